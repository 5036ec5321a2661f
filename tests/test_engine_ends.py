"""How engines end: cancelled at any point, left by the peer, or failed by its hypervisor. One side keeps the guest."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import pytest
import trio
import trio.testing

from pagexfer.errors import GuestError, Outcome, TransferAborted, UsageError
from pagexfer.migration import MigrationReport, receive_guest, send_guest
from pagexfer.testing.proxy import Action, FaultProxy, at_bundle, at_frame
from pagexfer.wire.bundle import BundleKind
from pagexfer.wire.constants import PAGE_SIZE
from pagexfer.wire.framing import FrameType

from .engine_guests import DEVICE_STATE, FailingLog, SmallMachine
from .loopback import HOST
from .small_guests import ATTESTOR

if TYPE_CHECKING:
    from collections.abc import Callable

    from pagexfer.testing.proxy import Frame

CHANNELS: Final = 2


@dataclass
class _Move:
    """One migration of a small guest through a proxy, and how both sides ended."""

    machine: SmallMachine = field(default_factory=SmallMachine)
    point: Callable[[Frame], bool] = lambda _frame: False
    action: Action = Action.PASS
    on_fault: Callable[[], None] = lambda: None
    stall_timeout_s: float = 5.0
    patience_s: float = 11.0
    sent: MigrationReport | TransferAborted | None = None
    received: MigrationReport | TransferAborted | None = None

    async def run(self) -> None:
        self.source_scope, self.destination_scope = trio.CancelScope(), trio.CancelScope()
        async with trio.open_nursery() as network, trio.open_nursery() as sides:
            port = await sides.start(self._receive)
            self.proxy = FaultProxy(HOST, port, self.point, self.action, self.on_fault)
            await self._send(await network.start(self.proxy.serve))
            # A destination whose source never got as far as a handshake goes on to wait for the next one.
            with trio.move_on_after(self.patience_s):
                while self.received is None and not self.destination_scope.cancelled_caught:  # noqa: ASYNC110
                    await trio.sleep(0.001)
            sides.cancel_scope.cancel()
            network.cancel_scope.cancel()

    async def _send(self, port: int) -> None:
        try:
            with self.source_scope:
                self.sent = await send_guest(
                    self.machine.source,
                    HOST,
                    port,
                    ATTESTOR,
                    channels=CHANNELS,
                    stall_timeout_s=self.stall_timeout_s,
                )
        except TransferAborted as aborted:
            self.sent = aborted

    async def _receive(self, task_status: trio.TaskStatus[int]) -> None:
        try:
            with self.destination_scope:
                self.received = await receive_guest(
                    self.machine.destination,
                    HOST,
                    0,
                    ATTESTOR,
                    stall_timeout_s=self.stall_timeout_s,
                    on_listening=task_status.started,
                )
        except TransferAborted as aborted:
            self.received = aborted


def _ended(
    end: MigrationReport | TransferAborted | None, reason: str, outcome: Outcome = Outcome.ENDED
) -> str:
    assert isinstance(end, TransferAborted)
    assert (end.outcome, end.reason) == (outcome, reason)
    assert str(end).isprintable()
    return str(end)


async def test_a_small_guest_moves() -> None:
    move = _Move()
    await move.run()
    assert move.machine.moved()
    assert move.machine.destination.hypervisor.loaded == DEVICE_STATE
    assert move.machine.source.hypervisor.calls == ["stop", "save"]


# Cancel


def _nth_frame(number: int, started: list[bool]) -> Callable[[Frame], bool]:
    """The `number`th frame of the migration; `started` says whether the start token was among those before."""
    seen = 0

    def point(frame: Frame) -> bool:
        nonlocal seen
        seen += 1
        if frame.kind is BundleKind.START_TOKEN:
            started.append(True)
        return seen == number

    return point


async def _frames() -> int:
    seen: list[Frame] = []

    def count(frame: Frame) -> bool:
        seen.append(frame)
        return False

    await _Move(point=count).run()
    return len(seen)


async def test_a_source_cancelled_at_any_frame_keeps_its_guest_or_has_moved_it() -> None:
    kept = moved = 0
    for number in range(1, await _frames() + 1):
        started: list[bool] = []
        move = _Move(point=_nth_frame(number, started), action=Action.DELAY, patience_s=0.2)
        move.on_fault = lambda move=move: move.source_scope.cancel()  # type: ignore[misc]
        with trio.fail_after(5):
            await move.run()
        if move.proxy.reached.is_set() and not started:
            assert move.source_scope.cancelled_caught
            assert move.machine.stayed()
            kept += 1
        else:
            assert isinstance(move.sent, MigrationReport)
            assert move.machine.moved()
            moved += 1
    assert kept > 10
    assert moved >= 2


async def test_a_destination_cancelled_at_any_frame_leaves_the_guest_or_has_taken_it() -> None:
    left = taken = 0
    for number in range(1, await _frames() + 1):
        started: list[bool] = []
        move = _Move(point=_nth_frame(number, started), action=Action.DELAY, patience_s=0.2)
        move.on_fault = lambda move=move: move.destination_scope.cancel()  # type: ignore[misc]
        with trio.fail_after(5):
            await move.run()
        machine = move.machine
        assert not (machine.source.gate.running and machine.destination.gate.running)
        if machine.destination.gate.running:
            assert started
            assert machine.moved()
            taken += 1
        elif started:
            # The abort token crossed the start token, and took it back.
            _ended(move.sent, "destination-failed" if "answered" in str(move.sent) else "cancelled")
            assert machine.stayed()
        else:
            assert isinstance(move.sent, TransferAborted)
            assert move.sent.outcome is Outcome.ENDED
            assert machine.stayed()
            left += 1
    assert left > 10
    assert taken >= 1


async def test_a_cancel_that_comes_with_the_end_does_not_hide_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(start: int, length: int) -> bool:
        del start, length
        time.sleep(0.1)  # pages that the kernel takes its time to provide, in a thread
        return True

    monkeypatch.setattr("pagexfer.migration._PROVIDED_BYTES", PAGE_SIZE)
    move = _Move(point=at_bundle(BundleKind.RUNNING))
    move.machine.destination.memory.prefault = slow  # type: ignore[method-assign]
    move.on_fault = lambda: move.destination_scope.cancel()
    await move.run()
    assert isinstance(move.received, MigrationReport)
    assert move.machine.moved()


async def test_a_destination_cancelled_while_it_waits() -> None:
    machine = SmallMachine()
    with trio.fail_after(5), trio.CancelScope() as scope:
        await receive_guest(machine.destination, HOST, 0, ATTESTOR, on_listening=lambda _port: scope.cancel())
    assert scope.cancelled_caught
    assert not machine.destination.gate.running


async def test_a_source_cancelled_before_it_connects() -> None:
    machine = SmallMachine()
    with trio.CancelScope() as scope:
        scope.cancel()
        await send_guest(machine.source, HOST, 9, ATTESTOR)
    assert scope.cancelled_caught
    assert machine.source.gate.running


# The peer is gone


async def test_the_answer_counts_even_if_the_control_connection_ends_before_it() -> None:
    move = _Move(point=at_bundle(BundleKind.RUNNING), action=Action.DELAY)
    move.on_fault = lambda: move.proxy.cut(None)
    with trio.fail_after(5):
        await move.run()
    assert isinstance(move.sent, MigrationReport)
    assert isinstance(move.received, MigrationReport)
    assert move.machine.moved()


async def test_the_guest_runs_at_the_destination_though_its_source_died_after_the_start_token() -> None:
    move = _Move()

    async def source_dies() -> None:
        for channel in (None, *range(CHANNELS)):
            move.proxy.cut(channel)
        await trio.sleep(0.02)

    move.machine.destination.hypervisor.before_resume = source_dies
    with trio.fail_after(5):
        await move.run()
    assert isinstance(move.received, MigrationReport)
    assert move.machine.moved()
    assert "ask the destination" in _ended(move.sent, "undecided", Outcome.UNDECIDED)


async def test_an_abort_token_takes_the_start_token_back() -> None:
    move = _Move(point=at_bundle(BundleKind.START_TOKEN), action=Action.DELAY)
    move.on_fault = lambda: move.destination_scope.cancel()
    with trio.fail_after(5):
        await move.run()
    assert "the destination's operator cancelled" in _ended(move.sent, "cancelled")
    assert move.machine.stayed()


async def test_a_source_that_dies_before_its_channels_ends_the_destination_at_once() -> None:
    move = _Move(point=at_frame(FrameType.HELLO, channel=1), action=Action.CUT_ALL, stall_timeout_s=60.0)
    with trio.fail_after(5):
        await move.run()
    assert "closed the connection" in _ended(move.received, "connection")
    assert move.machine.stayed()


async def test_a_channel_that_does_not_come_ends_both_sides() -> None:
    move = _Move(point=at_frame(FrameType.HELLO, channel=1), action=Action.STALL, stall_timeout_s=0.1)
    with trio.fail_after(5):
        await move.run()
    _ended(move.sent, "connection")
    _ended(move.received, "connection")
    assert move.machine.stayed()


async def test_nobody_listens() -> None:
    machine = SmallMachine()
    with pytest.raises(
        TransferAborted, match=r"cannot connect to 127\.0\.0\.1:9: .*Connection refused"
    ) as caught:
        await send_guest(machine.source, HOST, 9, ATTESTOR)
    assert caught.value.outcome is Outcome.ENDED
    assert machine.source.gate.running


# The hypervisor fails


async def _fail() -> None:
    raise GuestError("the monitor said no")


@pytest.mark.parametrize("call", ["start", "collect"])
async def test_a_dirty_log_that_fails_ends_the_migration(call: str) -> None:
    move = _Move(SmallMachine(FailingLog(call, GuestError)))
    with trio.fail_after(5):
        await move.run()
    assert _ended(move.sent, "guest") == f"the dirty log cannot {call}"
    assert _ended(move.received, "guest") == f"the source says: the dirty log cannot {call}"
    assert move.machine.stayed()


async def test_a_dirty_log_that_works_does_no_harm() -> None:
    move = _Move(SmallMachine(FailingLog("", GuestError)))
    await move.run()
    assert move.machine.moved()


async def test_a_dirty_log_that_cannot_be_stopped_does_not_hide_why_the_migration_ended() -> None:
    move = _Move(SmallMachine(FailingLog("stop", GuestError)))
    move.machine.destination.hypervisor.before_load = _fail
    with trio.fail_after(5):
        await move.run()
    text = _ended(move.sent, "device-state")
    assert "the monitor said no" in text
    assert "the dirty log cannot stop" in text
    assert move.machine.stayed()


@pytest.mark.parametrize("call", ["before_stop", "before_save"])
async def test_a_source_hypervisor_that_refuses_ends_the_migration(call: str) -> None:
    move = _Move()
    setattr(move.machine.source.hypervisor, call, _fail)
    with trio.fail_after(5):
        await move.run()
    assert _ended(move.sent, "guest") == "the monitor said no"
    assert _ended(move.received, "guest") == "the source says: the monitor said no"
    assert move.machine.stayed()


async def test_device_state_that_does_not_fit_is_the_reason_on_both_sides() -> None:
    move = _Move()
    move.machine.destination.hypervisor.before_load = _fail
    with trio.fail_after(5):
        await move.run()
    assert _ended(move.sent, "device-state") == "the destination says: the monitor said no"
    assert _ended(move.received, "device-state") == "the monitor said no"
    assert move.machine.stayed()


async def test_a_guest_that_cannot_go_on_here_is_said_so() -> None:
    move = _Move()
    move.machine.source.hypervisor.before_save = _fail
    move.machine.source.hypervisor.before_resume = _fail
    with trio.fail_after(5):
        await move.run()
    assert "and the guest does not go on here: the monitor said no" in _ended(move.sent, "guest")


async def test_a_destination_hypervisor_that_does_not_continue_leaves_it_undecided() -> None:
    move = _Move()
    move.machine.destination.hypervisor.before_resume = _fail
    with trio.fail_after(5):
        await move.run()
    _ended(move.sent, "undecided", Outcome.UNDECIDED)
    _ended(move.received, "undecided", Outcome.UNDECIDED)
    assert not move.machine.source.gate.running


@pytest.mark.parametrize(
    ("side", "call"),
    [("source", "before_stop"), ("source", "before_save"), ("destination", "before_load")],
)
async def test_a_hypervisor_that_never_answers_is_given_up(
    monkeypatch: pytest.MonkeyPatch, side: str, call: str
) -> None:
    monkeypatch.setattr("pagexfer.engine.failure.HYPERVISOR_TIMEOUT_S", 0.05)
    move = _Move()
    setattr(getattr(move.machine, side).hypervisor, call, trio.sleep_forever)
    with trio.fail_after(5):
        await move.run()
    reason = "guest" if side == "source" else "device-state"
    assert "within 0.05 s" in _ended(move.sent, reason)
    assert "within 0.05 s" in _ended(move.received, reason)
    assert move.machine.stayed()


async def test_a_parked_source_that_cannot_be_continued_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagexfer.engine.failure.HYPERVISOR_TIMEOUT_S", 0.05)
    move = _Move()
    move.machine.source.hypervisor.before_save = _fail
    move.machine.source.hypervisor.before_resume = trio.sleep_forever
    with trio.fail_after(5):
        await move.run()
    assert "did not continue the guest within 0.05 s" in _ended(move.sent, "guest")


async def test_a_vcpu_that_does_not_park_ends_the_migration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagexfer.engine.source.PARK_TIMEOUT_S", 0.05)
    move = _Move()
    move.machine.source.gate.slow = {1}
    await move.run()
    assert _ended(move.sent, "vcpu-not-parked") == "not every vCPU parked within 0.05 s"
    assert _ended(move.received, "vcpu-not-parked")
    assert move.machine.stayed()


# Arguments


@pytest.mark.parametrize("port", [-1, 1 << 16, 70000])
async def test_a_port_that_is_none(port: int) -> None:
    machine = SmallMachine()
    with pytest.raises(UsageError, match=f"not {port}$"):
        await send_guest(machine.source, HOST, port, ATTESTOR)
    with pytest.raises(UsageError, match=f"not {port}$"):
        await receive_guest(machine.destination, HOST, port, ATTESTOR)


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.inf, math.nan])
async def test_a_stall_timeout_that_is_none(seconds: float) -> None:
    machine = SmallMachine()
    with pytest.raises(UsageError, match="stall timeout"):
        await send_guest(machine.source, HOST, 1, ATTESTOR, stall_timeout_s=seconds)
    with pytest.raises(UsageError, match="stall timeout"):
        await receive_guest(machine.destination, HOST, 0, ATTESTOR, stall_timeout_s=seconds)
