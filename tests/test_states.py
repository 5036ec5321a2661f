"""Both tables, every pair of state and event; and what the tables promise about who may run the guest (R7)."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import pytest

from pagexfer.errors import LocalProtocolError
from pagexfer.svsm.states import DESTINATION, SOURCE, Event, StateMachine
from pagexfer.wire.slot import SessionStatus as State

if TYPE_CHECKING:
    from collections.abc import Mapping

    Table = Mapping[tuple[State, Event], State]

# Written out once more by hand, from section 6 of the design: what each state allows.
EXPECTED_SOURCE = {
    State.IDLE: {Event.PREPARE: State.PREPARED, Event.ABORT: State.ABORTED},
    State.PREPARED: {Event.ESTABLISH: State.PROVED, Event.ABORT: State.ABORTED},
    State.PROVED: {Event.KEY_CONFIRMED: State.KEYED, Event.ABORT: State.ABORTED},
    State.KEYED: {Event.EPOCH: State.PRECOPY, Event.ABORT: State.ABORTED},
    State.PRECOPY: {Event.EPOCH: State.PRECOPY, Event.PARK: State.PARKED, Event.ABORT: State.ABORTED},
    State.PARKED: {Event.EPOCH: State.PARKED, Event.START: State.STARTED, Event.ABORT: State.ABORTED},
    State.STARTED: {Event.CONFIRMED: State.FINISHED, Event.PEER_FAILED: State.ABORTED},
    State.ABORTED: {Event.ABORT: State.ABORTED},
}
EXPECTED_DESTINATION = {
    State.IDLE: {Event.ESTABLISH: State.KEYED, Event.FAIL: State.FAILED},
    State.KEYED: {Event.IMPORT: State.IMPORTING, Event.FAIL: State.FAILED},
    State.IMPORTING: {
        Event.IMPORT: State.IMPORTING,
        Event.VERIFY: State.VERIFIED,
        Event.FAIL: State.FAILED,
    },
    State.VERIFIED: {Event.START: State.RUNNING, Event.FAIL: State.FAILED},
    State.FAILED: {Event.FAIL: State.FAILED},
}


def machine_in(table: Table, state: State) -> StateMachine:
    machine = StateMachine(table)
    machine.state = state
    return machine


def reachable(table: Table, state: State, without: frozenset[Event] = frozenset()) -> set[State]:
    found, frontier = {state}, [state]
    while frontier:
        here = frontier.pop()
        for (origin, event), target in table.items():
            if origin is here and event not in without and target not in found:
                found.add(target)
                frontier.append(target)
    return found


@pytest.mark.parametrize("event", Event, ids=lambda event: event.name)
@pytest.mark.parametrize("state", State, ids=lambda state: state.name)
@pytest.mark.parametrize(
    ("table", "expected"),
    [(SOURCE, EXPECTED_SOURCE), (DESTINATION, EXPECTED_DESTINATION)],
    ids=["src", "dst"],
)
def test_every_pair_of_state_and_event(
    table: Table, expected: dict[State, dict[Event, State]], state: State, event: Event
) -> None:
    machine = machine_in(table, state)
    target = expected.get(state, {}).get(event)
    assert machine.allows(event) is (target is not None)
    if target is not None:
        machine.require(event)
        assert machine.state is state
        assert machine.advance(event) is target
        assert machine.state is target
        return
    for call in (machine.require, machine.advance):
        with pytest.raises(LocalProtocolError):
            call(event)
        assert machine.state is state


def test_session_begins_idle() -> None:
    assert StateMachine(SOURCE).state is State.IDLE


def test_no_way_back_from_started_without_the_destinations_word() -> None:
    assert reachable(SOURCE, State.STARTED, frozenset({Event.PEER_FAILED})) == {State.STARTED, State.FINISHED}
    assert reachable(SOURCE, State.STARTED) == {State.STARTED, State.FINISHED, State.ABORTED}


@pytest.mark.parametrize(
    ("table", "state"),
    [
        (SOURCE, State.FINISHED),
        (SOURCE, State.ABORTED),
        (DESTINATION, State.RUNNING),
        (DESTINATION, State.FAILED),
    ],
)
def test_terminal_states_stay(table: Table, state: State) -> None:
    assert reachable(table, state) == {state}


def test_started_has_one_way_in_and_running_too() -> None:
    assert [origin for (origin, _), target in SOURCE.items() if target is State.STARTED] == [State.PARKED]
    assert [pair for pair, target in DESTINATION.items() if target is State.RUNNING] == [
        (State.VERIFIED, Event.START)
    ]


def test_a_source_has_no_way_around_the_destinations_key_confirmation() -> None:
    without = frozenset({Event.KEY_CONFIRMED})
    assert reachable(SOURCE, State.IDLE, without) == {
        State.IDLE,
        State.PREPARED,
        State.PROVED,
        State.ABORTED,
    }


def test_every_state_before_the_point_of_no_return_can_abort() -> None:
    for state, event in product(
        reachable(SOURCE, State.IDLE) - {State.STARTED, State.FINISHED}, [Event.ABORT]
    ):
        assert machine_in(SOURCE, state).allows(event)
    for state in reachable(DESTINATION, State.IDLE) - {State.RUNNING}:
        assert machine_in(DESTINATION, state).allows(Event.FAIL)
