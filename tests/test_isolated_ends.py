"""How a side ends whose isolated engine fails it, or whose hypervisor does: by the SVSM's state, and with one line."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from typing import Final

import pytest

from pagexfer.errors import Outcome, TransferAborted

from .isolated_engines import IsolatedMove, engine_processes

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
