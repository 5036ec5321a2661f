"""The commit exchange, explored whole: no order of steps, messages, failing disks and crashes makes two sides run.

And none leaves the guest without a side that may run it: while no side crashes the sides settle it alone, after a crash
`pagexfer recover` does. Each property is shown to find the defect that it is there for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pagexfer.svsm.recovery import judge_both
from pagexfer.svsm.states import DESTINATION, SOURCE, Event
from pagexfer.wire.handshake import Role
from pagexfer.wire.journal import JOURNALED
from pagexfer.wire.slot import SessionStatus as State

from .commit_model import (
    ABORT_TOKEN,
    READY,
    RUNNING,
    START,
    Counterexample,
    Design,
    Do,
    Model,
    Setting,
    Steps,
    World,
    abandoned,
    crashed_destination,
    crashed_source,
    explore,
    record_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable


# What must hold in every world


def both_run(_model: Model, world: World) -> str:
    """(a) Once the guest ran at the destination it does not run at the source, whoever died and whoever was asked."""
    return "both sides run" if world.source.runs and world.destination.ran else ""


def recover_fails(model: Model, world: World) -> str:
    """(c) If all that still lives dies now, the two journals name one side, and none but the one that ran."""
    runners = model.recovered(world)
    if len(runners) > 1:
        return "recover lets both sides run"
    world = World(crashed_source(world.source), crashed_destination(world.destination))
    if model.can_abandon(world.destination) and not model.recovered(world):
        world = world._replace(destination=abandoned(world.destination))
    runners = model.recovered(world)
    if len(runners) != 1:
        return "recover names no side" if not runners else "recover lets both sides run"
    if world.destination.ran and Role.SOURCE in runners:
        return "recover lets the source run a guest that ran at the destination"
    return ""


def neither_runs(model: Model, world: World) -> str:
    """(b) Where links deliver and engines do their duty, a world in which nothing is left to do has one side that runs.

    A crash before the start token left is allowed for: then one side runs or, says `recover`, may.
    """
    source, destination = world.source, world.destination
    if not _is_settled(world):
        return ""
    if source.alive and destination.alive:
        if source.state is State.STARTED:
            return "the source stays undecided"
        return "" if source.runs is not destination.ran else "neither side runs"
    if source.runs or destination.ran:
        return ""
    return recover_fails(model, world)


def _is_settled(world: World) -> bool:
    source, destination = world.source, world.destination
    if source.alive and (
        source.todo or source.state is State.PARKED
    ):  # its engine goes on, or aborts in time
        return False
    answers = [kind for kind in world.sent if kind is not START]
    if source.alive and source.state is State.STARTED and world.heard < len(answers):
        return False
    if not destination.alive:
        return True
    if destination.todo or (destination.state is State.VERIFIED and START in world.sent):
        return False
    # Its engine sends RUNNING, or fetches the abort token that is there to be had.
    due = {State.RUNNING: RUNNING, State.FAILED: ABORT_TOKEN}.get(destination.state)
    return due is None or not destination.key or due in world.sent


class BeforeStart(Model):
    """No crash once the start token left."""

    def moves(self, world: World) -> list[tuple[str, World]]:  # type: ignore[override]
        return [
            (label, after)
            for label, after in super().moves(world)
            if not (label.endswith("crashes") and START in world.sent)
        ]


def in_every_world(model: Model, world: World) -> str:
    return both_run(model, world) or recover_fails(model, world)


HOSTILE = Setting()
BLIND = Setting(sees_life=False)
OUTSIDE = Setting(outside=True)
FAIR = Setting(hostile=False, disks_fail=False, operator=False)


@pytest.mark.parametrize(
    "setting", [HOSTILE, BLIND, OUTSIDE], ids=["sees-life", "copied-journal", "guest-in-a-process-of-its-own"]
)
def test_never_two_sides_and_after_a_crash_always_one(
    setting: Setting, record_property: Callable[[str, object], None]
) -> None:
    worlds = explore(Model(Design(), setting), in_every_world)
    record_property("worlds", len(worlds))
    print(len(worlds), "worlds")
    assert len(worlds) > 4000
    # The model does what it is there for: both outcomes, with and without a crash, and every message.
    assert any(world.destination.ran and not world.destination.alive for world in worlds)
    assert any(world.source.runs and not world.source.alive and START in world.sent for world in worlds)
    assert {kind for world in worlds for kind in world.sent} == {READY, START, RUNNING, ABORT_TOKEN}
    assert {world.source.state for world in worlds} == {
        state for pair in SOURCE.items() for state in (pair[0][0], pair[1])
    }
    assert {world.destination.state for world in worlds} == {
        state for pair in DESTINATION.items() for state in (pair[0][0], pair[1])
    }


def test_without_a_crash_after_the_start_token_one_side_runs(
    record_property: Callable[[str, object], None],
) -> None:
    worlds = explore(BeforeStart(Design(), FAIR), neither_runs)
    record_property("worlds", len(worlds))
    print(len(worlds), "worlds")
    settled = [world for world in worlds if _is_settled(world) and START in world.sent]
    assert {world.source.state for world in settled if world.source.alive and world.destination.alive} == {
        State.FINISHED,
        State.ABORTED,
    }


def test_the_pairs_of_records_that_contradict_each_other_are_those_that_cannot_come_about() -> None:
    worlds = explore(Model(Design(), HOSTILE), in_every_world)
    found = {(world.source.journal, world.destination.journal) for world in worlds}
    for ours in JOURNALED[Role.SOURCE]:
        for theirs in JOURNALED[Role.DESTINATION]:
            source, destination = (
                record_of(World().source._replace(journal=ours)),
                record_of(World().destination._replace(journal=theirs)),
            )
            assert source is not None
            assert destination is not None
            advice = judge_both(source, destination, active=False).advice
            assert ("contradict" in advice) is ((ours, theirs) not in found), (ours, theirs)


# Each defect has its counterexample


def _send_first(name: str, steps: Steps) -> Steps:
    """The start token leaves before STARTED is written down."""
    return (steps[-1], *steps[:-1]) if name == Event.START.name and steps[-1].do is Do.SEND else steps


def _release_first(name: str, steps: Steps) -> Steps:
    """The destination's vCPUs run before RUNNING is written down."""
    return (steps[-1], *steps[:-1]) if name == Event.START.name and steps[-1].do is Do.RELEASE else steps


