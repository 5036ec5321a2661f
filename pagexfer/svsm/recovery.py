"""Who may run the guest, as the journals say it: pure functions over one record, or over both sides' records.

For every moment at which sides can crash the two records name exactly one side, where need be after the operator has
abandoned a dead destination; tests/test_commit_model.py goes through all of them. That holds for records as they were
written: a host that puts an older file back makes them say what was true once (docs/protocol.md, section 12).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ..errors import UsageError
from ..wire.handshake import Role
from ..wire.slot import SessionStatus as State

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..wire.journal import JournalRecord

# Once one of these is written, no event of the session changes the answer.
FINAL: Final = frozenset({State.FINISHED, State.ABORTED, State.RUNNING, State.FAILED})


class MayRun(enum.Enum):
    """The answer of one side's journal."""

    THIS_SIDE = "this side"
    NOT_THIS_SIDE = "not this side"
    OTHER_DECIDES = "the other side's journal decides"
    UNDECIDED = "not decided yet"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one journal says: who may run now, and what to do."""

    may_run: MayRun
    advice: str

    @property
    def decided(self) -> bool:
        """Whether this side's operator needs to know nothing else."""
        return self.may_run in (MayRun.THIS_SIDE, MayRun.NOT_THIS_SIDE)


@dataclass(frozen=True, slots=True)
class PairVerdict:
    """What both journals say together: the one side that may run, or None as long as the advice was not followed."""

    runner: Role | None
    advice: str


_STILL_RUNS: Final = (
    "a process still uses this journal and may go on: wait for its end, or end it, and ask again"
)
_ABANDON: Final = (
    "once the destination's process is dead, run 'pagexfer recover --abandon' on its journal, and ask again"
)
_CONTRADICTION: Final = (
    "these records contradict each other, so one of them is an old one: let neither side run the guest"
)

_ONE: Final[Mapping[Role, Mapping[State, Verdict]]] = {
    Role.SOURCE: {
        State.KEYED: Verdict(MayRun.THIS_SIDE, "let the guest go on here: the start token never left"),
        State.STARTED: Verdict(
            MayRun.OTHER_DECIDES,
            "keep the guest parked; run 'pagexfer recover' on both journals, this one and the destination's",
        ),
        State.FINISHED: Verdict(
            MayRun.NOT_THIS_SIDE, "never run the guest here: the destination said that it runs"
        ),
        State.ABORTED: Verdict(MayRun.THIS_SIDE, "let the guest go on here: the move was given up"),
    },
    Role.DESTINATION: {
        State.KEYED: Verdict(
            MayRun.NOT_THIS_SIDE, "nothing to do here: the guest never came whole and stays at the source"
        ),
        State.VERIFIED: Verdict(MayRun.UNDECIDED, f"if the source says STARTED: {_ABANDON}"),
        State.RUNNING: Verdict(
            MayRun.THIS_SIDE,
            "the guest is this side's for good, never run it at the source: if its process is dead, it died with it",
        ),
        State.FAILED: Verdict(
            MayRun.NOT_THIS_SIDE,
            "never run the guest here: the source may run it, also where its journal says STARTED",
        ),
    },
}

_SOURCE_RUNS: Final = PairVerdict(
    Role.SOURCE, "let the guest go on at the source, and never run it at the destination"
)
_DESTINATION_RUNS: Final = PairVerdict(
    Role.DESTINATION, "the guest is the destination's: never run it at the source"
)
# By the source's status, then the destination's. What is missing cannot come about.
_BOTH: Final[Mapping[State, Mapping[State, PairVerdict]]] = {
    State.KEYED: {
        State.KEYED: _SOURCE_RUNS,
        State.VERIFIED: _SOURCE_RUNS,
        State.FAILED: _SOURCE_RUNS,
    },
    State.STARTED: {
        State.VERIFIED: PairVerdict(None, _ABANDON),
        State.RUNNING: _DESTINATION_RUNS,
        State.FAILED: _SOURCE_RUNS,
    },
    State.FINISHED: {State.RUNNING: _DESTINATION_RUNS},
    State.ABORTED: {
        State.KEYED: _SOURCE_RUNS,
        State.VERIFIED: _SOURCE_RUNS,
        State.FAILED: _SOURCE_RUNS,
    },
}


def judge(record: JournalRecord, *, active: bool) -> Verdict:
    """What one side's journal says; `active` where the process that writes it still lives."""
    if active and record.status not in FINAL:
        return Verdict(MayRun.UNDECIDED, _STILL_RUNS)
    return _ONE[record.role][record.status]


def judge_both(source: JournalRecord, destination: JournalRecord, *, active: bool) -> PairVerdict:
    """What both journals of a session say; `active` where a process that writes one of them still lives.

    Raises UsageError where the records are not those of the two sides of one session.
    """
    if (source.role, destination.role) != (Role.SOURCE, Role.DESTINATION):
        raise UsageError(f"both journals are of a {source.role.name.lower()}: give one of each side")
    if (source.session, source.guest_id) != (destination.session, destination.guest_id):
        raise UsageError(
            f"the journals are of two sessions: {source.session.hex()} at the source, {destination.session.hex()} at the "
            "destination"
        )
    both = _BOTH[source.status].get(destination.status)
    if active and (both is None or not FINAL & {source.status, destination.status}):
        return PairVerdict(None, _STILL_RUNS)
    return both or PairVerdict(None, _CONTRADICTION)
