"""Who may run the guest, as the journals say it: pure functions over one record, or over both sides' records.

For every moment at which sides can crash the two records name exactly one side, where need be after the operator has
abandoned a dead destination; tests/test_commit_model.py goes through all of them. That holds for records as they were
written: a host that puts an older file back makes them say what was true once (docs/protocol.md, section 13).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from ..errors import UsageError
from ..wire.handshake import Role
from ..wire.slot import SessionStatus as State

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..wire.journal import GuestProcess, JournalRecord

# Once one of these is written, no event of the session changes the answer. But RUNNING can be read before it is durable,
# and FAILED follows where the disk then fails: so nobody continues a guest for a process that lives (`_about_running`).
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
_LEDGER: Final = (
    "; 'pagexfer recover --ledger FILE' finishes what a killed 'receive --ledger FILE' left beside FILE"
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
        State.VERIFIED: Verdict(MayRun.UNDECIDED, "if the source says STARTED: "),
        State.RUNNING: Verdict(
            MayRun.THIS_SIDE,
            "the guest is this side's for good, never run it at the source",
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
        State.VERIFIED: PairVerdict(None, ""),
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


def judge(record: JournalRecord, *, active: bool, lives: bool | None = None) -> Verdict:
    """What one side's journal says; `active` where the process that writes it still lives.

    `lives` is whether the record's `process` does, None where that cannot be seen.
    """
    if active and record.status not in FINAL:
        return Verdict(MayRun.UNDECIDED, _STILL_RUNS)
    verdict = _ONE[record.role][record.status]
    if record.role is Role.SOURCE:
        return verdict
    ledger = _LEDGER if record.status is State.RUNNING and not active else ""
    return replace(verdict, advice=verdict.advice + _about_destination(record, active, lives) + ledger)


def judge_both(
    source: JournalRecord, destination: JournalRecord, *, active: bool, lives: bool | None = None
) -> PairVerdict:
    """What both journals of a session say; `active` where a process that writes one of them still lives.

    `lives` is as for `judge`, of the destination. Raises UsageError where the records are not those of the two sides of one
    session.
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
    if both is None:
        return PairVerdict(None, _CONTRADICTION)
    if both.runner is Role.SOURCE and destination.status is State.VERIFIED:
        return replace(both, advice=both.advice + _about_copy(destination.process, lives))
    return replace(both, advice=both.advice + _about_destination(destination, active, lives))


def how_to_end(process: GuestProcess) -> str:
    """What the operator does to a process that has a guest."""
    return f"'quit' at its monitor, or kill {process.id} where it has that id"


def _about_destination(record: JournalRecord, active: bool, lives: bool | None) -> str:
    """What the advice does not know yet: the process that has the guest, and may have outlived the one of the journal."""
    match record.status:
        case State.VERIFIED:
            return _about_abandoning(record.process, lives)
        case State.RUNNING:
            return _about_running(record.process, active, lives)
        case _:
            return _about_copy(record.process, lives)


def _about_abandoning(process: GuestProcess | None, lives: bool | None) -> str:
    abandon = "run 'pagexfer recover --abandon' on its journal, and ask again"
    if process is None:
        return f"once the destination's process is dead, {abandon}"
    if lives:
        return (
            f"process {process.id} there still has the whole guest, and could run it: end it ({how_to_end(process)}), then "
            f"{abandon}"
        )
    if lives is False:
        return f"process {process.id} there, which had the whole guest, is gone: {abandon}"
    return (
        f"process {process.id} there had the whole guest, and from here nobody can see whether it lives: make sure that "
        f"it is gone ({how_to_end(process)}; a restart of its machine has ended it), then {abandon}"
    )


def _about_running(process: GuestProcess | None, active: bool, lives: bool | None) -> str:
    if process is None:
        return "; if its process is dead, it died with it"
    if active and lives is not False:
        return (
            f"; process {process.id} has it: leave that alone as long as a process uses the destination's journal, which "
            "lets it go on by itself"
        )
    if lives:
        return f"; process {process.id} has it: if it stands still, 'cont' at its monitor lets it go on"
    if lives is False:
        return f"; process {process.id}, which had it, is gone, and it died with that"
    return f"; process {process.id} there may still run it; if that is gone, it died with that"


def _about_copy(process: GuestProcess | None, lives: bool | None) -> str:
    """Of a guest that the source may run."""
    if process is None or lives is False:
        return ""
    if lives:
        return f"; process {process.id} still has a copy of it: end that ({how_to_end(process)})"
    return f"; process {process.id} there may have a copy of it: make sure that it is gone ({how_to_end(process)})"
