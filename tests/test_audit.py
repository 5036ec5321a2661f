"""The digest audit: which changes it sees, what it leaves out, and that no manifest comes before it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagexfer.dirty import DirtyBitmap
from pagexfer.errors import LocalProtocolError, NotReady
from pagexfer.svsm.audit import RUN_PAGES, TASK_PAGES, PageDigests
from pagexfer.svsm.export import Packager
from pagexfer.svsm.ghash import multiply
from pagexfer.svsm.memory import GuestMemory
from pagexfer.wire.bundle import DATA, MAX_BUNDLE_BYTES, BundleKind
from pagexfer.wire.constants import PAGE_SIZE, WORDS_PER_PAGE
from pagexfer.wire.handshake import Freshness
from pagexfer.wire.page_state import PRIVATE

from .small_guests import PAGES, Move

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from pagexfer.svsm.export import Package

BUFFER = memoryview(bytearray(MAX_BUNDLE_BYTES))
RAM_PAGES = 3 * RUN_PAGES + 5


def a_memory(pages: int = RAM_PAGES) -> GuestMemory:
    memory = GuestMemory.allocate(pages * PAGE_SIZE)
    memory.launch()
    rng = np.random.default_rng(1)
    memory.words[: RAM_PAGES - 9] = rng.integers(1, 2**63, (RAM_PAGES - 9, WORDS_PER_PAGE), dtype=np.uint64)
    return memory


def send(memory: GuestMemory, digests: PageDigests, gfns: NDArray[np.int64]) -> None:
    """Record `gfns` as the source does when it exports them."""
    package = Packager(memory, stage=True).package(gfns, 512)
    digests.record(package.gfns, package.operations, package.payload)


def all_sent(memory: GuestMemory, workers: int = 1) -> PageDigests:
    digests = PageDigests(memory, workers)
    send(memory, digests, np.arange(memory.pages))
    return digests


def changed(memory: GuestMemory, digests: PageDigests, *excused: int) -> list[int]:
    bitmap = DirtyBitmap(memory.pages)
    bitmap.set_gfns(np.array(excused, dtype=np.int64))
    found: list[int] = digests.changed(0, memory.pages, bitmap).tolist()
    return found


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = a_memory()
    yield memory
    memory.close()


def test_product_of_the_specification() -> None:
    """The first step of test case 2 of McGrew and Viega, The Galois/Counter Mode of Operation."""
    subkey, block = 0x66E94BD4EF8A2C3B884CFA59CA342B2E, 0x0388DACE60B6A392F328C2B971B2FE78
    assert multiply(block, subkey) == multiply(subkey, block) == 0x5E2EC746917062882C85B0685353DEB7


# What the digests see


def test_nothing_changed(memory: GuestMemory) -> None:
    assert changed(memory, all_sent(memory)) == []


@settings(max_examples=200)
@given(gfn=st.integers(0, RAM_PAGES - 1), bit=st.integers(0, PAGE_SIZE * 8 - 1))
def test_any_flipped_bit_of_any_page(gfn: int, bit: int) -> None:
    memory = a_memory()
    digests = all_sent(memory)
    memory.words[gfn, bit // 64] ^= np.uint64(1 << bit % 64)
    assert changed(memory, digests) == [gfn]
    memory.close()


@given(st.sets(st.integers(0, RAM_PAGES - 1)), st.integers(0, 2**64 - 1))
def test_any_set_of_pages(gfns: set[int], word: int) -> None:
    memory = a_memory()
    digests = all_sent(memory)
    differ = {gfn for gfn in gfns if memory.words[gfn, 7] != word}
    memory.words[sorted(gfns), 7] = word
    assert changed(memory, digests) == sorted(differ)
    memory.close()


@given(st.integers(0, 255), st.integers(0, 255))
def test_swapped_blocks_of_a_page(first: int, second: int) -> None:
    memory = a_memory()
    digests = all_sent(memory)
    blocks = memory.words[70].reshape(256, 2)
    blocks[[first, second]] = blocks[[second, first]]
    assert changed(memory, digests) == ([70] if first != second else [])
    memory.close()


def test_swapped_pages_and_words_that_change_places(memory: GuestMemory) -> None:
    digests = all_sent(memory)
    memory.words[[3, 4]] = memory.words[[4, 3]]
    memory.words[100, :2] = memory.words[100, 1::-1]
    assert changed(memory, digests) == [3, 4, 100]


def test_page_that_became_zero_and_zero_page_that_is_none_any_more(memory: GuestMemory) -> None:
    digests = all_sent(memory)
    memory.words[10] = 0
    memory.words[RAM_PAGES - 1, 511] = 1
    assert changed(memory, digests) == [10, RAM_PAGES - 1]


@given(st.lists(st.integers(0, RAM_PAGES), max_size=4), st.sets(st.integers(0, RAM_PAGES - 1), max_size=20))
def test_digest_of_a_page_does_not_depend_on_its_bundle(cuts: list[int], again: set[int]) -> None:
    memory = a_memory()
    digests = PageDigests(memory, 1)
    edges = sorted({0, *cuts, RAM_PAGES})
    for first, end in pairwise(edges):
        send(memory, digests, np.arange(first, end))
    whole = digests._table.copy()
    if again:
        send(memory, digests, np.array(sorted(again)))
    assert np.array_equal(digests._table, whole)
    assert changed(memory, digests) == []
    memory.words[1] = memory.words[66] = memory.words[0]
    send(memory, digests, np.array([1, 66]))
    assert np.array_equal(digests._table[[1, 66]], digests._table[[0, 0]])
    memory.close()


@given(st.lists(st.tuples(st.sets(st.integers(0, RAM_PAGES - 1), min_size=1), st.booleans()), max_size=5))
def test_digests_of_runs_are_those_of_their_pages(sent: list[tuple[set[int], bool]]) -> None:
    """Composed as they are recorded, composed at an epoch's end, or left for the audit."""
    memory = a_memory()
    digests = all_sent(memory)
    for number, (gfns, settled) in enumerate(sent):
        memory.words[sorted(gfns), 3] = number
        send(memory, digests, np.array(sorted(gfns)))
        if settled:
            digests.settle()
        fresh = ~digests._stale
        runs = digests._table.reshape(-1, RUN_PAGES, 2)[fresh].reshape(-1, 2)
        assert np.array_equal(digests._composed[fresh], digests._composer.compose(runs))
        assert changed(memory, digests) == []
        assert fresh.all() or not settled
        memory.words[17, 3] ^= np.uint64(1)
        assert changed(memory, digests) == [17]
        memory.words[17, 3] ^= np.uint64(1)
    memory.close()


