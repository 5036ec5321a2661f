"""The shape that all guests share, so that whatever migrates one migrates them all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from ..dirty import DirtyTracker
    from ..engine.hypervisor import Hypervisor
    from ..svsm.gate import VcpuGate
    from ..svsm.memory import GuestMemory


class Guest(Protocol):
    """A guest of any kind: what the SVSM sees of it, and what the host sees of it."""

    @property
    def kind(self) -> str:
        """Short name: "simulated", "kvm", "qemu"."""
        ...

    @property
    def memory(self) -> GuestMemory:
        """RAM and page states (SVSM side)."""
        ...

    @property
    def gate(self) -> VcpuGate:
        """vCPUs (SVSM side)."""
        ...

    @property
    def tracker(self) -> DirtyTracker | None:
        """The SVSM's own dirty tracker; None where it has to rely on the hypervisor's log."""
        ...

    @property
    def hypervisor(self) -> Hypervisor:
        """The host side."""
        ...


@runtime_checkable
class GuestElsewhere(Guest, Protocol):
    """A guest in a process of its own, which goes on to have it where the one that migrates it dies.

    A destination's journal says so, and `recover` then looks for that process.
    """

    @property
    def process_id(self) -> int:
        """The process that has the guest's memory."""
        ...
