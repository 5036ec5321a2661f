"""The session state machines: all transitions of both sides stand in these two tables and nowhere else.

An event that the table does not allow raises LocalProtocolError and leaves the state as it was. STARTED is the point
of no return: before it the source alone decides that its guest goes on, after it only a destination that has first made
itself FAILED for good can say so, with an abort token (R7).
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Final

from ..errors import LocalProtocolError
from ..wire.slot import SessionStatus as State

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class Event(enum.Enum):
    """What can happen to a session."""

    PREPARE = "prepare"
    ESTABLISH = "establish"
    KEY_CONFIRMED = "key confirmed"  # the destination showed that it has the same keys
    EPOCH = "epoch"
    PARK = "park"
    START = "start"
    CONFIRMED = "confirmed"  # the destination says that it runs
    PEER_FAILED = "peer failed"  # the destination's abort token
    ABORT = "abort"
    IMPORT = "import"
    VERIFY = "verify"
    FAIL = "fail"


SOURCE: Final[Mapping[tuple[State, Event], State]] = {
    (State.IDLE, Event.PREPARE): State.PREPARED,
    (State.PREPARED, Event.ESTABLISH): State.PROVED,
    (State.PROVED, Event.KEY_CONFIRMED): State.KEYED,
    (State.KEYED, Event.EPOCH): State.PRECOPY,
    (State.PRECOPY, Event.EPOCH): State.PRECOPY,
    (State.PRECOPY, Event.PARK): State.PARKED,
    (State.PARKED, Event.EPOCH): State.PARKED,
    (State.PARKED, Event.START): State.STARTED,
    (State.STARTED, Event.CONFIRMED): State.FINISHED,
    (State.STARTED, Event.PEER_FAILED): State.ABORTED,
    (State.IDLE, Event.ABORT): State.ABORTED,
    (State.PREPARED, Event.ABORT): State.ABORTED,
    (State.PROVED, Event.ABORT): State.ABORTED,
    (State.KEYED, Event.ABORT): State.ABORTED,
    (State.PRECOPY, Event.ABORT): State.ABORTED,
    (State.PARKED, Event.ABORT): State.ABORTED,
    (State.ABORTED, Event.ABORT): State.ABORTED,
}

DESTINATION: Final[Mapping[tuple[State, Event], State]] = {
    (State.IDLE, Event.ESTABLISH): State.KEYED,
    (State.KEYED, Event.IMPORT): State.IMPORTING,
    (State.IMPORTING, Event.IMPORT): State.IMPORTING,
    (State.IMPORTING, Event.VERIFY): State.VERIFIED,
    (State.VERIFIED, Event.START): State.RUNNING,
    (State.IDLE, Event.FAIL): State.FAILED,
    (State.KEYED, Event.FAIL): State.FAILED,
    (State.IMPORTING, Event.FAIL): State.FAILED,
    (State.VERIFIED, Event.FAIL): State.FAILED,
    (State.FAILED, Event.FAIL): State.FAILED,
}


class StateMachine:
    """The state of one session under one of the tables.

    `before_entering` hears of each new state before it is entered; what it raises keeps the session where it was.
    """

    def __init__(
        self,
        table: Mapping[tuple[State, Event], State],
        before_entering: Callable[[State], None] = lambda _state: None,
    ) -> None:
        self._table = table
        self._before_entering = before_entering
        self.state = State.IDLE

    def allows(self, event: Event) -> bool:
        """Whether `event` may happen now."""
        return (self.state, event) in self._table

    def require(self, event: Event) -> None:
        """Raise LocalProtocolError where `event` may not happen now."""
        if not self.allows(event):
            raise LocalProtocolError(f"{event.value} does not fit a session that is {self.state.name}")

    def advance(self, event: Event) -> State:
        """Let `event` happen. Raises LocalProtocolError, changing nothing, where the table does not allow it."""
        self.require(event)
        target = self._table[self.state, event]
        if target is not self.state:
            self._before_entering(target)
        self.state = target
        return self.state
