"""A slot between two threads, by real doorbells and a real handler: rings that come, get lost, and are never answered."""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from pagexfer.engine.doorbell import FALLBACK_S, Doorbells
from pagexfer.engine.slots import Slot
from pagexfer.errors import GuestError, RefusalCode, SvsmLost, SvsmRefused
from pagexfer.isolation.mailbox import Mailbox
from pagexfer.svsm import handler
from pagexfer.svsm.service import Answer, SlotService
from pagexfer.svsm.staging import StagingPool
from pagexfer.wire.slot import Command, SessionStatus, SlotGeometry, SlotMemory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pagexfer.svsm.service import Call

_GEOMETRY = SlotGeometry(3, 2, 1 << 16)
_TIMEOUT_S = 0.3


class Svsm:
    """What stands behind one slot: EXPORT answers with its argument, EPOCH once it is let, ABORT never."""

    def __init__(self, slots: int = 1) -> None:
        self.state = SessionStatus.PRECOPY
        self.staging = StagingPool()
        self.local_fault = ""
        self.lock = threading.Lock()
        self.let = threading.Event()
        self.is_dead = threading.Event()
        self.mailbox = Mailbox(slots, _GEOMETRY.buffers, _GEOMETRY.buffer_bytes, self.is_dead.set)

    def serve(self, memory: SlotMemory) -> SlotService:
        def export(call: Call) -> Answer:
            return Answer(result=call.argument)

        def epoch(_call: Call) -> Answer:
            self.let.wait(10)
            return Answer(result=1)

        def abort(_call: Call) -> Answer:
            raise ValueError("a defect")

        commands = {Command.EXPORT: export, Command.EPOCH: epoch, Command.ABORT: abort}
        return SlotService(memory, self, commands, shared=True)

    def host(self) -> Host:
        return Host(self)


class Host:
    """The other end, which has the memory and the doorbells and nothing else."""

    def __init__(self, svsm: Svsm) -> None:
        self.to_svsm, self.to_host = svsm.mailbox.open(_GEOMETRY.slot_id, svsm.serve)
        shared = memoryview(mmap.mmap(svsm.mailbox.memory_fd, 0))
        self.memory = SlotMemory(shared[(len(svsm.mailbox.handlers) - 1) * _GEOMETRY.slot_bytes :])
        self.doorbells = Doorbells(self.memory, self.to_svsm, self.to_host, _TIMEOUT_S)
        self.slot = Slot(self.memory, self.doorbells.ring)


# Where a host waits for an answer: as a task, and as a channel's thread does, which has no event loop.
async def _in_loop(slot: Slot, command: Command, argument: int = 0) -> int:
    return (await slot.command(command, argument)).result


async def _in_thread(slot: Slot, command: Command, argument: int = 0) -> int:
    def run() -> int:
        try:
            slot.command(command, argument).send(None)
        except StopIteration as end:
            result: int = end.value.result
            return result
        raise AssertionError("it waited for an event loop")

    return await trio.to_thread.run_sync(run)


_Ask = Callable[[Slot, Command, int], Awaitable[int]]
ASKS = pytest.mark.parametrize("ask", [_in_loop, _in_thread])


@pytest.fixture
def svsm() -> Iterator[Svsm]:
    svsm = Svsm()
    with svsm.mailbox:
        yield svsm
        svsm.let.set()


@ASKS
async def test_every_command_has_its_answer(svsm: Svsm, ask: _Ask) -> None:
    slot = svsm.host().slot
    for number in range(300):  # among them such that are looked for awake, at either end
        assert await ask(slot, Command.EXPORT, number) == number
        if number % 50 == 0:
            await trio.sleep(0.002)


@ASKS
async def test_a_ring_that_the_svsm_never_heard_costs_a_look(
    svsm: Svsm, monkeypatch: pytest.MonkeyPatch, ask: _Ask
) -> None:
    monkeypatch.setattr(handler, "FALLBACK_MS", 20)
    host = svsm.host()
    deaf = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    doorbells = Doorbells(host.memory, deaf, host.to_host, 5.0)
    assert await ask(Slot(host.memory, doorbells.ring), Command.EXPORT, 7) == 7
    os.close(deaf)


