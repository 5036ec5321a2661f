"""Steering a running migration over real TCP: limits, pause, cancel, timeouts, and what a peer that trickles can do."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import pytest
import trio

import pagexfer
from pagexfer import MigrationParameters, Outcome, Status, Steering, TransferAborted, UsageError
from pagexfer.migration import receive_guest, send_guest

from .engine_guests import SmallMachine
from .loopback import HOST, connections
from .small_guests import ATTESTOR

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pagexfer import MigrationInfo

_MIB = 1 << 20
# Before pacing begins the kernel sends ten segments of 64 KiB, and its clock has a grain.
_GENEROUS = 1.5


@dataclass
class _Run:
    """One migration of a small guest under a steering, and how it ended."""

    parameters: MigrationParameters = field(default_factory=MigrationParameters)
    on_info: Callable[[MigrationInfo], None] = lambda _info: None
    stall_timeout_s: float = 5.0
    destination_stall_timeout_s: float = 5.0
    machine: SmallMachine = field(default_factory=SmallMachine)
    infos: list[MigrationInfo] = field(default_factory=list)
    sent: pagexfer.MigrationReport | TransferAborted | None = None

    def __post_init__(self) -> None:
        self.steering = Steering(self.parameters)

    async def run(self) -> None:
        async with trio.open_nursery() as network, trio.open_nursery() as nursery:
            self.network = _SlowNetwork(await nursery.start(self._receive))
            port = await network.start(self.network.serve)
            try:
                self.sent = await send_guest(
                    self.machine.source,
                    HOST,
                    port,
                    ATTESTOR,
                    channels=2,
                    steering=self.steering,
                    stall_timeout_s=self.stall_timeout_s,
                    on_progress=self._see,
                )
            except TransferAborted as aborted:
                self.sent = aborted
            network.cancel_scope.cancel()
            nursery.cancel_scope.cancel()

    def _see(self, info: MigrationInfo) -> None:
        self.infos.append(info)
        self.on_info(info)

    async def _receive(self, task_status: trio.TaskStatus[int]) -> None:
        with contextlib.suppress(TransferAborted):  # the source's end is what these tests look at
            await receive_guest(
                self.machine.destination,
                HOST,
                0,
                ATTESTOR,
                stall_timeout_s=self.destination_stall_timeout_s,
                on_listening=task_status.started,
            )

    def ended(self, reason: str) -> str:
        assert isinstance(self.sent, TransferAborted)
        assert (self.sent.outcome, self.sent.reason) == (Outcome.ENDED, reason)
        assert self.machine.stayed()
        return str(self.sent)

    def statuses(self) -> list[Status]:
        return list(dict.fromkeys(info.status for info in self.infos))


_PAUSING = MigrationParameters(pause_before_switchover=True)


# Bandwidth


async def test_a_paced_connection_stays_under_its_pace() -> None:
    data, pace = bytes(6 * _MIB), 8 * _MIB
    received = bytearray(len(data))
    async with connections() as (ours, theirs), trio.open_nursery() as nursery:
        ours.pace(pace)
        began = time.monotonic()
        nursery.start_soon(ours.send, data)
        await theirs.receive_into(memoryview(received))
        assert len(data) / (time.monotonic() - began) <= _GENEROUS * pace


async def test_a_pace_is_changed_and_lifted_while_data_flows() -> None:
    # At the first pace this would take a minute and a half.
    data = bytes(24 * _MIB)
    async with connections() as (ours, theirs), trio.open_nursery() as nursery:
        ours.pace(_MIB // 4)
        received = bytearray(len(data))
        nursery.start_soon(ours.send, data)
        await theirs.receive_into(memoryview(received)[:_MIB])
        ours.pace(None)
        with trio.fail_after(20):
            await theirs.receive_into(memoryview(received)[_MIB:])


async def test_a_connection_that_is_closed_cannot_be_paced() -> None:
    async with connections() as (ours, _):
        ours.close()
        with pytest.raises(pagexfer.PagexferError):
            ours.pace(1)


# Pause


async def test_a_pause_waits_while_the_guest_runs_and_ends_in_one_more_epoch() -> None:
    run = _Run(_PAUSING)
    waited: list[int] = []

    def look(info: MigrationInfo) -> None:
        if info.status is Status.PRE_SWITCHOVER and not waited:
            assert run.machine.source.gate.running
            assert run.steering.paused
            waited.append(info.ram.dirty_sync_count)
            run.machine.source.write(3, 77)
            run.steering.continue_switchover()

    run.on_info = look
    with trio.fail_after(10):
        await run.run()
    assert run.machine.moved()
    assert run.machine.destination.memory.words[3, 0] == 77
    assert isinstance(run.sent, pagexfer.MigrationReport)
    assert run.sent.info.ram.dirty_sync_count >= waited[0] + 2
    assert not run.steering.paused
    assert not run.steering.parameters.pause_before_switchover


async def test_a_pause_longer_than_the_patience_of_the_destination_does_not_end_it() -> None:
    # A destination takes a source for gone that says nothing for four stall timeouts. During the pause there is an
    # epoch each second, so that a busy machine has three seconds to spare.
    run = _Run(_PAUSING, destination_stall_timeout_s=1.0)
    paused_at: list[float] = []

    def look(_info: MigrationInfo) -> None:
        if run.steering.paused:
            paused_at.append(trio.current_time())
            if trio.current_time() - paused_at[0] > 4.5:
                run.steering.continue_switchover()

    run.on_info = look
    with trio.fail_after(30):
        await run.run()
    assert run.machine.moved()


async def test_a_pause_that_is_not_wanted_any_more_ends() -> None:
    run = _Run(_PAUSING)

    def look(_info: MigrationInfo) -> None:
        if run.steering.paused:
            run.steering.parameters = MigrationParameters()

    run.on_info = look
    with trio.fail_after(10):
        await run.run()
    assert run.machine.moved()


@pytest.mark.parametrize("how", ["method", "scope"])
async def test_cancelled_during_a_pause_the_guest_goes_on_here(how: str) -> None:
    run = _Run(_PAUSING)
    scope = trio.CancelScope()

    def look(_info: MigrationInfo) -> None:
        if run.steering.paused:
            (run.steering if how == "method" else scope).cancel()

    run.on_info = look
    with trio.fail_after(10), scope:
        await run.run()
    assert scope.cancelled_caught is (how == "scope")
    if how == "method":
        assert "operator cancelled" in run.ended("cancelled")
    assert run.machine.stayed()
    assert run.infos[-1].status is Status.CANCELLED
    assert not run.steering.paused


def test_only_a_pause_can_be_continued() -> None:
    with pytest.raises(UsageError, match="does not wait"):
        Steering().continue_switchover()


# Cancel and timeouts


async def test_cancelled_before_it_began_nothing_moves() -> None:
    run = _Run()
    run.steering.cancel()
    with trio.fail_after(10):
        await run.run()
    assert isinstance(run.sent, TransferAborted)
    assert run.sent.reason == "cancelled"
    assert run.machine.source.gate.running


async def test_a_cancel_after_the_start_token_has_no_effect() -> None:
    run = _Run()

    async def cancel() -> None:
        run.steering.cancel()
        await trio.sleep(0.02)

    run.machine.destination.hypervisor.before_resume = cancel
    with trio.fail_after(10):
        await run.run()
    assert run.machine.moved()
    assert isinstance(run.sent, pagexfer.MigrationReport)


async def test_precopy_that_lasts_longer_than_its_timeout_ends() -> None:
    run = _Run(replace(_PAUSING, timeout_s=0.3))
    with trio.fail_after(10):
        await run.run()
    assert "within the timeout of 0.3 s" in run.ended("timeout")
    assert Status.PRE_SWITCHOVER in run.statuses()
    assert run.infos[-1].status is Status.FAILED


async def test_a_timeout_can_be_changed_while_it_runs() -> None:
    run = _Run(replace(_PAUSING, timeout_s=500.0))

    def look(_info: MigrationInfo) -> None:
        if run.steering.paused:
            run.steering.parameters = replace(run.steering.parameters, timeout_s=0.01)

    run.on_info = look
    with trio.fail_after(10):
        await run.run()
    run.ended("timeout")


async def test_a_timeout_has_no_part_in_black_out() -> None:
    run = _Run(MigrationParameters(timeout_s=2.0))

    async def slow() -> None:
        await trio.sleep(2.1)

    run.machine.source.hypervisor.before_save = slow
    with trio.fail_after(10):
        await run.run()
    assert run.machine.moved()


class _SlowNetwork:
    """Relays connections to `port`; once `slow`, 64 KiB at a time with a pause after each, and never silent."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.slow = False

    async def serve(self, task_status: trio.TaskStatus[int]) -> None:
        listeners = await trio.open_tcp_listeners(0, host=HOST)
        task_status.started(listeners[0].socket.getsockname()[1])
        await trio.serve_listeners(self._join, listeners)

    async def _join(self, source: trio.SocketStream) -> None:
        destination = await trio.open_tcp_stream(HOST, self._port)
        async with destination, trio.open_nursery() as nursery:
            nursery.start_soon(self._relay, source, destination)
            nursery.start_soon(self._relay, destination, source)

    async def _relay(self, origin: trio.SocketStream, target: trio.SocketStream) -> None:
        try:
            while data := await origin.receive_some(1 << 16):
                await target.send_all(data)
                if self.slow:
                    await trio.sleep(0.02)
            await target.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            await target.aclose()