def test_digests_under_another_key_are_others(memory: GuestMemory) -> None:
    first, second = all_sent(memory), all_sent(memory)
    data = slice(0, RAM_PAGES - 9)
    assert not (first._table[data] == second._table[data]).any()
    assert len(np.unique(first._table[data], axis=0)) == RAM_PAGES - 9


def test_a_page_counts_as_it_was_sent_last(memory: GuestMemory) -> None:
    digests = all_sent(memory)
    before = memory.words[20].copy()
    memory.words[20] = 5
    send(memory, digests, np.array([20]))
    assert changed(memory, digests) == []
    memory.words[20] = before
    assert changed(memory, digests) == [20]


# What is left out


def test_excused_pages_are_left_out_and_hide_no_other(memory: GuestMemory) -> None:
    digests = all_sent(memory)
    memory.words[[5, 6, 64, 190, RAM_PAGES - 1]] = 77
    assert changed(memory, digests, 5, 190) == [6, 64, RAM_PAGES - 1]
    assert changed(memory, digests, 5, 6, 64, 190, RAM_PAGES - 1) == []
    assert changed(memory, digests, *range(RAM_PAGES)) == []


def test_pages_that_the_guest_gave_up_have_no_content(memory: GuestMemory) -> None:
    memory.pvalidate(np.array([9, 10]), validated=False)
    digests = all_sent(memory)
    memory.words[9] = 1
    assert changed(memory, digests) == []
    memory.pvalidate(np.array([9, 10]))
    assert changed(memory, digests) == [9, 10]


