"""A guest that really runs: 64-bit code in a VM over /dev/kvm that works the self-checking pattern."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from ...errors import GuestError
from ...svsm.memory import GuestMemory
from ...wire.constants import PAGE_SHIFT, PAGE_SIZE
from ..pattern import STATUS_GFN, STATUS_WORD_FIRST_GFN, Layout, RamCheck, check_ram, fill
from . import ioctls
from .gate import KvmGate
from .hypervisor import KIND, KvmHypervisor
from .image import RESERVED_PAGES, reserved_pages, wrong_reserved_pages
from .machine import MAX_RAM_BYTES, Machine
from .state import parse_untrusted

if TYPE_CHECKING:
    from types import TracebackType

    from ..pattern import Status
    from .state import VcpuState


class KvmGuest:
    """`Guest` of kind "kvm". Made by `boot` or `empty`; a context manager that closes it.

    Both give a machine that is stopped and whose gate has its flag raised, so a vCPU enters the guest after both
    `hypervisor.resume` and `gate.release`, in any order, and never without a state.
    """

    kind = KIND
    tracker = None  # KVM keeps the dirty log, so freshness is host-reported or audited by digest

    def __init__(self, memory: GuestMemory, vcpus: int) -> None:
        self.memory = memory
        self._machine = Machine(memory, vcpus)
        self.gate = KvmGate(self._machine)
        self.gate.raise_flag()
        self.hypervisor = KvmHypervisor(self._machine)

    @classmethod
    def boot(
        cls, ram_bytes: int, vcpus: int, *, write_rate_bytes: int, free: float = 0.25, seed: int = 1
    ) -> KvmGuest:
        """A guest before its first instruction: image and pattern in RAM, every page private, all vCPUs parked.

        All vCPUs together write `write_rate_bytes` per second; a rate above what they
        can do means full speed, 0 an idle guest that only ticks. Raises GuestError where it cannot be made.
        """
        if write_rate_bytes < 0:
            raise GuestError(f"a write rate cannot be {write_rate_bytes} bytes per second")
        layout = Layout.plan(ram_bytes, vcpus, free=free, seed=seed)
        guest = cls._create(layout)
        try:
            # All of it, also what stays zero: RAM of a confidential guest is pinned.
            guest.memory.prefault(0, ram_bytes)
            guest.memory.words[:RESERVED_PAGES] = reserved_pages()
            fill(guest.memory.words, layout)
            guest.memory.launch()
            guest._machine.set_write_rate(write_rate_bytes)
            guest._machine.set_first_states(layout)
        except BaseException:
            guest.close()
            raise
        return guest

    @classmethod
    def empty(cls, ram_bytes: int, vcpus: int) -> KvmGuest:
        """A destination: zero RAM, no page validated, vCPUs without a state, and an idle guest's write rate.

        Raises GuestError where it cannot be made.
        """
        return cls._create(Layout.plan(ram_bytes, vcpus))

    @classmethod
    def _create(cls, layout: Layout) -> KvmGuest:
        ram_bytes = layout.ram_pages * PAGE_SIZE
        if ram_bytes > MAX_RAM_BYTES:
            raise GuestError(
                f"a KVM guest has at most {MAX_RAM_BYTES >> 30}GiB of RAM, not {ram_bytes} bytes"
            )
        memory = GuestMemory.allocate(ram_bytes)
        try:
            return cls(memory, layout.vcpus)
        except BaseException:
            memory.close()
            raise

    def check(self) -> RamCheck:
        """Check everything there is of a parked guest: RAM, reserved pages, registers against status pages.

        Raises GateError where a vCPU is not parked. One that ended on its own is a fault in the result.
        """
        ended = [f"vCPU {vcpu.index} ended: {vcpu.fault}" for vcpu in self._machine.vcpus if vcpu.fault]
        parked = [vcpu.index for vcpu in self._machine.vcpus if not vcpu.fault]
        states = {vcpu: parse_untrusted(self.gate.save_state(vcpu)) for vcpu in parked}
        ram = check_ram(self.memory.words, self.gate.vcpus)
        lost = [
            f"vCPU {vcpu}: its registers are not as its status page says"
            for vcpu, state in states.items()
            if not _agree(
                state, ram.statuses[vcpu], int(self.memory.words[STATUS_GFN + vcpu, STATUS_WORD_FIRST_GFN])
            )
        ]
        reserved = [
            f"page {gfn} of code or tables is not as booted"
            for gfn in wrong_reserved_pages(self.memory.words)
        ]
        return RamCheck(ram.statuses, (*ended, *lost, *reserved, *ram.faults))

    def close(self) -> None:
        """End the vCPU threads and give back VM and RAM. Calling it again changes nothing."""
        self._machine.close()
        self.memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _agree(state: VcpuState, status: Status, first_gfn: int) -> bool:
    """Whether general and debug registers of a parked vCPU hold what its status page says."""
    general = ioctls.REGS.unpack(state.regs)
    dr0 = ioctls.DEBUGREGS.unpack(state.debugregs)[0]
    return (general[ioctls.REGS_R13], general[ioctls.REGS_R14], dr0) == (
        status.round,
        status.position,
        first_gfn << PAGE_SHIFT,
    )
