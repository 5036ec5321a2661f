"""The content table and the digests of the manifest."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagexfer.svsm.content import ContentTable, state_digest, vcpu_digest
from pagexfer.wire.constants import MAX_BUNDLES_PER_KEY


def table(*records: tuple[list[int], int, int, int], pages: int = 6) -> ContentTable:
    content = ContentTable(pages)
    for gfns, channel, incarnation, counter in records:
        content.record(np.array(gfns), channel, incarnation, counter)
    return content


def test_digest_is_over_the_last_carrier_of_each_page() -> None:
    content = table(([0, 1, 2], 0, 0, 0), ([1, 5], 3, 2, 7), ([2], 1, 0, 0))
    carriers = [1, 3 << 48 | 2 << 32 | 8, 1 << 48 | 1, 0, 0, 3 << 48 | 2 << 32 | 8]
    expected = hashlib.sha384(b"".join(carrier.to_bytes(8, "little") for carrier in carriers)).digest()
    assert content.digest() == expected


@pytest.mark.parametrize(
    "other",
    [([0, 1], 0, 0, 1), ([0, 1], 1, 0, 0), ([0, 1], 0, 1, 0), ([0, 2], 0, 0, 0), ([0], 0, 0, 0)],
)
def test_every_part_of_a_reference_counts(other: tuple[list[int], int, int, int]) -> None:
    assert table(([0, 1], 0, 0, 0)).digest() != table(other).digest()


def test_largest_reference_fits() -> None:
    content = table(([0], 1023, 0xFFFF, MAX_BUNDLES_PER_KEY - 1), ([1], 1023, 0xFFFF, 0), pages=2)
    assert content.complete()
    assert (
        content.digest()
        == hashlib.sha384(bytes.fromhex("ffffffffffffff03") + bytes.fromhex("01000000ffffff03")).digest()
    )


@given(st.lists(st.sets(st.integers(0, 5), min_size=1).map(sorted), max_size=6))
def test_complete_when_every_page_was_carried(runs: list[list[int]]) -> None:
    content = table(*[(gfns, 0, 0, counter) for counter, gfns in enumerate(runs)])
    assert content.complete() is (set().union(*runs) == set(range(6)))


def test_state_digest_is_over_little_endian_words() -> None:
    states = np.array([1, 0x7FFFF], dtype=np.uint32)
    assert state_digest(states) == hashlib.sha384(b"\1\0\0\0\xff\xff\7\0").digest()


def test_vcpu_digest_separates_the_states() -> None:
    inner = [hashlib.sha384(state).digest() for state in (b"ab", b"c")]
    assert vcpu_digest({1: b"c", 0: b"ab"}) == hashlib.sha384(b"".join(inner)).digest()
    assert vcpu_digest({0: b"ab", 1: b"c"}) != vcpu_digest({0: b"a", 1: b"bc"})
    assert vcpu_digest({0: b"c", 1: b"ab"}) != vcpu_digest({0: b"ab", 1: b"c"})
