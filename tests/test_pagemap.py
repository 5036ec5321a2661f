"""PAGEMAP_SCAN on memory of this very process: what it reports, what it cannot see, and kernels that refuse.

Under writers that do not wait for it, it is tested with the other trackers (test_trackers.py).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagexfer.dirty.pagemap import PAGEMAP_SCAN, UFFDIO_API, UFFDIO_REGISTER, PagemapTracker
from pagexfer.errors import GuestError, LocalProtocolError

from .tracked_ram import PAGES, WORDS, anonymous, needs_pagemap, shared

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

GFNS = st.integers(0, PAGES - 1)
MANY_PAGES = 3 * (1 << 17)


def started(ram: NDArray[np.uint64]) -> PagemapTracker:
    tracker = PagemapTracker(ram)
    tracker.start()
    return tracker


@needs_pagemap
class TestTracking:
    @pytest.mark.parametrize("make", [anonymous, shared])
    @given(populated=st.sets(GFNS), first=st.sets(GFNS), second=st.sets(GFNS))
    def test_collect_finds_exactly_what_was_written(
        self,
        make: Callable[[], NDArray[np.uint64]],
        populated: set[int],
        first: set[int],
        second: set[int],
    ) -> None:
        ram = make()
        ram[sorted(populated)] = 1
        tracker = started(ram)
        for gfns in (first, second):
            ram[sorted(gfns), 7] = 1  # also where that is what the page had: a write is a write
            collected = tracker.collect()
            assert (collected.pages, collected.gfns().tolist()) == (PAGES, sorted(gfns))
            assert not tracker.collect().any()
        tracker.stop()

    def test_reading_is_no_write(self) -> None:
        ram = anonymous()
        ram[: PAGES // 2] = 1
        tracker = started(ram)
        ram.copy()
        assert not tracker.collect().any()
        tracker.stop()

    def test_what_the_kernel_writes_is_seen(self) -> None:
        ram = shared()
        tracker = started(ram)
        with open("/dev/zero", "rb", buffering=0) as zeros:
            zeros.readinto(ram[9:11].data.cast("B"))
        assert tracker.collect().gfns().tolist() == [9, 10]
        tracker.stop()

    def test_memory_given_back_is_a_change(self) -> None:
        mapping = mmap.mmap(-1, PAGES * mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        ram = np.frombuffer(mapping, dtype=np.uint64).reshape(-1, WORDS)
        ram[:] = 1
        tracker = started(ram)
        mapping.madvise(mmap.MADV_DONTNEED, 5 * mmap.PAGESIZE, 2 * mmap.PAGESIZE)
        assert {5, 6} <= set(tracker.collect().gfns().tolist())
        tracker.stop()

    def test_another_mapping_of_the_same_memory_is_not_seen(self) -> None:
        """The limit that the module states; a guest whose vCPUs are processes needs another tracker."""
        ram_fd = os.memfd_create("ram")
        os.ftruncate(ram_fd, PAGES * mmap.PAGESIZE)
        ram, other = (
            np.frombuffer(mmap.mmap(ram_fd, 0), dtype=np.uint64).reshape(-1, WORDS) for _ in range(2)
        )
        os.close(ram_fd)
        tracker = started(ram)
        other[3] = 1
        assert not tracker.collect().any()
        tracker.stop()

    def test_more_regions_than_one_call_gives(self) -> None:
        ram = anonymous(MANY_PAGES)
        tracker = started(ram)
        ram[::2, 0] = 1
        assert np.array_equal(tracker.collect().gfns(), np.arange(0, MANY_PAGES, 2))
        assert not tracker.collect().any()
        tracker.stop()

    def test_pages_around_the_tracked_ones_are_left_alone(self) -> None:
        ram = anonymous()
        tracker = started(ram[10:20])
        ram[[9, 10, 19, 20]] = 1
        assert tracker.collect().gfns().tolist() == [0, 9]
        tracker.stop()

    def test_one_memory_has_one_tracker(self) -> None:
        ram = anonymous()
        tracker = started(ram)
        second = PagemapTracker(ram)
        with pytest.raises(GuestError, match="another userfaultfd tracks this memory"):
            second.start()
        second.stop()
        tracker.stop()
        second.start()
        ram[4] = 1
        assert second.collect().gfns().tolist() == [4]
        second.stop()

    def test_no_file_descriptor_is_left(self) -> None:
        before = os.listdir("/proc/self/fd")
        tracker = started(anonymous())
        tracker.stop()
        taken = started(ram := anonymous())
        with pytest.raises(GuestError):
            PagemapTracker(ram).start()
        taken.stop()
        assert os.listdir("/proc/self/fd") == before

    def test_memory_that_is_no_longer_there_is_refused(self) -> None:
        ram = anonymous()
        tracker = started(ram)
        remap_fixed(ram[8:9])
        with pytest.raises(GuestError, match="does not say which pages were written"):
            tracker.collect()
        tracker.stop()

    def test_needs_no_privilege(self) -> None:
        assert run_confined("become_nobody()") == "[7]"


@needs_pagemap
@pytest.mark.parametrize(
    ("system_call", "request_number", "error", "reason"),
    [
        (
            323,
            None,
            "EPERM",
            "this process may not use userfaultfd and /proc/self/pagemap: Operation not permitted",
        ),
        (323, None, "ENOSYS", "this kernel cannot track this memory"),
        (16, UFFDIO_API, "EINVAL", "this kernel cannot track this memory"),
        (16, UFFDIO_REGISTER, "ENOMEM", "the kernel does not track this memory: Cannot allocate memory"),
        (16, PAGEMAP_SCAN, "ENOTTY", "this kernel cannot track this memory"),
    ],
)
def test_a_kernel_that_refuses_is_one_clear_error(
    system_call: int, request_number: int | None, error: str, reason: str
) -> None:
    """Refused by a system call filter in a process of its own, which is how containers refuse it."""
    output = run_confined(f"refuse({system_call}, {request_number}, errno.{error})")
    assert output.startswith(f"GuestError {reason}")
    assert len(output.splitlines()) == 1


@pytest.mark.parametrize(
    ("ram", "reason"),
    [
        (np.zeros((2, 511), np.uint64), "shape"),
        (np.zeros((4, WORDS), np.uint64)[::2], "contiguous"),
        (anonymous(4).reshape(-1)[8 : 8 + WORDS].reshape(1, WORDS), "begin with a page"),
    ],
)
def test_ram_of_another_form_is_refused(ram: NDArray[np.uint64], reason: str) -> None:
    with pytest.raises(LocalProtocolError, match=reason):
        PagemapTracker(ram)


def remap_fixed(page: NDArray[np.uint64]) -> None:
    """Put another mapping where this page was."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    map_fixed = 0x10
    flags = map_fixed | mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    address = libc.mmap(
        ctypes.c_void_p(page.ctypes.data),
        ctypes.c_size_t(page.nbytes),
        mmap.PROT_READ | mmap.PROT_WRITE,
        flags,
        -1,
        ctypes.c_long(0),
    )
    assert address == page.ctypes.data


