"""The host side of a simulated guest: signals stop and continue the vCPU processes.

It knows process ids and the write rate, and nothing of the gate: a parked vCPU stays parked whatever happens
here.
"""

from __future__ import annotations

import os
import signal
import struct
from typing import TYPE_CHECKING, Final

import trio

from ...errors import GuestError
from ..duty_cycle import check_percentage
from ..platform import check_kind, describe_kind
from ..simulated_vcpu.control import MAX_RATE

if TYPE_CHECKING:
    import subprocess

    from ..simulated_vcpu.control import ControlPage

KIND: Final = "simulated"

# u32 magic "VDEV", u16 version, u16 reserved, u64 write rate in bytes a second.
_DEVICE_STATE: Final = struct.Struct("<IHHQ")
assert _DEVICE_STATE.size == 16

_MAGIC: Final = 0x5645_4456
_VERSION: Final = 1

_STOP_TIMEOUT_SECONDS: Final = 5.0
_STOP_POLL_SECONDS: Final = 0.0005


class SimulatedHypervisor:
    """`engine.hypervisor.Hypervisor` over the vCPU processes. The machine begins stopped."""

    def __init__(self, control: ControlPage, processes: list[subprocess.Popen[bytes]]) -> None:
        self._control = control
        self._processes = processes

    @property
    def dirty_log(self) -> None:
        """None: the guest's own tracker sees every write."""

    @property
    def throttle_percentage(self) -> int:
        """How much every vCPU is slowed down."""
        return self._control.throttle

    @property
    def process_ids(self) -> tuple[int, ...]:
        """Process id of each vCPU, for accounting and pinning."""
        return tuple(process.pid for process in self._processes)

    async def stop(self) -> None:
        """Stop every vCPU process and wait for it. Raises GuestError where one has died or does not stop."""
        self._signal(signal.SIGSTOP)
        with trio.move_on_after(_STOP_TIMEOUT_SECONDS):
            while not all(_is_stopped(process.pid) for process in self._processes):
                self._check_alive()
                await trio.sleep(_STOP_POLL_SECONDS)
            await trio.lowlevel.checkpoint()
            return
        raise GuestError(f"a vCPU process did not stop within {_STOP_TIMEOUT_SECONDS:g} s")

    async def resume(self) -> None:
        """Continue every vCPU process. Raises GuestError where one has died."""
        self._signal(signal.SIGCONT)
        await trio.lowlevel.checkpoint()

    async def throttle(self, percentage: int) -> None:
        """`engine.hypervisor.ThrottlingHypervisor`. Raises GuestError where `percentage` is none.

        By the control page: a process that a signal stops sees no park, and a park must not wait for it.
        """
        check_percentage(percentage)
        self._control.throttle = percentage
        await trio.lowlevel.checkpoint()

    async def platform(self) -> bytes:
        """`engine.hypervisor.DescribedHypervisor`."""
        await trio.lowlevel.checkpoint()
        return describe_kind(KIND)

    async def check_platform(self, platform: bytes) -> None:
        await trio.lowlevel.checkpoint()
        check_kind(platform, KIND)

    async def save_device_state(self) -> bytes:
        await trio.lowlevel.checkpoint()
        return _DEVICE_STATE.pack(_MAGIC, _VERSION, 0, self._control.rate)

    async def load_device_state(self, state: bytes) -> None:
        await trio.lowlevel.checkpoint()
        if len(state) != _DEVICE_STATE.size:
            raise GuestError(f"simulated device state has {_DEVICE_STATE.size} bytes, not {len(state)}")
        magic, version, reserved, rate = _DEVICE_STATE.unpack(state)
        if (magic, version, reserved) != (_MAGIC, _VERSION, 0):
            raise GuestError("this is not the device state of a simulated guest, or of another version")
        if rate > MAX_RATE:
            raise GuestError(f"simulated device state has an impossible write rate of {rate} bytes a second")
        self._control.rate = rate

    def _signal(self, number: signal.Signals) -> None:
        self._check_alive()
        for process in self._processes:
            process.send_signal(number)

    def _check_alive(self) -> None:
        for vcpu, process in enumerate(self._processes):
            if process.poll() is not None:
                raise GuestError(f"the process of vCPU {vcpu} has ended with code {process.returncode}")


def _is_stopped(process_id: int) -> bool:
    """Whether all threads of a child have stopped. The news stays, so that it may be asked again."""
    return os.waitid(os.P_PID, process_id, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None
