"""RAM that was never touched is sent, audited and received without the kernel having to provide memory for it."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagexfer.dirty import DirtyBitmap
from pagexfer.dirty.byte_map import ByteMapTracker
from pagexfer.dirty.content import ContentTracker
from pagexfer.errors import GuestError, PagexferError
from pagexfer.guests.qemu.backends import Backend, data_gfns, map_backends
from pagexfer.svsm.audit import RUN_PAGES, PageDigests
from pagexfer.svsm.export import Packager
from pagexfer.svsm.memory import GuestMemory, data_ranges
from pagexfer.svsm.page_digest import fresh_digest
from pagexfer.testing import BytesGate, SvsmPair
from pagexfer.wire.bundle import DATA, DROP, ZERO, BundleKind
from pagexfer.wire.constants import PAGE_SIZE

from .small_guests import ATTESTOR

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

PAGES = 3 * RUN_PAGES + 7  # the last run is a part of one


@dataclass(frozen=True, slots=True)
class Sparse:
    """RAM in a sparse file, as a hypervisor's memory backend is."""

    memory: GuestMemory
    fd: int

    def touch(self, gfn: int, word: int = 7) -> None:
        """As a vCPU does: through another mapping."""
        os.pwrite(self.fd, word.to_bytes(8, "little"), gfn * PAGE_SIZE)

    def punch(self, gfn: int) -> None:
        """Give the page back to the kernel."""
        address = ctypes.c_void_p(self.memory.words.ctypes.data + gfn * PAGE_SIZE)
        assert ctypes.CDLL(None).madvise(address, ctypes.c_size_t(PAGE_SIZE), mmap.MADV_REMOVE) == 0

    def allocated(self) -> int:
        """Pages that have memory."""
        return os.fstat(self.fd).st_blocks * 512 // PAGE_SIZE


