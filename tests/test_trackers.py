"""What every tracker must do, whatever it is made of: the same tests for all, each under the writers that it is for."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import pytest

from pagexfer.dirty import DirtyBitmap, PageCopies
from pagexfer.dirty.content import ContentTracker
from pagexfer.dirty.pagemap import PagemapTracker
from pagexfer.errors import LocalProtocolError
from pagexfer.guests.kvm import KvmGuest
from pagexfer.guests.simulated import SimulatedGuest
from pagexfer.svsm.page_digest import fresh_digest

from .kvm_guests import FULL_SPEED, RAM_BYTES, VCPUS, needs_kvm, park, progress, start, until
from .tracked_ram import PAGES, WORDS, needs_pagemap, shared

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from pagexfer.dirty import DirtyTracker
    from pagexfer.guests.guest import Guest

ROUNDS: Final = 20


class GuestWriters:
    """The vCPUs of a guest."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest

    async def run(self) -> None:
        await start(self._guest)

    async def progress(self) -> None:
        await progress(self._guest, 20)

    async def halt(self) -> None:
        await park(self._guest)


class ThreadWriters:
    """Threads of this process, which write to the same pages, each to its own half."""

    def __init__(self, ram: NDArray[np.uint64]) -> None:
        self._ram = ram
        self._halted = threading.Event()
        self._threads: list[threading.Thread] = []
        self._steps = [0] * VCPUS

    async def run(self) -> None:
        self._halted.clear()
        self._threads = [threading.Thread(target=self._write, args=(number,)) for number in range(VCPUS)]
        for thread in self._threads:
            thread.start()

    async def progress(self) -> None:
        before = list(self._steps)
        await until(lambda: all(now > then for now, then in zip(self._steps, before, strict=True)))

    async def halt(self) -> None:
        self._halted.set()
        for thread in self._threads:
            thread.join()

    def _write(self, number: int) -> None:
        rng = np.random.default_rng(number)
        half = WORDS // VCPUS
        while not self._halted.is_set():
            gfns = rng.integers(0, len(self._ram), 20)
            # Old content comes back all the time.
            self._ram[gfns, number * half : (number + 1) * half] = rng.integers(0, 3, dtype=np.uint64)
            self._steps[number] += 1


@dataclass(frozen=True, slots=True)
class Subject:
    """A tracker, the RAM it is for, and who writes there."""

    tracker: DirtyTracker
    ram: NDArray[np.uint64]
    writers: GuestWriters | ThreadWriters
    sent: Callable[[NDArray[np.int64], NDArray[np.uint64]], None] = lambda _gfns, _content: None

    def send_all(self) -> NDArray[np.uint64]:
        """A copy of all pages, as the first epoch makes it."""
        target = self.ram.copy()
        self.sent(np.arange(len(target)), target)
        return target

    def send(self, target: NDArray[np.uint64]) -> int:
        """Collect, then copy what is reported; returns the pages sent."""
        gfns = self.tracker.collect().gfns()
        copy = self.ram[gfns]
        target[gfns] = copy
        if gfns.size:
            self.sent(gfns, copy)
        return len(gfns)


def byte_map() -> Iterator[Subject]:
    with SimulatedGuest.boot(RAM_BYTES, VCPUS, write_rate_bytes=FULL_SPEED) as guest:
        yield Subject(guest.tracker, guest.memory.words, GuestWriters(guest))


class ToldTracker(ContentTracker):
    """A content tracker that is told at once that all of RAM was sent, so that it has the others' contract."""

    def __init__(self, ram: NDArray[np.uint64]) -> None:
        super().__init__(ram, fresh_digest())
        self._ram = ram
        self._told = False

    def start(self) -> None:
        super().start()
        if not self._told:
            self.tell(np.arange(len(self._ram)), self._ram)
            self._told = True

    def tell(self, gfns: NDArray[np.int64], content: NDArray[np.uint64]) -> None:
        copies = PageCopies(len(content))
        copies.words[:] = content
        self.sent(gfns, copies, np.ones(len(gfns), dtype=np.bool_))

    def stop(self) -> None:
        super().stop()
        self._told = False


def content() -> Iterator[Subject]:
    with SimulatedGuest.boot(RAM_BYTES, VCPUS, write_rate_bytes=FULL_SPEED) as guest:
        tracker = ToldTracker(guest.memory.words)
        yield Subject(tracker, guest.memory.words, GuestWriters(guest), tracker.tell)


def kvm_log() -> Iterator[Subject]:
    with KvmGuest.boot(RAM_BYTES, VCPUS, write_rate_bytes=FULL_SPEED) as guest:
        yield Subject(guest.hypervisor.dirty_log, guest.memory.words, GuestWriters(guest))


def pagemap_of_vcpus() -> Iterator[Subject]:
    with KvmGuest.boot(RAM_BYTES, VCPUS, write_rate_bytes=FULL_SPEED) as guest:
        yield Subject(PagemapTracker(guest.memory.words), guest.memory.words, GuestWriters(guest))


def pagemap_of_threads() -> Iterator[Subject]:
    ram = shared(PAGES)
    yield Subject(PagemapTracker(ram), ram, ThreadWriters(ram))


@pytest.fixture(
    params=[
        byte_map,
        content,
        pytest.param(kvm_log, marks=needs_kvm),
        pytest.param(pagemap_of_vcpus, marks=[needs_kvm, needs_pagemap]),
        pytest.param(pagemap_of_threads, marks=needs_pagemap),
    ],
    ids=lambda make: make.__name__,
)
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    make: Callable[[], Iterator[Subject]] = request.param
    for made in make():
        yield made
        made.tracker.stop()


async def test_no_write_is_lost_and_a_guest_that_stands_still_is_clean(subject: Subject) -> None:
    for _ in range(2):  # started anew after `stop`, it tracks as it did at first
        await subject.writers.run()
        try:
            subject.tracker.start()
            target = subject.send_all()
            for _ in range(ROUNDS):
                await subject.writers.progress()
                assert subject.send(target) > 0
        finally:
            await subject.writers.halt()
        subject.send(target)
        assert np.array_equal(target, subject.ram)
        assert not subject.tracker.collect().any()
        assert not subject.tracker.collect().any()
        subject.tracker.stop()


async def test_what_is_reported_is_what_changed_since_it_was_started(subject: Subject) -> None:
    await subject.writers.run()
    await subject.writers.progress()
    await subject.writers.halt()
    subject.tracker.start()
    assert subject.tracker.collect() == DirtyBitmap(len(subject.ram))
    before = subject.ram.copy()
    await subject.writers.run()
    await subject.writers.progress()
    subject.tracker.start()  # again, which forgets nothing
    await subject.writers.halt()
    changed = np.flatnonzero((subject.ram != before).any(axis=1))
    assert set(changed.tolist()) <= set(subject.tracker.collect().gfns().tolist())
    await subject.writers.run()
    await subject.writers.progress()
    await subject.writers.halt()
    subject.tracker.stop()
    subject.tracker.start()
    assert not subject.tracker.collect().any()


def test_collect_needs_start_and_stop_may_come_twice(subject: Subject) -> None:
    subject.tracker.stop()
    for _ in range(2):
        with pytest.raises(LocalProtocolError, match="not started"):
            subject.tracker.collect()
        subject.tracker.start()
        assert subject.tracker.collect().pages == len(subject.ram)
        subject.tracker.stop()
        subject.tracker.stop()
