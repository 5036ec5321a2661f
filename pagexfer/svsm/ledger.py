"""The ledger of a guest's moves: how a record is made, signed by both sides, and checked as a link of a chain (R12).

    signature     = Ed25519 (RFC 8032) by the ledger key in the side's hello, over the role's label || body
    record hash   = SHA-384("pagexfer v1 ledger record" || body || source signature || destination signature)

Each side's evidence is made over the transcript, the transcript over both hellos, and the hellos name the ledger keys. So
where the evidence of a record verifies, the two SVSMs that gave it signed this body and, by the hash of the record before,
all that stands before it: no record can be changed, moved, left out between others, or taken from another guest.

What a chain cannot show: whoever holds a ledger can cut off its end or show an older one. It proves these moves, and not
that there were no later ones. Only the SVSM that has the guest knows that, so in a move the ledger goes from SVSM to SVSM,
sealed and under the manifest, where no host can shorten it, and the destination takes its record's number from what came.
An SVSM that breaks its own rules could drop what it was given: policies keep such a one from getting a guest.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NoReturn

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from ..errors import AttestationError, KeyPoisoned, LedgerRefused, MalformedData
from ..wire.constants import DIGEST_BYTES
from ..wire.handshake import AttestorKind, Role, parse_hello_untrusted
from ..wire.ledger import (
    MAX_LEDGER_BYTES,
    Record,
    RecordBody,
    bytes_with_record,
    pack_ledger,
    parse_ledger_untrusted,
)
from .keys import report_data, transcript_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..attestation import Claims
    from ..wire.handshake import Freshness
    from ..wire.ledger import Proofs

_RECORD_LABEL: Final = b"pagexfer v1 ledger record"
_SIGNATURE_LABELS: Final = {
    Role.SOURCE: b"pagexfer v1 ledger source",
    Role.DESTINATION: b"pagexfer v1 ledger destination",
}
NO_RECORD: Final = bytes(DIGEST_BYTES)  # stands for the hash of the record before a guest's first move
# What evidence may say of the machine that gave it. Where that machine is a move's destination and gives the guest away in
# the next one, neither can have changed: a chip has one name, and a launch of its firmware one report id.
_INSTANCE: Final = ("certified_chip", "report_id")
# When the certificates behind evidence are valid: in UTC and one form, so that texts compare as times do.
VALID_FROM: Final = "certificates_valid_from"
VALID_UNTIL: Final = "certificates_valid_until"


class LedgerKey:
    """The private key of one side in one session, for its signature under one record.

    It lives in OpenSSL, which wipes it when the object ends. It has no encoding here and cannot be pickled or copied.
    """

    __slots__ = ("_key", "public")

    def __init__(self) -> None:
        key = Ed25519PrivateKey.generate()
        self._key: Ed25519PrivateKey | None = key
        self.public: Final = key.public_key().public_bytes_raw()

    def sign(self, role: Role, body: RecordBody) -> bytes:
        """The signature of `role`, 64 bytes; the key is gone then. Raises KeyPoisoned at the second use."""
        key = self._key
        if key is None:
            raise KeyPoisoned("the ledger key was used or dropped")
        self.drop()
        return key.sign(_SIGNATURE_LABELS[role] + body.pack())

    def drop(self) -> None:
        """Forget the private key."""
        self._key = None

    def __repr__(self) -> str:
        return f"LedgerKey({self.public.hex()}, [REDACTED])"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a LedgerKey cannot be pickled or copied")


@dataclass(frozen=True, slots=True)
class MoveTerms:
    """What the hellos of a move say that its record needs."""

    kind: AttestorKind
    guest_id: bytes
    freshness: Freshness
    source_policy_digest: bytes
    destination_policy_digest: bytes
    source_ledger_key: bytes
    destination_ledger_key: bytes


@dataclass(frozen=True, slots=True)
class Evidence:
    """Evidence of one side in one move, for whoever can verify its kind.

    `policy_digest` is that of the policy under which the other side accepted it at the time.
    """

    move: int
    role: Role
    kind: AttestorKind
    data: bytes
    report_data: bytes
    policy_digest: bytes


@dataclass(frozen=True, slots=True)
class VerifiedMove:
    """One link of a chain that held.

    Claims are None where the evidence could not be verified. `continuous` says whether the source is the same launch on the
    same machine as the destination of the move before: None where evidence does not tell, or there is no move before.
    """

    record: Record
    terms: MoveTerms
    source: Claims | None
    destination: Claims | None
    continuous: bool | None


def read_terms_untrusted(proofs: Proofs) -> MoveTerms:
    """The terms that both hellos agree on. Raises MalformedData where they are no pair of hellos of one session."""
    source = parse_hello_untrusted(proofs.source_hello)
    destination = parse_hello_untrusted(proofs.destination_hello)
    if (source.role, destination.role) != (Role.SOURCE, Role.DESTINATION):
        raise MalformedData("the hellos are not of a source and a destination")
    if (source.attestor, source.guest_id, source.freshness) != (
        destination.attestor,
        destination.guest_id,
        destination.freshness,
    ):
        raise MalformedData("the hellos are of different guests or on different terms")
    return MoveTerms(
        source.attestor,
        source.guest_id,
        source.freshness,
        source.policy_digest,
        destination.policy_digest,
        source.ledger_key,
        destination.ledger_key,
    )


def next_body(records: Sequence[Record], proofs: Proofs, manifest: bytes) -> RecordBody:
    """The body of the record that comes after `records`, for a move with this manifest. Raises MalformedData."""
    terms = read_terms_untrusted(proofs)
    return RecordBody(
        len(records) + 1,
        terms.guest_id,
        terms.freshness,
        record_hash(records[-1]) if records else NO_RECORD,
        transcript_digest(proofs.source_hello, proofs.destination_hello),
        _digest(proofs.source_evidence),
        _digest(proofs.destination_evidence),
        terms.source_policy_digest,
        terms.destination_policy_digest,
        _digest(manifest),
    )


def append(
    records: Sequence[Record], body: RecordBody, proofs: Proofs, source_signature: bytes, key: LedgerKey
) -> bytes:
    """The destination's part: check the source's signature, sign too, and return the ledger with the new record.

    Raises LedgerRefused, and KeyPoisoned where `key` was used before.
    """
    terms = read_terms_untrusted(proofs)
    _check_signature(Role.SOURCE, terms.source_ledger_key, body, source_signature)
    signature = key.sign(Role.DESTINATION, body)
    return pack_ledger([*records, Record(body, source_signature, signature, proofs)])


def check_next(ledger: bytes, proofs: Proofs) -> int:
    """A guest with this ledger can make one more move, with these proofs; returns the number of that move.

    Raises MalformedData or LedgerRefused: for the chain, the guest, or want of room.
    """
    records = parse_ledger_untrusted(ledger)
    chain = check_chain(records)
    move = len(records) + 1
    guest_id = read_terms_untrusted(proofs).guest_id
    _require(
        not chain or chain[0].guest_id == guest_id, "guest_id", move, "the moves before are another guest's"
    )
    _require(
        bytes_with_record(ledger, proofs) <= MAX_LEDGER_BYTES,
        "room",
        move,
        f"its record would make the ledger longer than {MAX_LEDGER_BYTES} bytes",
    )
    return move


def record_hash(record: Record) -> bytes:
    """What the next record names this one by, 48 bytes."""
    signed = record.body.pack() + record.source_signature + record.destination_signature
    return _digest(_RECORD_LABEL + signed)


def check_chain(records: Sequence[Record]) -> list[MoveTerms]:
    """Check all of a ledger but its evidence: numbers, hashes, guest, digests and both signatures of every record.

    Returns the terms of each move. Raises LedgerRefused with the first rule that does not hold.
    """
    terms: list[MoveTerms] = []
    previous = NO_RECORD
    for number, record in enumerate(records, start=1):
        body = record.body
        _require(body.move == number, "move_number", number, f"the record is of move {body.move}")
        _require(body.previous == previous, "previous_record", number, "it follows another record")
        terms.append(_check_record(record))
        _require(
            body.guest_id == terms[0].guest_id, "guest_id", number, "the moves before are another guest's"
        )
        previous = record_hash(record)
    return terms


def verify_chain(
    records: Sequence[Record],
    verify_evidence: Callable[[Evidence], Claims | None],
    *,
    psk_after_reports: bool = False,
) -> tuple[VerifiedMove, ...]:
    """Check a ledger with its evidence. `verify_evidence` returns None for evidence that it has no means to verify.

    A move with a pre-shared key names no machine, so between moves with reports it would hide that the guest left from
    elsewhere than it had come to: anybody could put another guest behind a chain. Only `psk_after_reports` accepts one.

    Raises LedgerRefused with the first rule that does not hold: those of `check_chain`; `evidence` where `verify_evidence`
    raises AttestationError or MalformedData; `continuity` where evidence names another machine, or another launch of its
    firmware, as a move's source than as the destination of the move before, or none at all after one that did;
    `dates` where certificates were not valid in the order in which they would have been used.
    """
    moves: list[VerifiedMove] = []
    began = ""
    for record, terms in zip(records, check_chain(records), strict=True):
        _require(
            psk_after_reports or not moves or not _loses_reports(moves[-1].terms, terms),
            "continuity",
            record.body.move,
            "a pre-shared key names no machine, and the move before had reports of two",
        )
        source, destination = (_verify(evidence, verify_evidence) for evidence in _evidence_of(record, terms))
        began = _check_dates(record.body.move, began, source, destination)
        continuous = _check_continuity(record.body.move, moves[-1].destination if moves else None, source)
        moves.append(VerifiedMove(record, terms, source, destination, continuous))
    return tuple(moves)


def _check_record(record: Record) -> MoveTerms:
    """A record by itself: the body says of hellos and evidence what they are, and both ledger keys signed it."""
    body, proofs = record.body, record.proofs
    try:
        terms = read_terms_untrusted(proofs)
    except MalformedData as error:
        raise LedgerRefused("hellos", body.move, str(error)) from None
    transcript = transcript_digest(proofs.source_hello, proofs.destination_hello)
    _require(body.transcript == transcript, "transcript", body.move, "the hellos are of another session")
    _require(
        (body.guest_id, body.freshness, body.source_policy_digest, body.destination_policy_digest)
        == (terms.guest_id, terms.freshness, terms.source_policy_digest, terms.destination_policy_digest),
        "terms",
        body.move,
        "guest, freshness mode or policies are not those of the hellos",
    )
    _require(
        (body.source_evidence_digest, body.destination_evidence_digest)
        == (_digest(proofs.source_evidence), _digest(proofs.destination_evidence)),
        "evidence_digest",
        body.move,
        "the evidence is not what was signed",
    )
    _check_signature(Role.SOURCE, terms.source_ledger_key, body, record.source_signature)
    _check_signature(Role.DESTINATION, terms.destination_ledger_key, body, record.destination_signature)
    return terms


def _check_signature(role: Role, key: bytes, body: RecordBody, signature: bytes) -> None:
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, _SIGNATURE_LABELS[role] + body.pack())
    except (InvalidSignature, ValueError):
        rule = f"{role.name.lower()}_signature"
        raise LedgerRefused(rule, body.move, "the ledger key of the hello did not sign this record") from None


def _evidence_of(record: Record, terms: MoveTerms) -> tuple[Evidence, Evidence]:
    """Of the source, and of the destination."""

    def evidence(role: Role, data: bytes, policy_digest: bytes) -> Evidence:
        expected = report_data(role, record.body.transcript)
        return Evidence(record.body.move, role, terms.kind, data, expected, policy_digest)

    return (
        evidence(Role.SOURCE, record.proofs.source_evidence, terms.destination_policy_digest),
        evidence(Role.DESTINATION, record.proofs.destination_evidence, terms.source_policy_digest),
    )


def _verify(evidence: Evidence, verify: Callable[[Evidence], Claims | None]) -> Claims | None:
    try:
        return verify(evidence)
    except (AttestationError, MalformedData) as error:
        side = evidence.role.name.lower()
        raise LedgerRefused("evidence", evidence.move, f"the {side}'s evidence: {error}") from None


def _loses_reports(before: MoveTerms, terms: MoveTerms) -> bool:
    return terms.kind is AttestorKind.PSK and before.kind is not AttestorKind.PSK


def _check_continuity(move: int, before: Claims | None, source: Claims | None) -> bool | None:
    if before is None or source is None:
        return None
    known = [name for name in _INSTANCE if before.details.get(name) and source.details.get(name)]
    for name in known:
        _require(
            before.details[name] == source.details[name],
            "continuity",
            move,
            f"the guest left from {name} {source.details[name]}, but had arrived at {before.details[name]}",
        )
    return True if known else None


def _check_dates(move: int, began: str, *sides: Claims | None) -> str:
    """`began` is when the last certificate of the moves before began; returns the same of all up to this move.

    Each move was at a time when its certificates were valid, and after the moves before it.
    """
    known = [side.details for side in sides if side is not None and VALID_FROM in side.details]
    began = max([began, *(str(details[VALID_FROM]) for details in known)])
    for details in known:
        ended = str(details[VALID_UNTIL])
        _require(
            began <= ended,
            "dates",
            move,
            f"a certificate ended at {ended}, before one of this move or an earlier one began at {began}",
        )
    return began


def _require(holds: bool, rule: str, move: int, why: str) -> None:
    if not holds:
        raise LedgerRefused(rule, move, why)


def _digest(data: bytes) -> bytes:
    return hashlib.sha384(data).digest()
