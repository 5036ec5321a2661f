"""The vCPU gate: how the SVSM stops and releases a guest's vCPUs without the hypervisor's word (R5).

Parking has two phases. The SVSM raises the global flag; every vCPU that sees it stops touching guest memory, leaves
its state where the SVSM can read it, and raises its own flag. Only when all own flags are up is the guest parked. A
guest kind implements `VcpuGate`; the hypervisor has no part in it and cannot make `parked` true.
"""

from __future__ import annotations

from typing import Protocol


class VcpuGate(Protocol):
    """Port of the SVSM to the vCPUs of one guest. All calls return at once."""

    @property
    def vcpus(self) -> int:
        """Number of vCPUs."""
        ...

    def raise_flag(self) -> None:
        """Phase one: raise the global flag. Calling it again changes nothing."""
        ...

    def parked(self) -> int:
        """Phase two: how many vCPUs have raised their own flag since `raise_flag`."""
        ...

    def save_state(self, vcpu: int) -> bytes:
        """State of a parked vCPU, 1 byte to 64 KiB. Raises GateError where it is not parked."""
        ...

    def load_state(self, vcpu: int, state: bytes) -> None:
        """Give a vCPU, parked or never run, the state that another gate saved. Raises GateError where it cannot."""
        ...

    def release(self) -> None:
        """Lower the flags: every vCPU goes on from its state. Calling it again changes nothing.

        A vCPU runs once both this and the host's `Hypervisor.resume` have come, in either order, and never after one alone.
        """
        ...
