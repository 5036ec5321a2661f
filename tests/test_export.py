"""The packager: which page becomes DATA, ZERO or DROP, where a bundle is cut, and what its payload is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagexfer.dirty.content import BLOCK_PAGES
from pagexfer.isolation.sides import BUFFER_BYTES, BUFFERS
from pagexfer.svsm.export import BUNDLE_PAGES, Package, Packager, most_data_pages
from pagexfer.svsm.memory import GuestMemory
from pagexfer.wire.bundle import (
    ENTRY_BYTES,
    HEADER_BYTES,
    BundleHeader,
    BundleKind,
    Direction,
    Operation,
    parse_entries_untrusted,
)
from pagexfer.wire.constants import MAX_BUNDLE_DATA_PAGES, MAX_BUNDLE_ENTRIES, PAGE_SIZE, TAG_BYTES
from pagexfer.wire.page_state import PRIVATE, SHARED
from pagexfer.wire.slot import SlotGeometry

PAGES = 600


def memory_of(kinds: str) -> GuestMemory:
    """One page a letter: d data, l in its last word only, m in a middle one, z zero, s shared, x given up with old data."""
    memory = GuestMemory.allocate(len(kinds) * PAGE_SIZE)
    for gfn, kind in enumerate(kinds):
        memory.states[gfn] = {"s": SHARED, "x": 0}.get(kind, PRIVATE)
        if kind in "dsx":
            memory.words[gfn] = 1000 + gfn
        elif kind == "l":
            memory.words[gfn, -1] = 1000 + gfn
        elif kind == "m":
            memory.words[gfn, 200] = 1000 + gfn
    return memory


_OPERATION = {
    "d": Operation.DATA,
    "l": Operation.DATA,
    "m": Operation.DATA,
    "s": Operation.DATA,
    "z": Operation.ZERO,
    "x": Operation.DROP,
}


def check(memory: GuestMemory, kinds: str, asked: list[int], package: Package, max_data_pages: int) -> None:
    """Everything that a package has to be, computed page by page."""
    taken: list[int] = []
    data = 0
    for gfn in asked:
        if _OPERATION[kinds[gfn]] is Operation.DATA:
            if data == max_data_pages:
                break
            data += 1
        taken.append(gfn)
    payload = b"".join(
        memory.words[gfn].tobytes() for gfn in taken if _OPERATION[kinds[gfn]] is Operation.DATA
    )
    header = BundleHeader(
        BundleKind.PAGES, Direction.FORWARD, bytes(16), 0, 0, 1, 0, len(taken), len(payload)
    )
    entries = parse_entries_untrusted(package.entries, header, memory.pages)
    assert package.gfns.tolist() == entries.gfns.tolist() == taken
    assert entries.operations.tolist() == [_OPERATION[kinds[gfn]] for gfn in taken]
    assert entries.states.tolist() == memory.states[taken].tolist()
    assert bytes(package.payload) == payload
    assert package.zero_pages == sum(kinds[gfn] == "z" for gfn in taken)


@pytest.mark.parametrize(
    ("kinds", "asked"),
    [
        ("dddd", [0, 1, 2, 3]),
        ("dddd", [1, 2]),
        ("dddd", [0, 3]),
        ("llll", [0, 1, 2, 3]),
        ("mmmm", [0, 1, 2, 3]),
        ("dlmz", [0, 1, 2, 3]),
        ("dzdz", [0, 1, 2, 3]),
        ("zzzz", [0, 1, 2, 3]),
        ("zzzz", [0, 2]),
        ("xxxx", [0, 1, 2, 3]),
        ("dxzs", [0, 1, 2, 3]),
        ("dxzs", [1, 3]),
        ("z", [0]),
    ],
)
def test_kinds_of_pages(kinds: str, asked: list[int]) -> None:
    memory = memory_of(kinds)
    package = Packager(memory).package(np.array(asked), 128)
    check(memory, kinds, asked, package, 128)
    memory.close()


def test_run_of_data_pages_is_not_copied() -> None:
    memory = memory_of("dddd")
    package = Packager(memory).package(np.arange(1, 3), 128)
    assert np.shares_memory(np.frombuffer(package.payload, dtype=np.uint64), memory.words)
    memory.close()


def test_given_up_page_does_not_leak_its_old_content() -> None:
    memory = memory_of("xdx")
    assert (1000).to_bytes(8, "little") not in bytes(Packager(memory).package(np.arange(3), 128).payload)
    memory.close()


def test_cut_takes_the_zero_pages_before_the_page_that_is_too_much() -> None:
    kinds = "ddzzdz"
    memory = memory_of(kinds)
    package = Packager(memory).package(np.arange(6), 2)
    assert package.gfns.tolist() == [0, 1, 2, 3]
    check(memory, kinds, list(range(6)), package, 2)
    memory.close()


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_against_a_naive_packager(data: st.DataObject) -> None:
    kinds = data.draw(st.text("dlmzsx", min_size=1, max_size=40))
    memory = memory_of(kinds)
    packager = Packager(memory)
    for _ in range(2):  # the staging areas are used again
        asked = sorted(data.draw(st.sets(st.integers(0, len(kinds) - 1), min_size=1)))
        max_data_pages = data.draw(st.integers(1, 12))
        package = packager.package(np.array(asked), max_data_pages)
        check(memory, kinds, asked, package, max_data_pages)
    memory.close()


@pytest.mark.parametrize("buffer_bytes", [1 << 16, 1 << 17, 1 << 18, 1 << 21, 1 << 22])
def test_a_bundle_that_fits_has_whole_blocks_as_soon_as_one_fits(buffer_bytes: int) -> None:
    room = SlotGeometry(0, 2, buffer_bytes).package_bytes
    pages = most_data_pages(room)
    assert HEADER_BYTES + ENTRY_BYTES * MAX_BUNDLE_DATA_PAGES + PAGE_SIZE * pages + TAG_BYTES <= room
    assert 0 < pages <= BLOCK_PAGES or pages % BLOCK_PAGES == 0


def test_a_usual_bundle_is_all_that_a_usual_buffer_holds() -> None:
    assert most_data_pages(SlotGeometry(0, BUFFERS, BUFFER_BYTES).package_bytes) == BUNDLE_PAGES


def test_full_bundle_of_zero_pages_in_one() -> None:
    kinds = "z" * MAX_BUNDLE_ENTRIES
    memory = memory_of(kinds)
    package = Packager(memory).package(np.arange(MAX_BUNDLE_ENTRIES), 128)
    assert (len(package.gfns), len(package.payload)) == (MAX_BUNDLE_ENTRIES, 0)
    memory.close()


@pytest.mark.parametrize("stage", [False, True])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize(
    ("first", "pages", "data_pages"),
    [
        (0, 512, 16),
        (511, 512, 1),
        (512, 512, 16),
        (600, 512, 16),
        (1023, 512, 1),
        (1024, 1024, 0),
        (2500, 2048, 0),
    ],
)
def test_zero_pages_go_together_up_to_the_first_that_is_none(
    stage: bool, every: int, first: int, pages: int, data_pages: int
) -> None:
    """A bundle is all zero, in steps of 512, or has at most 512 pages."""
    memory = memory_of("z" * (MAX_BUNDLE_ENTRIES * every))
    memory.words[first * every : (first + 16) * every, 7] = 1
    package = Packager(memory, stage=stage).package(np.arange(MAX_BUNDLE_ENTRIES) * every, 128)
    assert len(package.gfns) == pages
    assert np.count_nonzero(package.operations == Operation.DATA) == (data_pages if first < 512 else 0)
    memory.close()
