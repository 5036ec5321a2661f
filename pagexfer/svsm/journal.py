"""The journal: what a side decided about its session, durably, for whoever asks after a crash who may run the guest.

A decision is written down before it takes effect: the source's STARTED before the start token leaves (R7), and the
destination's VERIFIED before READY leaves, its RUNNING before a vCPU is released, its FAILED before the abort token leaves.

A file has one record (`wire.journal`), replaced as a whole. On hardware the SVSM would have the host store it, sealed under
a key that the processor derives; here the trusted side writes the file itself.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Protocol

from ..errors import JournalError, MalformedData, UsageError
from ..wire.handshake import Role
from ..wire.journal import JOURNAL_BYTES, JOURNALED, JournalRecord, parse_journal_untrusted
from ..wire.slot import SessionStatus as State
from .processes import lives
from .recovery import how_to_end

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from ..wire.journal import GuestProcess

# What cannot be written down is not done. For the other statuses the record before leaves whoever asks with no wrong
# answer, and a guest that goes on, a move that is complete or a session that has failed is not undone by a full disk:
# KEYED says the same as ABORTED and FAILED, and STARTED sends to a destination that is RUNNING, or FAILED, durably.
# FAILED is written down only after VERIFIED: without that, KEYED says all, and no source can be STARTED.
_DURABLE_FIRST: Final = frozenset({State.KEYED, State.STARTED, State.VERIFIED, State.RUNNING})
# Records that a new session may replace: they say of the old one that its guest stayed at the source, which needs them not.
# A destination that FAILED was VERIFIED, and a source that is STARTED may have but this record to go on by.
_REPLACEABLE: Final = frozenset({State.KEYED, State.ABORTED})


class Journal(Protocol):
    """Port to where a side keeps its record. A new record replaces the one before."""

    def record(self, record: JournalRecord) -> None:
        """Keep `record`: durable when it returns. Raises JournalError where that cannot be said."""
        ...


class LedgerStore(Protocol):
    """Port to where a destination keeps the guest's ledger: beside its place until the move is complete."""

    def keep(self, session: bytes, ledger: bytes) -> None:
        """Keep the ledger with the record of this move: durable when it returns. Raises OSError where that cannot be said.

        The guest runs here afterwards, unless `drop` is called, or nobody can tell as the journal's disk fails.
        """
        ...

    def drop(self) -> None:
        """The guest never runs here, and no record says so: forget what was kept, or was to be. Raises nothing."""
        ...


class SessionJournal:
    """What one session writes down, each status before it is entered; nothing where there is no journal.

    A destination's `store` has the ledger from before RUNNING is written, and until nothing may say RUNNING any more.
    """

    def __init__(
        self,
        role: Role,
        journal: Journal | None,
        process: GuestProcess | None = None,
        store: LedgerStore | None = None,
    ) -> None:
        self._role = role
        self._journal = journal
        self._process = process
        self._store = store
        self._ids: tuple[bytes, bytes] | None = None
        self._verified = False
        self._kept = False
        # After a record of which the disk says that it was not written, that one or the one before.
        self._may_say: set[State] = set()

    def begin(self, session: bytes, guest_id: bytes) -> None:
        """The session has a name from here on; what came before is nobody's to recover."""
        self._ids = session, guest_id

    def before_entering(self, status: State) -> None:
        """For `StateMachine`. Raises JournalError where `status` must not be entered without a record of it."""
        if status not in JOURNALED[self._role] or (status is State.FAILED and not self._verified):
            return
        self._verified |= (
            status is State.VERIFIED
        )  # also where the disk says that it was not written: it may have been
        try:
            self.insist(status)
        except JournalError:
            if status in _DURABLE_FIRST:
                raise

    def insist(self, status: State) -> None:
        """Make sure that `status` stands in the journal. Raises JournalError where it does not."""
        try:
            if self._journal is not None and self._ids is not None:
                self._may_say.add(status)
                self._journal.record(JournalRecord(self._role, status, *self._ids, self._process))
                self._may_say = {status}
        finally:
            if status is State.FAILED and self._kept and State.RUNNING not in self._may_say:
                assert self._store is not None
                self._store.drop()
                self._kept = False

    def keep(self, ledger: bytes) -> None:
        """Have the ledger kept, to be dropped with the record of FAILED. Raises JournalError where it cannot be."""
        if self._store is None or self._ids is None:
            return
        self._kept = True
        try:
            self._store.keep(self._ids[0], ledger)
        except OSError as error:
            raise JournalError(f"the ledger cannot be written: {error.strerror or error}") from error