@contextmanager
def sparse(*touched: int) -> Iterator[Sparse]:
    fd = os.memfd_create("sparse")
    try:
        os.ftruncate(fd, PAGES * PAGE_SIZE)
        backends = (Backend("m0", PAGES * PAGE_SIZE, PAGE_SIZE, fd),)
        for gfn in touched:
            os.pwrite(fd, b"\7", gfn * PAGE_SIZE)
        memory = GuestMemory.over(map_backends(backends), lambda: data_gfns(backends))
        memory.launch()
        yield Sparse(memory, fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize("tracked", [True, False])
def test_a_page_that_is_written_in_a_hole_is_no_hole(tracked: bool) -> None:
    """By whoever sees writes: the SVSM's tracker, or the hypervisor's log. Only a comparison looks by itself."""
    words = np.zeros((64, 512), dtype=np.uint64)
    words[:8] = 7
    memory = GuestMemory.over(words, lambda: [(gfn, gfn + 1) for gfn in range(64) if words[gfn].any()])
    memory.launch()
    marks = np.zeros(64, dtype=np.uint8)
    target = GuestMemory.allocate(64 * PAGE_SIZE)
    tracker = ByteMapTracker(marks) if tracked else None
    gates = BytesGate([b"vCPU"], running=True), BytesGate.waiting(1)
    pair = SvsmPair(memory, gates[0], target, gates[1], ATTESTOR, tracker=tracker)
    pair.until_precopy()
    for gfn in (40, 41):
        words[gfn], marks[gfn] = 0x1234, 1
        pair.source.hint(0, (1 << gfn).to_bytes(8, "little"))
        if gfn == 40:
            pair.epoch()
    pair.park()
    pair.epoch()
    pair.vcpus()
    pair.manifest()
    assert np.array_equal(target.words, words)


@pytest.mark.parametrize("told", [GuestError("no answer"), None], ids=["fails", "nonsense"])
def test_where_nobody_can_say_what_is_a_hole_all_is_read(told: GuestError | None) -> None:
    """A host that goes on without another EPOCH: the tracker does not report the page again."""
    words = np.zeros((64, 512), dtype=np.uint64)
    broken = threading.Event()

    def data() -> list[tuple[int, int]]:
        if broken.is_set() and told is not None:
            raise told
        return [(0, 65 if broken.is_set() else 8)]

    words[:8] = 7
    memory = GuestMemory.over(words, data)
    memory.launch()
    marks = np.zeros(64, dtype=np.uint8)
    target = GuestMemory.allocate(64 * PAGE_SIZE)
    gates = BytesGate([b"vCPU"], running=True), BytesGate.waiting(1)
    pair = SvsmPair(memory, gates[0], target, gates[1], ATTESTOR, tracker=ByteMapTracker(marks))
    pair.until_precopy()
    pair.park()
    words[40], marks[40] = 0x1234, 1
    broken.set()
    with pytest.raises(PagexferError):
        pair.source.begin_epoch()
    while message := pair.seal_pages(0, 0, 64):
        pair.send(message)
    pair.send(pair.seal_token(BundleKind.EPOCH_TOKEN))
    pair.vcpus()
    pair.manifest()
    assert np.array_equal(target.words, words)


@pytest.mark.parametrize("number", [errno.EIO, errno.EINVAL])
def test_a_file_that_cannot_say_where_its_holes_are_has_none(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    with sparse(5) as ram:
        size = PAGES * PAGE_SIZE
        assert list(data_ranges(ram.fd, size)) == [(5 * PAGE_SIZE, 6 * PAGE_SIZE)]
        seek = os.lseek

        def failing(fd: int, offset: int, whence: int) -> int:
            if whence == os.SEEK_DATA and offset >= 6 * PAGE_SIZE:
                raise OSError(number, os.strerror(number))
            return seek(fd, offset, whence)

        monkeypatch.setattr(os, "lseek", failing)
        assert list(data_ranges(ram.fd, size)) == [(5 * PAGE_SIZE, 6 * PAGE_SIZE), (6 * PAGE_SIZE, size)]


def all_sent(ram: Sparse) -> PageDigests:
    digests = PageDigests(ram.memory, workers=2)
    packager = Packager(ram.memory, stage=True)
    gfns = np.arange(PAGES)
    while gfns.size:
        package = packager.package(gfns[:512], 512)
        digests.record(package.gfns, package.operations, package.payload)
        gfns = gfns[len(package.gfns) :]
    digests.settle()
    return digests


def changed(digests: PageDigests, *excused: int) -> list[int]:
    left_out = DirtyBitmap(PAGES)
    left_out.set_gfns(np.array(excused, dtype=np.int64))
    found: list[int] = digests.changed(0, PAGES, left_out).tolist()
    return found


touched_pages = st.sets(st.integers(0, PAGES - 1), max_size=40)


@settings(max_examples=40)
@given(sent=touched_pages, later=touched_pages, gone=touched_pages)
def test_holes_are_zero_for_export_and_audit_and_stay_holes(
    sent: set[int], later: set[int], gone: set[int]
) -> None:
    with sparse(*sent) as ram:
        package = Packager(ram.memory).package(np.arange(PAGES), 512)
        assert {gfn for gfn in range(PAGES) if package.operations[gfn] == DATA} == sent
        assert all(package.operations[gfn] == ZERO for gfn in range(PAGES) if gfn not in sent)
        digests = all_sent(ram)
        assert changed(digests) == []
        assert ram.allocated() == len(sent)
        ram.memory.pvalidate(np.arange(RUN_PAGES), validated=False)
        given_up = Packager(ram.memory).package(np.arange(RUN_PAGES), 512)
        assert (given_up.operations == DROP).all()
        ram.memory.pvalidate(np.arange(RUN_PAGES))
        for gfn in later:
            ram.touch(gfn, 9)
        assert changed(digests) == sorted(later)
        assert ram.allocated() == len(sent | later)
        # A page can become a hole, as by a balloon: then it is zero, and may not have been sent so.
        for gfn in gone:
            ram.punch(gfn)
        assert changed(digests) == sorted((later - gone) | (sent & gone))
        assert ram.allocated() == len((sent | later) - gone)


def test_a_page_written_after_the_look_is_the_audits_to_find() -> None:
    with sparse(3) as ram:
        ram.touch(RUN_PAGES + 5)
        packager = Packager(ram.memory)
        assert packager.package(np.array([RUN_PAGES + 5]), 1).operations.tolist() == [ZERO]
        assert changed(all_sent(ram)) == [RUN_PAGES + 5]
        assert packager.package(np.array([RUN_PAGES + 5]), 1).operations.tolist() == [DATA]


def test_excused_pages_in_holes_and_beside_them() -> None:
    with sparse(3, 4) as ram:
        digests = all_sent(ram)
        for gfn in (3, 5, RUN_PAGES, PAGES - 1):
            ram.touch(gfn, 9)
        assert changed(digests, 3, 6, RUN_PAGES) == [5, PAGES - 1]


@settings(max_examples=40)
@given(sent=touched_pages, later=touched_pages, gone=touched_pages)
def test_holes_are_told_and_compared_as_zero_and_stay_holes(
    sent: set[int], later: set[int], gone: set[int]
) -> None:
    with sparse(*sent) as ram:
        memory = ram.memory
        tracker = ContentTracker(memory.words, fresh_digest(), data=lambda: memory.data_ranges)
        tracker.start()
        packager = Packager(memory, stage=True)

        def tell(gfns: NDArray[np.int64]) -> None:
            package = packager.package(gfns, 512)
            tracker.sent(package.gfns, package.copies, package.in_use)

        def found() -> set[int]:
            memory.find_holes()
            return set(tracker.collect().gfns().tolist())

        tell(np.arange(PAGES))
        assert not found()
        assert ram.allocated() == len(sent)
        for gfn in later:
            ram.touch(gfn, 9)
        if later:
            tell(np.array(sorted(later)))  # by the last look: some of them as the holes that they were
        assert later - sent <= found() <= set(range(PAGES)) - later | later - sent
        for gfn in gone:
            ram.punch(gfn)
        zeroed = (sent | later) & gone
        assert zeroed <= found() <= (set(range(PAGES)) if zeroed else set())
        assert not found()


def test_probes_of_what_was_sent_leave_holes_alone() -> None:
    """A mapping provides memory for a hole that is read, and has its process killed where there is none left."""
    blocks = 2 * 1024
    fd = os.memfd_create("guest-ram", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, blocks * 32 * PAGE_SIZE)
        for block in range(blocks):
            os.pwrite(fd, b"\7", block * 32 * PAGE_SIZE)
        backends = (Backend("m0", blocks * 32 * PAGE_SIZE, PAGE_SIZE, fd),)
        memory = GuestMemory.over(map_backends(backends), lambda: data_gfns(backends))
        memory.launch()
        tracker = ContentTracker(memory.words, fresh_digest(), data=lambda: memory.data_ranges)
        tracker.start()
        packager = Packager(memory, stage=True)
        for first in range(0, memory.pages, 512):
            package = packager.package(np.arange(first, first + 512), 512)
            tracker.sent(package.gfns, package.copies, package.in_use)
        assert not tracker.collect().any()
        assert os.fstat(fd).st_blocks * 512 == blocks * PAGE_SIZE
    finally:
        os.close(fd)


def test_ram_without_a_hole_is_not_asked_for_again() -> None:
    with sparse(*range(PAGES)) as ram:
        ram.punch(5)
        ram.memory.find_holes()
        assert ram.memory.in_holes(range(PAGES)) is None
        # It is read, and so it is what it is.
        assert Packager(ram.memory).package(np.arange(3, 7), 512).operations.tolist() == [
            DATA,
            DATA,
            ZERO,
            DATA,
        ]


@pytest.mark.parametrize("touched", [(), tuple(range(16)), (40,)])
def test_only_ram_without_holes_is_provided(touched: tuple[int, ...]) -> None:
    with sparse(*touched) as ram:
        assert ram.memory.prefault(0, 16 * PAGE_SIZE)
        assert ram.memory.prefault(16 * PAGE_SIZE, 16 * PAGE_SIZE)
        assert ram.allocated() == len(touched)


def test_a_file_is_mapped_before_it_is_read_and_its_holes_stay() -> None:
    def faults() -> int:
        return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt

    with sparse(*range(64)) as ram:
        assert ram.memory.map_ahead(0, 64 * PAGE_SIZE)
        before = faults()
        assert ram.memory.words[:64, 0].all()
        assert faults() - before < 4  # unmapped it takes one for every 16 pages at least
        assert ram.memory.map_ahead(64 * PAGE_SIZE, (PAGES - 64) * PAGE_SIZE)
        assert ram.allocated() == 64


def test_ram_that_this_process_made_is_mapped_already() -> None:
    memory = GuestMemory.allocate(PAGE_SIZE)
    assert not memory.map_ahead(0, PAGE_SIZE)
    memory.close()


def test_zero_leaves_holes_alone() -> None:
    with sparse(1) as ram:
        ram.memory.zero(np.arange(PAGES))
        assert ram.allocated() == 1
        assert not ram.memory.words[1].any()
