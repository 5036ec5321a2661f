"""The journal's record: one side's word on one session, 88 bytes that say after a crash who may run the guest.

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
JOURNAL_VERSION: Final = 1

# Journal record:
#   offset  size  field
#        0     4  magic "PGXJ"
#        4     2  version
#        6     1  role
#        7     1  session status
#        8    16  session id
#       24    16  guest id
#       40    48  check: SHA-384 of all before
_RECORD: Final = struct.Struct("<IHBB16s16s48s")
JOURNAL_BYTES: Final = 88
_CHECKED_BYTES: Final = JOURNAL_BYTES - DIGEST_BYTES
assert _RECORD.size == JOURNAL_BYTES
assert struct.calcsize("<IHBB16s16s") == _CHECKED_BYTES

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
class JournalRecord:
    """How far one side's session came. `status` is one of the role's `JOURNALED`, both ids have 16 bytes."""

    role: Role
    status: SessionStatus
    session: bytes
    guest_id: bytes

    def pack(self) -> bytes:
        record = _RECORD.pack(
            JOURNAL_MAGIC,
            JOURNAL_VERSION,
            self.role,
            self.status,
            self.session,
            self.guest_id,
            bytes(DIGEST_BYTES),
        )
        checked = record[:_CHECKED_BYTES]
        return checked + hashlib.sha384(checked).digest()


def parse_journal_untrusted(data: bytes) -> JournalRecord:
    """A record of exactly 88 bytes. Raises MalformedData where the check or any field does not hold."""
    if len(data) != JOURNAL_BYTES:
        raise MalformedData(f"it does not have the {JOURNAL_BYTES} bytes of a journal")
    magic, version, role, status, session, guest_id, check = _RECORD.unpack(data)
    if magic != JOURNAL_MAGIC:
        raise MalformedData("not a journal: wrong magic")
    if version != JOURNAL_VERSION:
        raise MalformedData(f"journal of version {version}, this side knows {JOURNAL_VERSION}")
    if hashlib.sha384(data[:_CHECKED_BYTES]).digest() != check:
        raise MalformedData("damaged journal: its check does not hold")
    try:
        record = JournalRecord(Role(role), SessionStatus(status), session, guest_id)
    except ValueError as error:
        raise MalformedData(f"journal with an unknown value: {error}") from None
    if record.status not in JOURNALED[record.role]:
        raise MalformedData(f"journal of a {record.role.name} that is {record.status.name}")
    return record


assert SESSION_ID_BYTES == GUEST_ID_BYTES == 16
