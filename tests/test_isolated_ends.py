"""How a side ends whose isolated engine fails it, or whose hypervisor does: by the SVSM's state, and with one line."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import pytest
import trio

from pagexfer.dirty import DirtyBitmap
from pagexfer.engine import failure
from pagexfer.errors import ChannelBroken, GuestError, Outcome, TransferAborted
from pagexfer.isolation.link import Link
from pagexfer.migration import MigrationReport

from .engine_guests import SmallMachine
from .isolated_engines import IsolatedMove, engine_processes
from .machines import PATIENCE_S
from .small_guests import PAGES

if TYPE_CHECKING:
    from typing import Literal

# More than a socket buffer takes.
_LARGE_STATE: Final = bytes(8 << 20)


def _aborted(end: object, outcome: Outcome, reason: str) -> str:
    assert isinstance(end, TransferAborted), end
    assert (end.outcome, end.reason) == (outcome, reason), str(end)
    assert str(end).isprintable()
    return str(end)


@pytest.mark.parametrize("meanwhile", ["nothing", "steered", "ended"])
async def test_an_engine_that_stands_still_while_it_is_answered(meanwhile: str) -> None:
    move = IsolatedMove("source")
    move.machine.source.hypervisor.device_state = _LARGE_STATE

    async def hang() -> None:
        os.kill(engine_processes()[0], signal.SIGSTOP)
        if meanwhile == "steered":
            move.steering.parameters = replace(move.steering.parameters, downtime_limit_s=1.0)
        elif meanwhile == "ended":
            move.steering.cancel()

    move.machine.source.hypervisor.before_save = hang
    await move.run()
    assert "took nothing for 1.5 s" in _aborted(move.sent.end, Outcome.ENDED, "engine")
    assert move.machine.stayed()


async def test_a_cancel_while_an_engine_stands_still() -> None:
    move = IsolatedMove("source")
    move.machine.source.hypervisor.device_state = _LARGE_STATE

    async def hang() -> None:
        os.kill(engine_processes()[0], signal.SIGSTOP)
        move.scope.cancel()

    move.machine.source.hypervisor.before_save = hang
    await move.run()
    assert move.scope.cancelled_caught
    assert move.machine.stayed()


@pytest.mark.parametrize("how", ["cancelled", "ended", "steered"])
async def test_an_engine_hears_of_its_task_before_anything_else(how: str) -> None:
    """A source's operator who changes his mind while its engine's process starts."""
    move = IsolatedMove("source", patience_s=PATIENCE_S if how == "steered" else 0.0)

    async def once_it_started() -> None:
        while not engine_processes():  # noqa: ASYNC110 (a process has no event)
            await trio.sleep(0.0001)
        if how == "cancelled":
            move.scope.cancel()
        elif how == "ended":
            move.steering.cancel()
        else:
            move.steering.parameters = replace(move.steering.parameters, downtime_limit_s=1.0)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(once_it_started)
        await move.run()
    if how == "cancelled":
        assert move.scope.cancelled_caught
        assert move.machine.stayed()
    elif how == "ended":
        _aborted(move.sent.end, Outcome.ENDED, "cancelled")
        assert move.machine.stayed()
    else:
        assert isinstance(move.sent.end, MigrationReport), move.sent.end
        assert move.machine.moved()


@pytest.mark.parametrize("milliseconds", [0, 1, 2, 3, 5, 8, 12, 20, 50])
async def test_a_cancel_at_once_is_a_cancel(milliseconds: int) -> None:
    move = IsolatedMove("source", patience_s=0.0)
    move.scope.deadline = trio.current_time() + milliseconds / 1000
    await move.run()
    assert move.scope.cancelled_caught
    assert move.machine.stayed()


async def test_an_engine_that_cannot_be_given_its_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel limits how many are on their way (ETOOMANYREFS), whatever may be open."""

    async def refuse(_self: Link, _descriptors: list[int]) -> None:
        await trio.lowlevel.checkpoint()
        raise ChannelBroken("no files can be given to the engine's process: too many references")

    monkeypatch.setattr(Link, "send_descriptors", refuse)
    move = IsolatedMove("source", patience_s=0.0)
    await move.run()
    assert "too many references" in _aborted(move.sent.end, Outcome.ENDED, "engine")
    assert move.machine.stayed()