def _without_journal(state: State) -> Callable[[str, Steps], Steps]:
    def order(_name: str, steps: Steps) -> Steps:
        return tuple(
            step for step in steps if not (step.do in (Do.JOURNAL, Do.INSIST) and step.state is state)
        )

    return order


def _without_entering_failed(name: str, steps: Steps) -> Steps:
    """The destination gives the abort token and stays what it was."""
    return tuple(step for step in steps if name != ABORT_TOKEN.name or step.do is Do.SEND)


_DEFECTS = {
    "start token before the record of it": Design(order=_send_first),
    "no record of STARTED": Design(order=_without_journal(State.STARTED)),
    "vCPUs released before the record of it": Design(order=_release_first),
    "no record of RUNNING": Design(order=_without_journal(State.RUNNING)),
    "source aborts once STARTED": Design(source={**SOURCE, (State.STARTED, Event.ABORT): State.ABORTED}),
    "source goes on when the destination runs": Design(
        source={**SOURCE, (State.STARTED, Event.CONFIRMED): State.ABORTED}
    ),
    "abort token of a destination that is not FAILED": Design(order=_without_entering_failed),
    "abort token of a destination that is RUNNING": Design(
        abort_token_from=frozenset({State.VERIFIED, State.RUNNING})
    ),
    "destination fails once RUNNING": Design(
        destination={**DESTINATION, (State.RUNNING, Event.FAIL): State.FAILED}
    ),
    "destination starts once FAILED": Design(
        destination={**DESTINATION, (State.FAILED, Event.START): State.RUNNING}
    ),
}


@pytest.mark.parametrize("name", _DEFECTS)
def test_a_defect_makes_both_sides_run(name: str) -> None:
    with pytest.raises(Counterexample) as caught:
        explore(Model(_DEFECTS[name], HOSTILE), both_run)
    print(caught.value)


def test_a_machine_that_outlives_its_abandoning_makes_both_sides_run() -> None:
    with pytest.raises(Counterexample, match="operator: abandons") as caught:
        explore(Model(Design(abandons_machines_that_live=True), OUTSIDE), both_run)
    print(caught.value)


def test_a_guest_that_is_the_destinations_goes_on_there_without_its_svsm() -> None:
    """It crashed between the record of RUNNING and the release of the vCPUs: whoever follows `recover` lets it run."""
    worlds = explore(Model(Design(), OUTSIDE), both_run)
    left = World().destination._replace(journal=State.RUNNING, alive=False, key=False)
    assert {left, left._replace(ran=True)} <= {world.destination for world in worlds}


def test_without_a_record_of_verified_recover_names_no_side() -> None:
    with pytest.raises(Counterexample) as caught:
        explore(Model(Design(order=_without_journal(State.VERIFIED)), HOSTILE), in_every_world)
    assert caught.value.what == "recover names no side"


def test_a_destination_that_fails_without_a_word_leaves_the_source_undecided() -> None:
    with pytest.raises(Counterexample) as caught:
        explore(BeforeStart(Design(fail_keeps_key=False), FAIR), neither_runs)
    assert caught.value.what == "the source stays undecided"


def test_a_counterexample_shows_the_way() -> None:
    with pytest.raises(Counterexample, match="source: abort") as caught:
        explore(Model(_DEFECTS["source aborts once STARTED"], HOSTILE), both_run)
    assert "destination: ... release" in str(caught.value)