CONFINED = """
import ctypes, errno, os, struct
from pagexfer.dirty.pagemap import PagemapTracker
from pagexfer.errors import GuestError
from tests.tracked_ram import anonymous

def refuse(system_call, request, error):
    # A filter over struct seccomp_data (nr u32 at 0, args[1] u64 at 24), as in <linux/seccomp.h> and <linux/filter.h>.
    load, equal, give = 0x20, 0x15, 0x06
    allow, refused = 0x7FFF0000, 0x00050000 | error
    program = [(load, 0, 0, 0), (equal, 0, 3 if request else 1, system_call)]
    if request:
        program += [(load, 0, 0, 24), (equal, 0, 1, request)]
    program += [(give, 0, 0, refused), (give, 0, 0, allow)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *step) for step in program))
    head = ctypes.create_string_buffer(struct.pack("<HxxxxxxQ", len(program), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    zero = ctypes.c_ulong(0)
    assert libc.prctl(38, ctypes.c_ulong(1), zero, zero, zero) == 0  # PR_SET_NO_NEW_PRIVS
    assert libc.prctl(22, ctypes.c_ulong(2), head, zero, zero) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER

def become_nobody():
    if os.getuid() == 0:
        os.setuid(65534)
        # Changing the user hides /proc/self from the process itself; PR_SET_DUMPABLE shows it again.
        assert ctypes.CDLL(None).prctl(4, *[ctypes.c_ulong(number) for number in (1, 0, 0, 0)]) == 0

ram = anonymous()
CONFINE
tracker = PagemapTracker(ram)
try:
    tracker.start()
    ram[7] = 1
    print(tracker.collect().gfns().tolist())
except GuestError as error:
    print("GuestError", error)
"""


def run_confined(confine: str) -> str:
    """Track memory in another process that confines itself first; returns what it says."""
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CONFINED).replace("CONFINE", confine)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=os.path.dirname(os.path.dirname(__file__)),
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()
