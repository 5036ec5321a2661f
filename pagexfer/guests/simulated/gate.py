"""The vCPU gate of a simulated guest: parking by flags in the SVSM's own memory, without the hypervisor."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from ...errors import GateError, MalformedData
from ..simulated_vcpu.registers import Registers, parse_registers_untrusted

if TYPE_CHECKING:
    import socket

    from ..simulated_vcpu.control import ControlPage


class SimulatedGate:
    """`svsm.gate.VcpuGate` over a control page; `bells` wakes the vCPUs, one socket each."""

    def __init__(self, control: ControlPage, bells: list[socket.socket], ram_pages: int) -> None:
        self._control = control
        self._bells = bells
        self._ram_pages = ram_pages

    @property
    def vcpus(self) -> int:
        return self._control.vcpus

    def raise_flag(self) -> None:
        if not self._control.flag_up:
            self._control.turn_flag()
            self._ring()

    def parked(self) -> int:
        return sum(self._is_parked(vcpu) for vcpu in range(self.vcpus))

    def save_state(self, vcpu: int) -> bytes:
        self._check_parked(vcpu)
        state = self._control.registers(vcpu)
        if state is None:
            raise GateError(f"vCPU {vcpu} has no state yet: it waits for one to be loaded")
        return state

    def load_state(self, vcpu: int, state: bytes) -> None:
        self._check_parked(vcpu)
        try:
            registers = parse_registers_untrusted(state)
        except MalformedData as error:
            raise GateError(f"vCPU {vcpu} cannot take this state: {error}") from error
        registers.check_fits(self._ram_pages, vcpu)
        self._control.set_registers(vcpu, state)

    def release(self) -> None:
        """Lower the flags. Raises GateError, releasing nobody, where a vCPU has no state to go on from."""
        if not self._control.flag_up:
            return
        for vcpu in range(self.vcpus):
            if self._control.registers(vcpu) is None:
                raise GateError(f"vCPU {vcpu} cannot be released: load its state first")
        self._control.turn_flag()
        self._ring()

    def registers(self, vcpu: int) -> Registers:
        """The saved state of a parked vCPU. Raises GateError where it is not parked or has none."""
        return parse_registers_untrusted(self.save_state(vcpu))

    def _is_parked(self, vcpu: int) -> bool:
        return self._control.flag_up and self._control.own_flag(vcpu) == self._control.generation

    def _check_parked(self, vcpu: int) -> None:
        if not 0 <= vcpu < self.vcpus:
            raise GateError(f"there is no vCPU {vcpu}: the guest has {self.vcpus}")
        if not self._is_parked(vcpu):
            raise GateError(f"vCPU {vcpu} is not parked")

    def _ring(self) -> None:
        for bell in self._bells:
            # A full socket wakes the vCPU as well. A dead vCPU never parks, and that is how it shows.
            with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
                bell.send(b"\0")
