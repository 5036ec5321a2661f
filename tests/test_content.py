"""The content table and the digests of the manifest."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagexfer.svsm.content import REGION_PAGES, ContentTable, vcpu_digest
from pagexfer.wire.constants import MAX_BUNDLES_PER_KEY
from pagexfer.wire.page_state import PRIVATE

from .wire_vectors import Vector, load, name_of

PAGES = 2 * REGION_PAGES + 6
EDGE = REGION_PAGES

Record = tuple[list[int], int, int, int]


def table(*records: Record, pages: int = 6) -> ContentTable:
    content = ContentTable(np.full(pages, PRIVATE, dtype=np.uint32))
    for gfns, channel, incarnation, counter in records:
        content.record(np.array(gfns), channel, incarnation, counter)
    return content


@pytest.mark.parametrize("vector", load("tokens")["tables"], ids=name_of)
def test_digests_of_vector(vector: Vector) -> None:
    states = np.full(vector["pages"], PRIVATE, dtype=np.uint32)
    for gfn, state in vector["other_states"]:
        states[gfn] = state
    content = ContentTable(states)
    for first, pages, stride, channel, incarnation, counter in vector["bundles"]:
        content.record(np.arange(first, first + pages * stride, stride), channel, incarnation, counter)
        content.refresh()
    assert content.complete()
    assert content.content_digest().hex() == vector["content_digest"]
    assert content.state_digest().hex() == vector["state_digest"]


@pytest.mark.parametrize(
    "other",
    [([0, 1], 0, 0, 1), ([0, 1], 1, 0, 0), ([0, 1], 0, 1, 0), ([0, 2], 0, 0, 0), ([0], 0, 0, 0)],
)
def test_every_part_of_a_reference_counts(other: Record) -> None:
    assert table(([0, 1], 0, 0, 0)).content_digest() != table(other).content_digest()


def test_number_of_pages_counts() -> None:
    one, two = table(([0], 0, 0, 0), pages=1), table(([0, 1], 0, 0, 0), pages=2)
    assert one.content_digest() != two.content_digest()
    assert one.state_digest() != two.state_digest()


def test_largest_reference_differs_from_its_neighbours() -> None:
    most = MAX_BUNDLES_PER_KEY - 1
    records = [(1023, 0xFFFF, most), (1022, 0xFFFF, most), (1023, 0xFFFE, most), (1023, 0xFFFF, most - 1)]
    digests = {
        table(([0], channel, incarnation, counter), pages=1).content_digest()
        for channel, incarnation, counter in records
    }
    assert len(digests) == 4


@given(st.lists(st.sets(st.integers(0, 5), min_size=1).map(sorted), max_size=6))
def test_complete_when_every_page_was_carried(runs: list[list[int]]) -> None:
    content = table()
    carried = set[int]()
    for counter, gfns in enumerate(runs):
        content.record(np.array(gfns), 0, 0, counter)
        carried |= set(gfns)
        assert content.complete() is (carried == set(range(6)))


def test_page_that_is_missing_in_any_region_is_missed() -> None:
    for missing in (0, EDGE - 1, EDGE, 2 * EDGE, PAGES - 1):
        gfns = [gfn for gfn in range(PAGES) if gfn != missing]
        content = table((gfns, 0, 0, 0), pages=PAGES)
        assert not content.complete()
        content.record(np.array([missing]), 0, 0, 1)
        assert content.complete()


gfns_near_an_edge = st.integers(-3, 5).flatmap(lambda at: st.sampled_from([3 + at, EDGE + at, 2 * EDGE + at]))


@given(
    st.lists(
        st.tuples(st.sets(gfns_near_an_edge.filter(lambda gfn: 0 <= gfn < PAGES), min_size=1), st.booleans())
    )
)
def test_digests_do_not_depend_on_when_regions_were_hashed(steps: list[tuple[set[int], bool]]) -> None:
    content = table(pages=PAGES)
    again = table(pages=PAGES)
    for counter, (gfns, hash_now) in enumerate(steps):
        for side in (content, again):
            side.record(np.array(sorted(gfns)), 1, 0, counter)
        if hash_now:
            content.refresh()
    assert content.content_digest() == again.content_digest()
    assert content.state_digest() == again.state_digest()


@pytest.mark.parametrize("gfn", [0, EDGE - 1, EDGE, PAGES - 1])
def test_state_counts_as_it_was_when_its_page_came(gfn: int) -> None:
    states = np.full(PAGES, PRIVATE, dtype=np.uint32)
    content = ContentTable(states)
    before = content.state_digest()
    states[gfn] ^= 1
    content.record(np.array([gfn]), 0, 0, 0)
    assert content.state_digest() != before
    states[gfn] ^= 1
    content.record(np.array([gfn]), 0, 0, 0)
    assert content.state_digest() == before


def test_only_touched_regions_are_hashed_again() -> None:
    """What black-out pays for: a region that no bundle touched is not read again."""
    states = np.full(PAGES, PRIVATE, dtype=np.uint32)
    content = ContentTable(states)
    before = content.state_digest()
    states[[0, PAGES - 1]] ^= 1  # nobody brought these pages, so nobody looks
    content.record(np.array([EDGE]), 0, 0, 0)
    assert content.state_digest() == before


def test_vcpu_digest_separates_the_states() -> None:
    inner = [hashlib.sha384(state).digest() for state in (b"ab", b"c")]
    assert vcpu_digest({1: b"c", 0: b"ab"}) == hashlib.sha384(b"".join(inner)).digest()
    assert vcpu_digest({0: b"ab", 1: b"c"}) != vcpu_digest({0: b"a", 1: b"bc"})
    assert vcpu_digest({0: b"c", 1: b"ab"}) != vcpu_digest({0: b"ab", 1: b"c"})
