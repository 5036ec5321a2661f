"""How a side ends whose isolated engine fails it, or whose hypervisor does: by the SVSM's state, and with one line."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from typing import Final

import pytest
import trio

from pagexfer.errors import Outcome, TransferAborted
from pagexfer.migration import MigrationReport

from .isolated_engines import IsolatedMove, engine_processes
from .machines import PATIENCE_S

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
