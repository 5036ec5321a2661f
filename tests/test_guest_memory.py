"""Guest memory and the emulated RMP, against its refusals and against a naive model."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagexfer.dirty import DirtyBitmap, as_run
from pagexfer.errors import GuestError, LocalProtocolError, PageStateError
from pagexfer.svsm.memory import GuestMemory
from pagexfer.wire.constants import PAGE_SIZE, WORDS_PER_PAGE
from pagexfer.wire.page_state import PRIVATE, SHARED, SIZE_2M, STATE_MASK, VALIDATED, VMSA, permissions

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

PAGES = 70


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory.allocate(PAGES * PAGE_SIZE)
    yield memory
    memory.close()


def gfns(*numbers: int) -> NDArray[np.int64]:
    return np.array(numbers, dtype=np.int64)


def content(*words: int) -> NDArray[np.uint64]:
    return np.repeat(np.array(words, dtype=np.uint64)[:, None], WORDS_PER_PAGE, axis=1)


@pytest.mark.parametrize("ram_bytes", [0, -PAGE_SIZE, PAGE_SIZE - 1, PAGE_SIZE + 1, 1 << 50])
def test_ram_is_whole_pages_and_fits_the_machine(ram_bytes: int) -> None:
    with pytest.raises((PageStateError, GuestError)):
        GuestMemory.allocate(ram_bytes)


def test_fresh_ram_is_zero_and_not_validated(memory: GuestMemory) -> None:
    assert memory.ram_bytes == PAGES * PAGE_SIZE
    assert not memory.words.any()
    assert not memory.states.any()
    assert not memory.take_state_changes().any()
    memory.launch()
    assert (memory.states == PRIVATE).all()


def test_ram_is_the_memfd(memory: GuestMemory) -> None:
    memory.words[3] = 0x0102030405060708
    assert os.pread(memory.ram_fd, 8, 3 * PAGE_SIZE) == bytes(range(8, 0, -1))


def test_write_to_a_page_that_is_not_validated_is_refused(memory: GuestMemory) -> None:
    memory.pvalidate(gfns(1))
    with pytest.raises(PageStateError):
        memory.write(gfns(1, 2), content(5, 6))
    assert not memory.words.any()
    memory.write(gfns(1), content(5))
    assert (memory.words[1] == 5).all()


def test_write_to_a_shared_page_is_fine(memory: GuestMemory) -> None:
    memory.adopt_states(gfns(4), np.array([SHARED], dtype=np.uint32))
    memory.write(gfns(4), content(9))
    assert (memory.words[4] == 9).all()


def test_second_pvalidate_is_refused_and_changes_nothing(memory: GuestMemory) -> None:
    memory.pvalidate(gfns(1))
    memory.take_state_changes()
    with pytest.raises(PageStateError):
        memory.pvalidate(gfns(0, 1))
    with pytest.raises(PageStateError):
        memory.pvalidate(gfns(1, 2), validated=False)
    assert memory.states.tolist()[:3] == [0, VALIDATED, 0]
    assert not memory.take_state_changes().any()
    memory.pvalidate(gfns(1), validated=False)
    assert not memory.states.any()


def test_rmpadjust_sets_one_vmpls_permissions_and_nothing_else(memory: GuestMemory) -> None:
    memory.launch()
    memory.rmpadjust(gfns(2, 9), 2, 0b10101)
    assert permissions(int(memory.states[2]), 2) == 0b10101
    assert permissions(int(memory.states[2]), 1) == permissions(PRIVATE, 1)
    assert int(memory.states[9]) == PRIVATE | 0b10101 << 9
    memory.rmpadjust(gfns(2), 2, 0)
    assert int(memory.states[2]) == PRIVATE
    assert memory.take_state_changes().gfns().tolist() == [2, 9]


def test_no_state_change_is_lost_while_others_are_taken() -> None:
    """Or the destination would have an old page state, and neither side would know."""
    pages = 8000
    memory = GuestMemory.allocate(pages * PAGE_SIZE)
    memory.launch()

    def change() -> None:
        for gfn in range(pages // 2):
            memory.rmpadjust(gfns(gfn, gfn + pages // 2), 1, 0)

    taken = DirtyBitmap(pages)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    vcpu = threading.Thread(target=change)
    try:
        vcpu.start()
        while vcpu.is_alive():
            taken.union(memory.take_state_changes())
    finally:
        vcpu.join()
        sys.setswitchinterval(interval)
        memory.close()
    taken.union(memory.take_state_changes())
    assert taken.count() == pages


def test_rmpadjust_needs_validated_pages(memory: GuestMemory) -> None:
    memory.pvalidate(gfns(1))
    with pytest.raises(PageStateError):
        memory.rmpadjust(gfns(1, 2), 1, 15)
    assert memory.states.tolist()[:3] == [0, VALIDATED, 0]


@pytest.mark.parametrize("gfn", [-1, PAGES, 1 << 39])
def test_gfn_out_of_ram_is_refused(memory: GuestMemory, gfn: int) -> None:
    memory.launch()
    for step in (memory.pvalidate, memory.zero):
        with pytest.raises(PageStateError):
            step(gfns(gfn))
    with pytest.raises(PageStateError):
        memory.rmpadjust(gfns(gfn), 1, 0)
    for pages in (gfns(gfn), range(gfn, gfn + 1)):
        with pytest.raises(PageStateError):
            memory.write(pages, content(1))


def test_zero_clears_what_was_written(memory: GuestMemory) -> None:
    memory.launch()
    memory.write(gfns(1, 2, 5), content(7, 8, 9))
    memory.zero(gfns(0, 2, 5))
    assert np.flatnonzero(memory.words.any(axis=1)).tolist() == [1]


def test_zero_does_not_touch_fresh_pages(memory: GuestMemory) -> None:
    """What the destination never wrote costs no memory: its pages stay holes of the memfd."""
    memory.launch()
    memory.zero(np.arange(PAGES))
    assert os.fstat(memory.ram_fd).st_blocks == 0


def test_zero_clears_ram_that_was_not_fresh() -> None:
    """RAM that somebody else provides may hold anything: a zero page of the source has to become zero."""
    ram_fd = os.memfd_create("provided", os.MFD_CLOEXEC)
    os.write(ram_fd, b"\xff" * 4 * PAGE_SIZE)
    memory = GuestMemory(ram_fd, 4 * PAGE_SIZE)
    memory.launch()
    memory.zero(gfns(0, 1, 3))
    assert np.flatnonzero(memory.words.any(axis=1)).tolist() == [2]
    memory.close()


def test_adopt_states_takes_every_bit(memory: GuestMemory) -> None:
    states = np.array([PRIVATE | SIZE_2M, SHARED, VALIDATED | VMSA, 0], dtype=np.uint32)
    memory.adopt_states(gfns(0, 1, 2, 3), states)
    assert np.array_equal(memory.states[:4], states)
    memory.adopt_states(gfns(0, 1, 2, 3), states[::-1].copy())
    assert np.array_equal(memory.states[:4], states[::-1])


def test_one_session_claims_a_guest(memory: GuestMemory) -> None:
    memory.claim()
    with pytest.raises(LocalProtocolError):
        memory.claim()
    memory.disclaim()
    memory.claim()


def test_close_twice(memory: GuestMemory) -> None:
    memory.close()
    memory.close()
    assert memory.ram_fd == -1


def test_ram_that_nobody_has_any_more_is_given_back() -> None:
    memory = GuestMemory.allocate(PAGES * PAGE_SIZE)
    ram_fd, status = memory.ram_fd, os.fstat(memory.ram_fd)
    del memory
    gc.collect()
    with tempfile.TemporaryFile() as other:  # which may have the number by now
        assert other.fileno() >= 0
        with suppress(OSError):
            assert not os.path.samestat(os.fstat(ram_fd), status)


def test_what_was_closed_is_not_closed_again() -> None:
    memory = GuestMemory.allocate(PAGES * PAGE_SIZE)
    ram_fd = memory.ram_fd
    memory.close()
    with tempfile.TemporaryFile() as other:
        assert other.fileno() == ram_fd
        del memory
        gc.collect()
        assert os.fstat(ram_fd).st_size == 0


_SOME_GFNS = st.lists(st.integers(0, 9), min_size=1, unique=True).map(sorted)
_STEP = st.one_of(
    st.tuples(st.just("pvalidate"), _SOME_GFNS, st.booleans()),
    st.tuples(st.just("rmpadjust"), _SOME_GFNS, st.integers(0, 3 * 32 - 1)),
    st.tuples(st.just("adopt"), _SOME_GFNS, st.integers(0, STATE_MASK)),
    st.tuples(st.just("write"), _SOME_GFNS, st.integers(1, 99)),
    st.tuples(st.just("zero"), _SOME_GFNS, st.none()),
)


@settings(deadline=None)
@given(st.lists(_STEP, max_size=25))
def test_against_a_naive_model(steps: list[tuple[str, list[int], int]]) -> None:
    memory = GuestMemory.allocate(10 * PAGE_SIZE)
    states, words = [0] * 10, [0] * 10
    for step, numbers, value in steps:
        pages = gfns(*numbers)
        run_or_pages = as_run(pages)
        expected_states, expected_words = list(states), list(words)
        legal = True
        for gfn in numbers:
            match step:
                case "pvalidate":
                    legal &= bool(states[gfn] & VALIDATED) != value
                    expected_states[gfn] ^= VALIDATED
                case "rmpadjust":
                    legal &= bool(states[gfn] & VALIDATED)
                    shift = 4 + 5 * (value // 32)
                    expected_states[gfn] = states[gfn] & ~(31 << shift) | value % 32 << shift
                case "adopt":
                    expected_states[gfn] = value
                case "write":
                    legal &= bool(states[gfn] & (VALIDATED | SHARED))
                    expected_words[gfn] = value
                case _:
                    expected_words[gfn] = 0
        try:
            match step:
                case "pvalidate":
                    memory.pvalidate(pages, validated=bool(value))
                case "rmpadjust":
                    memory.rmpadjust(pages, value // 32 + 1, value % 32)
                case "adopt":
                    memory.adopt_states(run_or_pages, np.full(len(numbers), value, dtype=np.uint32))
                case "write":
                    memory.write(run_or_pages, content(*[value] * len(numbers)))
                case _:
                    memory.zero(pages)
        except PageStateError:
            assert not legal
        else:
            assert legal
            states, words = expected_states, expected_words
        assert memory.states.tolist() == states
        assert np.array_equal(memory.words, content(*words))
    memory.close()


class _SlowStates(np.ndarray[tuple[int], np.dtype[np.uint32]]):
    """States of much RAM, of which nobody has read all before another thread came."""

    both: threading.Barrier

    def any(self, *_arguments: object, **_named: object) -> np.bool_:  # type: ignore[override]
        with suppress(threading.BrokenBarrierError):
            self.both.wait(0.2)
        return np.bool_(False)


def test_two_sessions_at_once_are_not_both_the_guests(memory: GuestMemory) -> None:
    """Each has a lock of its own, and numpy lets other threads run while it looks at the states of much RAM."""
    slow = memory.states.view(_SlowStates)
    slow.both = threading.Barrier(2)
    memory.states = slow
    ends: list[object] = []

    def claim() -> None:
        try:
            ends.append(memory.claim(vacant=True))
        except LocalProtocolError as error:
            ends.append(str(error))

    threads = [threading.Thread(target=claim) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(str, ends)) == ["1", "another session moves this guest, or has moved it"]
