"""Writes to memory of this process, seen by its page tables: PAGEMAP_SCAN over asynchronous userfaultfd write protection.

For a program that maps guest RAM itself (anonymous memory or a memfd) and wants to know which pages were written, without
a mark at every write and without KVM. Needs Linux 6.7 or later and no privilege. Numbers are from <linux/userfaultfd.h> and
<linux/fs.h>. The kernel is the host's, so for a guest that does not trust the host this is a hint (R4, R13).

`start` takes the right to write from every page. The first write to a page faults, and the kernel gives the right back by
itself (WP_ASYNC: there is no handler to wait for); that the page is writable is the mark. `collect` asks for the pages that
are writable and takes the right away again in one step (PM_SCAN_WP_MATCHING), so a page costs one fault for each collect.

Why no write is lost. Reporting a page and protecting it are one step under the page table's lock, and before `collect`
returns, no processor has an old translation of the page. A write before that is in the page when it is read afterwards; a
write after it faults, and is reported by the next `collect`.

What is seen: stores of this process's threads, what the kernel writes for them (read, recv), and vCPUs of a KVM machine
over this memory. What is not: another process's own mapping of the same memfd, and devices that write to pages that were
pinned for them earlier (VFIO, registered buffers of io_uring).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import struct
from typing import TYPE_CHECKING, Final

import numpy as np

from ..errors import GuestError, LocalProtocolError
from .bitmap import DirtyBitmap
from .ram import PAGE_SIZE, check_form

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SYS_USERFAULTFD: Final = 323  # x86-64
# Faults of kernel code need no handler here either, and without this flag userfaultfd is for the privileged.
_UFFD_USER_MODE_ONLY: Final = 1
_UFFD_API: Final = 0xAA
# WP_HUGETLBFS_SHMEM: a memfd, too. WP_UNPOPULATED: pages never touched, too. WP_ASYNC: the kernel resolves the faults.
_FEATURES: Final = 1 << 12 | 1 << 13 | 1 << 15
_MODE_WP: Final = 1 << 1
_WRITEPROTECT_WP: Final = 1 << 0
_PM_SCAN_WP_MATCHING: Final = 1 << 0
_PM_SCAN_CHECK_WPASYNC: Final = 1 << 1
_PAGE_IS_WRITTEN: Final = 1 << 1

UFFDIO_API: Final = 0xC018_AA3F
UFFDIO_REGISTER: Final = 0xC020_AA00
UFFDIO_WRITEPROTECT: Final = 0xC018_AA06
PAGEMAP_SCAN: Final = 0xC060_6610

# struct uffdio_api: api u64, features u64, ioctls u64
_API: Final = struct.Struct("<QQQ")
# struct uffdio_register: start u64, bytes u64, mode u64, ioctls u64
_REGISTER: Final = struct.Struct("<QQQQ")
# struct uffdio_writeprotect: start u64, bytes u64, mode u64
_WRITEPROTECT: Final = struct.Struct("<QQQ")
# struct pm_scan_arg, all u64: size, flags, start, end, walk_end (out), vec, vec_len, max_pages, category_inverted,
# category_mask, category_anyof_mask, return_mask
_SCAN: Final = struct.Struct("<12Q")
_SCAN_WALK_END: Final = 4
# struct page_region: start u64, end u64, categories u64
_REGION_WORDS: Final = 3

# The size of each argument is part of its request's number.
assert _API.size == UFFDIO_API >> 16 & 0x3FFF == 24
assert _REGISTER.size == UFFDIO_REGISTER >> 16 & 0x3FFF == 32
assert _WRITEPROTECT.size == UFFDIO_WRITEPROTECT >> 16 & 0x3FFF == 24
assert _SCAN.size == PAGEMAP_SCAN >> 16 & 0x3FFF == 96

# Regions that one call may give: 1.5 MiB of them, for which a call takes some 10 ms at most.
_REGIONS: Final = 1 << 16


class PagemapTracker:
    """Dirty tracker over `words`, uint64 of shape (pages, 512), which is whole pages of a mapping of this process.

    The mapping has to stay as long as the tracker is started. Only one thread calls the tracker.
    """

    def __init__(self, words: NDArray[np.uint64]) -> None:
        """Raises LocalProtocolError where `words` is not whole pages of memory, one after the other."""
        check_form(words)
        if words.ctypes.data % PAGE_SIZE:
            raise LocalProtocolError("RAM has to begin with a page of memory")
        self._words = words
        self._start = words.ctypes.data
        self._end = self._start + words.nbytes
        self._regions: NDArray[np.uint64] = np.zeros((_REGIONS, _REGION_WORDS), dtype=np.uint64)
        self._userfault_fd = self._pagemap_fd = -1

    def start(self) -> None:
        """Write-protect every page and track from here on. Where it is started already, nothing changes.

        Raises GuestError where the kernel cannot, or does not permit it, or another userfaultfd has this memory.
        """
        if self._userfault_fd >= 0:
            return
        try:
            self._userfault_fd = _userfaultfd()
            self._pagemap_fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            size = self._end - self._start
            register = _REGISTER.pack(self._start, size, _MODE_WP, 0)
            protect = _WRITEPROTECT.pack(self._start, size, _WRITEPROTECT_WP)
            fcntl.ioctl(self._userfault_fd, UFFDIO_API, _API.pack(_UFFD_API, _FEATURES, 0))
            fcntl.ioctl(self._userfault_fd, UFFDIO_REGISTER, register)
            fcntl.ioctl(self._userfault_fd, UFFDIO_WRITEPROTECT, protect)
            # A kernel that protects but cannot be asked is found here, and not in the first epoch.
            self._scan(self._start)
        except OSError as error:
            self.stop()
            raise GuestError(_reason(error)) from error

    def collect(self) -> DirtyBitmap:
        """Pages written since `start` or the last `collect`; read them after this returned, never before.

        Raises LocalProtocolError where the tracker is not started, GuestError where the mapping is no longer what it was.
        """
        if self._userfault_fd < 0:
            raise LocalProtocolError("the pagemap tracker is not started: call start first")
        bitmap = DirtyBitmap(len(self._words))
        address = self._start
        while address < self._end:
            try:
                address, found = self._scan(address)
            except OSError as error:
                raise GuestError(
                    f"the kernel does not say which pages were written: {error.strerror}"
                ) from error
            runs = (self._regions[:found, :2] - np.uint64(self._start)).view(np.int64) // PAGE_SIZE
            bitmap.set_runs(runs[:, 0], runs[:, 1] - runs[:, 0])
        return bitmap

    def stop(self) -> None:
        """Stop tracking: the kernel gives all rights back. Calling it again changes nothing."""
        for fd in (self._userfault_fd, self._pagemap_fd):
            if fd >= 0:
                os.close(fd)
        self._userfault_fd = self._pagemap_fd = -1

    def _scan(self, address: int) -> tuple[int, int]:
        """Fill `_regions` with written pages from `address` on, and protect them: where to go on, and how many regions."""
        argument = bytearray(
            _SCAN.pack(
                _SCAN.size,
                _PM_SCAN_WP_MATCHING | _PM_SCAN_CHECK_WPASYNC,
                address,
                self._end,
                0,
                self._regions.ctypes.data,
                _REGIONS,
                0,
                0,
                _PAGE_IS_WRITTEN,
                0,
                _PAGE_IS_WRITTEN,
            )
        )
        found = fcntl.ioctl(self._pagemap_fd, PAGEMAP_SCAN, argument)
        return _SCAN.unpack(argument)[_SCAN_WALK_END], found


def _userfaultfd() -> int:
    """A new userfaultfd. Raises OSError."""
    if platform.machine() != "x86_64":
        raise OSError(errno.ENOSYS, "no system call number for this machine")
    fd: int = ctypes.CDLL(None, use_errno=True).syscall(
        _SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK | _UFFD_USER_MODE_ONLY
    )
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return fd


def _reason(error: OSError) -> str:
    """What `start` could not do, in one line."""
    match error.errno:
        case errno.EPERM | errno.EACCES:
            return f"this process may not use userfaultfd and /proc/self/pagemap: {error.strerror}"
        case errno.EBUSY:
            return "another userfaultfd tracks this memory"
        case errno.ENOSYS | errno.EINVAL | errno.ENOTTY:
            return f"this kernel cannot track this memory, it has to be Linux 6.7 or later: {error.strerror}"
        case _:
            return f"the kernel does not track this memory: {error.strerror}"
