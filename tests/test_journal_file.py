"""The journal in a file: always one whole record, durable, and one process's own; failing disks and dying processes."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from pagexfer.errors import JournalError, UsageError
from pagexfer.svsm import journal
from pagexfer.svsm.journal import FileJournal, abandon, read_journal
from pagexfer.svsm.processes import process_of
from pagexfer.wire.handshake import Role
from pagexfer.wire.journal import JOURNALED, JournalRecord
from pagexfer.wire.slot import SessionStatus as State

if TYPE_CHECKING:
    from collections.abc import Iterator

SESSION, GUEST = b"s" * 16, b"g" * 16
REPLACEABLE = {State.KEYED, State.ABORTED}


def record(status: State, role: Role = Role.SOURCE) -> JournalRecord:
    return JournalRecord(role, status, SESSION, GUEST)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "guest.journal"


def keep(path: Path, kept: JournalRecord) -> None:
    with FileJournal(path) as journal:
        journal.record(kept)


def test_a_new_file_has_no_record(path: Path) -> None:
    with FileJournal(path) as journal:
        assert journal.last is None
    assert not list(path.parent.iterdir())


def test_the_last_record_is_in_the_file(path: Path) -> None:
    with FileJournal(path) as journal:
        for status in (State.KEYED, State.STARTED, State.FINISHED):
            journal.record(record(status))
            assert journal.last == record(status)
            assert path.read_bytes() == record(status).pack()
    assert read_journal(path) == (record(State.FINISHED), False)
    with FileJournal(path) as journal:
        assert journal.last == record(State.FINISHED)
    assert list(path.parent.iterdir()) == [path]


def test_no_descriptor_is_left_open(path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    with FileJournal(path) as journal:
        for _ in range(3):
            journal.record(record(State.KEYED))
        assert len(os.listdir("/proc/self/fd")) == len(before) + 1
    read_journal(path)
    for bad in (path.parent, Path("/dev/zero"), Path("/nonexistent/x")):
        with pytest.raises(UsageError):
            FileJournal(bad)
    with FileJournal(path), pytest.raises(UsageError):
        FileJournal(path)
    assert os.listdir("/proc/self/fd") == before


def test_it_is_its_owners_alone(path: Path) -> None:
    old_mask = os.umask(0)
    try:
        new = path.parent / f"{path.name}.new"
        new.write_bytes(b"of a process that was killed" * 10)
        new.chmod(0o666)
        keep(path, record(State.KEYED))
    finally:
        os.umask(old_mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_bytes() == record(State.KEYED).pack()


def test_a_record_is_on_the_disk_before_it_is_the_files_and_the_folder_after(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, object]] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        calls.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def noted_replace(new: Path, old: Path) -> None:
        calls.append(("replace", (new.read_bytes(), old)))
        replace(new, old)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    keep(path, record(State.STARTED))
    assert calls == [
        ("fsync", f"{path}.new"),
        ("replace", (record(State.STARTED).pack(), path)),
        ("fsync", str(path.parent)),
    ]


# One process at a time


def test_a_journal_in_use_is_nobody_elses(path: Path) -> None:
    with FileJournal(path) as journal:
        for _ in range(2):  # before its first record, and after it
            with pytest.raises(UsageError, match="in use"):
                FileJournal(path)
            journal.record(record(State.KEYED))
        assert read_journal(path) == (record(State.KEYED), True)
        journal.record(record(State.STARTED))
        assert read_journal(path) == (record(State.STARTED), True)
    assert read_journal(path) == (record(State.STARTED), False)


def test_a_record_that_is_replaced_before_it_is_locked_is_not_the_last_word(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that writes moves on, and its lock with it, between another's open and lock."""
    owner = FileJournal(path)
    owner.record(record(State.VERIFIED, Role.DESTINATION))
    lock = fcntl.flock

    def lock_too_late(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        owner.record(record(State.RUNNING, Role.DESTINATION))
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", lock_too_late)
    assert read_journal(path) == (record(State.RUNNING, Role.DESTINATION), True)
    owner.record(record(State.VERIFIED, Role.DESTINATION))
    monkeypatch.setattr(fcntl, "flock", lock_too_late)
    with pytest.raises(UsageError, match="in use"):
        abandon(path)
    assert read_journal(path) == (record(State.RUNNING, Role.DESTINATION), True)
    owner.close()


def test_a_first_record_between_anothers_looks_makes_it_no_new_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or both would have it, and each replace what the other one decided."""
    owner = FileJournal(path)
    look = journal._open_existing

    def look_and_wait(file: Path) -> int | None:
        found = look(file)
        monkeypatch.setattr(journal, "_open_existing", look)
        owner.record(record(State.VERIFIED, Role.DESTINATION))
        return found

    monkeypatch.setattr(journal, "_open_existing", look_and_wait)
    with pytest.raises(UsageError, match="in use"):
        FileJournal.for_session(path)
    assert read_journal(path) == (record(State.VERIFIED, Role.DESTINATION), True)
    owner.close()


def test_a_next_file_that_its_owner_removes_is_nobodys(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is opened before, and locked after: a record in it would be in no folder, and what is renamed another's."""
    owner = FileJournal(path)
    lock = fcntl.flock

    def lock_too_late(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        owner.close()
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", lock_too_late)
    with FileJournal(path) as second:
        with pytest.raises(UsageError, match="in use"):
            FileJournal(path)
        second.record(record(State.KEYED))
        assert read_journal(path) == (record(State.KEYED), True)


def test_a_next_file_that_somebody_removes_is_made_again(path: Path) -> None:
    with FileJournal(path) as journal:
        (path.parent / f"{path.name}.new").unlink()
        journal.record(record(State.STARTED))
        assert read_journal(path) == (record(State.STARTED), True)


@pytest.mark.parametrize("call", ["ftruncate", "pwrite", "fsync", "replace"])
def test_a_journal_is_not_given_back_while_a_record_is_under_way(
    path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """On a disk that hangs. An operator who abandons it meanwhile would free the source of a guest that then runs here."""
    owner = FileJournal(path)
    owner.record(record(State.VERIFIED, Role.DESTINATION))
    hangs, goes_on = threading.Event(), threading.Event()
    real = getattr(os, call)

    def hanging(*arguments: object) -> object:
        monkeypatch.setattr(os, call, real)
        hangs.set()
        assert goes_on.wait(20)
        return real(*arguments)

    monkeypatch.setattr(os, call, hanging)
    thread = threading.Thread(target=owner.record, args=(record(State.RUNNING, Role.DESTINATION),))
    thread.start()
    assert hangs.wait(20)
    owner.close()
    assert read_journal(path) == (record(State.VERIFIED, Role.DESTINATION), True)
    with pytest.raises(UsageError, match="in use"):
        abandon(path)
    goes_on.set()
    thread.join()
    assert read_journal(path) == (record(State.RUNNING, Role.DESTINATION), False)
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(JournalError, match="closed"):
        owner.record(record(State.FAILED, Role.DESTINATION))


def test_a_next_file_that_a_stranger_locks_is_an_error_of_the_journal(path: Path) -> None:
    with FileJournal(path) as journal:
        journal.record(record(State.KEYED))
        with (path.parent / f"{path.name}.new").open("w") as stranger:
            fcntl.flock(stranger, fcntl.LOCK_EX)
            with pytest.raises(JournalError, match="in use"):
                journal.record(record(State.STARTED))


def test_a_closed_journal_takes_no_record(path: Path) -> None:
    journal = FileJournal(path)
    journal.record(record(State.KEYED))
    journal.close()
    with pytest.raises(JournalError, match="closed"):
        journal.record(record(State.STARTED))
    assert read_journal(path) == (record(State.KEYED), False)


@pytest.mark.parametrize("role", Role)
def test_only_a_record_of_a_guest_that_stayed_is_replaced_by_a_new_session(path: Path, role: Role) -> None:
    for status in JOURNALED[role]:
        keep(path, record(status, role))
        if status in REPLACEABLE:
            FileJournal.for_session(path).close()
        else:
            with pytest.raises(UsageError, match=f"{status.name}.*run 'pagexfer recover {path}'"):
                FileJournal.for_session(path)
        assert read_journal(path) == (record(status, role), False)


# What is no journal


def test_files_that_are_no_journals(path: Path) -> None:
    path.write_bytes(b"")
    fifo, link = path.with_name("fifo"), path.with_name("link")
    os.mkfifo(fifo)
    link.symlink_to(path)
    damaged = path.with_name("damaged")
    damaged.write_bytes(record(State.STARTED).pack()[:-1] + b"\0")
    for bad in (
        path,
        path.parent,
        Path("/"),
        Path(),
        fifo,
        link,
        damaged,
        Path("/dev/full"),
        Path("/dev/zero"),
    ):
        for use in (FileJournal, FileJournal.for_session, read_journal, abandon):
            with pytest.raises(UsageError) as caught:
                use(bad)
            assert str(caught.value).isprintable()
    assert path.read_bytes() == b""
    assert damaged.exists()


@pytest.mark.parametrize("folder", ["/nonexistent", "/proc", "/proc/self"])
def test_a_folder_that_takes_no_files(folder: str) -> None:
    with pytest.raises(UsageError, match=f"cannot use the journal {folder}/x: "):
        FileJournal(Path(folder) / "x")
    with pytest.raises(UsageError, match="there is no journal"):
        read_journal(Path(folder) / "x")


# Abandoning


def test_a_destination_that_died_verified_can_be_made_to_have_failed(path: Path) -> None:
    with FileJournal(path) as journal:
        journal.record(record(State.VERIFIED, Role.DESTINATION))
        with pytest.raises(UsageError, match="in use"):
            abandon(path)
    abandon(path)
    assert read_journal(path) == (record(State.FAILED, Role.DESTINATION), False)
    with pytest.raises(UsageError, match="FAILED"):
        abandon(path)


def test_a_destination_is_not_abandoned_while_a_process_has_its_guest(path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        held = replace(record(State.VERIFIED, Role.DESTINATION), process=process_of(process.pid))
        keep(path, held)
        line = f"process {process.pid} still has the whole guest, .* or kill {process.pid} where .*, and ask again"
        with pytest.raises(UsageError, match=line):
            abandon(path)
        assert read_journal(path) == (held, False)
        process.kill()
    abandon(path)
    assert read_journal(path) == (replace(held, status=State.FAILED), False)


def test_where_nobody_can_see_its_process_the_operators_word_is_taken(path: Path) -> None:
    elsewhere = replace(process_of(os.getpid()), boot=bytes(16))
    held = replace(record(State.VERIFIED, Role.DESTINATION), process=elsewhere)
    keep(path, held)
    abandon(path)
    assert read_journal(path) == (replace(held, status=State.FAILED), False)


@pytest.mark.parametrize(
    ("role", "status"),
    [
        (role, status)
        for role in Role
        for status in sorted(JOURNALED[role])
        if (role, status) != (Role.DESTINATION, State.VERIFIED)
    ],
)
def test_nothing_else_is_abandoned(path: Path, role: Role, status: State) -> None:
    keep(path, record(status, role))
    with pytest.raises(UsageError, match=f"a {role.name.lower()} that is {status.name}"):
        abandon(path)
    assert read_journal(path) == (record(status, role), False)


def test_there_is_nothing_to_abandon(path: Path) -> None:
    with pytest.raises(UsageError, match="there is no journal"):
        abandon(path)
    assert not list(path.parent.iterdir())


# Disks that fail


@contextmanager
def full_disk() -> Iterator[None]:
    """No file of this process can grow beyond 50 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_the_record_before(path: Path) -> None:
    with FileJournal(path) as journal:
        journal.record(record(State.KEYED))
        with full_disk(), pytest.raises(JournalError, match=f"cannot write the journal {path}: "):
            journal.record(record(State.STARTED))
        assert journal.last == record(State.KEYED)
        assert read_journal(path) == (record(State.KEYED), True)
        journal.record(record(State.ABORTED))
    assert read_journal(path) == (record(State.ABORTED), False)


def test_a_folder_that_went_away(path: Path) -> None:
    with FileJournal(path) as journal:
        journal.record(record(State.KEYED))
        gone = path.parent.rename(path.parent.with_name("gone"))
        with pytest.raises(JournalError):
            journal.record(record(State.STARTED))
    assert read_journal(gone / path.name) == (record(State.KEYED), False)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_call_that_fails_is_said_and_can_be_tried_again(
    path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    real = getattr(os, call)
    broken = [True]

    def failing(*arguments: object) -> None:
        if broken[0]:
            raise OSError(5, "Input/output error")
        real(*arguments)

    with FileJournal(path) as journal:
        monkeypatch.setattr(os, call, failing)
        with pytest.raises(JournalError, match="Input/output error"):
            journal.record(record(State.STARTED))
        broken[0] = False
        journal.record(record(State.ABORTED))
        assert read_journal(path) == (record(State.ABORTED), True)


def test_a_folder_that_cannot_be_synced_leaves_one_whole_record(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def failing(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(5, "Input/output error")
        fsync(descriptor)

    with FileJournal(path) as journal:
        journal.record(record(State.KEYED))
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", failing)
            with pytest.raises(JournalError):
                journal.record(record(State.STARTED))
        found = read_journal(path)
        assert found in ((record(State.KEYED), True), (record(State.STARTED), True))
        inode = path.stat().st_ino
        journal.record(record(State.ABORTED))
        assert path.stat().st_ino != inode  # the file that is there is never written again
    assert read_journal(path) == (record(State.ABORTED), False)


# Processes that die

_KILLED: Final = """
import os, signal, sys
from pathlib import Path
from pagexfer.svsm.journal import FileJournal
from pagexfer.wire.handshake import Role
from pagexfer.wire.journal import JournalRecord
from pagexfer.wire.slot import SessionStatus as State

def die(*_arguments):
    os.kill(os.getpid(), signal.SIGKILL)

path, call, number = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
journal = FileJournal(path)
journal.record(JournalRecord(Role.SOURCE, State.KEYED, b"s" * 16, b"g" * 16))
real, calls = getattr(os, call), []

def counted(*arguments):
    calls.append(call)
    return die() if len(calls) == number else real(*arguments)

setattr(os, call, counted)
journal.record(JournalRecord(Role.SOURCE, State.STARTED, b"s" * 16, b"g" * 16))
raise SystemExit("it was to be killed")
"""


@pytest.mark.parametrize(
    ("call", "number", "status"),
    [
        ("ftruncate", 1, State.KEYED),
        ("pwrite", 1, State.KEYED),
        ("fsync", 1, State.KEYED),  # written, and not yet on the disk
        ("replace", 1, State.KEYED),  # on the disk, and not yet the file's
        ("fsync", 2, State.STARTED),  # the file's, and the folder not yet on the disk
    ],
)
def test_a_process_that_is_killed_leaves_one_whole_record(
    path: Path, call: str, number: int, status: State
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, path, call, str(number)],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert (done.returncode, done.stderr) == (-signal.SIGKILL, "")
    assert read_journal(path) == (record(status), False)
    keep(path, record(State.ABORTED))  # what it left beside the record is in nobody's way
    assert list(path.parent.iterdir()) == [path]
