"""CPUID of a vCPU: what the host's KVM offers, made a vCPU's own, and compared with what a state that comes in needs.

A machine keeps the entries that it gave each vCPU, and these are part of the state: what KVM gives back instead has bits
that follow other registers (OSXSAVE follows CR4), and by kind of KVM features that it does not offer.
"""

from __future__ import annotations

import fcntl
from typing import TYPE_CHECKING, Final

from . import ioctls

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_CPUID_ENTRIES: Final = 256  # KVM_MAX_CPUID_ENTRIES

# Leaves that say by their bits what the processor can do: function and index, and which of eax, ebx, ecx, edx do. Others
# describe caches, counts and names, in which hosts may differ without harm.
_FEATURES: Final = {
    (0x0000_0001, 0): "cd",
    (0x0000_0006, 0): "a",
    (0x0000_0007, 0): "bcd",
    (0x0000_0007, 1): "abcd",
    (0x0000_0007, 2): "d",
    (0x0000_000D, 0): "ad",  # parts of XCR0
    (0x0000_000D, 1): "acd",  # kinds of XSAVE, parts of IA32_XSS
    (0x4000_0001, 0): "a",  # KVM's own
    (0x8000_0001, 0): "cd",
    (0x8000_0007, 0): "bd",
    (0x8000_0008, 0): "b",
    (0x8000_000A, 0): "d",
    (0x8000_001F, 0): "a",
    (0x8000_0021, 0): "a",
    (0x8000_0022, 0): "a",
}
# Leaves that say which vCPU this is: that of all processors, two of Intel's, AMD's.
_BASIC: Final = 0x0000_0001
_TOPOLOGY: Final = (0x0000_000B, 0x0000_001F)
_AMD_TOPOLOGY: Final = 0x8000_001E


def offered(device: int) -> bytes:
    """Entries with all that KVM can give a guest on this host. Raises OSError where it does not say."""
    buffer = ioctls.counted(bytes(MAX_CPUID_ENTRIES * ioctls.CPUID_ENTRY.size), ioctls.CPUID_ENTRY.size)
    fcntl.ioctl(device, ioctls.KVM_GET_SUPPORTED_CPUID, buffer, True)
    entries, _ = ioctls.ENTRIES_HEADER.unpack_from(buffer)
    return bytes(buffer[ioctls.ENTRIES_HEADER.size :][: entries * ioctls.CPUID_ENTRY.size])


def of_vcpu(entries: bytes, vcpu: int) -> bytes:
    """`entries` with the APIC id of vCPU number `vcpu`, which is its number, where they say one.

    How many vCPUs share what stays as it is on the host.
    """
    own = b""
    for function, index, flags, eax, ebx, ecx, edx in ioctls.CPUID_ENTRY.iter_unpack(entries):
        if function == _BASIC:
            ebx = ebx & 0x00FF_FFFF | (vcpu & 0xFF) << 24
        elif function in _TOPOLOGY:
            edx = vcpu
        elif function == _AMD_TOPOLOGY:
            eax, ebx = vcpu, ebx & ~0xFF | vcpu & 0xFF
        own += ioctls.CPUID_ENTRY.pack(function, index, flags, eax, ebx, ecx, edx)
    return own


def lacking(wanted: bytes, available: bytes) -> list[str]:
    """The features that entries `wanted` have and `available` have not, by leaf, register and bit."""
    here: dict[tuple[int, int, str], int] = {}
    for function, index, register, bits in _features(available):
        here[function, index, register] = bits
    return [
        f"CPUID {function:#x}.{index} e{register}x bit {bit}"
        for function, index, register, bits in _features(wanted)
        for bit in range(32)
        if bits & ~here.get((function, index, register), 0) & 1 << bit
    ]


def _features(entries: bytes) -> Iterator[tuple[int, int, str, int]]:
    for function, index, _, *registers in ioctls.CPUID_ENTRY.iter_unpack(entries):
        for register, bits in zip("abcd", registers, strict=True):
            if register in _FEATURES.get((function, index), ""):
                yield function, index, register, bits
