"""A session undoes what it did itself: of a guest that is another's, or has left, it touches nothing."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from pagexfer import MigrationParameters, Outcome, Steering, TransferAborted, UsageError
from pagexfer.attestation.psk import PskAttestor
from pagexfer.dirty import DirtyBitmap
from pagexfer.errors import GateError, GuestError, PolicyRefused
from pagexfer.migration import MigrationReport, receive_guest, send_guest

from .engine_guests import DestinationGuest, SmallMachine
from .isolated_engines import IsolatedMove, engine_processes, start_hostile_engines
from .loopback import HOST
from .small_guests import ATTESTOR, PAGES

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path

    from pagexfer.attestation.attestor import Attestor

_PAUSING = MigrationParameters(pause_before_switchover=True)
_MINE = "this guest is being moved already, or has left"


@pytest.fixture(params=[False, True], ids=["local", "isolated"])
def isolated(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


class _Log:
    """A hypervisor's dirty log that is on or off, and never has a page."""

    def __init__(self) -> None:
        self.is_on = False
        self.stops = 0

    def start(self) -> None:
        self.is_on = True

    def collect(self) -> DirtyBitmap:
        assert self.is_on
        return DirtyBitmap(PAGES)

    def stop(self) -> None:
        self.is_on = False
        self.stops += 1


class _Move:
    """A small guest's move that waits before switchover, and how both sides ended."""

    def __init__(self) -> None:
        self.log = _Log()
        self.machine = SmallMachine(self.log)
        self.steering = Steering(_PAUSING)
        self.sent: MigrationReport | TransferAborted | None = None
        self.received: MigrationReport | TransferAborted | None = None

    @property
    def calls(self) -> list[str]:
        return self.machine.source.hypervisor.calls

    async def run(self, *, isolated: bool = False) -> None:
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                port = await nursery.start(self._receive)
                try:
                    self.sent = await send_guest(
                        self.machine.source,
                        HOST,
                        port,
                        ATTESTOR,
                        channels=1,
                        steering=self.steering,
                        isolated=isolated,
                    )
                except TransferAborted as aborted:
                    self.sent = aborted

    async def _receive(self, task_status: trio.TaskStatus[int]) -> None:
        try:
            self.received = await receive_guest(
                self.machine.destination, HOST, 0, ATTESTOR, on_listening=task_status.started
            )
        except TransferAborted as aborted:
            self.received = aborted

    async def wait_paused(self) -> None:
        while not self.steering.paused:  # noqa: ASYNC110 (its event is of any change)
            await trio.sleep(0.001)


class _NoMove(PskAttestor):
    """Of a guest that may not move any more."""

    def check_move(self, move: int) -> None:
        raise PolicyRefused(f"the policy's rule maximum_moves: move {move}")


async def _refused(move: _Move, attestor: Attestor = ATTESTOR, *, isolated: bool) -> None:
    """Send its guest once more: nobody is connected to."""
    listeners = await trio.open_tcp_listeners(0, host=HOST)
    port = listeners[0].socket.getsockname()[1]
    with pytest.raises(UsageError) as refused, trio.fail_after(60):
        await send_guest(move.machine.source, HOST, port, attestor, channels=1, isolated=isolated)
    assert str(refused.value) == _MINE
    with trio.move_on_after(0) as nobody:
        await listeners[0].accept()
    assert nobody.cancelled_caught
    await listeners[0].aclose()


async def test_a_guest_that_has_left_is_not_touched(isolated: bool) -> None:
    move = _Move()
    move.steering.parameters = MigrationParameters()
    await move.run()
    assert move.machine.moved()
    log, calls = move.log.stops, list(move.calls)
    await _refused(move, isolated=isolated)
    # That it has left says more than a policy.
    await _refused(move, _NoMove(b"a pre-shared key of 32 bytes ..."), isolated=isolated)
    assert (move.log.stops, move.calls) == (log, calls)
    assert move.machine.moved()


async def test_a_guest_that_is_being_moved_is_not_touched(isolated: bool) -> None:
    move = _Move()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(move.run)
        await move.wait_paused()
        await _refused(move, isolated=isolated)
        assert move.log.is_on
        assert move.calls == []
        move.steering.continue_switchover()
    assert isinstance(move.sent, MigrationReport), move.sent
    assert isinstance(move.received, MigrationReport), move.received
    assert move.machine.moved()


async def test_a_second_destination_of_a_guest_leaves_the_first_alone() -> None:
    """It has another source, which keeps its guest."""
    move, other = _Move(), SmallMachine()
    other.destination = move.machine.destination
    ends: list[TransferAborted] = []

    async def receive(task_status: trio.TaskStatus[int]) -> None:
        with pytest.raises(TransferAborted) as refused:
            await receive_guest(other.destination, HOST, 0, ATTESTOR, on_listening=task_status.started)
        ends.append(refused.value)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(move.run)
        await move.wait_paused()
        port = await nursery.start(receive)
        with pytest.raises(TransferAborted, match="another session has the destination's guest"):
            await send_guest(other.source, HOST, port, ATTESTOR, channels=1)
        move.steering.continue_switchover()
    assert "another session has the destination's guest" in str(ends[0])
    assert move.machine.moved()
    assert other.source.gate.running
    assert move.machine.destination.hypervisor.calls == ["load", "resume"]


