"""What the embedding program's own code raises: it comes back as the cause of a clear outcome, and decides nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

import pytest
import trio

import pagexfer
from pagexfer import MigrationParameters, Outcome, Status, Steering, TransferAborted
from pagexfer.engine.channel import DestinationChannel
from pagexfer.errors import ChannelBroken
from pagexfer.migration import MigrationReport, receive_guest, send_guest
from pagexfer.wire.bundle import BundleKind

from .engine_guests import FailingLog, SmallMachine, TestHypervisor
from .loopback import HOST
from .small_guests import ATTESTOR

if TYPE_CHECKING:
    from collections.abc import Callable

    from pagexfer import MigrationInfo


class ForeignError(Exception):
    """Nothing that pagexfer knows."""


async def _fail() -> None:
    await trio.lowlevel.checkpoint()
    raise ForeignError("no room on the device")


async def _fail_in_a_nursery() -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_fail)
        nursery.start_soon(trio.sleep_forever)


def _fail_at(*statuses: Status) -> Callable[[MigrationInfo], None]:
    def look(info: MigrationInfo) -> None:
        if info.status in statuses:
            raise ForeignError(info.status.value)

    return look


def _ignore(_value: object) -> None:
    return


@dataclass
class _Move:
    """One migration of a small guest, and how both sides ended."""

    machine: SmallMachine = field(default_factory=SmallMachine)
    see_source: Callable[[MigrationInfo], None] = _ignore
    see_destination: Callable[[MigrationInfo], None] = _ignore
    on_stranger: Callable[[str], None] = _ignore
    on_listening: Callable[[int], None] = _ignore
    isolated: bool = False
    pauses: bool = False
    sent: MigrationReport | TransferAborted | None = None
    received: MigrationReport | TransferAborted | None = None

    async def run(self) -> None:
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                port = await nursery.start(self._receive)
                await self._send(port)

    async def _send(self, port: int) -> None:
        try:
            self.sent = await send_guest(
                self.machine.source,
                HOST,
                port,
                ATTESTOR,
                channels=2,
                isolated=self.isolated,
                steering=Steering(MigrationParameters(pause_before_switchover=self.pauses)),
                on_progress=self.see_source,
            )
        except TransferAborted as aborted:
            self.sent = aborted

    async def _receive(self, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED) -> None:
        def listening(port: int) -> None:
            task_status.started(port)
            self.on_listening(port)

        try:
            self.received = await receive_guest(
                self.machine.destination,
                HOST,
                0,
                ATTESTOR,
                isolated=self.isolated,
                on_listening=listening,
                on_progress=self.see_destination,
                on_stranger=self.on_stranger,
            )
        except TransferAborted as aborted:
            self.received = aborted


def _ended(end: object, reason: str, outcome: Outcome = Outcome.ENDED) -> TransferAborted:
    assert isinstance(end, TransferAborted), end
    assert (end.outcome, end.reason) == (outcome, reason), end
    return end


def _caused(end: object, reason: str, outcome: Outcome = Outcome.ENDED) -> str:
    """The line of an end that a ForeignError caused."""
    aborted = _ended(end, reason, outcome)
    cause = aborted.__cause__
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    assert isinstance(cause, ForeignError), cause
    assert f"ForeignError: {cause}" in str(aborted)
    assert str(aborted).isprintable()
    return str(aborted)


@pytest.fixture(params=[False, True], ids=["local", "isolated"])
def isolated(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


# Callbacks


async def test_the_last_call_of_on_progress_changes_no_outcome(
    isolated: bool, caplog: pytest.LogCaptureFixture
) -> None:
    final = _fail_at(Status.COMPLETED)
    move = _Move(see_source=final, see_destination=final, isolated=isolated)
    await move.run()
    assert isinstance(move.sent, MigrationReport), move.sent
    assert isinstance(move.received, MigrationReport), move.received
    assert move.machine.moved()
    logged = [record.exc_info[1] for record in caplog.records if record.exc_info]
    assert [type(error) for error in logged] == [ForeignError, ForeignError]


async def test_the_last_call_of_on_progress_does_not_hide_a_failure(isolated: bool) -> None:
    final = _fail_at(Status.FAILED)
    move = _Move(see_source=final, see_destination=final, isolated=isolated)
    move.machine.destination.hypervisor.before_load = _fail
    await move.run()
    _caused(move.received, "device-state")
    _ended(move.sent, "device-state")
    assert move.machine.source.gate.running


@pytest.mark.parametrize("side", ["source", "destination"])
async def test_a_callback_that_fails_on_the_way_ends_it_and_the_guest_goes_on(
    side: str, isolated: bool
) -> None:
    # The source waits for its operator, so that both sides report before the move is over.
    move = _Move(isolated=isolated, pauses=True)
    setattr(move, f"see_{side}", _fail_at(Status.PRE_SWITCHOVER if side == "source" else Status.ACTIVE))
    await move.run()
    own, other = (move.sent, move.received) if side == "source" else (move.received, move.sent)
    _caused(own, "callback")
    assert "callback" in str(_ended(other, "callback"))
    assert "ForeignError" not in str(other)
    assert move.machine.source.gate.running
    assert not move.machine.destination.gate.running


async def test_a_callback_that_raises_what_is_ours_is_no_better() -> None:
    def look(info: MigrationInfo) -> None:
        if info.status is Status.PRE_SWITCHOVER:
            raise pagexfer.UsageError("there is no pause")

    move = _Move(see_source=look, pauses=True)
    await move.run()
    aborted = _ended(move.sent, "callback")
    assert isinstance(aborted.__cause__, pagexfer.UsageError)
    assert move.machine.source.gate.running


async def test_an_on_listening_that_fails_ends_it_before_it_began() -> None:
    def fail(_port: int) -> None:
        raise ForeignError("cannot say where")

    move = _Move(on_listening=fail)
    with trio.fail_after(10):
        await move._receive()
    _caused(move.received, "callback")
    assert not move.machine.destination.gate.running


async def test_an_on_stranger_that_fails_ends_it(isolated: bool) -> None:
    def fail(_line: str) -> None:
        raise ForeignError("cannot write that down")

    move = _Move(on_stranger=fail, isolated=isolated)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            port = await nursery.start(move._receive)
            async with await trio.open_tcp_stream(HOST, port) as stranger:
                await stranger.send_all(b"GET / HTTP/1.1\r\n\r\n" * 8)
                while await _more(stranger):
                    pass
    _caused(move.received, "callback")
    assert not move.machine.destination.gate.running


async def _more(stream: trio.SocketStream) -> bool:
    try:
        return bool(await stream.receive_some())
    except trio.BrokenResourceError:
        return False


async def test_an_on_stranger_that_fails_when_the_guest_runs_here_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A source that is lost when it should hear that the guest runs is a line to `on_stranger`."""

    def fail(line: str) -> None:
        lines.append(line)
        raise ForeignError("cannot write that down")

    async def answer(channel: DestinationChannel, kind: BundleKind) -> None:
        await real_answer(channel, kind)
        if kind is BundleKind.RUNNING:
            raise ChannelBroken("the source is gone")

    lines: list[str] = []
    real_answer = DestinationChannel.answer
    monkeypatch.setattr(DestinationChannel, "answer", answer)
    move = _Move(on_stranger=fail)
    await move.run()
    assert isinstance(move.received, MigrationReport), move.received
    assert lines == ["the guest runs here, but the source may not know: the source is gone"]
    assert move.machine.moved()