@ASKS
async def test_an_answer_whose_ring_is_lost_is_found(svsm: Svsm, ask: _Ask) -> None:
    host = svsm.host()
    deaf = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    doorbells = Doorbells(host.memory, host.to_svsm, deaf, 5.0)
    began = trio.current_time()
    assert await ask(Slot(host.memory, doorbells.ring), Command.EXPORT, 7) == 7
    assert trio.current_time() - began < 20 * FALLBACK_S
    os.close(deaf)


@ASKS
async def test_rings_for_nothing_do_nothing(svsm: Svsm, ask: _Ask) -> None:
    host = svsm.host()
    for bell in (host.to_svsm, host.to_host):
        os.eventfd_write(bell, 1000)
    assert await ask(host.slot, Command.EXPORT, 7) == 7


@ASKS
async def test_a_silent_svsm_is_lost_and_stays_so(svsm: Svsm, ask: _Ask) -> None:
    slot = svsm.host().slot
    began = trio.current_time()
    with pytest.raises(SvsmLost, match="did not answer"):
        await ask(slot, Command.EPOCH, 0)
    assert trio.current_time() - began >= _TIMEOUT_S
    svsm.let.set()
    with trio.fail_after(_TIMEOUT_S), pytest.raises(SvsmLost):
        await ask(slot, Command.EXPORT, 7)


@ASKS
async def test_who_waits_hears_soon_that_the_svsm_is_gone(svsm: Svsm, ask: _Ask) -> None:
    host = svsm.host()
    doorbells = Doorbells(host.memory, host.to_svsm, host.to_host, 60.0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_is_lost, ask, Slot(host.memory, doorbells.ring))
        await trio.testing.wait_all_tasks_blocked()
        doorbells.give_up()
        nursery.cancel_scope.deadline = trio.current_time() + 5
    assert not nursery.cancel_scope.cancelled_caught


async def _is_lost(ask: _Ask, slot: Slot) -> None:
    with pytest.raises(SvsmLost):
        await ask(slot, Command.EPOCH, 0)


async def test_a_cancel_waits_for_the_answer(svsm: Svsm) -> None:
    host = svsm.host()
    doorbells = Doorbells(host.memory, host.to_svsm, host.to_host, 60.0)
    slot = Slot(host.memory, doorbells.ring)
    threading.Timer(0.1, svsm.let.set).start()
    with trio.move_on_after(0.01):
        assert (await slot.command(Command.EPOCH)).result == 1
    assert svsm.let.is_set()
    assert (await slot.command(Command.EXPORT, 7)).result == 7


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_handler_with_a_defect_answers_and_says_that_it_is_dead(svsm: Svsm) -> None:
    slot = svsm.host().slot
    with pytest.raises(SvsmRefused) as caught:
        await slot.command(Command.ABORT)
    assert caught.value.code is RefusalCode.INTERNAL
    assert svsm.is_dead.is_set()
    with pytest.raises(SvsmLost):
        await slot.command(Command.EXPORT, 7)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_handler_with_a_defect_answers_also_where_the_session_cannot_be_ended(svsm: Svsm) -> None:
    def fail() -> None:
        raise GuestError("the tracker does not answer")

    svsm.mailbox._on_death = fail
    slot = svsm.host().slot
    with pytest.raises(SvsmRefused) as caught:
        await slot.command(Command.ABORT)
    assert caught.value.code is RefusalCode.INTERNAL


async def test_idle_handlers_use_less_than_a_hundredth_of_a_core() -> None:
    svsm = Svsm(16)
    with svsm.mailbox:
        hosts = [svsm.host() for _ in range(16)]
        # The last looks awake are over once the answer is.
        await hosts[0].slot.command(Command.EXPORT, 7)
        await trio.sleep(0.05)
        began = time.process_time()
        await trio.sleep(1)
        assert time.process_time() - began < 0.01


def test_nobody_can_take_memory_away(svsm: Svsm) -> None:
    for size in (0, _GEOMETRY.slot_bytes - 4096, 2 * _GEOMETRY.slot_bytes):
        with pytest.raises(PermissionError):
            os.ftruncate(svsm.mailbox.memory_fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(svsm.mailbox.memory_fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
