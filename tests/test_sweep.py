"""An epoch that is begun in steps, as its tracker has to read RAM: what is pending, and what a host may do meanwhile."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import numpy as np
import pytest
import trio

from pagexfer import Outcome, Steering, TransferAborted
from pagexfer.dirty import SteppedTracker, content
from pagexfer.dirty.content import ContentTracker
from pagexfer.errors import GuestError, NotReady, RefusalCode
from pagexfer.migration import receive_guest, send_guest
from pagexfer.svsm.page_digest import fresh_digest
from pagexfer.testing.tracker import SteppedMarks
from pagexfer.wire.bundle import BundleKind
from pagexfer.wire.slot import Command, SlotStatus
from pagexfer.wire.slot import SessionStatus as State

from .engine_guests import SmallMachine
from .host_slot import HostSlots
from .loopback import HOST
from .small_guests import ATTESTOR, PAGES, Move

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from pagexfer.dirty import DirtyBitmap
    from pagexfer.wire.slot import StatusRegisters

STEP = 64


@pytest.fixture
def move() -> Move:
    """In pre-copy, nothing written and nothing pending."""
    move = Move(step_pages=STEP)
    assert isinstance(move.guest.tracker, SteppedTracker)
    move.pair.until_precopy()
    return move


def begin(slots: HostSlots) -> StatusRegisters:
    answer, package = slots.source_control.call(Command.EPOCH)
    assert answer.status is not SlotStatus.INCOMPLETE or not package
    assert slots.source_control.free_buffers() == 2
    return answer


def test_epoch_says_how_far_it_is_until_it_is_complete(move: Move) -> None:
    slots = HostSlots.of(move.pair)
    for gfn in (3, 70, PAGES - 1):
        move.guest.write(gfn, 8)
    for looked in (STEP, 2 * STEP, 3 * STEP):
        answer = begin(slots)
        assert (answer.status, answer.result) == (SlotStatus.INCOMPLETE, looked)
    answer = begin(slots)
    assert (answer.status, answer.result) == (SlotStatus.OK, 3)


def test_the_first_epoch_is_all_of_ram_in_steps_too() -> None:
    move = Move(step_pages=STEP)
    move.pair.handshake()
    slots = HostSlots.of(move.pair)
    assert [begin(slots).status for _ in range(4)] == [SlotStatus.INCOMPLETE] * 3 + [SlotStatus.OK]
    assert move.pair.source.begin_epoch().count() == PAGES


def test_what_is_written_behind_a_step_comes_with_the_next_epoch(move: Move) -> None:
    source = move.pair.source
    assert source.collect_part() == (STEP, True)
    move.guest.write(3, 8)
    move.guest.write(STEP, 8)
    move.guest.memory.rmpadjust(np.array([4]), 1, 0)  # reported, not looked for
    assert source.begin_epoch().gfns().tolist() == [4, STEP]
    assert source.begin_epoch().gfns().tolist() == [3, 4, STEP]


def test_nothing_leaves_while_an_epoch_is_being_begun(move: Move) -> None:
    slots = HostSlots.of(move.pair)
    move.guest.write(3, 8)
    assert begin(slots).status is SlotStatus.INCOMPLETE
    control, (first, second) = slots.source_control, slots.source_channels
    for slot, command, argument in [
        (first, Command.EXPORT, 0),
        (second, Command.EXPORT, 0),
        (first, Command.TOKEN, BundleKind.EPOCH_TOKEN),
        (first, Command.TOKEN, BundleKind.MANIFEST),
        (first, Command.STATE, 0),
        (control, Command.BLACKOUT, 0),
        (control, Command.AUDIT, 0),
        (control, Command.FINISH, 0),
    ]:
        answer, data = slot.call(command, argument, PAGES)
        assert (answer.status, answer.error, data) == (SlotStatus.REFUSED, RefusalCode.STATE, b""), command
    assert move.guest.gate.running
    while begin(slots).status is SlotStatus.INCOMPLETE:
        pass
    assert first.call(Command.EXPORT, 0, PAGES)[0].result == 1


def test_an_epoch_of_parked_vcpus_leaves_nothing_out(move: Move) -> None:
    """The park waits for the end of the epoch, so that the last one has looked at every page since."""
    slots = HostSlots.of(move.pair)
    begin(slots)
    move.guest.write(3, 8)
    while begin(slots).status is SlotStatus.INCOMPLETE:
        pass
    move.pair.park()
    answer, _ = slots.source_channels[0].call(Command.STATE, 0)
    assert answer.status is SlotStatus.OK
    begin(slots)
    for command, argument in ((Command.STATE, 1), (Command.TOKEN, BundleKind.MANIFEST)):
        answer, _ = slots.source_channels[0].call(command, argument)
        assert answer.error is RefusalCode.STATE
    assert move.pair.source.begin_epoch().gfns().tolist() == [3]


class _Failing(SteppedMarks):
    """Fails the first time that it finds something, after it has forgotten it."""

    failed = False

    def collect_part(self, start: int, stop: int) -> NDArray[np.int64]:
        return self._once(super().collect_part(start, stop))

    def collect(self) -> DirtyBitmap:
        found = super().collect()
        self._once(found.gfns())
        return found

    def _once(self, found: NDArray[np.int64]) -> NDArray[np.int64]:
        if found.size and not self.failed:
            self.failed = True
            raise GuestError("no memory to look into memory")
        return found


@pytest.mark.parametrize("step", ["epoch", "manifest"])
def test_what_a_failing_tracker_had_found_is_not_lost(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """G3: the host gives the command again, and by then the tracker has forgotten the write."""
    move = Move(step_pages=STEP)
    monkeypatch.setattr(move.guest.tracker, "__class__", _Failing)
    pair = move.pair
    pair.until_precopy()
    if step == "epoch":
        move.guest.write(3, 8)
        pair.park()
        with pytest.raises(GuestError):
            pair.epoch()
        pair.epoch()
        pair.vcpus()
    else:
        pair.park()
        pair.epoch()
        pair.vcpus()
        move.guest.write(3, 8)
        with pytest.raises(GuestError):
            pair.manifest()
        with pytest.raises(NotReady, match="dirty or unsent"):
            pair.manifest()
        pair.epoch()
    pair.manifest()
    assert move.arrived()


def test_abort_in_the_middle_lets_the_guest_go_on(move: Move) -> None:
    slots = HostSlots.of(move.pair)
    begin(slots)
    answer, _ = slots.source_control.call(Command.ABORT)
    assert (answer.status, answer.session) == (SlotStatus.OK, State.ABORTED)
    assert move.guest.gate.running
    answer, _ = slots.source_control.call(Command.EPOCH)
    assert (answer.error, answer.session) == (RefusalCode.STATE, State.ABORTED)


def test_a_whole_move_in_steps(move: Move) -> None:
    move.guest.write(3, 8)
    move.pair.park()
    move.pair.epoch()
    move.pair.vcpus()
    move.pair.manifest()
    move.pair.ready()
    move.pair.start()
    assert move.arrived()


# The engine


class _Watched(SteppedMarks):
    """Tells of each step of each epoch but the first, which is all of RAM."""

    def __init__(self, marks: NDArray[np.uint8], on_step: Callable[[int], None]) -> None:
        super().__init__(marks, 8)
        self._on_step = on_step
        self._steps = 0

    def collect_part(self, start: int, stop: int) -> NDArray[np.int64]:
        self._steps += 1
        self._on_step(self._steps)
        return super().collect_part(start, stop)


async def _send(machine: SmallMachine, steering: Steering) -> TransferAborted | None:
    async def receive(task_status: trio.TaskStatus[int]) -> None:
        with contextlib.suppress(TransferAborted):
            await receive_guest(machine.destination, HOST, 0, ATTESTOR, on_listening=task_status.started)

    async with trio.open_nursery() as nursery:
        port = await nursery.start(receive)
        try:
            await send_guest(machine.source, HOST, port, ATTESTOR, channels=2, steering=steering)
        except TransferAborted as aborted:
            return aborted
    return None


async def test_an_engine_gives_epoch_until_it_is_complete() -> None:
    machine, steps = SmallMachine(), [0]
    machine.source.tracker = _Watched(machine.source._marks, steps.append)
    assert await _send(machine, Steering()) is None
    assert machine.moved()
    assert steps[-1] >= 2 * PAGES // 8


async def test_an_engine_is_cancelled_between_two_steps() -> None:
    machine, steps, steering = SmallMachine(), [0], Steering()

    def cancel(step: int) -> None:
        steps.append(step)
        if step == 3:
            steering.cancel()

    machine.source.tracker = _Watched(machine.source._marks, cancel)
    aborted = await _send(machine, steering)
    assert aborted is not None
    assert (aborted.outcome, aborted.reason) == (Outcome.ENDED, "cancelled")
    assert machine.stayed()
    assert steps[-1] < PAGES // 8


async def test_a_content_tracker_is_asked_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "_STEP_BLOCKS", 1)
    machine = SmallMachine()
    machine.source.tracker = ContentTracker(machine.source.memory.words, fresh_digest())
    assert await _send(machine, Steering()) is None
    assert machine.moved()