# The hypervisor


@pytest.mark.parametrize("fail", [_fail, _fail_in_a_nursery])
@pytest.mark.parametrize("call", ["before_stop", "before_save"])
async def test_whatever_a_source_hypervisor_raises_ends_it(
    call: str, fail: Callable[[], None], isolated: bool
) -> None:
    move = _Move(isolated=isolated)
    setattr(move.machine.source.hypervisor, call, fail)
    await move.run()
    _caused(move.sent, "guest")
    heard = str(_ended(move.received, "guest"))
    assert heard.startswith("the source says: the hypervisor did not s")
    assert "ForeignError" not in heard
    assert move.machine.stayed()


async def test_whatever_a_destination_hypervisor_raises_ends_it(isolated: bool) -> None:
    move = _Move(isolated=isolated)
    move.machine.destination.hypervisor.before_load = _fail
    await move.run()
    _caused(move.received, "device-state")
    heard = str(_ended(move.sent, "device-state"))
    assert heard.startswith("the destination says: the hypervisor did not load")
    assert "ForeignError" not in heard
    assert move.machine.stayed()


async def test_a_destination_hypervisor_that_cannot_continue_leaves_it_undecided(isolated: bool) -> None:
    move = _Move(isolated=isolated)
    move.machine.destination.hypervisor.before_resume = _fail
    await move.run()
    assert "does not run" in _caused(move.received, "undecided", Outcome.UNDECIDED)
    _ended(move.sent, "undecided", Outcome.UNDECIDED)
    assert not move.machine.source.gate.running


async def test_a_source_hypervisor_that_cannot_continue_is_said_so(isolated: bool) -> None:
    move = _Move(isolated=isolated)
    move.machine.source.hypervisor.before_save = _fail
    move.machine.source.hypervisor.before_resume = _fail
    await move.run()
    text = _caused(move.sent, "guest")
    assert text.count("and the guest does not go on here: ") == 1


@pytest.mark.parametrize("side", ["source", "destination"])
async def test_a_watch_that_fails_ends_it(side: str, isolated: bool) -> None:
    class Watched(TestHypervisor):
        async def watch(self) -> NoReturn:
            await _fail()
            raise AssertionError

    move = _Move(isolated=isolated, pauses=True)
    guest = getattr(move.machine, side)
    guest.hypervisor = Watched()
    if side == "source":  # the destination goes on waiting for a source that it never saw
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                port = await nursery.start(move._receive)
                await move._send(port)
                nursery.cancel_scope.cancel()
        _caused(move.sent, "guest")
    else:
        with trio.fail_after(60):
            await move._receive()
        _caused(move.received, "guest")
    assert move.machine.source.gate.running
    assert not move.machine.destination.gate.running


@pytest.mark.parametrize("call", ["start", "collect"])
async def test_whatever_a_dirty_log_raises_ends_it(call: str, isolated: bool) -> None:
    move = _Move(SmallMachine(FailingLog(call, ForeignError)), isolated=isolated)
    await move.run()
    _caused(move.sent, "guest")
    assert move.machine.stayed()


async def test_a_dirty_log_that_cannot_be_stopped_is_said_and_hides_nothing() -> None:
    move = _Move(SmallMachine(FailingLog("stop", ForeignError)))
    move.machine.source.hypervisor.before_save = _fail
    await move.run()
    assert "the dirty log cannot stop" in _caused(move.sent, "guest")
    assert move.machine.stayed()