@pytest.mark.parametrize(("how", "isolated"), [("cancelled", False), ("cancelled", True), ("killed", True)])
async def test_a_guest_that_was_not_stopped_is_not_continued(how: str, isolated: bool) -> None:
    """Its operator may have paused it meanwhile. What was begun, its dirty log, is ended once."""
    move = _Move()

    async def end() -> None:
        await move.wait_paused()
        if how == "killed":
            os.kill(engine_processes()[0], signal.SIGKILL)
        else:
            move.steering.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(end)
        await move.run(isolated=isolated)
    assert isinstance(move.sent, TransferAborted)
    assert (move.sent.outcome, move.sent.reason) == (
        Outcome.ENDED,
        "engine" if how == "killed" else "cancelled",
    )
    assert move.calls == []
    assert (move.log.is_on, move.log.stops) == (False, 1)
    assert move.machine.source.gate.running


async def test_a_guest_that_was_parked_is_continued_though_its_engine_is_gone() -> None:
    """Its gate may have paused it, for which nobody asked the hypervisor."""
    move = _Move()
    move.steering.parameters = MigrationParameters()
    gate = move.machine.source.gate
    parked = gate.parked

    def park_and_kill() -> int:
        if engine_processes():
            os.kill(engine_processes()[0], signal.SIGKILL)
        return parked()

    gate.parked = park_and_kill  # type: ignore[method-assign]
    await move.run(isolated=True)
    assert isinstance(move.sent, TransferAborted)
    assert (move.sent.outcome, move.sent.reason) == (Outcome.ENDED, "engine")
    assert move.calls == ["resume"]
    assert gate.running


async def test_what_an_engine_has_undone_is_not_undone_again() -> None:
    """The guest may be another session's by then."""
    move = _Move()
    move.steering.parameters = MigrationParameters()

    async def fail() -> None:
        raise GuestError("the monitor said no")

    move.machine.source.hypervisor.before_save = fail
    await move.run(isolated=True)
    assert "the monitor said no" in str(move.sent)
    assert move.calls == ["stop", "resume"]
    assert move.log.stops == 1


async def test_an_engine_that_never_began_leaves_nothing_to_undo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_hostile_engines(tmp_path, monkeypatch, "say", '{"type": "cancelled"}')
    log = _Log()
    move = IsolatedMove("source", SmallMachine(log), patience_s=0.0)
    await move.run()
    assert isinstance(move.sent.end, TransferAborted)
    assert move.machine.source.hypervisor.calls == []
    assert log.stops == 0


async def test_a_destination_that_is_not_there_leaves_the_guest_free(isolated: bool) -> None:
    """The guest is the session's before it connects, and nobody's once that failed."""
    move = _Move()
    move.steering.parameters = MigrationParameters()
    with pytest.raises(TransferAborted, match="cannot connect"), trio.fail_after(60):
        await send_guest(move.machine.source, HOST, 1, ATTESTOR, channels=1, isolated=isolated)
    assert move.calls == []
    assert move.log.stops == 0
    await move.run()
    assert move.machine.moved()


async def test_a_gate_that_does_not_let_go_is_said_and_nobody_is_asked() -> None:
    """The start token was never asked for: the guest cannot be elsewhere."""

    async def fail() -> None:
        raise GuestError("the monitor said no")

    def keep() -> None:
        raise GateError("the vCPUs do not go on")

    move = _Move()
    move.steering.parameters = MigrationParameters()
    move.machine.source.hypervisor.before_save = fail
    move.machine.source.gate.release = keep  # type: ignore[method-assign]
    await move.run()
    assert isinstance(move.sent, TransferAborted)
    assert (move.sent.outcome, move.sent.reason) == (Outcome.ENDED, "guest")
    assert "and the guest does not go on here" in str(move.sent)
    assert "start token" not in str(move.sent)


# What was under way


def _slow(machine: SmallMachine, call: str) -> None:
    setattr(machine.source.hypervisor, f"before_{call}", trio.sleep_forever)


@pytest.mark.parametrize(("call", "what"), [("stop", "stopping the guest"), ("save", "saving the devices")])
async def test_a_slow_hypervisor_is_not_the_destinations_fault(call: str, what: str) -> None:
    move = IsolatedMove("destination", patience_s=5.0)
    move.steering.parameters = MigrationParameters(downtime_limit_s=0.2)
    _slow(move.machine, call)
    await move.run()
    for end, start in ((move.sent.end, "black-out"), (move.received.end, "the source says: black-out")):
        assert isinstance(end, TransferAborted), end
        assert end.reason == "timeout"
        assert str(end).startswith(f"{start} did not end within 1.7 s: {what} took 1.")
    assert move.machine.stayed()


async def test_a_destination_says_what_it_was_doing_when_the_source_went(isolated: bool) -> None:
    move = IsolatedMove("destination" if isolated else "source")
    move.machine.destination.hypervisor.before_load = _for(3.0) if isolated else trio.sleep_forever
    await move.run()
    assert isinstance(move.sent.end, TransferAborted)
    assert str(move.sent.end) == "the destination did not say READY within 1.5 s"
    assert isinstance(move.received.end, TransferAborted)
    assert move.received.end.reason == "connection"
    assert "; the hypervisor here had been loading the devices for " in str(move.received.end)
    assert move.machine.stayed()


def _for(seconds: float) -> Callable[[], Coroutine[None, None, None]]:
    async def wait() -> None:
        await trio.sleep(seconds)

    return wait


async def test_a_destination_guest_in_use_is_no_usage_error_of_the_source() -> None:
    """As it is today: the destination says so once it knows who comes."""
    guest = DestinationGuest()
    guest.memory.claim()
    machine = SmallMachine()
    machine.destination = guest
    move = IsolatedMove("source", machine)
    await move.run()
    assert isinstance(move.sent.end, TransferAborted)
    assert "another session has the destination's guest" in str(move.sent.end)
    assert machine.source.gate.running