class FileJournal:
    """A journal in a file, which is this object's alone until `close`: `last` is its record, None for a new file.

    There is a whole record at `path` at every moment: the next one is written beside it, as `path` with `.new`, and renamed
    over it. Whichever of the two files exists is locked (flock), so that others see whether its process still lives.

    Any thread may call `close`, also while another one is in `record`.
    """

    def __init__(self, path: Path) -> None:
        """Raises UsageError where the file is no journal, cannot be written, or is another process's."""
        self.path = path
        self.last: JournalRecord | None = None
        self._new = path.parent / f"{path.name}.new"
        self._current: int | None = None
        self._next: int | None = None
        self._closed = False
        self._recording = threading.Lock()
        try:
            self._current = _open_existing(path)
            if self._current is not None:
                self._lock(self._current)
                if not _is_at(
                    self._current, path
                ):  # replaced before it was locked, by a process that still writes
                    raise UsageError(f"the journal {path} is in use: its process still runs")
                self.last = _read(self._current, path)
            self._next = self._prepare()
            if self._current is None and os.path.lexists(path):  # its first record came in between
                raise UsageError(f"the journal {path} is in use: its process still runs")
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise UsageError(f"cannot use the journal {path}: {error.strerror}") from None
            raise

    @classmethod
    def for_session(cls, path: Path) -> FileJournal:
        """The journal of a session that begins. Raises UsageError also where the file says that a guest has left."""
        journal = cls(path)
        last = journal.last
        if last is None or last.status in _REPLACEABLE:
            return journal
        journal.close()
        needed = (
            "move it away, as a source may need its word"
            if last.status is State.FAILED
            else "see what it says"
        )
        raise UsageError(
            f"the journal {path} is still needed: it says {last.status.name} of a {last.role.name.lower()}'s session; "
            f"run 'pagexfer recover {path}', {needed}, and give a new move a file of its own"
        )

    def record(self, record: JournalRecord) -> None:
        """See `Journal`; after an error either the record before or this one is at `path`, and both are whole."""
        try:
            with self._recording:
                self._record(record)
        finally:
            if self._closed:  # meanwhile, and what was in use could not be given back
                self.close()

    def close(self) -> None:
        """Give the file back. It stays, with its last record; none can follow.

        A record that is under way, say on a disk that hangs, may still become the last one: until it is there, or is not,
        the file stays locked, so that nobody is told what the record before says.
        """
        self._closed = True
        if not self._recording.acquire(blocking=False):
            return
        try:
            if self._next is not None and _is_at(self._next, self._new):
                self._new.unlink(missing_ok=True)
            for descriptor in (self._current, self._next):
                if descriptor is not None:
                    os.close(descriptor)
            self._current = self._next = None
        finally:
            self._recording.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _record(self, record: JournalRecord) -> None:
        if self._closed:
            raise JournalError(f"the journal {self.path} was closed")
        try:
            if self._next is not None and not _is_at(self._next, self._new):  # somebody removed it
                os.close(self._next)
                self._next = None
            if self._next is None:
                self._next = self._prepare()
            os.ftruncate(self._next, 0)
            if os.pwrite(self._next, record.pack(), 0) != JOURNAL_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._next)
            os.replace(self._new, self.path)
            replaced, self._current, self._next = self._current, self._next, None
            if replaced is not None:
                os.close(replaced)
            sync_folder(self.path)
        except (OSError, UsageError) as error:  # the latter where a stranger holds the next file's lock
            reason = error.strerror if isinstance(error, OSError) else error
            raise JournalError(f"cannot write the journal {self.path}: {reason}") from error
        self.last = record

    def _prepare(self) -> int:
        while True:
            descriptor = os.open(
                self._new, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600
            )
            try:
                os.fchmod(descriptor, 0o600)
                self._lock(descriptor)
                if _is_at(descriptor, self._new):
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # it was another process's, which has removed it

    def _lock(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"the journal {self.path} is in use: its process still runs") from None


def read_journal(path: Path) -> tuple[JournalRecord, bool]:
    """The record at `path`, and whether the process that writes it still lives. Raises UsageError where there is none."""
    try:
        while True:
            descriptor = _open_existing(path)
            if descriptor is None:
                raise UsageError(f"there is no journal {path}: no session of its side got as far as keys")
            try:
                # The lock first: a record that was replaced meanwhile is not the last word, and its lock is gone.
                locked = _is_locked(descriptor)
                record = _read(descriptor, path)
                if _is_at(descriptor, path):
                    return record, locked
            finally:
                os.close(descriptor)
    except OSError as error:
        raise UsageError(f"cannot read the journal {path}: {error.strerror}") from None


def abandon(path: Path) -> None:
    """Make the journal of a destination that died VERIFIED say FAILED, so that the source may run the guest.

    The operator's word instead of an abort token: nothing authenticates it. Raises UsageError where the journal is not that
    of such a destination or a process still has the guest, JournalError where it cannot be written.
    """
    with FileJournal(path) as journal:
        last = journal.last
        if last is None:
            raise UsageError(f"there is no journal {path}")
        if (last.role, last.status) != (Role.DESTINATION, State.VERIFIED):
            raise UsageError(
                f"only a destination that is VERIFIED can be abandoned; {path} is of a {last.role.name.lower()} that is "
                f"{last.status.name}"
            )
        if last.process is not None and lives(last.process):
            raise UsageError(
                f"process {last.process.id} still has the whole guest, and could run it: end it "
                f"({how_to_end(last.process)}), and ask again"
            )
        journal.record(replace(last, status=State.FAILED))


def sync_folder(path: Path) -> None:
    """Make durable that the file at `path` has its name. Raises OSError."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _open_existing(path: Path) -> int | None:
    """A descriptor of the regular file at `path`, None where there is nothing. Raises OSError or UsageError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UsageError(f"{path} is no journal: not a regular file")
    return descriptor


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the file behind `descriptor` is still the one at `path`."""
    try:
        at = path.stat(follow_symlinks=False)
    except FileNotFoundError:
        return False
    own = os.fstat(descriptor)
    return (own.st_dev, own.st_ino) == (at.st_dev, at.st_ino)


def _read(descriptor: int, path: Path) -> JournalRecord:
    try:
        return parse_journal_untrusted(os.pread(descriptor, JOURNAL_BYTES + 1, 0))
    except MalformedData as error:
        raise UsageError(f"{path} is no journal: {error}") from None


def _is_locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False
