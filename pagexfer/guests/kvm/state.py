"""The state of one vCPU: read from KVM, written to KVM, and as bytes.

A blob is a header and sections in a fixed order, each with a tag and its length. Only a host that has what the vCPU was
given can take it: sizes, features and the speed of the TSC have to fit, and KVM refuses a register that it cannot hold.

These machines have no irqchip, neither KVM's nor one of their own, hence no LAPIC, IOAPIC or PIT whose state would move:
their guest takes no interrupt.

    header   magic u32, version u16, number of sections u16, bytes of all sections u32, reserved u32
    section  tag u16, reserved u16, length u32, then `length` bytes: the structure as KVM gives it
"""

from __future__ import annotations

import fcntl
import struct
from dataclasses import dataclass
from typing import Final, NamedTuple

from ...errors import GateError, MalformedData
from ...wire.constants import MAX_STATE_BYTES
from . import ioctls
from .cpuid import MAX_CPUID_ENTRIES, lacking

STATE_MAGIC: Final = 0x5543_564B  # "KVCU"
STATE_VERSION: Final = 2

MAX_MSRS: Final = 1024
_MSRS_PER_CALL: Final = 255  # KVM takes fewer than MAX_IO_MSRS, 256
MAX_XSAVE_BYTES: Final = 12 * 1024  # with AMX tiles it is 11008
_MAX_TSC_KHZ: Final = 100_000_000
# KVM itself takes two clocks so near to each other for one (tsc_tolerance_ppm): a crystal is no better than that.
_TSC_TOLERANCE: Final = 250e-6

_HEADER: Final = struct.Struct("<IHHII")
assert _HEADER.size == 16
_SECTION: Final = struct.Struct("<HHI")
assert _SECTION.size == 8


@dataclass(frozen=True, slots=True)
class VcpuState:
    """Structures of <linux/kvm.h> as KVM gives them; cpuid and msrs are entries without the counting header.

    `cpuid` is what the vCPU was given (`cpuid`), `tsc_khz` the speed of its time stamp counter.
    """

    cpuid: bytes
    sregs: bytes
    xcrs: bytes
    xsave: bytes
    regs: bytes
    msrs: bytes
    vcpu_events: bytes
    debugregs: bytes
    mp_state: bytes
    tsc_khz: bytes


class Host(NamedTuple):
    """What a vCPU can have on this host."""

    cpuid: bytes
    msr_indices: tuple[int, ...]
    xsave_bytes: int
    scales_tsc: bool


# tag, field, unit of length, least and most bytes. Tags are never reused.
_SECTIONS: Final = (
    (1, "cpuid", ioctls.CPUID_ENTRY.size, 0, MAX_CPUID_ENTRIES * ioctls.CPUID_ENTRY.size),
    (2, "sregs", 1, ioctls.SREGS_BYTES, ioctls.SREGS_BYTES),
    (3, "xcrs", 1, ioctls.XCRS_BYTES, ioctls.XCRS_BYTES),
    (4, "xsave", 64, ioctls.XSAVE_BYTES, MAX_XSAVE_BYTES),
    (5, "regs", 1, ioctls.REGS_BYTES, ioctls.REGS_BYTES),
    (6, "msrs", ioctls.MSR_ENTRY.size, 0, MAX_MSRS * ioctls.MSR_ENTRY.size),
    (7, "vcpu_events", 1, ioctls.VCPU_EVENTS_BYTES, ioctls.VCPU_EVENTS_BYTES),
    (8, "debugregs", 1, ioctls.DEBUGREGS_BYTES, ioctls.DEBUGREGS_BYTES),
    (9, "mp_state", 1, ioctls.MP_STATE_BYTES, ioctls.MP_STATE_BYTES),
    (10, "tsc_khz", 1, ioctls.TSC_KHZ.size, ioctls.TSC_KHZ.size),
)
# Even the largest blob fits one bundle of vCPU state.
assert _HEADER.size + sum(_SECTION.size + section[4] for section in _SECTIONS) <= MAX_STATE_BYTES


def encode(state: VcpuState) -> bytes:
    """The blob of `state`."""
    body = b"".join(
        _SECTION.pack(tag, 0, len(part)) + part
        for tag, field, *_ in _SECTIONS
        for part in (bytes(getattr(state, field)),)
    )
    return _HEADER.pack(STATE_MAGIC, STATE_VERSION, len(_SECTIONS), len(body), 0) + body


