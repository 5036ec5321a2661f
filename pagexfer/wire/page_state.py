"""The state word of one guest page: what PVALIDATE and RMPADJUST set (AMD64 APM volume 3; SEV-SNP ABI, RMP entry).

Nineteen bits, the same in memory (uint32 per page) as in a bundle entry, where they stand above gfn and operation.

    bit 0       size         0: RMP entry of 4 KiB, 1: part of a 2 MiB entry
    bit 1       validated    PVALIDATE was done
    bit 2       shared       page is the hypervisor's to read and write (not assigned to the guest)
    bit 3       vmsa         page holds a vCPU's save area
    bits 4-8    VMPL1 permissions: read, write, execute user, execute supervisor, supervisor shadow stack
    bits 9-13   VMPL2 permissions
    bits 14-18  VMPL3 permissions
"""

from __future__ import annotations

from typing import Final

SIZE_2M: Final = 1 << 0
VALIDATED: Final = 1 << 1
SHARED: Final = 1 << 2
VMSA: Final = 1 << 3

STATE_BITS: Final = 19
STATE_MASK: Final = (1 << STATE_BITS) - 1

PERMISSION_BITS: Final = 5
READ: Final = 1
WRITE: Final = 2
EXECUTE_USER: Final = 4
EXECUTE_SUPERVISOR: Final = 8
SHADOW_STACK: Final = 16
ALL_PERMISSIONS: Final = (
    15  # what a guest's kernel has at its own VMPL; shadow stacks are asked for page by page
)


def vmpl_shift(vmpl: int) -> int:
    """Where the permissions of `vmpl` (1 to 3) stand in a state word. VMPL0 has all permissions and no field."""
    if vmpl not in (1, 2, 3):
        raise ValueError(f"permissions are kept for VMPL 1 to 3, not {vmpl}")
    return 4 + PERMISSION_BITS * (vmpl - 1)


def permissions(state: int, vmpl: int) -> int:
    """Permission mask of `vmpl` in `state`."""
    return (state >> vmpl_shift(vmpl)) & ((1 << PERMISSION_BITS) - 1)


# A private page of an ordinary guest: validated, and all of VMPL1's as an SVSM grants it to the guest's kernel.
PRIVATE: Final = VALIDATED | ALL_PERMISSIONS << 4