async def test_a_black_out_ends_though_the_peer_takes_something_now_and_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every part that is sent finds the peer alive; only the sum says that the guest stands still for too long."""
    run = _Run(MigrationParameters(downtime_limit_s=0.2), stall_timeout_s=1.5)

    async def save() -> bytes:
        await trio.lowlevel.checkpoint()
        run.network.slow = True
        return bytes(64 * _MIB)  # at 3 MiB/s, and more than the kernel's buffers take

    monkeypatch.setattr(run.machine.source.hypervisor, "save_device_state", save)
    with trio.fail_after(20):
        await run.run()
    assert "black-out did not end within 1.7 s" in run.ended("timeout")


def test_parameters_that_cannot_be() -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"downtime_limit_s": 0.0}, "downtime limit"),
        ({"downtime_limit_s": 2000.0}, "downtime limit"),
        ({"downtime_limit_s": float("nan")}, "downtime limit"),
        ({"max_downtime_limit_s": 0.1}, "below the downtime limit"),
        ({"max_bandwidth_bytes": 0}, "bandwidth limit"),
        ({"max_bandwidth_bytes": _MIB - 1}, "bandwidth limit"),
        ({"timeout_s": 0.0}, "timeout"),
        ({"timeout_s": float("inf")}, "timeout"),
    ]
    for arguments, word in bad:
        with pytest.raises(UsageError, match=word) as caught:
            MigrationParameters(**arguments)
        assert str(caught.value).isprintable()


async def test_a_limit_is_given_once() -> None:
    machine = SmallMachine()
    with pytest.raises(UsageError, match="twice"):
        await send_guest(machine.source, HOST, 1, ATTESTOR, steering=Steering(), downtime_limit_s=1.0)
