"""KVM's own log of pages that vCPUs wrote: the hypervisor's tracker, whose word is a hint (R4, R13).

Runs on the untrusted host. It knows the RAM slot and nothing else of the machine; numbers are from <linux/kvm.h>.
"""

from __future__ import annotations

import fcntl
import struct
from dataclasses import dataclass
from typing import Final

import numpy as np

from ..errors import GuestError, LocalProtocolError
from .bitmap import WORD_BITS, DirtyBitmap

KVM_GET_DIRTY_LOG: Final = 0x4010_AE42
KVM_SET_USER_MEMORY_REGION: Final = 0x4020_AE46
KVM_MEM_LOG_DIRTY_PAGES: Final = 1

_PAGE_SIZE: Final = 4096

# struct kvm_dirty_log: slot u32, padding u32, address of the bitmap u64
_DIRTY_LOG: Final = struct.Struct("<IIQ")
assert _DIRTY_LOG.size == 16
# struct kvm_userspace_memory_region: slot u32, flags u32, guest_phys_addr u64, memory_size u64, userspace_addr u64
_REGION: Final = struct.Struct("<IIQQQ")
assert _REGION.size == 32


@dataclass(frozen=True, slots=True)
class MemorySlot:
    """`pages` pages of this process's memory at `address`, which a guest sees at `gpa`."""

    number: int
    gpa: int
    pages: int
    address: int

    def register(self, vm_fd: int, *, log_dirty: bool = False) -> None:
        """Give the slot to KVM, or switch its dirty log. Raises GuestError where KVM refuses."""
        flags = KVM_MEM_LOG_DIRTY_PAGES if log_dirty else 0
        region = _REGION.pack(self.number, flags, self.gpa, self.pages * _PAGE_SIZE, self.address)
        try:
            fcntl.ioctl(vm_fd, KVM_SET_USER_MEMORY_REGION, region)
        except OSError as error:
            raise GuestError(f"KVM refused a memory slot of {self.pages} pages: {error.strerror}") from error


class KvmDirtyLog:
    """Dirty tracker of one memory slot of the VM behind `vm_fd`. gfns count from the slot's first page."""

    def __init__(self, vm_fd: int, slot: MemorySlot) -> None:
        self._vm_fd = vm_fd
        self._slot = slot
        # KVM fills whole words, and never marks a page above the slot's last.
        self._words = np.zeros(-(-slot.pages // WORD_BITS), dtype=np.uint64)
        self._started = False

    def start(self) -> None:
        """Write-protect the slot's pages and log from here on. Raises GuestError where KVM refuses."""
        if not self._started:
            self._slot.register(self._vm_fd, log_dirty=True)
            self._started = True

    def collect(self) -> DirtyBitmap:
        """Pages that vCPUs wrote since `start` or the last `collect`. Raises LocalProtocolError before `start`."""
        if not self._started:
            raise LocalProtocolError("the dirty log is not started")
        request = _DIRTY_LOG.pack(self._slot.number, 0, self._words.ctypes.data)
        try:
            fcntl.ioctl(self._vm_fd, KVM_GET_DIRTY_LOG, request)
        except OSError as error:
            raise GuestError(f"KVM did not give its dirty log: {error.strerror}") from error
        return DirtyBitmap.from_words(self._words, self._slot.pages)

    def stop(self) -> None:
        """Stop logging and forget what was logged."""
        if self._started:
            self._started = False
            self._slot.register(self._vm_fd, log_dirty=False)
