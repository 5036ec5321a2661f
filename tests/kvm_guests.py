"""What tests of the KVM guest do with one: start it, wait for it, park it, move it by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from pagexfer.guests import kvm
from pagexfer.guests.kvm.state import VcpuState, encode, parse_untrusted
from pagexfer.guests.pattern import read_status

if TYPE_CHECKING:
    from collections.abc import Callable

    from pagexfer.guests.guest import Guest

UNAVAILABLE = kvm.unavailable_reason()
needs_kvm = pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))

RAM_BYTES = 2 << 20
VCPUS = 2
FULL_SPEED = 1 << 40


async def start(guest: Guest) -> None:
    guest.gate.release()
    await guest.hypervisor.resume()


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(30):
        while not condition():  # noqa: ASYNC110 - a vCPU has no event to wait for
            await trio.sleep(0.0005)


async def park(guest: Guest) -> None:
    guest.gate.raise_flag()
    await until(lambda: guest.gate.parked() == VCPUS)


def steps(guest: Guest) -> list[int]:
    return [read_status(guest.memory.words, vcpu).steps for vcpu in range(VCPUS)]


def ticks(guest: Guest) -> list[int]:
    return [read_status(guest.memory.words, vcpu).ticks for vcpu in range(VCPUS)]


def errors(guest: Guest) -> int:
    return sum(read_status(guest.memory.words, vcpu).errors for vcpu in range(VCPUS))


async def progress(guest: Guest, pages: int = 1000) -> None:
    """Until every vCPU has written `pages` more pages."""
    before = steps(guest)
    await until(lambda: all(now >= then + pages for now, then in zip(steps(guest), before, strict=True)))


async def run_and_park(guest: Guest) -> None:
    await start(guest)
    await progress(guest)
    await park(guest)


def move(source: Guest, destination: Guest) -> None:
    """RAM and vCPUs of a parked guest, by hand."""
    destination.memory.words[:] = source.memory.words
    for vcpu in range(VCPUS):
        destination.gate.load_state(vcpu, source.gate.save_state(vcpu))


def edit_state(state: bytes, edit: Callable[[VcpuState], VcpuState]) -> bytes:
    return encode(edit(parse_untrusted(state)))