def test_only_runs_that_differ_are_looked_at_page_by_page(memory: GuestMemory) -> None:
    """What makes the audit fast: composed digests equal those of whole runs, with pages left out, and of the last one."""
    digests = all_sent(memory)
    excused = DirtyBitmap(memory.pages)
    assert digests._changed_runs(0, memory.pages, excused).size == 0
    excused.set_gfns(np.array([5, 6, RUN_PAGES, RAM_PAGES - 2]))
    memory.words[[5, 6, RAM_PAGES - 2]] = 77
    assert digests._changed_runs(0, memory.pages, excused).size == 0
    memory.words[RAM_PAGES - 1] = 77
    assert digests._changed_runs(0, memory.pages, excused).tolist() == [3 * RUN_PAGES]


@pytest.mark.parametrize("workers", [1, 3])
def test_steps_and_threads_find_the_same(workers: int) -> None:
    memory = a_memory(2 * TASK_PAGES + 70)
    digests = PageDigests(memory, workers)
    assert digests.step_pages % (workers * TASK_PAGES) == 0
    for first in range(0, RAM_PAGES, 256):
        send(memory, digests, np.arange(first, first + 256))
    written = [0, 63, TASK_PAGES - 1, TASK_PAGES, 2 * TASK_PAGES + 69]
    memory.words[written, 1] = 3
    nothing = DirtyBitmap(memory.pages)
    assert digests.changed(0, memory.pages, nothing).tolist() == written
    assert digests.changed(TASK_PAGES, memory.pages, nothing).tolist() == written[3:]
    assert digests.changed(0, TASK_PAGES, nothing).tolist() == written[:3]
    memory.close()


# The source


def in_precopy(*, tracked: bool = False) -> Move:
    move = Move(tracked=tracked, audit=True)
    move.pair.until_precopy()
    return move


def write_hidden(move: Move, gfn: int, word: int) -> None:
    """A write that neither tracker nor dirty log tells of."""
    move.guest.memory.words[gfn] = word


def finish(move: Move) -> None:
    move.pair.vcpus()
    move.pair.manifest()
    move.pair.ready()
    move.pair.start()
    move.pair.running()
    move.pair.finish()


def test_hidden_write_goes_stale_without_the_audit_and_not_with_it() -> None:
    stale = Move(tracked=False)
    fresh = in_precopy()
    stale.pair.until_precopy()
    for move in (stale, fresh):
        write_hidden(move, 17, 4711)
        move.pair.park()
    stale.pair.epoch()
    finish(stale)
    assert np.flatnonzero((stale.memory.words != stale.guest.memory.words).any(axis=1)).tolist() == [17]
    assert fresh.pair.audit() == 1
    fresh.pair.epoch()
    finish(fresh)
    assert fresh.arrived()


def test_hidden_write_is_seen_whoever_else_tracks() -> None:
    move = in_precopy(tracked=True)
    write_hidden(move, 17, 4711)
    move.guest.write(18, 4712)
    move.pair.park()
    assert move.pair.audit() == 1  # the tracker told of the other
    move.pair.epoch()
    finish(move)
    assert move.arrived()


def test_content_that_came_back_after_it_was_sent_is_seen() -> None:
    move = in_precopy()
    before = move.guest.memory.words[30].copy()
    write_hidden(move, 30, 1)
    move.pair.source.hint(0, (1 << 30).to_bytes(8, "little"))
    move.pair.epoch()
    move.guest.memory.words[30] = before
    move.pair.park()
    assert move.pair.audit() == 1
    move.pair.epoch()
    finish(move)
    assert move.arrived()


def test_no_manifest_before_the_audit() -> None:
    move = in_precopy()
    move.pair.park()
    move.pair.epoch()
    move.pair.vcpus()
    with pytest.raises(NotReady):
        move.pair.manifest()
    assert move.pair.audit() == 0
    move.pair.manifest()


def test_no_manifest_before_what_the_audit_found_was_sent() -> None:
    move = in_precopy()
    write_hidden(move, 0, 1)
    move.pair.park()
    move.pair.epoch()
    assert move.pair.audit() == 1
    move.pair.vcpus()
    with pytest.raises(NotReady):
        move.pair.manifest()
    move.pair.epoch()
    move.pair.manifest()
    assert move.arrived()


