"""What `recover` makes of one record and of two. That it is right, tests/test_commit_model.py shows."""

from __future__ import annotations

from itertools import product

import pytest

from pagexfer.errors import UsageError
from pagexfer.svsm.recovery import FINAL, MayRun, judge, judge_both
from pagexfer.wire.handshake import Role
from pagexfer.wire.journal import JOURNALED, GuestProcess, JournalRecord
from pagexfer.wire.slot import SessionStatus as State

SESSION, GUEST = b"s" * 16, b"g" * 16
ONE = [
    (Role.SOURCE, State.KEYED, MayRun.THIS_SIDE),
    (Role.SOURCE, State.STARTED, MayRun.OTHER_DECIDES),
    (Role.SOURCE, State.FINISHED, MayRun.NOT_THIS_SIDE),
    (Role.SOURCE, State.ABORTED, MayRun.THIS_SIDE),
    (Role.DESTINATION, State.KEYED, MayRun.NOT_THIS_SIDE),
    (Role.DESTINATION, State.VERIFIED, MayRun.UNDECIDED),
    (Role.DESTINATION, State.RUNNING, MayRun.THIS_SIDE),
    (Role.DESTINATION, State.FAILED, MayRun.NOT_THIS_SIDE),
]
_S, _D, _N = Role.SOURCE, Role.DESTINATION, None
# For each status of the source: KEYED, VERIFIED, RUNNING, FAILED at the destination.
BOTH: dict[State, tuple[Role | None, ...]] = {
    State.KEYED: (_S, _S, _N, _S),
    State.STARTED: (_N, _N, _D, _S),
    State.FINISHED: (_N, _N, _D, _N),
    State.ABORTED: (_S, _S, _N, _S),
}
THEIRS = (State.KEYED, State.VERIFIED, State.RUNNING, State.FAILED)


def record(role: Role, status: State, session: bytes = SESSION, guest_id: bytes = GUEST) -> JournalRecord:
    return JournalRecord(role, status, session, guest_id)


@pytest.mark.parametrize(("role", "status", "may_run"), ONE)
def test_one_journal(role: Role, status: State, may_run: MayRun) -> None:
    verdict = judge(record(role, status), active=False)
    assert verdict.may_run is may_run
    assert verdict.decided is (may_run in (MayRun.THIS_SIDE, MayRun.NOT_THIS_SIDE))
    assert verdict.advice.isprintable()


def test_every_journal_is_judged() -> None:
    assert {(role, status) for role, status, _ in ONE} == {
        (role, status) for role in Role for status in JOURNALED[role]
    }


@pytest.mark.parametrize(("role", "status", "may_run"), ONE)
def test_a_process_that_lives_decides_itself_until_its_record_is_final(
    role: Role, status: State, may_run: MayRun
) -> None:
    verdict = judge(record(role, status), active=True)
    assert verdict.may_run is (may_run if status in FINAL else MayRun.UNDECIDED)


@pytest.mark.parametrize(("ours", "theirs"), list(product(BOTH, THEIRS)))
def test_both_journals(ours: State, theirs: State) -> None:
    expected = BOTH[ours][THEIRS.index(theirs)]
    source, destination = record(Role.SOURCE, ours), record(Role.DESTINATION, theirs)
    assert judge_both(source, destination, active=False).runner is expected
    settled = bool(FINAL & {ours, theirs})
    assert judge_both(source, destination, active=True).runner is (expected if settled else None)


def test_a_contradiction_while_a_process_lives_may_be_a_matter_of_time() -> None:
    """The one journal was read before the other side went on."""
    source, destination = record(Role.SOURCE, State.KEYED), record(Role.DESTINATION, State.RUNNING)
    assert "still uses" in judge_both(source, destination, active=True).advice
    assert "contradict" in judge_both(source, destination, active=False).advice


# A guest in a process of its own

HELD = GuestProcess(b"b" * 16, 1, 4711, 1)


@pytest.mark.parametrize("lives", [True, False, None])
@pytest.mark.parametrize("status", THEIRS)
def test_a_process_that_has_the_guest_is_named_and_changes_no_answer(
    status: State, lives: bool | None
) -> None:
    inside = record(Role.DESTINATION, status)
    outside = JournalRecord(inside.role, status, SESSION, GUEST, HELD)
    one = judge(outside, active=False, lives=lives)
    assert one.may_run is judge(inside, active=False).may_run
    told = [one.advice]
    for ours in BOTH:
        both = judge_both(record(Role.SOURCE, ours), outside, active=False, lives=lives)
        assert both.runner is judge_both(record(Role.SOURCE, ours), inside, active=False).runner
        told += [both.advice] if "contradict" not in both.advice else []
    for advice in told:
        assert advice.isprintable()
        assert "its process is dead" not in advice
        assert "destination's process is dead" not in advice
        assert lives is False or "process 4711" in advice


def test_what_becomes_of_a_process_that_has_the_guest() -> None:
    verified, running, failed = (
        JournalRecord(Role.DESTINATION, status, SESSION, GUEST, HELD)
        for status in (State.VERIFIED, State.RUNNING, State.FAILED)
    )
    for held, lives, said in [
        (
            verified,
            True,
            "end it ('quit' at its monitor, or kill 4711 where it has that id), then run 'pagexfer recover --abandon'",
        ),
        (verified, False, "is gone: run 'pagexfer recover --abandon'"),
        (verified, None, "nobody can see whether it lives: make sure that it is gone ('quit' at its monitor"),
        (running, True, "'cont' at its monitor lets it go on"),
        (running, False, "is gone, and it died with that"),
        (running, None, "may still run it"),
        (failed, True, "still has a copy of it: end that"),
        (failed, None, "may have a copy of it: make sure that it is gone"),
    ]:
        assert said in judge(held, active=False, lives=lives).advice
        assert said in judge_both(record(Role.SOURCE, State.STARTED), held, active=False, lives=lives).advice


def test_nobody_continues_a_guest_for_a_process_that_still_may() -> None:
    """RUNNING is in the file before its folder is synced: where that fails, the side fails, and the source may go on."""
    held = JournalRecord(Role.DESTINATION, State.RUNNING, SESSION, GUEST, HELD)
    for lives in (True, None):
        one = judge(held, active=True, lives=lives)
        both = judge_both(record(Role.SOURCE, State.STARTED), held, active=True, lives=lives)
        assert (one.may_run, both.runner) == (MayRun.THIS_SIDE, Role.DESTINATION)
        for advice in (one.advice, both.advice):
            assert "'cont'" not in advice
            assert "process 4711 has it: leave that alone as long as" in advice
    assert "died" in judge(held, active=True, lives=False).advice


@pytest.mark.parametrize("changes", [{"session": bytes(16)}, {"guest_id": bytes(16)}])
def test_journals_of_two_sessions(changes: dict[str, bytes]) -> None:
    with pytest.raises(UsageError, match="two sessions"):
        judge_both(
            record(Role.SOURCE, State.STARTED),
            record(Role.DESTINATION, State.FAILED, **changes),
            active=False,
        )


@pytest.mark.parametrize("role", Role)
def test_two_journals_of_one_side(role: Role) -> None:
    one = record(role, State.KEYED)
    with pytest.raises(UsageError, match=f"of a {role.name.lower()}"):
        judge_both(one, one, active=False)
