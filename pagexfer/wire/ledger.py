"""The ledger: one record for each completed move of a guest, signed by both sides, with all that checking it later needs.

    header (16 bytes) · records

A record is a body of fixed layout, the signatures of source and destination, and four attachments: both hellos, both
pieces of evidence. The body has digests of the attachments, so the signatures cover them. A guest that never moved has a
ledger of no bytes at all, and no other ledger without records exists. Integers are little endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ..errors import MalformedData
from .constants import DIGEST_BYTES, GUEST_ID_BYTES
from .handshake import MAX_EVIDENCE_BYTES, Freshness

if TYPE_CHECKING:
    from collections.abc import Iterable

LEDGER_MAGIC: Final = b"PGXLEDGR"
RECORD_MAGIC: Final = b"PGXL"
LEDGER_VERSION: Final = 1
SIGNATURE_BYTES: Final = 64  # Ed25519, RFC 8032
# One bundle carries it, and with header, tag and headroom that bundle has to fit a slot's buffer of 2 MiB. A record is some
# 3 KiB with a pre-shared key (636 moves), 15 KiB with SNP reports and their certificates (138), 19 KiB where the host gives
# those in PEM (111). A guest whose ledger is full moves no more: a chain that left records out would be none.
MAX_LEDGER_BYTES: Final = (2 << 20) - 4096

# Ledger header:
#   offset  size  field
#        0     8  magic "PGXLEDGR"
#        8     2  version
#       10     6  reserved, zero
_HEADER: Final = struct.Struct("<8sH6s")
assert _HEADER.size == 16

# Record body:
#   offset  size  field
#        0     4  magic "PGXL"
#        4     2  version
#        6     1  freshness mode
#        7     1  reserved, zero
#        8     8  move number
#       16    16  guest id
#       32    48  hash of the record before
#       80    48  transcript
#      128    48  digest of the source's evidence
#      176    48  digest of the destination's evidence
#      224    48  digest of the source's policy
#      272    48  digest of the destination's policy
#      320    48  digest of the manifest
_BODY: Final = struct.Struct("<4sHBBQ16s48s48s48s48s48s48s48s")
BODY_BYTES: Final = 368
assert _BODY.size == BODY_BYTES
assert struct.calcsize("<4sHBBQ16s") == 32

# Record: u32 length of the rest · body · both signatures · each attachment behind its own u32 length.
_LENGTH: Final = struct.Struct("<I")
_SIGNED_BYTES: Final = BODY_BYTES + 2 * SIGNATURE_BYTES
_ATTACHMENTS: Final = 4


@dataclass(frozen=True, slots=True)
class RecordBody:
    """What both sides sign of one move. Digests are 48 bytes; `previous` is zero in a guest's first move, `move` 1."""

    move: int
    guest_id: bytes
    freshness: Freshness
    previous: bytes
    transcript: bytes
    source_evidence_digest: bytes
    destination_evidence_digest: bytes
    source_policy_digest: bytes
    destination_policy_digest: bytes
    manifest_digest: bytes

    def pack(self) -> bytes:
        """The 368 bytes that are signed."""
        return _BODY.pack(
            RECORD_MAGIC,
            LEDGER_VERSION,
            self.freshness,
            0,
            self.move,
            self.guest_id,
            self.previous,
            self.transcript,
            self.source_evidence_digest,
            self.destination_evidence_digest,
            self.source_policy_digest,
            self.destination_policy_digest,
            self.manifest_digest,
        )


@dataclass(frozen=True, slots=True)
class Proofs:
    """What the two sides showed each other in the handshake of a move, as it was sent: 1 to 65536 bytes each."""

    source_hello: bytes
    destination_hello: bytes
    source_evidence: bytes
    destination_evidence: bytes

    def pack(self) -> bytes:
        """Each part behind its length."""
        parts = (self.source_hello, self.destination_hello, self.source_evidence, self.destination_evidence)
        return b"".join(_LENGTH.pack(len(part)) + part for part in parts)


@dataclass(frozen=True, slots=True)
class Record:
    """One completed move."""

    body: RecordBody
    source_signature: bytes
    destination_signature: bytes
    proofs: Proofs

    def pack(self) -> bytes:
        """The record with its length in front."""
        rest = self.body.pack() + self.source_signature + self.destination_signature + self.proofs.pack()
        return _LENGTH.pack(len(rest)) + rest


