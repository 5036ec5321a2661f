"""`pagexfer recover` and `--journal` as an operator meets them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from pagexfer.svsm.journal import FileJournal, read_journal
from pagexfer.wire.handshake import Role
from pagexfer.wire.journal import JournalRecord
from pagexfer.wire.slot import SessionStatus as State

from .test_cli import GUEST, key_file, one_line, run

if TYPE_CHECKING:
    from pathlib import Path

SESSION, GUEST_ID = bytes(range(16)), bytes(range(16, 32))


def journal(path: Path, role: Role, status: State, session: bytes = SESSION) -> str:
    with FileJournal(path) as kept:
        kept.record(JournalRecord(role, status, session, GUEST_ID))
    return str(path)


def asked(*arguments: str, code: int) -> dict[str, Any]:
    done = run("recover", "--json", *arguments)
    assert done.returncode == code, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["decided"] is (code == 0)
    if code:
        assert one_line(done.stderr) == f"pagexfer: undecided: {report['what-to-do']}"
    else:
        assert not done.stderr
    return report


@pytest.mark.parametrize(
    ("role", "status", "code", "may_run"),
    [
        (Role.SOURCE, State.KEYED, 0, "this side"),
        (Role.SOURCE, State.STARTED, 4, "the other side's journal decides"),
        (Role.SOURCE, State.FINISHED, 0, "not this side"),
        (Role.DESTINATION, State.VERIFIED, 4, "not decided yet"),
        (Role.DESTINATION, State.RUNNING, 0, "this side"),
    ],
)
def test_one_journal(tmp_path: Path, role: Role, status: State, code: int, may_run: str) -> None:
    report = asked(journal(tmp_path / "j", role, status), code=code)
    assert report["role"] == role.name.lower()
    assert report["state"] == status.name
    assert report["session"] == SESSION.hex()
    assert report["guest-id"] == GUEST_ID.hex()
    assert report["in-use"] is False
    assert report["may-run"] == may_run


def test_a_table_for_people(tmp_path: Path) -> None:
    done = run("recover", journal(tmp_path / "j", Role.DESTINATION, State.FAILED))
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert done.returncode == 0
    assert lines["may-run"] == "not this side"
    assert "the source may run it" in lines["what-to-do"]


def test_both_journals_in_any_order(tmp_path: Path) -> None:
    source = journal(tmp_path / "s", Role.SOURCE, State.STARTED)
    destination = journal(tmp_path / "d", Role.DESTINATION, State.RUNNING)
    for pair in ((source, destination), (destination, source)):
        report = asked(*pair, code=0)
        assert report["may-run"] == "the destination"
        assert (report["source-state"], report["destination-state"]) == ("STARTED", "RUNNING")


def test_a_destination_that_died_verified_is_abandoned_and_the_source_may_run(tmp_path: Path) -> None:
    source = journal(tmp_path / "s", Role.SOURCE, State.STARTED)
    destination = journal(tmp_path / "d", Role.DESTINATION, State.VERIFIED)
    assert "--abandon" in asked(source, destination, code=4)["what-to-do"]
    assert asked("--abandon", destination, code=0)["state"] == "FAILED"
    assert asked(source, destination, code=0)["may-run"] == "the source"


def test_a_journal_in_use(tmp_path: Path) -> None:
    path = tmp_path / "d"
    with FileJournal(path) as kept:
        kept.record(JournalRecord(Role.DESTINATION, State.VERIFIED, SESSION, GUEST_ID))
        report = asked(str(path), code=4)
        assert report["in-use"] is True
        assert "still uses" in report["what-to-do"]
        done = run("recover", "--abandon", str(path))
        assert done.returncode == 2
        assert "in use" in one_line(done.stderr)
    assert read_journal(path)[0].status is State.VERIFIED


def test_bad_usage(tmp_path: Path) -> None:
    source = journal(tmp_path / "s", Role.SOURCE, State.STARTED)
    other = journal(tmp_path / "o", Role.DESTINATION, State.FAILED, session=bytes(16))
    garbage = tmp_path / "garbage"
    garbage.write_bytes(bytes(128))
    for arguments, word in [
        ((), "JOURNALS"),
        ((source, other), "two sessions"),
        ((source, source), "of a source"),
        ((source, other, source), "one journal"),
        (("--abandon", source, other), "one journal"),
        (("--abandon", source), "STARTED"),
        ((str(garbage),), "not a journal"),
        ((str(tmp_path),), "not a regular file"),
        ((str(tmp_path / "none"),), "or the path is wrong"),
    ]:
        done = run("recover", *arguments)
        assert done.returncode == 2
        assert word in one_line(done.stderr)
        assert not done.stdout


# --journal


@pytest.fixture
def psk(tmp_path: Path) -> str:
    return key_file(tmp_path / "psk", "0123456789abcdef" * 4)


@pytest.mark.parametrize(
    ("command", "role", "status"),
    [
        ("send", Role.SOURCE, State.STARTED),
        ("send", Role.SOURCE, State.FINISHED),
        ("receive", Role.DESTINATION, State.VERIFIED),
        ("receive", Role.DESTINATION, State.RUNNING),
        ("receive", Role.DESTINATION, State.FAILED),
    ],
)
def test_a_record_that_is_still_needed_is_not_overwritten(
    tmp_path: Path, psk: str, command: str, role: Role, status: State
) -> None:
    path = journal(tmp_path / "j", role, status)
    address = ("--to", "127.0.0.1:1") if command == "send" else ("--listen", "127.0.0.1:0")
    done = run(command, *address, "--psk-file", psk, "--journal", path, *GUEST)
    assert done.returncode == 2
    assert f"run 'pagexfer recover {path}'" in one_line(done.stderr)
    assert ("move it away, as a source may need its word" in done.stderr) is (status is State.FAILED)
    assert read_journal(tmp_path / "j")[0].status is status


@pytest.mark.parametrize("path", ["/nonexistent/j", "/proc/j", "/dev/full", "/"])
def test_a_journal_that_cannot_be_written(psk: str, path: str) -> None:
    done = run("receive", "--listen", "127.0.0.1:0", "--psk-file", psk, "--journal", path, *GUEST)
    assert done.returncode == 2
    assert path in one_line(done.stderr)
