"""The hypervisor of a KVM guest as the engine sees it: stop, resume, device state, dirty log. Untrusted in role."""

from __future__ import annotations

import fcntl
import struct
from typing import TYPE_CHECKING, Final

import trio

from ...dirty.kvm_log import KvmDirtyLog
from ...errors import GuestError, MalformedData
from ..duty_cycle import check_percentage
from ..platform import check_kind, describe_kind
from . import ioctls

if TYPE_CHECKING:
    from .machine import Machine

KIND: Final = "kvm"

# Device state: magic u32, version u32, KVM clock u64 in ns, write rate u64 in bytes per second.
_DEVICE_STATE: Final = struct.Struct("<IIQQ")
assert _DEVICE_STATE.size == 24
_MAGIC: Final = 0x4456_4B50
_VERSION: Final = 1

_MAX_WRITE_RATE_BYTES: Final = 1 << 50
_MAX_CLOCK_NS: Final = 1 << 62


class KvmHypervisor:
    """`Hypervisor` of `machine`."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._dirty_log = KvmDirtyLog(machine.vm_fd, machine.ram_slot)

    @property
    def dirty_log(self) -> KvmDirtyLog:
        return self._dirty_log

    async def stop(self) -> None:
        """Kick every vCPU out of the guest, wherever in its work it is. Raises GuestError where one does not leave."""
        self._machine.set_running(False)
        # A thread of its own, as a vCPU that the host does not run at once would hold up the whole loop.
        await trio.to_thread.run_sync(self._machine.wait_stopped, abandon_on_cancel=True)

    async def resume(self) -> None:
        self._machine.set_running(True)
        await trio.lowlevel.checkpoint()

    async def throttle(self, percentage: int) -> None:
        """`engine.hypervisor.ThrottlingHypervisor`. Raises GuestError where `percentage` is none."""
        check_percentage(percentage)
        self._machine.set_throttle(percentage)
        await trio.lowlevel.checkpoint()

    async def platform(self) -> bytes:
        """`engine.hypervisor.DescribedHypervisor`."""
        await trio.lowlevel.checkpoint()
        return describe_kind(KIND)

    async def check_platform(self, platform: bytes) -> None:
        await trio.lowlevel.checkpoint()
        check_kind(platform, KIND)

    async def save_device_state(self) -> bytes:
        """The clock and the write rate, which is this machine's only device."""
        buffer = bytearray(ioctls.CLOCK.size)
        try:
            fcntl.ioctl(self._machine.vm_fd, ioctls.KVM_GET_CLOCK, buffer, True)
        except OSError as error:
            raise GuestError(f"KVM did not give its clock: {error.strerror}") from error
        clock_ns, _ = ioctls.CLOCK.unpack(buffer)
        await trio.lowlevel.checkpoint()
        return _DEVICE_STATE.pack(_MAGIC, _VERSION, clock_ns, self._machine.write_rate_bytes)

    async def load_device_state(self, state: bytes) -> None:
        """Raises GuestError, changing nothing, where `state` is malformed."""
        try:
            clock_ns, write_rate_bytes = parse_device_state_untrusted(state)
        except MalformedData as error:
            raise GuestError(str(error)) from error
        try:
            fcntl.ioctl(self._machine.vm_fd, ioctls.KVM_SET_CLOCK, ioctls.CLOCK.pack(clock_ns, 0))
        except OSError as error:
            raise GuestError(f"KVM refused the clock of a device state: {error.strerror}") from error
        self._machine.set_write_rate(write_rate_bytes)
        await trio.lowlevel.checkpoint()


def parse_device_state_untrusted(state: bytes) -> tuple[int, int]:
    """Clock in ns and write rate in bytes per second. Raises MalformedData."""
    if len(state) != _DEVICE_STATE.size:
        raise MalformedData(f"device state of {len(state)} bytes, not {_DEVICE_STATE.size}")
    magic, version, clock_ns, write_rate_bytes = _DEVICE_STATE.unpack(state)
    if (magic, version) != (_MAGIC, _VERSION):
        raise MalformedData("device state of another kind of hypervisor")
    if clock_ns > _MAX_CLOCK_NS or write_rate_bytes > _MAX_WRITE_RATE_BYTES:
        raise MalformedData("device state with a clock or a write rate out of range")
    return clock_ns, write_rate_bytes