def bytes_with_record(ledger: bytes, proofs: Proofs) -> int:
    """How many bytes a ledger will have with one more record, of a move with these proofs."""
    return (len(ledger) or _HEADER.size) + _LENGTH.size + _SIGNED_BYTES + len(proofs.pack())


def pack_ledger(records: Iterable[Record]) -> bytes:
    """A ledger of these records; of none, no bytes."""
    packed = b"".join(record.pack() for record in records)
    return _HEADER.pack(LEDGER_MAGIC, LEDGER_VERSION, bytes(6)) + packed if packed else b""


def parse_ledger_untrusted(data: bytes) -> tuple[Record, ...]:
    """The records of a ledger, whose form is checked and nothing else. Raises MalformedData."""
    if len(data) > MAX_LEDGER_BYTES:
        raise MalformedData(f"ledger of {len(data)} bytes, at most {MAX_LEDGER_BYTES} are allowed")
    if not data:
        return ()
    if len(data) <= _HEADER.size:
        raise MalformedData(f"ledger of {len(data)} bytes: no record")
    magic, version, reserved = _HEADER.unpack_from(data)
    if magic != LEDGER_MAGIC:
        raise MalformedData("wrong magic where a ledger begins")
    if version != LEDGER_VERSION:
        raise MalformedData(f"ledger of version {version}, expected {LEDGER_VERSION}")
    if reserved != bytes(6):
        raise MalformedData("ledger with reserved bytes set")
    records = []
    offset = _HEADER.size
    while offset < len(data):
        packed, offset = _take(data, offset, MAX_LEDGER_BYTES)
        records.append(_parse_record(packed))
    return tuple(records)


def guest_id_of(ledger: bytes) -> bytes | None:
    """The guest whose moves these are; None for one that never moved. Raises MalformedData."""
    records = parse_ledger_untrusted(ledger)
    return records[0].body.guest_id if records else None


def parse_body_untrusted(data: bytes) -> RecordBody:
    """A record's body of exactly 368 bytes. Raises MalformedData where any field is outside of its range."""
    if len(data) != BODY_BYTES:
        raise MalformedData(f"ledger record with a body of {len(data)} bytes, expected {BODY_BYTES}")
    magic, version, freshness, reserved, move, guest_id, *digests = _BODY.unpack(data)
    if magic != RECORD_MAGIC:
        raise MalformedData("not a ledger record: wrong magic")
    if version != LEDGER_VERSION:
        raise MalformedData(f"ledger record of version {version}, expected {LEDGER_VERSION}")
    if reserved or not move:
        raise MalformedData("ledger record with its reserved byte set, or of move 0")
    if freshness not in Freshness.__members__.values():
        raise MalformedData(f"ledger record with unknown freshness mode {freshness}")
    return RecordBody(move, guest_id, Freshness(freshness), *digests)


def _parse_record(data: bytes) -> Record:
    if len(data) < _SIGNED_BYTES:
        raise MalformedData(f"ledger record of {len(data)} bytes")
    body = parse_body_untrusted(data[:BODY_BYTES])
    signatures = data[BODY_BYTES:_SIGNED_BYTES]
    parts = []
    offset = _SIGNED_BYTES
    for _ in range(_ATTACHMENTS):
        part, offset = _take(data, offset, MAX_EVIDENCE_BYTES)
        parts.append(part)
    if offset != len(data):
        raise MalformedData("ledger record with bytes behind its last part")
    return Record(body, signatures[:SIGNATURE_BYTES], signatures[SIGNATURE_BYTES:], Proofs(*parts))


def _take(data: bytes, offset: int, limit: int) -> tuple[bytes, int]:
    """What stands behind the length at `offset`, and where it ends."""
    start = offset + _LENGTH.size
    if start > len(data):
        raise MalformedData("ledger that ends within a length")
    (length,) = _LENGTH.unpack_from(data, offset)
    if not 0 < length <= limit or start + length > len(data):
        raise MalformedData(
            f"ledger with a part of {length} bytes, which is too many, too few, or not all there"
        )
    return data[start : start + length], start + length


assert DIGEST_BYTES == 48
assert GUEST_ID_BYTES == 16