def parse_untrusted(blob: bytes) -> VcpuState:
    """The state in `blob`. Raises MalformedData for anything that `encode` does not make."""
    if len(blob) < _HEADER.size or len(blob) > MAX_STATE_BYTES:
        raise MalformedData(f"vCPU state of {len(blob)} bytes")
    header = _HEADER.unpack_from(blob)
    if header != (STATE_MAGIC, STATE_VERSION, len(_SECTIONS), len(blob) - _HEADER.size, 0):
        raise MalformedData("vCPU state with a wrong header")
    parts: dict[str, bytes] = {}
    offset = _HEADER.size
    for tag, field, unit, least, most in _SECTIONS:
        if len(blob) - offset < _SECTION.size:
            raise MalformedData(f"vCPU state ends before its section {field}")
        found, reserved, length = _SECTION.unpack_from(blob, offset)
        offset += _SECTION.size
        if (found, reserved) != (tag, 0) or not least <= length <= most or length % unit:
            raise MalformedData(f"vCPU state with a wrong section {field}")
        parts[field] = blob[offset : offset + length]
        if len(parts[field]) != length:
            raise MalformedData(f"vCPU state ends within its section {field}")
        offset += length
    if offset != len(blob):
        raise MalformedData(f"vCPU state with {len(blob) - offset} bytes behind its last section")
    return VcpuState(**parts)


def save(vcpu_fd: int, cpuid: bytes, host: Host) -> VcpuState:
    """Read a vCPU that is out of KVM_RUN and was given `cpuid`. Raises GateError where KVM refuses.

    The order matters, since two of these reads write: that of the run state handles a pending INIT or SIPI, which changes
    cs and rip, and that of the events delivers what a pending exception carries to cr2 or dr6. So they come before what
    reads those registers.
    """
    xsave = ioctls.KVM_GET_XSAVE if host.xsave_bytes == ioctls.XSAVE_BYTES else ioctls.KVM_GET_XSAVE2
    try:
        mp_state = _get(vcpu_fd, ioctls.KVM_GET_MP_STATE, ioctls.MP_STATE_BYTES)
        vcpu_events = _get(vcpu_fd, ioctls.KVM_GET_VCPU_EVENTS, ioctls.VCPU_EVENTS_BYTES)
        return VcpuState(
            cpuid=cpuid,
            sregs=_get(vcpu_fd, ioctls.KVM_GET_SREGS, ioctls.SREGS_BYTES),
            xcrs=_get(vcpu_fd, ioctls.KVM_GET_XCRS, ioctls.XCRS_BYTES),
            xsave=_get(vcpu_fd, xsave, host.xsave_bytes),
            regs=_get(vcpu_fd, ioctls.KVM_GET_REGS, ioctls.REGS_BYTES),
            msrs=_get_msrs(vcpu_fd, host.msr_indices),
            vcpu_events=vcpu_events,
            debugregs=_get(vcpu_fd, ioctls.KVM_GET_DEBUGREGS, ioctls.DEBUGREGS_BYTES),
            mp_state=mp_state,
            tsc_khz=ioctls.TSC_KHZ.pack(fcntl.ioctl(vcpu_fd, ioctls.KVM_GET_TSC_KHZ, 0)),
        )
    except OSError as error:
        raise GateError(f"KVM did not give the state of a vCPU: {error.strerror}") from error


def check_fits(state: VcpuState, host: Host) -> None:
    """Raises GateError where this host lacks what `state` needs: KVM itself takes any CPUID."""
    missing = lacking(state.cpuid, host.cpuid)
    if missing:
        count = f"{len(missing)} features" if len(missing) > 1 else "a feature"
        raise GateError(f"this host lacks {count} that the guest's processor has: {missing[0]}")
    if len(state.xsave) != host.xsave_bytes:
        raise GateError(f"XSAVE area of {len(state.xsave)} bytes; this processor's has {host.xsave_bytes}")


def give_cpuid(vcpu_fd: int, cpuid: bytes) -> None:
    """Before everything else, as it decides what the rest may hold, and before the first KVM_RUN. Raises GateError."""
    _set(vcpu_fd, ioctls.KVM_SET_CPUID2, ioctls.counted(cpuid, ioctls.CPUID_ENTRY.size), "CPUID")


