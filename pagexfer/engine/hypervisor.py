"""Port of the engine to the hypervisor: what runs, stops and describes the virtual machine from outside.

Nothing that a hypervisor says is believed by the SVSM: its stop comes after the SVSM's own park, its device state is an
opaque blob that it only carries, its dirty log is a hint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn, Protocol, runtime_checkable

from ..errors import GuestError
from ..wire.device_state import MAX_DEVICE_STATE_BYTES

if TYPE_CHECKING:
    from ..dirty import DirtyTracker


class Hypervisor(Protocol):
    """One virtual machine, as its monitor sees it."""

    @property
    def dirty_log(self) -> DirtyTracker | None:
        """The hypervisor's own dirty log, or None where it keeps none and the SVSM tracks every write itself.

        Its calls come from threads, one at a time; one that takes longer than any other call may is not waited for.
        """
        ...

    async def stop(self) -> None:
        """Stop every vCPU (QMP `stop`). Calling it again changes nothing."""
        ...

    async def resume(self) -> None:
        """Let vCPUs run (QMP `cont`). Calling it again changes nothing.

        A vCPU runs once both this and the SVSM's `VcpuGate.release` have come, in either order, and never after one alone.
        """
        ...

    async def save_device_state(self) -> bytes:
        """State of all that is not RAM or vCPU, opaque to the engine. The machine is stopped."""
        ...

    async def load_device_state(self, state: bytes) -> None:
        """Take over the state that the source's hypervisor saved. Raises GuestError where it does not fit."""
        ...


@runtime_checkable
class WatchedHypervisor(Hypervisor, Protocol):
    """A hypervisor that hears of what others do to its machine; the engine ends the move with it."""

    async def watch(self) -> NoReturn:
        """For ever. Raises GuestError once the machine is stopped, continued or gone, and not by this hypervisor's calls.

        What somebody else has stopped, `resume` leaves so, and raises GuestError.
        """
        ...


@runtime_checkable
class DescribedHypervisor(Hypervisor, Protocol):
    """A hypervisor that says what machine it has, so that two that do not fit part before a page is sent.

    One that cannot has no such methods, and what does not fit is found when the device state arrives, in black-out.
    """

    async def platform(self) -> bytes:
        """What a machine that takes this one over must be like, at most 16 KiB, opaque to the engine."""
        ...

    async def check_platform(self, platform: bytes) -> None:
        """Raises GuestError, with what differs, where a source's `platform` does not fit this machine.

        Bytes of the network: nothing may rely on them but a refusal, and `load_device_state` checks what it was given.
        """
        ...


@runtime_checkable
class ThrottlingHypervisor(Hypervisor, Protocol):
    """A hypervisor that can slow its vCPUs down; one that cannot has no such method, and the engine does without."""

    async def throttle(self, percentage: int) -> None:
        """Keep every vCPU from running for `percentage` (0 to 99) of the time (QEMU's cpu-throttle-percentage).

        It never holds up a park that the SVSM wants, and does not migrate with the guest.
        """
        ...


def octets(call: str, given: object) -> bytes:
    """What the hypervisor's `call` gave. Raises GuestError where that is not bytes."""
    if not isinstance(given, bytes | bytearray | memoryview):
        raise GuestError(f"the hypervisor's {call} gave a {type(given).__name__}, not bytes")
    return bytes(given)


async def saved_device_state(hypervisor: Hypervisor) -> bytes:
    """Its device state. Raises GuestError where that is not bytes, or over the cap of what a destination takes."""
    state = octets("save_device_state", await hypervisor.save_device_state())
    if len(state) > MAX_DEVICE_STATE_BYTES:
        raise GuestError(f"device state of {len(state)} bytes is over the cap of {MAX_DEVICE_STATE_BYTES}")
    return state
