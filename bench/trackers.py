"""Dirty trackers side by side on RAM of one size: what `collect` takes, and what the writer takes. A part of bench.dirty.

In each round every tracker in turn has the same part of its RAM written and is asked; "x read" is the median of the ratios
to a plain read of the same RAM (a sum) at the begin of the same round. KVM's log needs a vCPU that writes, so the part
written there is nearly that of the others, and the writer's time is not known. A tracker that this machine does not have
has no rows, but its reason below them.
"""

from __future__ import annotations

import mmap
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from time import perf_counter, sleep
from typing import TYPE_CHECKING, Final

import numpy as np
import trio

from pagexfer.dirty.byte_map import ByteMapTracker
from pagexfer.dirty.content import ContentTracker
from pagexfer.dirty.pagemap import PagemapTracker
from pagexfer.errors import GuestError
from pagexfer.guests import kvm
from pagexfer.guests.kvm import KvmGuest
from pagexfer.guests.pattern import read_status
from pagexfer.svsm.page_digest import fresh_digest
from pagexfer.wire.constants import WORDS_PER_PAGE

from .measure import Spread, rotated
from .options import progress
from .table import Table

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from pagexfer.dirty import DirtyTracker

DENSITIES: Final = (0.0, 0.001, 0.1, 0.7)
FULL_SPEED: Final = 1 << 40
KVM_LOG: Final = "KVM's log"


@dataclass(frozen=True, slots=True)
class Subject:
    """A tracker that was started, and how to write about so many pages of its RAM; a vCPU's writing cannot be timed."""

    name: str
    tracker: DirtyTracker
    write: Callable[[int], None]
    timed: bool = True


@dataclass(frozen=True, slots=True)
class Collected:
    """One row: pages that `collect` reported, its seconds, and the writer's seconds."""

    tracker: str
    density: float
    pages: int
    seconds: Spread
    write_seconds: Spread | None
    times_read: float


def tracker_table(ram_bytes: int, repeats: int, seed: int) -> tuple[list[dict[str, object]], Table]:
    """Measure every tracker that this machine has."""
    progress(f"trackers over {ram_bytes >> 20} MiB")
    with ExitStack() as stack:
        subjects, missing = _in_process(ram_bytes, seed, stack)
        no_kvm = kvm.unavailable_reason()
        if no_kvm is None:
            subjects.append(_of_vcpu(ram_bytes, stack))
        else:
            missing[KVM_LOG] = no_kvm
        rows = _measure(subjects, ram_bytes // mmap.PAGESIZE, repeats)
    table = Table.of(
        f"Trackers over {ram_bytes >> 20} MiB",
        ("", "written", "pages found", "collect ms", "min", "max", "x read", "writer ns/page"),
        [
            (
                row.tracker,
                f"{row.density:.1%}",
                row.pages,
                *row.seconds.scaled(1e3).cells(2),
                f"{row.times_read:.3f}",
                f"{row.write_seconds.median / row.pages * 1e9:.0f}"
                if row.write_seconds and row.pages
                else "-",
            )
            for row in rows
        ],
        " ".join(
            [
                "The writer stores one word in each page, and its mark where it has to; a fault for it is in its time.",
                *(f"Not measured: {name}: {reason}." for name, reason in missing.items()),
            ]
        ),
    )
    return [asdict(row) for row in rows], table


def _measure(subjects: list[Subject], pages: int, repeats: int) -> list[Collected]:
    """All trackers in turn in every round; the first round warms up and does not count."""
    ram = _ram(pages)
    found: dict[tuple[str, float], int] = {}
    collects: dict[tuple[str, float], list[float]] = {}
    writes: dict[tuple[str, float], list[float]] = {}
    reads: list[float] = []
    for round_ in range(repeats + 1):
        reads.append(_seconds(lambda: np.add.reduce(ram.reshape(-1))))
        for density in DENSITIES:
            for subject in rotated(subjects, round_):
                case = subject.name, density
                number = round(pages * density)
                writing = _seconds(lambda: subject.write(number)) if number else 0.0  # noqa: B023 (called at once)
                began = perf_counter()
                bitmap = subject.tracker.collect()
                collecting = perf_counter() - began
                if round_:
                    writes.setdefault(case, []).append(writing)
                    collects.setdefault(case, []).append(collecting)
                    found[case] = bitmap.count()
    return [
        Collected(
            subject.name,
            density,
            found[subject.name, density],
            Spread.of(collects[subject.name, density]),
            Spread.of(writes[subject.name, density]) if subject.timed else None,
            Spread.of(
                [took / read for took, read in zip(collects[subject.name, density], reads[1:], strict=True)]
            ).median,
        )
        for subject in subjects
        for density in DENSITIES
    ]


def _in_process(ram_bytes: int, seed: int, stack: ExitStack) -> tuple[list[Subject], dict[str, str]]:
    """Trackers over RAM of this process, each with a RAM of its own, and why others are missing."""
    pages = ram_bytes // mmap.PAGESIZE
    order = np.random.default_rng(seed).permutation(pages)
    marks = np.zeros(pages, dtype=np.uint8)
    byte_map, content, pagemap = _ram(pages), _ram(pages), _ram(pages)

    def write(ram: NDArray[np.uint64], number: int) -> None:
        ram[order[:number], 0] += np.uint64(1)

    def write_and_mark(number: int) -> None:
        write(byte_map, number)
        marks[order[:number]] = 1

    subjects = [
        Subject("byte map", ByteMapTracker(marks), write_and_mark),
        Subject("content", ContentTracker(content, fresh_digest()), lambda number: write(content, number)),
        Subject("pagemap", PagemapTracker(pagemap), lambda number: write(pagemap, number)),
    ]
    started: list[Subject] = []
    missing: dict[str, str] = {}
    for subject in subjects:
        try:
            subject.tracker.start()
        except GuestError as error:
            progress(f"{subject.name}: skipped: {error}")
            missing[subject.name] = str(error)
            continue
        stack.callback(subject.tracker.stop)
        started.append(subject)
    return started, missing


def _of_vcpu(ram_bytes: int, stack: ExitStack) -> Subject:
    """KVM's log of a guest with one vCPU that fills its slice."""
    guest = stack.enter_context(KvmGuest.boot(ram_bytes, 1, write_rate_bytes=FULL_SPEED))
    trio.run(guest.hypervisor.resume)

    def write(number: int) -> None:
        goal = read_status(guest.memory.words, 0).steps + number
        guest.gate.release()
        while read_status(guest.memory.words, 0).steps < goal:
            sleep(0.0001)
        guest.gate.raise_flag()
        while guest.gate.parked() < 1:
            sleep(0.0001)

    log = guest.hypervisor.dirty_log
    log.start()
    stack.callback(log.stop)
    return Subject(KVM_LOG, log, write, timed=False)


def _ram(pages: int) -> NDArray[np.uint64]:
    ram = np.frombuffer(mmap.mmap(-1, pages * mmap.PAGESIZE), dtype=np.uint64).reshape(-1, WORDS_PER_PAGE)
    ram[:] = 1
    return ram


def _seconds(call: Callable[[], object]) -> float:
    began = perf_counter()
    call()
    return perf_counter() - began
