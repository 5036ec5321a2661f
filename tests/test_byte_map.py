"""The byte map, alone and under writer processes that do not wait for the collector."""

from __future__ import annotations

import multiprocessing
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagexfer.dirty.byte_map import ByteMapTracker
from pagexfer.errors import LocalProtocolError

if TYPE_CHECKING:
    from multiprocessing.synchronize import Barrier
    from pathlib import Path

    from numpy.typing import NDArray

    from pagexfer.dirty import DirtyTracker

PAGES = 512
WORDS = 64  # of a page: small, so that marks and not copies are most of the work
WRITERS = 2
ROUNDS = 40
WRITES_PER_ROUND = 5000


def started(marks: NDArray[np.uint8]) -> DirtyTracker:
    tracker = ByteMapTracker(marks)
    tracker.start()
    return tracker


@given(
    st.sampled_from([1, 7, 8, 9, 63, 64, 65, 1000, (1 << 17) - 1, 1 << 17, (1 << 17) + 9]),
    st.lists(st.integers(0, 1 << 20), max_size=50),
    st.sampled_from([1, 2, 255]),
)
def test_marked_pages_are_collected_once(pages: int, numbers: list[int], mark: int) -> None:
    marks = np.zeros(pages, dtype=np.uint8)
    tracker = started(marks)
    gfns = sorted({number % pages for number in [*numbers, pages - 1]})
    marks[gfns] = mark
    collected = tracker.collect()
    assert (collected.pages, collected.gfns().tolist()) == (pages, gfns)
    assert not marks.any()
    assert not tracker.collect().any()


def test_start_forgets_old_marks_and_a_second_start_keeps_new_ones() -> None:
    marks = np.ones(100, dtype=np.uint8)
    tracker = started(marks)
    assert not tracker.collect().any()
    marks[7] = 1
    tracker.start()
    assert tracker.collect().gfns().tolist() == [7]


def test_collect_needs_start() -> None:
    tracker = ByteMapTracker(np.zeros(100, dtype=np.uint8))
    with pytest.raises(LocalProtocolError, match="not started"):
        tracker.collect()
    tracker.start()
    tracker.stop()
    tracker.stop()
    with pytest.raises(LocalProtocolError, match="not started"):
        tracker.collect()


@pytest.mark.parametrize(
    "marks", [np.zeros(0, np.uint8), np.zeros((2, 2), np.uint8), np.zeros(8, np.bool_), np.zeros(8, np.int8)]
)
def test_a_map_of_another_form_is_refused(marks: NDArray[np.uint8]) -> None:
    with pytest.raises(LocalProtocolError, match="one uint8 per page"):
        ByteMapTracker(marks)


class SharedRam:
    """RAM, marks and each writer's finished round, in one file that several processes map."""

    def __init__(self, path: Path) -> None:
        self.ram = np.memmap(path, np.uint64, "r+", 0, (PAGES, WORDS))
        self.marks = np.memmap(path, np.uint8, "r+", PAGES * WORDS * 8, (PAGES,))
        self.finished = np.memmap(path, np.int64, "r+", PAGES * WORDS * 8 + PAGES, (WRITERS,))


def hammer(path: Path, writer: int, barrier: Barrier) -> None:
    """Write pages, all writers the same ones but each its own words, and mark each AFTER it was written."""
    shared = SharedRam(path)
    rng = np.random.default_rng(writer)
    width = WORDS // WRITERS
    value = writer
    for round_ in range(1, ROUNDS + 1):
        barrier.wait(30)
        for gfn in rng.integers(0, PAGES, WRITES_PER_ROUND).tolist():
            value += WRITERS
            shared.ram[gfn, writer * width : (writer + 1) * width] = value
            shared.marks[gfn] = 1
        shared.finished[writer] = round_


def test_no_write_of_other_processes_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    path.write_bytes(bytes(PAGES * WORDS * 8 + PAGES + WRITERS * 8))
    shared = SharedRam(path)
    tracker = started(shared.marks)
    copy = np.zeros_like(shared.ram)
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(WRITERS + 1)
    collects_with_marks = 0
    with ExitStack() as stack:
        for writer in range(WRITERS):
            process = context.Process(target=hammer, args=(path, writer, barrier))
            process.start()
            stack.callback(process.join)
            stack.callback(process.kill)
        for round_ in range(1, ROUNDS + 1):
            barrier.wait(30)
            writing = True
            while writing:
                # Asked before the collect, so that the last collect of a round comes after its last write.
                writing = bool((shared.finished < round_).any())
                gfns = tracker.collect().gfns()
                copy[gfns] = shared.ram[gfns]
                collects_with_marks += bool(gfns.size)
            assert np.array_equal(copy, shared.ram), f"round {round_}: the copy lacks writes"
    assert int(copy.max()) >= ROUNDS * WRITES_PER_ROUND
    # Otherwise nothing ran against the writers, and the test says nothing.
    assert collects_with_marks > 2 * ROUNDS
