"""A process that may have no more files or threads: one line says so, and nothing stays open."""

from __future__ import annotations

import gc
import threading
from typing import TYPE_CHECKING, cast

import pytest
import trio

from pagexfer.errors import GuestError, TransferAborted, UsageError
from pagexfer.guests import kvm
from pagexfer.guests.kvm import KvmGuest
from pagexfer.guests.simulated import SimulatedGuest
from pagexfer.isolation.mailbox import Mailbox
from pagexfer.migration import MigrationReport, receive_guest, send_guest

from .engine_guests import SmallMachine
from .few_descriptors import few_descriptors, open_files
from .loopback import HOST
from .small_guests import ATTESTOR

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from pagexfer.svsm.service import SlotService

_MIB = 1 << 20


@pytest.mark.parametrize("guest_type", [SimulatedGuest, KvmGuest])
def test_a_guest_that_cannot_be_made_is_said_so_and_leaves_nothing(
    guest_type: type[KvmGuest] | type[SimulatedGuest],
) -> None:
    if guest_type is KvmGuest and kvm.unavailable_reason() is not None:
        pytest.skip("no KVM here")
    guest_type.empty(_MIB, 1).close()  # whatever is imported late
    gc.collect()
    before, count, lines = open_files(), 0, []
    while line := _refusal(guest_type, count):
        gc.collect()
        assert open_files() == before, count
        lines.append(line)
        count += 1
    assert count > 3
    assert all("Too many open files" in line or "cannot provide RAM" in line for line in lines)
    gc.collect()
    assert open_files() == before


def _refusal(guest_type: type[KvmGuest] | type[SimulatedGuest], count: int) -> str:
    """Why a guest is not made with so many files more; empty where it is."""
    try:
        with few_descriptors(count):
            guest_type.empty(_MIB, 1).close()
    except GuestError as error:
        return str(error)
    return ""


async def _receive(
    machine: SmallMachine, isolated: bool, listening: Callable[[int], None]
) -> MigrationReport:
    return await receive_guest(
        machine.destination,
        HOST,
        0,
        ATTESTOR,
        isolated=isolated,
        stall_timeout_s=0.5,
        on_listening=listening,
    )


async def _end(side: Callable[[], Awaitable[MigrationReport]], count: int) -> tuple[type[Exception], str]:
    with pytest.raises((UsageError, TransferAborted)) as caught, few_descriptors(count):
        await side()
    kind, line = type(caught.value), str(caught.value)
    caught.value.__traceback__ = None
    del caught
    gc.collect()
    return kind, line


async def test_an_isolated_source_without_descriptors_is_bad_usage() -> None:
    machine = SmallMachine()

    async def send() -> MigrationReport:
        return await send_guest(machine.source, HOST, 1, ATTESTOR, channels=2, isolated=True)

    await _end(send, 100)  # whatever is imported late
    before, lines = open_files(), set()
    for count in range(18):
        _, line = await _end(send, count)
        lines.add(line.partition(":")[0])
        assert open_files() == before, (count, line)
    assert "the engine's process cannot be started" in lines
    assert "no memory for the mailbox" in lines
    assert machine.source.gate.running


async def test_an_isolated_destination_without_descriptors_is_bad_usage() -> None:
    machine = SmallMachine()
    with trio.move_on_after(0):
        await _receive(machine, True, lambda _port: None)
    gc.collect()
    before = open_files()
    for count in range(8):
        kind, line = await _end(lambda: _receive(machine, True, lambda _port: None), count)
        assert kind is UsageError, line
        assert open_files() == before, (count, line)


def test_a_slot_without_a_thread_is_bad_usage_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    gc.collect()
    before = open_files()
    with Mailbox(2, 2, 1 << 16, lambda: None) as mailbox:
        mailbox.open(0, _serve)
        monkeypatch.setattr(threading.Thread, "start", none)
        with pytest.raises(UsageError, match="no thread for slot 1: can't start new thread"):
            mailbox.open(1, _serve)
    del mailbox
    gc.collect()
    assert open_files() == before


def _serve(_slot: object) -> SlotService:
    return cast("SlotService", object())  # of which nobody asks anything
