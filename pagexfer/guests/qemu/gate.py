"""The vCPU gate of a stock QEMU: the park is QMP `stop`, and registers travel in QEMU's own device state.

This is emulation. A QEMU that lies about having stopped is believed here, which R5 forbids on hardware: only an SVSM in the
guest can decide that vCPUs are parked.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ...errors import GateError

if TYPE_CHECKING:
    from .machine import QemuMachine

# magic u32 "QCPU", version u16, index u16; then "architecture QOM-type" in UTF-8.
_RECORD: Final = struct.Struct("<IHH")
assert _RECORD.size == 8
_MAGIC: Final = 0x5550_4351
_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class CpuModel:
    """What both ends must agree on for one vCPU."""

    index: int
    target: str
    qom_type: str

    def pack(self) -> bytes:
        return _RECORD.pack(_MAGIC, _VERSION, self.index) + f"{self.target} {self.qom_type}".encode()


class QemuGate:
    """`VcpuGate` of one QEMU."""

    def __init__(self, machine: QemuMachine, models: tuple[CpuModel, ...]) -> None:
        self._machine = machine
        self._models = models

    @property
    def vcpus(self) -> int:
        return len(self._models)

    def raise_flag(self) -> None:
        if not self._machine.flag_up:
            self._machine.flag_up = True
            self._machine.wake()

    def parked(self) -> int:
        return self.vcpus if self._machine.flag_up and self._machine.stopped else 0

    def save_state(self, vcpu: int) -> bytes:
        self._check_parked(vcpu)
        return self._models[vcpu].pack()

    def load_state(self, vcpu: int, state: bytes) -> None:
        self._check_parked(vcpu)
        if state != self._models[vcpu].pack():
            raise GateError(f"the source's vCPU {vcpu} is of another kind than {self._models[vcpu].qom_type}")

    def release(self) -> None:
        if self._machine.flag_up:
            self._machine.flag_up = False
            self._machine.wake()

    def _check_parked(self, vcpu: int) -> None:
        if not 0 <= vcpu < self.vcpus:
            raise GateError(f"there is no vCPU {vcpu}: the guest has {self.vcpus}")
        if not self.parked():
            raise GateError(f"vCPU {vcpu} is not parked")
