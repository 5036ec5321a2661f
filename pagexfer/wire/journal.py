"""The journal's record: one side's word on one session, 128 bytes that say after a crash who may run the guest.

The check at the end finds damage. It does not find a host that writes a record of its own: nothing here is secret.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ..errors import MalformedData
from .constants import DIGEST_BYTES, GUEST_ID_BYTES, SESSION_ID_BYTES
from .handshake import Role
from .slot import SessionStatus

if TYPE_CHECKING:
    from collections.abc import Mapping

JOURNAL_MAGIC: Final = int.from_bytes(b"PGXJ", "little")
JOURNAL_VERSION: Final = 2

# Journal record:
#   offset  size  field
#        0     4  magic "PGXJ"
#        4     2  version
#        6     1  role
#        7     1  session status
#        8    16  session id
#       24    16  guest id
#       40    16  boot id        of a destination's process that has the guest and is not the one that writes the journal;
#       56     8  pid namespace  all four are zero where there is none
#       64     8  process id
#       72     8  start time
#       80    48  check: SHA-384 of all before
_RECORD: Final = struct.Struct("<IHBB16s16s16sQQQ48s")
JOURNAL_BYTES: Final = 128
_CHECKED_BYTES: Final = JOURNAL_BYTES - DIGEST_BYTES
_BOOT_BYTES: Final = 16
assert _RECORD.size == JOURNAL_BYTES
assert struct.calcsize("<IHBB16s16s16sQQQ") == _CHECKED_BYTES

# The statuses that a side writes down; between them the answer to "who may run?" does not change.
JOURNALED: Final[Mapping[Role, frozenset[SessionStatus]]] = {
    Role.SOURCE: frozenset(
        {SessionStatus.KEYED, SessionStatus.STARTED, SessionStatus.FINISHED, SessionStatus.ABORTED}
    ),
    Role.DESTINATION: frozenset(
        {SessionStatus.KEYED, SessionStatus.VERIFIED, SessionStatus.RUNNING, SessionStatus.FAILED}
    ),
}


@dataclass(frozen=True, slots=True)
class GuestProcess:
    """The process that has a guest's memory, told apart from any that gets its id later: by boot and time of its start."""

    boot: bytes  # /proc/sys/kernel/random/boot_id, 16 bytes
    namespace: int  # inode of the pid namespace in which `id` was seen
    id: int
    start: int  # clock ticks after the boot


_NO_PROCESS: Final = GuestProcess(bytes(_BOOT_BYTES), 0, 0, 0)


@dataclass(frozen=True, slots=True)
class JournalRecord:
    """How far one side's session came. `status` is one of the role's `JOURNALED`, both ids have 16 bytes.

    `process` is what outlives the process that writes the journal, with the guest in it; None where nothing does.
    """

    role: Role
    status: SessionStatus
    session: bytes
    guest_id: bytes
    process: GuestProcess | None = None

    def pack(self) -> bytes:
        process = self.process or _NO_PROCESS
        record = _RECORD.pack(
            JOURNAL_MAGIC,
            JOURNAL_VERSION,
            self.role,
            self.status,
            self.session,
            self.guest_id,
            process.boot,
            process.namespace,
            process.id,
            process.start,
            bytes(DIGEST_BYTES),
        )
        checked = record[:_CHECKED_BYTES]
        return checked + hashlib.sha384(checked).digest()


def parse_journal_untrusted(data: bytes) -> JournalRecord:
    """A record of exactly 128 bytes. Raises MalformedData where the check or any field does not hold."""
    if len(data) != JOURNAL_BYTES:
        raise MalformedData(f"it does not have the {JOURNAL_BYTES} bytes of a journal")
    magic, version, role, status, session, guest_id, boot, namespace, process_id, start, check = (
        _RECORD.unpack(data)
    )
    if magic != JOURNAL_MAGIC:
        raise MalformedData("not a journal: wrong magic")
    if version != JOURNAL_VERSION:
        raise MalformedData(f"journal of version {version}, this side knows {JOURNAL_VERSION}")
    if hashlib.sha384(data[:_CHECKED_BYTES]).digest() != check:
        raise MalformedData("damaged journal: its check does not hold")
    try:
        process = GuestProcess(boot, namespace, process_id, start)
        held = None if process == _NO_PROCESS else process
        record = JournalRecord(Role(role), SessionStatus(status), session, guest_id, held)
    except ValueError as error:
        raise MalformedData(f"journal with an unknown value: {error}") from None
    if record.status not in JOURNALED[record.role]:
        raise MalformedData(f"journal of a {record.role.name} that is {record.status.name}")
    if held is not None and (record.role is not Role.DESTINATION or not process_id):
        raise MalformedData(f"journal of a {record.role.name} with a guest in process {process_id}")
    return record


assert SESSION_ID_BYTES == GUEST_ID_BYTES == 16
