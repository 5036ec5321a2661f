"""What a fresh KVM guest has in its reserved pages and registers: code, page tables, the state of the first instruction.

gfn 1        PML4: one entry
gfn 2        page directory pointers: 4 GiB
gfn 3 .. 6   page directories: the first 4 GiB, mapped to themselves by pages of 2 MiB
gfn 7        task state segment, whose I/O bitmap is all zero: ring 3 may use ports
gfn 8        code (guest.S)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from ...wire.constants import PAGE_SHIFT, PAGE_SIZE, WORDS_PER_PAGE
from ..pattern import STATUS_GFN
from . import ioctls

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..pattern import Layout

RESERVED_PAGES: Final = STATUS_GFN

_PML4_GFN: Final = 1
_POINTERS_GFN: Final = 2
_DIRECTORY_GFN: Final = 3
_DIRECTORIES: Final = 4
_TASK_GFN: Final = 7
_CODE_GFN: Final = 8
CODE_GPA: Final = _CODE_GFN << PAGE_SHIFT

# Page table entries
_PRESENT_WRITABLE_USER: Final = 0x7
_LARGE: Final = 0x80
_ACCESSED_DIRTY: Final = 0x60

# 64-bit task state segment: u16 at 102 is the offset of the I/O bitmap, which begins right behind it.
_TASK_BITMAP_OFFSET: Final = 102
_TASK_BYTES: Final = 104

# Control registers: paging, write protect, native FPU errors, protection; SSE and PAE; long mode.
_CR0: Final = 0x8005_0033
_CR4: Final = 0x620
_EFER: Final = 0x500
_RFLAGS: Final = 0x2
_USER_RING: Final = 3
_RDI: Final = 5  # place in struct kvm_regs
_FIRST_ROUND: Final = 1
# Debug registers with nothing pending and nothing enabled.
_DR6: Final = 0xFFFF_0FF0
_DR7: Final = 0x400

# guest.S, assembled as its head says.
GUEST_CODE: Final = bytes.fromhex(
    """
    4c8d471049c1e00c41b9000000e048c1e7064d8d9439800000004d8b58484d8b6050f3410f7e4040f3410f7e48580f6f
    3d1b010000498b014885c00f85f800000049837940000f84e000000066480f7ec849f7e649f7f44a8d341a4889f748c1
    e70c480f7efa66480f7ec0488b1dd6000000480fafde4801d8498d5dff4889d1480fafcb4801c84c8d3c104839377536
    48395f0875304801f3b902000000483904cf75224801c3480faf05a9000000480305aa000000ffc181f9ff01000072de
    48391ccf740849ff4020498970284c89f84889374c896f084a8d1c2eb902000000488904cf4801c3480faf0568000000
    48030569000000ffc181f9ff01000072e048891ccf49ffc64d39e672064531f649ffc54d8968084d89701049ff401848
    ffc5493b69400f8209ffffff49ff403031ede610e9fcfeffff498902e611e9f2feffff0f1f440000157c4a7fb979379e
    4febd4273daeb2c22d7f954c2df451584f8167f77e7b0514
    """
)
assert len(GUEST_CODE) <= PAGE_SIZE


def reserved_pages() -> NDArray[np.uint64]:
    """Pages 0 to 15 of every KVM guest, uint64 of shape (16, 512)."""
    pages = np.zeros((RESERVED_PAGES, WORDS_PER_PAGE), dtype=np.uint64)
    pages[_PML4_GFN, 0] = _POINTERS_GFN << PAGE_SHIFT | _PRESENT_WRITABLE_USER
    for directory in range(_DIRECTORIES):
        pages[_POINTERS_GFN, directory] = _DIRECTORY_GFN + directory << PAGE_SHIFT | _PRESENT_WRITABLE_USER
    numbers = np.arange(_DIRECTORIES * WORDS_PER_PAGE, dtype=np.uint64).reshape(_DIRECTORIES, -1)
    entries = numbers << np.uint64(21) | np.uint64(_PRESENT_WRITABLE_USER | _LARGE)
    pages[_DIRECTORY_GFN : _DIRECTORY_GFN + _DIRECTORIES] = entries
    pages[_TASK_GFN].view(np.uint8)[_TASK_BITMAP_OFFSET] = _TASK_BYTES
    pages[_CODE_GFN].view(np.uint8)[: len(GUEST_CODE)] = np.frombuffer(GUEST_CODE, dtype=np.uint8)
    return pages


def wrong_reserved_pages(words: NDArray[np.uint64]) -> list[int]:
    """gfns of reserved pages in RAM (uint64 of shape (pages, 512)) that are not as `reserved_pages` makes them.

    The processor sets accessed and dirty bits in page tables, so these may be either.
    """
    differences = words[:RESERVED_PAGES] ^ reserved_pages()
    differences[_PML4_GFN : _DIRECTORY_GFN + _DIRECTORIES] &= np.uint64(2**64 - 1 ^ _ACCESSED_DIRTY)
    return np.flatnonzero(differences.any(axis=1)).tolist()


def first_registers(vcpu: int) -> bytes:
    """struct kvm_regs of a vCPU at its first instruction."""
    general = [0] * 16
    general[_RDI] = vcpu
    general[ioctls.REGS_R13] = _FIRST_ROUND
    return ioctls.REGS.pack(*general, CODE_GPA, _RFLAGS)


def first_special_registers(reset: bytes) -> bytes:
    """struct kvm_sregs for ring 3 of 64-bit mode, from `reset`, which KVM gives a new vCPU."""
    code = _segment(0x8 | _USER_RING, 0xB, code=True)
    data = _segment(0x10 | _USER_RING, 0x3)
    task = _segment(0x18, 0xB, system=True, base=_TASK_GFN << PAGE_SHIFT)
    local_table = _segment(0, 0x2, system=True)
    segments = code + data * 5 + task + local_table
    control = ioctls.SREGS_CONTROL
    _, cr2, _, _, cr8, _, apic_base = control.unpack_from(reset, ioctls.SREGS_CONTROL_OFFSET)
    special = bytearray(reset)
    special[: len(segments)] = segments
    control.pack_into(
        special,
        ioctls.SREGS_CONTROL_OFFSET,
        *(_CR0, cr2, _PML4_GFN << PAGE_SHIFT, _CR4, cr8, _EFER, apic_base),
    )
    return bytes(special)


def first_debug_registers(vcpu: int, layout: Layout) -> bytes:
    """struct kvm_debugregs: DR0 holds the address of the slice, so that it is known whether it was migrated.

    No breakpoint is enabled, and ring 3 cannot read it; `KvmGuest.check` does.
    """
    return ioctls.DEBUGREGS.pack(layout.first_gfn(vcpu) << PAGE_SHIFT, 0, 0, 0, _DR6, _DR7, 0)


def _segment(selector: int, kind: int, *, code: bool = False, system: bool = False, base: int = 0) -> bytes:
    """struct kvm_segment: present; code is 64-bit, code and data belong to ring 3 and reach everywhere."""
    limit = PAGE_SIZE - 1 if system else 0xFFFF_FFFF
    ring = 0 if system else _USER_RING
    big, granular, ordinary = not (code or system), not system, not system
    return ioctls.SEGMENT.pack(base, limit, selector, kind, 1, ring, big, ordinary, code, granular, 0)
