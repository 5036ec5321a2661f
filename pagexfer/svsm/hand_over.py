"""What goes beside the pages once every vCPU is parked: the state of each vCPU, once, and the device state in parts."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from ..errors import GateError, MalformedData
from ..wire.constants import MAX_STATE_BYTES
from .content import vcpu_digest
from .device_state import Carried

if TYPE_CHECKING:
    from .gate import VcpuGate

# u32 vCPU, then its state.
_VCPU: Final = struct.Struct("<I")


class HandOver:
    """What was handed over so far of the guest behind `gate`, at either side."""

    def __init__(self, gate: VcpuGate) -> None:
        self._gate = gate
        self._vcpu_states: dict[int, bytes] = {}
        self.device_state = Carried()

    @property
    def begun(self) -> bool:
        """Whether anything was."""
        return bool(self._vcpu_states) or self.device_state.begun

    @property
    def missing(self) -> str:
        """What is not there yet, or nothing."""
        if len(self._vcpu_states) != self._gate.vcpus:
            return "the state of a vCPU is missing"
        return "" if self.device_state.complete else "a part of the device state is missing"

    def may_come(self, vcpu: int) -> bool:
        """Whether there is such a vCPU, and its state was not handed over before."""
        return 0 <= vcpu < self._gate.vcpus and vcpu not in self._vcpu_states

    def add(self, vcpu: int, state: bytes) -> None:
        """The state of a vCPU was handed over."""
        self._vcpu_states[vcpu] = state

    def save(self, vcpu: int) -> bytes:
        """The state of a parked vCPU. Raises GateError where it cannot be saved, or no bundle may carry it."""
        state = self._gate.save_state(vcpu)
        if not 1 <= len(state) <= MAX_STATE_BYTES:
            raise GateError(f"the state of vCPU {vcpu} has {len(state)} bytes, not 1 to {MAX_STATE_BYTES}")
        return state

    def load(self) -> None:
        """Give every vCPU the state that came for it. Raises GateError where one does not take it."""
        for vcpu, state in sorted(self._vcpu_states.items()):
            self._gate.load_state(vcpu, state)

    def vcpu_digest(self) -> bytes:
        """Digest of all vCPU states."""
        return vcpu_digest(self._vcpu_states)


def pack_vcpu(vcpu: int, state: bytes) -> bytes:
    """Payload of a VCPU_STATE bundle."""
    return _VCPU.pack(vcpu) + state


def parse_vcpu_untrusted(payload: bytes) -> tuple[int, bytes]:
    """A vCPU and its state. Raises MalformedData where the payload of a VCPU_STATE bundle is none."""
    if not _VCPU.size < len(payload) <= _VCPU.size + MAX_STATE_BYTES:
        raise MalformedData(f"VCPU_STATE payload of {len(payload)} bytes")
    return _VCPU.unpack_from(payload)[0], payload[_VCPU.size :]