# Hypervisors


async def test_a_device_state_over_the_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagexfer.engine.hypervisor.MAX_DEVICE_STATE_BYTES", 100)
    move = IsolatedMove("source")
    move.machine.source.hypervisor.device_state = bytes(101)
    await move.run()
    assert "device state of 101 bytes is over the cap" in _aborted(move.sent.end, Outcome.ENDED, "guest")
    assert "the source says: device state of 101" in _aborted(move.received.end, Outcome.ENDED, "guest")
    assert move.machine.stayed()


async def _fail() -> None:
    raise GuestError("the monitor said no")


async def test_a_guest_that_cannot_go_on_at_the_source_is_said_so() -> None:
    move = IsolatedMove("source")
    move.machine.source.hypervisor.before_save = _fail
    move.machine.source.hypervisor.before_resume = _fail
    await move.run()
    message = _aborted(move.sent.end, Outcome.ENDED, "guest")
    assert message == "the monitor said no; and the guest does not go on here: the monitor said no"


async def test_a_cancelled_guest_that_cannot_go_on_at_the_source_is_said_so() -> None:
    move = IsolatedMove("source")

    async def cancel() -> None:
        move.scope.cancel()

    move.machine.source.hypervisor.before_save = cancel
    move.machine.source.hypervisor.before_resume = _fail
    await move.run()
    assert "and the guest does not go on here: the monitor said no" in _aborted(
        move.sent.end, Outcome.ENDED, "cancelled"
    )


async def test_a_destination_hypervisor_that_does_not_continue_leaves_it_undecided() -> None:
    move = IsolatedMove("destination")
    move.machine.destination.hypervisor.before_resume = _fail
    await move.run()
    assert _aborted(move.received.end, Outcome.UNDECIDED, "undecided") == (
        "the guest was released here but does not run: the monitor said no"
    )
    _aborted(move.sent.end, Outcome.UNDECIDED, "undecided")
    assert not move.machine.source.gate.running


@pytest.mark.parametrize("side", ["source", "destination"])
async def test_a_hypervisor_that_hangs_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, side: Literal["source", "destination"]
) -> None:
    monkeypatch.setattr(failure, "HYPERVISOR_TIMEOUT_S", 0.5)  # of this process
    move = IsolatedMove(side)
    if side == "source":
        move.machine.source.hypervisor.before_save = trio.sleep_forever
        await move.run()
        assert _aborted(move.sent.end, Outcome.ENDED, "guest") == (
            "the hypervisor did not save device state within 0.5 s"
        )
        assert move.machine.stayed()
    else:
        move.machine.destination.hypervisor.before_resume = trio.sleep_forever
        await move.run()
        assert "the hypervisor did not continue the guest within 0.5 s" in _aborted(
            move.received.end, Outcome.UNDECIDED, "undecided"
        )


class _DirtyLog:
    """A hypervisor's log that is on or off, and never has a page."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def start(self) -> None:
        self.calls.append("start")

    def collect(self) -> DirtyBitmap:
        self.calls.append("collect")
        return DirtyBitmap(PAGES)

    def stop(self) -> None:
        self.calls.append("stop")


async def test_an_engine_that_died_leaves_no_dirty_log_on() -> None:
    log = _DirtyLog()
    move = IsolatedMove("source", SmallMachine(log))

    async def kill() -> None:
        os.kill(engine_processes()[0], signal.SIGKILL)

    move.machine.source.hypervisor.before_save = kill
    await move.run()
    _aborted(move.sent.end, Outcome.ENDED, "engine")
    assert move.machine.stayed()
    assert log.calls[0] == "start"
    assert log.calls[-1] == "stop"
