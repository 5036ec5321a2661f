"""The vCPU gate of a KVM guest: parks by the control page, reads and writes parked vCPUs by KVM.

SVSM side in role: it believes the own flags that guest code raises and no word of the hypervisor (R5).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ...errors import GateError, MalformedData
from .state import encode, parse_untrusted

if TYPE_CHECKING:
    from .machine import Machine
    from .vcpu import Vcpu

# From own flag to OUT is one instruction; the rest is for a thread that the host does not run at once.
_LEAVE_TIMEOUT_S: Final = 1.0


class KvmGate:
    """`VcpuGate` of `machine`."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._ticket = 0

    @property
    def vcpus(self) -> int:
        return len(self._machine.vcpus)

    def raise_flag(self) -> None:
        """Phase one. A vCPU whose thread sleeps, for pacing or from an earlier park, is woken to see it."""
        switch = self._machine.switch
        with switch.lock:
            if switch.control.park_flag == 0:
                self._ticket += 1
                switch.control.park_flag = self._ticket
                switch.changed.notify_all()

    def parked(self) -> int:
        """Phase two. A vCPU that the hypervisor stopped before it raised its flag is not parked."""
        return sum(vcpu.is_parked for vcpu in self._machine.vcpus)

    def save_state(self, vcpu: int) -> bytes:
        """The blob of `state` of a parked vCPU. Raises GateError where it is not parked."""
        target = self._vcpu(vcpu)
        target.require_readable(_LEAVE_TIMEOUT_S)
        return encode(self._machine.save_vcpu(target))

    def load_state(self, vcpu: int, state: bytes) -> None:
        """Raises GateError where `state` is malformed, or this machine cannot hold it, or the vCPU is not parked.

        After a refusal half of the state may be loaded, so the vCPU does not run until a state was loaded in whole.
        """
        target = self._vcpu(vcpu)
        target.require_writable(_LEAVE_TIMEOUT_S)
        try:
            parsed = parse_untrusted(state)
        except MalformedData as error:
            raise GateError(f"vCPU {vcpu} cannot take its state: {error}") from error
        target.runnable = False
        self._machine.load_vcpu(target, parsed)
        self._machine.hold(target)

    def release(self) -> None:
        """Lower the flag. A vCPU that never got a state stays where it is."""
        switch = self._machine.switch
        with switch.lock:
            switch.control.park_flag = 0
            switch.changed.notify_all()

    def _vcpu(self, vcpu: int) -> Vcpu:
        if not 0 <= vcpu < self.vcpus:
            raise GateError(f"there is no vCPU {vcpu}; this guest has {self.vcpus}")
        return self._machine.vcpus[vcpu]