def test_before_the_park_it_is_a_trial() -> None:
    move = in_precopy()
    write_hidden(move, 17, 4711)
    for _ in range(2):
        assert move.pair.source.audit() == (PAGES, 0, False)
        assert not move.pair.source.begin_epoch().any()
    move.pair.park()
    move.pair.vcpus()
    with pytest.raises(NotReady):
        move.pair.manifest()


def test_page_found_in_the_epoch_that_carried_it_goes_with_the_next() -> None:
    move = Move(tracked=False, audit=True)
    move.pair.handshake()
    move.pair.open_channels()
    move.pair.ledger()
    move.pair.source.begin_epoch()
    message = move.pair.seal_pages(0, 0, 100)
    assert message is not None
    move.pair.send(message)
    write_hidden(move, 0, 7)
    write_hidden(move, 150, 7)  # not sent yet
    move.pair.park()
    assert move.pair.source.audit() == (PAGES, 1, False)
    while message := move.pair.seal_pages(1, 0, PAGES):
        move.pair.send(message)
    move.pair.send(move.pair.seal_token(BundleKind.EPOCH_TOKEN))
    move.pair.epoch()
    finish(move)
    assert move.arrived()


def test_no_audit_while_a_page_is_being_sealed_that_was_read_before_the_park(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The host holds an EXPORT across the park, and hides that the page it has read is written back meanwhile."""
    move = in_precopy()
    source, words = move.pair.source, move.guest.memory.words
    before = words[7].copy()
    write_hidden(move, 7, 4711)
    source.hint(0, (1 << 7).to_bytes(8, "little"))
    source.begin_epoch()
    read, go_on, package = threading.Event(), threading.Event(), Packager.package

    def held(self: Packager, gfns: NDArray[np.int64], most: int) -> Package:
        done = package(self, gfns, most)
        read.set()
        assert go_on.wait(30)
        return done

    monkeypatch.setattr(Packager, "package", held)
    with ThreadPoolExecutor(1) as threads:
        export = threads.submit(move.pair.seal_pages, 1, 0, PAGES)
        try:
            assert read.wait(30)
            with source.lock:
                words[7] = before
                move.pair.park()
                with pytest.raises(LocalProtocolError, match="being sealed"):
                    source.audit()
        finally:
            go_on.set()
        message = export.result()
    assert message is not None
    move.pair.send(message)
    assert source.audit() == (PAGES, 1, False)
    move.pair.send(move.pair.seal_token(BundleKind.EPOCH_TOKEN))
    move.pair.epoch()
    finish(move)
    assert move.arrived()


def test_audit_again_finds_nothing() -> None:
    move = in_precopy()
    move.pair.park()
    assert move.pair.source.audit() == (PAGES, 0, False)
    assert move.pair.source.audit() == (0, 0, False)


@pytest.mark.parametrize("audit", [True, False])
def test_audit_needs_an_epoch_and_a_session_made_for_it(audit: bool) -> None:
    move = Move(audit=audit)
    with pytest.raises(LocalProtocolError):
        move.pair.source.audit()
    move.pair.until_manifest()
    if not audit:
        with pytest.raises(LocalProtocolError):
            move.pair.source.audit()
    move.pair.manifest()
    with pytest.raises(LocalProtocolError):
        move.pair.source.audit()


def test_mode_is_in_both_hellos() -> None:
    for tracked in (True, False):
        pair = in_precopy(tracked=tracked).pair
        assert pair.source.freshness is pair.destination.freshness is Freshness.DIGEST_AUDIT


def test_what_is_digested_is_what_is_sealed() -> None:
    """A guest that writes on while its page is packaged: the payload is a copy, whatever the run."""
    move = in_precopy()
    memory = move.guest.memory
    for gfns in (np.arange(3), np.array([0, 2]), np.array([1])):
        package = Packager(memory, stage=True).package(gfns, 512)
        sealed = bytes(package.payload)
        memory.words[gfns] += np.uint64(1)
        assert bytes(package.payload) == sealed
        assert package.operations.tolist() == [DATA] * len(gfns)
    assert (memory.states == PRIVATE).all()