def load(vcpu_fd: int, state: VcpuState, host: Host) -> None:
    """Write all but CPUID to a vCPU that is out of KVM_RUN. Raises GateError, naming the part, where KVM refuses.

    The order matters: the speed of the TSC decides what its MSR counts, XCR0 (which needs CR4.OSXSAVE) what XSAVE may hold,
    and the control registers of sregs what MSRs such as EFER may.
    """
    _set_tsc_khz(vcpu_fd, *ioctls.TSC_KHZ.unpack(state.tsc_khz), scales=host.scales_tsc)
    _set(vcpu_fd, ioctls.KVM_SET_SREGS, state.sregs, "special registers")
    _set(vcpu_fd, ioctls.KVM_SET_XCRS, state.xcrs, "XCRs")
    _set(vcpu_fd, ioctls.KVM_SET_XSAVE, state.xsave, "XSAVE area")
    _set(vcpu_fd, ioctls.KVM_SET_REGS, state.regs, "general registers")
    _set_msrs(vcpu_fd, state.msrs)
    _set(vcpu_fd, ioctls.KVM_SET_VCPU_EVENTS, state.vcpu_events, "pending events")
    _set(vcpu_fd, ioctls.KVM_SET_DEBUGREGS, state.debugregs, "debug registers")
    _set(vcpu_fd, ioctls.KVM_SET_MP_STATE, state.mp_state, "run state")


def _get(vcpu_fd: int, request: int, size: int) -> bytes:
    buffer = bytearray(size)
    fcntl.ioctl(vcpu_fd, request, buffer, True)
    return bytes(buffer)


def _set(vcpu_fd: int, request: int, value: bytes | bytearray, part: str) -> None:
    try:
        fcntl.ioctl(vcpu_fd, request, bytearray(value), True)
    except OSError as error:
        raise GateError(f"KVM refused the {part} of a vCPU state: {error.strerror}") from error


def _set_tsc_khz(vcpu_fd: int, wanted: int, *, scales: bool) -> None:
    """Have the TSC count as it did at the source.

    KVM is not asked for a faster one where the processor cannot scale it: it would set the guest's clock forward at each
    entry, and call that done. It is not asked for one of 0 kHz either, by which it means its own.
    """
    if not 0 < wanted <= _MAX_TSC_KHZ:
        raise GateError(f"no processor's TSC has {wanted} kHz")
    try:
        own = fcntl.ioctl(vcpu_fd, ioctls.KVM_GET_TSC_KHZ, 0)
        if scales and wanted != own:
            fcntl.ioctl(vcpu_fd, ioctls.KVM_SET_TSC_KHZ, wanted)
            own = wanted
    except OSError as error:
        raise GateError(f"this host cannot give a vCPU a TSC of {wanted} kHz: {error.strerror}") from error
    if abs(own - wanted) > _TSC_TOLERANCE * own:
        raise GateError(f"the guest's TSC has {wanted} kHz, this host's {own}, which it cannot scale")


def _get_msrs(vcpu_fd: int, indices: tuple[int, ...]) -> bytes:
    """Entries of those of `indices` that can be read: the host lists some that its guests' CPUID does not have."""
    read = b""
    while indices:
        batch = indices[:_MSRS_PER_CALL]
        entries = b"".join(ioctls.MSR_ENTRY.pack(index, 0, 0) for index in batch)
        buffer = ioctls.counted(entries, ioctls.MSR_ENTRY.size)
        # KVM stops at the first that it cannot read, and returns how many it read.
        done = fcntl.ioctl(vcpu_fd, ioctls.KVM_GET_MSRS, buffer, True)
        read += buffer[ioctls.ENTRIES_HEADER.size :][: done * ioctls.MSR_ENTRY.size]
        indices = indices[done + (done < len(batch)) :]
    return read


def _set_msrs(vcpu_fd: int, entries: bytes) -> None:
    """Write MSRs. One that cannot be written must already hold its value. Raises GateError with its number if not."""
    size = ioctls.MSR_ENTRY.size
    while entries:
        batch = entries[: _MSRS_PER_CALL * size]
        try:
            done = fcntl.ioctl(vcpu_fd, ioctls.KVM_SET_MSRS, ioctls.counted(batch, size), True)
        except OSError as error:
            raise GateError(f"KVM refused the MSRs of a vCPU state: {error.strerror}") from error
        refused = batch[done * size :][:size]
        if refused:
            index = ioctls.MSR_ENTRY.unpack(refused)[0]
            if _get_msrs(vcpu_fd, (index,)) != refused:
                raise GateError(f"this host cannot give MSR {index:#x} the value that the guest has in it")
        entries = entries[done * size + len(refused) :]
