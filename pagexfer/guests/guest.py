"""The shape that all guests share, so that whatever migrates one migrates them all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

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
