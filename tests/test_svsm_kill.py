"""The SVSM's process of an isolated side is killed at every named fault point: what both journals say, and who runs.

What is expected is read off the tables of `svsm/states.py` and docs/design.md, "After a crash". The dead side's journal
says what it wrote down last: a source's KEYED until it wrote STARTED, before the token left; a destination's KEYED until it
wrote VERIFIED, before READY left, and that until it wrote RUNNING. The side that lives ends: a destination without a start
token is FAILED, a source before it ABORTED, and after it STARTED until it hears from the destination.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Final

import pytest
import trio

from pagexfer.errors import Outcome
from pagexfer.testing.proxy import Action, FaultProxy

from .fault_points import FAULT_POINTS
from .machines import CHANNELS, HOST, PATIENCE_S
from .side_processes import (
    CALM,
    ISOLATED,
    SideProcess,
    guest_goes_on,
    journals,
    new_psk,
    only_the_source_may_run,
    receive_arguments,
    recover,
    send_arguments,
    side_process,
)

if TYPE_CHECKING:
    from pathlib import Path

# The dead SVSM's engine says so, unless its peer is quicker to see that a connection is gone. Where each waits for
# the other nobody is quicker.
_REASONS: Final = ("svsm", "connection")
_WAITING: Final = ("svsm",)

# What the destination says, and the states in both journals. Up to the manifest a dead source's journal says KEYED whatever
# was sent, and a dead destination's whatever came: there each side in its turn tells all that both would. At the manifest
# it is the source that dies, as the destination then becomes VERIFIED by itself and has to go back on it.
_SOURCE: Final = {
    "channel-open": (Outcome.ENDED, "KEYED", "KEYED"),
    "first-barrier": (Outcome.ENDED, "KEYED", "KEYED"),
    "epoch-token": (Outcome.ENDED, "KEYED", "KEYED"),
    "device-state": (Outcome.ENDED, "KEYED", "KEYED"),
    "manifest": (Outcome.ENDED, "KEYED", "FAILED"),
    "ready": (Outcome.ENDED, "KEYED", "FAILED"),
    "start-token": (Outcome.COMPLETED, "STARTED", "RUNNING"),
}
# What the source says, and the state in the destination's journal. After the start token a source's death changes nothing
# for the destination, so at RUNNING it is the destination that dies.
_DESTINATION: Final = {
    "mid-epoch": (Outcome.ENDED, "KEYED"),
    "last-barrier": (Outcome.ENDED, "KEYED"),
    "last-epoch-token": (Outcome.ENDED, "KEYED"),
    "vcpu-state": (Outcome.ENDED, "KEYED"),
    "ready": (Outcome.ENDED, "VERIFIED"),
    "start-token": (Outcome.UNDECIDED, "VERIFIED"),
    "running": (Outcome.UNDECIDED, "RUNNING"),
}


@pytest.fixture
def psk(tmp_path: Path) -> str:
    return new_psk(tmp_path)


def test_a_side_dies_at_every_point() -> None:
    assert _SOURCE.keys() | _DESTINATION.keys() == FAULT_POINTS.keys()


@pytest.mark.parametrize("point", _SOURCE)
async def test_source_svsm_killed_at(psk: str, point: str) -> None:
    """What it had sent arrives: a start token that has left is the destination's, whatever became of the source."""
    outcome, *states = _SOURCE[point]
    code, source, destination = await _migrate(psk, point, "source", Action.PASS)
    assert source.process.returncode == -signal.SIGKILL
    assert code == outcome
    report = destination.report()
    if outcome is Outcome.COMPLETED:
        assert guest_goes_on(report)
    else:
        assert report["error"]["reason"] in _REASONS
        assert "progressed" not in report["guest"]
    code, verdict = await trio.to_thread.run_sync(recover, *journals(psk))
    found = [verdict["source-state"], verdict["destination-state"]]
    # What follows the device state, up to the manifest, may have left before the death is known of.
    assert found == states or (point, found) == ("device-state", ["KEYED", "FAILED"])
    runner = "the destination" if outcome is Outcome.COMPLETED else "the source"
    assert (code, verdict["may-run"]) == (Outcome.COMPLETED, runner)


@pytest.mark.parametrize("point", _DESTINATION)
async def test_destination_svsm_killed_at(psk: str, point: str) -> None:
    """The frame at that point is lost with it: the answers too, with which the source would know all that it needs."""
    outcome, left = _DESTINATION[point]
    code, source, destination = await _migrate(psk, point, "destination", Action.DROP)
    assert destination.process.returncode == -signal.SIGKILL
    assert code == outcome
    report = source.report()
    if outcome is Outcome.ENDED:
        assert report["error"]["reason"] in (_WAITING if point == "ready" else _REASONS)
        assert guest_goes_on(report)
    else:
        assert report["error"]["reason"] == "undecided"
        assert "stays parked here" in report["error"]["message"]
        assert "progressed" not in report["guest"]
    if left == "RUNNING":
        code, verdict = await trio.to_thread.run_sync(recover, *journals(psk))
        assert (verdict["source-state"], verdict["destination-state"]) == ("STARTED", "RUNNING")
        assert (code, verdict["may-run"]) == (Outcome.COMPLETED, "the destination")
    else:
        source_state = "ABORTED" if outcome is Outcome.ENDED else "STARTED"
        await only_the_source_may_run(psk, source_state, left)


async def _migrate(psk: str, point: str, victim: str, action: Action) -> tuple[int, SideProcess, SideProcess]:
    """Kill one side at the point; returns the other's exit code, once no process of either is left."""
    sides: dict[str, SideProcess] = {}

    def kill() -> None:
        for side in sides.values():
            side.note_children()
        sides[victim].process.kill()

    options = {victim: ISOLATED}
    with trio.fail_after(PATIENCE_S):
        async with (
            side_process(*receive_arguments(psk, *options.get("destination", ()))) as destination,
            trio.open_nursery() as network,
        ):
            sides["destination"] = destination
            proxy = FaultProxy(HOST, await destination.port(), FAULT_POINTS[point](), action, kill)
            port = await network.start(proxy.serve)
            channels = "--channels", str(CHANNELS)
            async with side_process(
                *send_arguments(psk, port, *CALM, *channels, *options.get("source", ()))
            ) as source:
                sides["source"] = source
                codes = {"source": await source.end(), "destination": await destination.end()}
            network.cancel_scope.cancel()
    assert proxy.reached.is_set()
    return codes["destination" if victim == "source" else "source"], source, destination
