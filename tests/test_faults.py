"""One thing goes wrong at one named point of a migration over real TCP: afterwards exactly one side may run the guest.

Every case is one fault of `pagexfer.testing.proxy` and what both sides have to make of it. That a side goes on is proved by
the guest itself, which writes on and finds its whole RAM as its history says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest
import trio

from pagexfer.errors import Outcome, TransferAborted
from pagexfer.migration import MigrationReport
from pagexfer.svsm.journal import read_journal
from pagexfer.svsm.recovery import judge_both
from pagexfer.testing.proxy import Action, FaultProxy
from pagexfer.wire.handshake import Role

from .fault_points import FAULT_POINTS
from .machines import HOST, PATIENCE_S, Machines, Side, goes_on, is_parked, never_ran, receive

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pagexfer.testing.proxy import Frame

# Short where a side has to find out by waiting, long where nothing is to be waited for.
_SHORT_S: Final = 0.2
_LONG_S: Final = 10.0

_ACTIONS: Final = [action for action in Action if action not in (Action.PASS, Action.DELAY)]

# Outcome at the source, and whether the guest runs at the destination.
_ENDED: Final = ({Outcome.ENDED}, False)
_LOST: Final = ({Outcome.UNDECIDED}, False)
_UNHEARD: Final = ({Outcome.UNDECIDED}, True)
_COMPLETED: Final = ({Outcome.COMPLETED}, True)

# Before the start token every fault leaves the guest at the source; these do so, too, or change nothing that matters.
_EXCEPTIONS: Final = {
    # A destination that is VERIFIED and finds the token damaged says so with an abort token, and the guest goes on.
    ("start-token", Action.FLIP): _ENDED,
    # A channel that is lost while epochs are sent gets a new connection; the last barrier is the last that it has to say.
    **{
        (point, action): _COMPLETED
        for point in ("mid-epoch", "first-barrier", "last-barrier", "epoch-token", "last-epoch-token")
        for action in (Action.CUT, Action.TRUNCATE)
    },
    ("last-barrier", Action.HALF_CLOSE): _COMPLETED,
    # The answer that arrived lets the start token leave; what goes wrong after it cannot be undecided by the source.
    ("ready", Action.HALF_CLOSE): _UNHEARD,
    ("ready", Action.DUPLICATE): _UNHEARD,
    ("start-token", Action.HALF_CLOSE): _COMPLETED,
    ("start-token", Action.DUPLICATE): _COMPLETED,
    ("running", Action.HALF_CLOSE): _COMPLETED,
    ("running", Action.DUPLICATE): _COMPLETED,
}
_AFTER_START: Final = {"start-token": _LOST, "running": _UNHEARD}
# A second manifest ends the destination, while its READY may have made the source release the start token.
_RACES: Final = {("manifest", Action.DUPLICATE): {Outcome.ENDED, Outcome.UNDECIDED}}


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    with Machines() as machines:
        yield machines


def _expected(point: str, action: Action) -> tuple[set[Outcome], bool]:
    if (point, action) in _RACES:
        return _RACES[point, action], False
    return _EXCEPTIONS.get((point, action)) or _AFTER_START.get(point, _ENDED)


@pytest.mark.parametrize("action", _ACTIONS)
@pytest.mark.parametrize("point", FAULT_POINTS)
async def test_one_side_may_run_the_guest(
    machines: Machines, tmp_path: Path, point: str, action: Action
) -> None:
    outcomes, runs_there = _expected(point, action)
    stall_timeout_s = _LONG_S if outcomes == {Outcome.COMPLETED} else _SHORT_S
    source, destination, runner = await _migrate(
        machines, FAULT_POINTS[point], action, stall_timeout_s, tmp_path
    )

    outcome = _outcome(source)
    assert outcome in outcomes, source.end
    _one_clear_line(source)
    _one_clear_line(destination)
    if outcome is Outcome.ENDED:
        assert await goes_on(machines.source)
    else:
        assert is_parked(machines.source)
    assert _outcome(destination) is (Outcome.COMPLETED if runs_there else Outcome.ENDED), destination.end
    if runs_there:
        assert await goes_on(machines.destination)
    else:
        assert never_ran(machines.destination)
    # Whatever the source makes of it, the journals together know.
    assert runner is (Role.DESTINATION if runs_there else Role.SOURCE)


async def test_without_a_fault_the_guest_moves(machines: Machines, tmp_path: Path) -> None:
    source, destination, runner = await _migrate(
        machines, FAULT_POINTS["start-token"], Action.PASS, _LONG_S, tmp_path
    )
    assert runner is Role.DESTINATION
    assert _outcome(source) is _outcome(destination) is Outcome.COMPLETED
    assert source.progress[-1].ram.dirty_sync_count >= 2
    assert is_parked(machines.source)
    assert await goes_on(machines.destination)


async def _migrate(
    machines: Machines,
    point: Callable[[], Callable[[Frame], bool]],
    action: Action,
    stall_timeout_s: float,
    folder: Path,
) -> tuple[Side, Side, Role | None]:
    """Migrate with one fault; returns both ends, and who may run by the journals.

    A machine that is too busy to come to its point in time gets more time.
    """
    for factor in (1, 4, 16):
        await machines.start()
        destination = Side()
        ours, theirs = folder / f"source {factor}", folder / f"destination {factor}"
        with trio.fail_after(PATIENCE_S):
            async with trio.open_nursery() as network, trio.open_nursery() as sides:
                timeout_s = factor * stall_timeout_s
                port = await sides.start(receive, machines.destination, destination, timeout_s / 2, theirs)
                proxy = FaultProxy(HOST, port, point(), action)
                proxy_port = await network.start(proxy.serve)
                source = await machines.send(proxy_port, timeout_s, ours)
                if not proxy.reached.is_set():
                    sides.cancel_scope.cancel()
                # A side ends on its own; the proxy, which stays silent where it has to, does not end it.
                while destination.end is None and proxy.reached.is_set():  # noqa: ASYNC110 (a side has no event)
                    await trio.sleep(0.002)
                network.cancel_scope.cancel()
        if proxy.reached.is_set():
            (left, _), (right, _) = read_journal(ours), read_journal(theirs)
            return source, destination, judge_both(left, right, active=False).runner
    raise AssertionError(f"the point of the fault was not reached: {source.end}")


def _outcome(side: Side) -> Outcome:
    if isinstance(side.end, TransferAborted):
        return side.end.outcome
    assert isinstance(side.end, MigrationReport)
    return Outcome.COMPLETED


def _one_clear_line(side: Side) -> None:
    if isinstance(side.end, TransferAborted):
        assert str(side.end)
        assert str(side.end).isprintable()
        assert side.end.reason
        assert side.end.reason != "internal"
