"""`pagexfer recover`: who may run the guest, from the journal of one side or of both.

Exit codes: 0 decided; 2 bad usage, or a file that is no journal; 4 undecided, and the advice says what decides it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import JournalError, Outcome, UsageError
from ..svsm.journal import abandon as abandon_journal
from ..svsm.journal import read_journal
from ..svsm.processes import lives
from ..svsm.recovery import MayRun, judge, judge_both
from ..wire.handshake import Role
from ..wire.slot import SessionStatus as State
from .kept_ledger import forget, put_in_place
from .ledger import beside
from .output import note, print_answer

if TYPE_CHECKING:
    from ..wire.journal import JournalRecord


@click.command()
@click.argument("journals", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--abandon",
    is_flag=True,
    help="Make a dead destination that is VERIFIED FAILED for good, so that the source may run the guest. Refused while "
    "a process there (QEMU) still has it. On its own machine, and not on a copy: that does not show whether it lives.",
)
@click.option(
    "--ledger",
    type=click.Path(path_type=Path, dir_okay=False),
    help="That of a 'receive --ledger' that was killed: put the record of its move into place, once that is complete.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
def recover(journals: tuple[Path, ...], ledger: Path | None, *, abandon: bool, as_json: bool) -> int:
    """Say who may run a guest whose move was cut off.

    JOURNALS is the file of one side, or those of both.

    Exit code 0: decided. 4: undecided, do what it says and ask again. 2: not the journals of one move.
    """
    if len(journals) > 2 or (abandon and len(journals) > 1):
        raise UsageError(
            "give one journal" if abandon else "give one journal, or the source's and the destination's"
        )
    if abandon:
        try:
            abandon_journal(journals[0])
        except JournalError as error:
            raise UsageError(str(error)) from None
    found = [_read(path) for path in journals]
    report, decided = _report_one(*found[0]) if len(found) == 1 else _report_both(found)
    if ledger is not None:
        report["ledger"] = _finish_ledger(ledger, found)
    print_answer({**report, "decided": decided} if as_json else report, as_json=as_json)
    if not decided:
        note(f"undecided: {report['what-to-do']}")
    return Outcome.COMPLETED if decided else Outcome.UNDECIDED


def _read(path: Path) -> tuple[JournalRecord, bool]:
    if not path.exists():
        # Nobody may take a guest for one that never left because of a slip of the keyboard.
        raise UsageError(
            f"there is no journal {path}: no session of its side got as far as keys, or the path is wrong"
        )
    return read_journal(path)


def _finish_ledger(path: Path, found: list[tuple[JournalRecord, bool]]) -> str:
    """Put what was left beside the ledger into its place, or remove it where the guest never runs here; in words."""
    for record, active in found:
        if record.role is Role.DESTINATION:
            kept = beside(path, record.session)
            if not kept.exists():
                return f"nothing of this move was left beside {path}"
            if active or record.status is State.VERIFIED:
                return f"not decided yet: {kept}"
            if record.status is State.RUNNING:
                return f"{_placed(path, kept)} has the record of this move"
            forget(kept)
            return f"removed, as the guest never runs here: {kept}"
    raise UsageError("--ledger is a destination's: give its journal")


def _placed(path: Path, kept: Path) -> Path:
    try:
        return put_in_place(path, kept)
    except OSError as error:
        raise UsageError(f"the ledger is {kept}: cannot write {path}: {error.strerror}") from None


def _lives(record: JournalRecord) -> bool | None:
    return None if record.process is None else lives(record.process)


def _report_one(record: JournalRecord, active: bool) -> tuple[dict[str, object], bool]:
    verdict = judge(record, active=active, lives=_lives(record))
    return {
        "role": record.role.name.lower(),
        "session": record.session.hex(),
        "guest-id": record.guest_id.hex(),
        "state": record.status.name,
        "in-use": active,
        "may-run": verdict.may_run.value,
        "what-to-do": verdict.advice,
    }, verdict.decided


def _report_both(found: list[tuple[JournalRecord, bool]]) -> tuple[dict[str, object], bool]:
    active = any(live for _, live in found)
    source, destination = sorted((record for record, _ in found), key=lambda record: record.role)
    verdict = judge_both(source, destination, active=active, lives=_lives(destination))
    return {
        "session": source.session.hex(),
        "guest-id": source.guest_id.hex(),
        "source-state": source.status.name,
        "destination-state": destination.status.name,
        "in-use": active,
        "may-run": MayRun.UNDECIDED.value if verdict.runner is None else f"the {verdict.runner.name.lower()}",
        "what-to-do": verdict.advice,
    }, verdict.runner is not None
