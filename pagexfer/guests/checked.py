"""Guests that can prove that they are whole, and the proof itself: what the command and the examples migrate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, Protocol, Self

import trio

from ..errors import GuestError
from . import kvm
from .guest import Guest
from .kvm import KvmGuest
from .pattern import read_status
from .simulated import SimulatedGuest

if TYPE_CHECKING:
    from types import TracebackType

    from .pattern import RamCheck

GuestKind = Literal["auto", "kvm", "simulated"]

_PARK_TIMEOUT_S: Final = 10.0


class CheckedGuest(Guest, Protocol):
    """A guest whose content says what it must be."""

    def check(self) -> RamCheck:
        """Check all of RAM and the vCPUs. Raises GateError where a vCPU is not parked."""
        ...

    def close(self) -> None:
        """End the guest and give its memory back."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class Proof:
    """What `prove` found: whole RAM as the guest's own history says, and every vCPU going on."""

    kind: str
    consistent: bool
    progressed: bool
    faults: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        return {
            "kind": self.kind,
            "consistent": self.consistent,
            "progressed": self.progressed,
            "faults": list(self.faults),
        }


def resolve_kind(kind: GuestKind) -> Literal["kvm", "simulated"]:
    """The kind that "auto" means here. Raises GuestError where KVM was asked for and this machine cannot."""
    reason = kvm.unavailable_reason() if kind != "simulated" else None
    if kind == "kvm" and reason is not None:
        raise GuestError(f"{reason}; or choose the simulated guest")
    return "simulated" if kind == "simulated" or reason is not None else "kvm"


def boot_guest(kind: GuestKind, ram_bytes: int, vcpus: int, write_rate_bytes: int) -> CheckedGuest:
    """A guest with its workload in place, stopped. Raises GuestError where it cannot be made."""
    guest_type = KvmGuest if resolve_kind(kind) == "kvm" else SimulatedGuest
    return guest_type.boot(ram_bytes, vcpus, write_rate_bytes=write_rate_bytes)


def empty_guest(kind: GuestKind, ram_bytes: int, vcpus: int) -> CheckedGuest:
    """A destination for a guest of this kind. Raises GuestError where it cannot be made."""
    guest_type = KvmGuest if resolve_kind(kind) == "kvm" else SimulatedGuest
    return guest_type.empty(ram_bytes, vcpus)


async def start(guest: Guest) -> None:
    """Let a booted guest run."""
    await guest.hypervisor.resume()
    guest.gate.release()


async def prove(guest: CheckedGuest, seconds: float) -> Proof:
    """Let a guest that runs go on for `seconds`, then park it and check everything; it stays parked.

    Raises GuestError where a vCPU does not park.
    """
    before = _activity(guest)
    await trio.sleep(seconds)
    guest.gate.raise_flag()
    with trio.move_on_after(_PARK_TIMEOUT_S):
        while guest.gate.parked() < guest.gate.vcpus:  # noqa: ASYNC110 (the gate has no event)
            await trio.sleep(0.001)
    if guest.gate.parked() < guest.gate.vcpus:
        raise GuestError(f"not every vCPU parked within {_PARK_TIMEOUT_S:g} s")
    progressed = all(now > then for now, then in zip(_activity(guest), before, strict=True))
    check = await trio.to_thread.run_sync(guest.check)
    return Proof(guest.kind, check.consistent, progressed, check.faults)


def _activity(guest: Guest) -> list[int]:
    statuses = [read_status(guest.memory.words, vcpu) for vcpu in range(guest.gate.vcpus)]
    return [status.steps + status.ticks for status in statuses]
