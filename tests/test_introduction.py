"""Once the source has proved itself, what goes wrong is the destination's own: it ends, and says why to both operators."""

from __future__ import annotations

import os
import resource
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio

from pagexfer.engine.destination import DestinationEngine
from pagexfer.errors import Outcome, SvsmLost, TransferAborted
from pagexfer.migration import MigrationReport, _local_slot, receive_guest, send_guest
from pagexfer.svsm.commands import destination_control

from .engine_guests import SmallMachine
from .loopback import HOST
from .small_guests import ATTESTOR

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from pagexfer.engine.slots import Slot
    from pagexfer.svsm.service import SlotService
    from pagexfer.wire.slot import SlotMemory

_PATIENCE_S = 20.0
_INTRODUCTION_S = 0.5

End = MigrationReport | TransferAborted


async def _migrate(machine: SmallMachine, *, isolated: bool = False, channels: int = 2) -> tuple[End, End]:
    """Both sides' ends; the destination is not told to end."""
    ends: list[End] = []

    async def receive(task_status: trio.TaskStatus[int]) -> None:
        receiving = partial(receive_guest, machine.destination, HOST, 0, ATTESTOR, isolated=isolated)
        try:
            ends.append(await receiving(stall_timeout_s=5, on_listening=task_status.started))
        except TransferAborted as aborted:
            ends.append(aborted)

    sent: End
    with trio.fail_after(_PATIENCE_S):
        async with trio.open_nursery() as nursery:
            port = await nursery.start(receive)
            try:
                sent = await send_guest(machine.source, HOST, port, ATTESTOR, channels=channels)
            except TransferAborted as aborted:
                sent = aborted
    return sent, ends[0]


def _ended(end: End, reason: str) -> str:
    assert isinstance(end, TransferAborted), end
    assert (end.outcome, end.reason) == (Outcome.ENDED, reason)
    return str(end)


@contextmanager
def _few_descriptors(count: int) -> Iterator[None]:
    """So many files may be open beside those that are."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + count, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


async def test_no_descriptors_for_the_doorbells_of_as_many_channels_as_the_source_wants() -> None:
    machine = SmallMachine()
    with _few_descriptors(100):
        ends = await _migrate(machine, isolated=True, channels=130)
    for end in ends:
        assert "no doorbell for slot" in _ended(end, "guest")
        assert "Too many open files" in str(end)
    assert machine.stayed()


async def test_slots_that_take_longer_than_an_introduction(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(DestinationEngine):
        def __init__(
            self, control_slot: Slot, make_slots: Callable[[int], Awaitable[list[Slot]]], *rest: object
        ) -> None:
            async def make_later(count: int) -> list[Slot]:
                await trio.sleep(2 * _INTRODUCTION_S)
                return await make_slots(count)

            super().__init__(control_slot, make_later, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("pagexfer.migration.DestinationEngine", Slow)
    monkeypatch.setattr("pagexfer.engine.destination.INTRODUCTION_TIMEOUT_S", _INTRODUCTION_S)
    machine = SmallMachine()
    for end in await _migrate(machine):
        assert isinstance(end, MigrationReport), end
    assert machine.moved()


@pytest.mark.parametrize("isolated", [False, True])
async def test_a_guest_that_another_session_has(isolated: bool) -> None:
    """As the one before leaves it that failed after its handshake."""
    machine = SmallMachine()
    machine.destination.memory.claim()
    for end in await _migrate(machine, isolated=isolated):
        assert "another session has the destination's guest" in _ended(end, "guest")
    assert machine.stayed()


async def test_an_svsm_that_is_lost_before_it_has_a_session(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(slot_id: int, serve: Callable[[SlotMemory], SlotService], *rest: int) -> Slot:
        slot = _local_slot(slot_id, serve, *rest)
        if isinstance(serve, partial) and serve.func is destination_control:
            slot._ring = lost
        return slot

    async def lost() -> None:
        await trio.lowlevel.checkpoint()
        raise SvsmLost("the SVSM is gone")

    monkeypatch.setattr("pagexfer.migration._local_slot", make)
    machine = SmallMachine()
    sent, received = await _migrate(machine)
    assert _ended(sent, "svsm") == "the destination says: the SVSM is gone"
    assert _ended(received, "svsm") == "the SVSM is gone"  # no guest can have been released
    assert machine.stayed()
