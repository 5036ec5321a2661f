"""`pagexfer ledger verify`, and the files that ledgers of moves are kept in.

Exit codes: 0 every rule holds; 2 bad usage, or the file is no ledger; 3 a rule does not hold, or evidence was not verified.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from datetime import UTC, datetime
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from ..attestation import PskAttestor
from ..attestation.insecure import EmulatedAuthority
from ..attestation.policy import Policy, check_moves, check_policy, check_psk, check_report_data
from ..attestation.policy_file import load_policies
from ..attestation.snp import AMD_ROOTS
from ..attestation.snp.attestor import as_claims, verify_evidence
from ..errors import LedgerRefused, MalformedData, Outcome, UsageError
from ..svsm.journal import sync_folder
from ..svsm.ledger import VALID_FROM, VALID_UNTIL, record_hash, verify_chain
from ..wire.constants import SESSION_ID_BYTES
from ..wire.handshake import AttestorKind, Role
from ..wire.ledger import MAX_LEDGER_BYTES, parse_ledger_untrusted
from .files import read_crls, read_file
from .output import note, print_json, print_table

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from ..attestation import Claims
    from ..attestation.snp import Root, SnpClaims
    from ..svsm.ledger import Evidence, VerifiedMove
    from ..wire.ledger import Record

_FILE: Final = click.Path(path_type=Path, dir_okay=False)
# Of a ledger from which an operator is warned: room is left for a dozen moves with reports.
_NEARLY_FULL: Final = MAX_LEDGER_BYTES * 9 // 10
# What is told of the machine at either end, where its evidence says it.
_TOLD: Final = (
    "product",
    "certified_chip",
    "report_id",
    "measurement",
    "vmpl",
    VALID_FROM,
    VALID_UNTIL,
)


def ledger_option(purpose: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """--ledger FILE of one side."""
    return click.option("--ledger", type=_FILE, help=purpose)


@click.group("ledger")
def ledger_commands() -> None:
    """Check the record of a guest's moves."""


@ledger_commands.command()
@click.argument("file", type=_FILE)
@click.option("--policy", "policy_file", type=_FILE, help="Rules that both sides of each move must meet.")
@click.option("--no-policy", is_flag=True, help="Check signatures only, and accept whatever evidence says.")
@click.option(
    "--psk-file", type=_FILE, help="psk: the pre-shared key, without which evidence is not verified."
)
@click.option(
    "--crl",
    type=_FILE,
    multiple=True,
    help="snp: revocation list of a root key of AMD's (DER or PEM); may be given again, for each product one.",
)
@click.option("--test-ca", type=_FILE, help="emulated: file of 'attest make-test-ca'.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
def verify(
    file: Path,
    policy_file: Path | None,
    no_policy: bool,
    psk_file: Path | None,
    crl: tuple[Path, ...],
    test_ca: Path | None,
    as_json: bool,
) -> int:
    """Check a guest's ledger offline, and print its moves.

    It shows these moves, and cannot show that there were no later ones: compare the last record with what the guest's
    present SVSM has. When a move was made is not recorded, for no side has a clock that the others trust: certificates may
    have been valid at any time, and the answer says when those of each move were. A CRL has to be valid today; what it
    revokes counts for old moves, too.

    Without --policy and --no-policy the built-in rules of 'attest verify' hold, and moves with a pre-shared key are
    accepted, but not after one with reports. With --policy they are refused unless it has allow_psk.

    Exit code 0: every rule holds. 2: bad usage, or no ledger. 3: a rule does not hold, or evidence by pre-shared key was
    not verified.
    """
    if policy_file is not None and no_policy:
        raise UsageError("--policy and --no-policy exclude each other")
    verifier = _Verifier(
        None if no_policy else _policies(policy_file),
        None if psk_file is None else PskAttestor.from_file(psk_file),
        read_crls(crl),
        None if test_ca is None else EmulatedAuthority.load(test_ca),
        datetime.now(UTC),
    )
    data = read_file(file, "ledger", MAX_LEDGER_BYTES)
    try:
        records = parse_ledger_untrusted(data)
    except MalformedData as error:
        raise UsageError(f"{file} is not a ledger: {error}") from None
    if not records:
        raise UsageError(f"{file} is empty: a guest that never moved has no ledger to verify")
    try:
        # With a policy its rule allow_psk decides about every move by itself.
        moves = verify_chain(records, verifier, psk_after_reports=no_policy or policy_file is not None)
    except LedgerRefused as error:
        return _refused(error, as_json=as_json)
    unverified = [move for move in moves if None in (move.source, move.destination)]
    if unverified:
        # Anybody can write such a record: hashes and signatures hold, and nobody's word stands behind them.
        missing = LedgerRefused(
            "evidence", unverified[0].record.body.move, "a pre-shared key's is not verified: give --psk-file"
        )
        _print(moves, missing, as_json=as_json)
        note(str(missing))
        return Outcome.REFUSED
    _print(moves, None, as_json=as_json)
    if policy_file is None and any(move.terms.kind is not AttestorKind.PSK for move in moves):
        note("evidence holds; the measurements were compared with nothing: give --policy")
    return Outcome.COMPLETED


def read_ledger(path: Path | None) -> bytes:
    """The ledger in a file; empty where there is none, for a guest that never moved. Raises UsageError."""
    if path is None:
        return b""
    data = read_file(path, "ledger", MAX_LEDGER_BYTES) if path.exists() else b""
    if not data:
        note(f"no ledger at {path}: counted as the first move")
    if len(data) > _NEARLY_FULL:
        note(
            f"warning: the ledger at {path} has {len(data)} of at most {MAX_LEDGER_BYTES} bytes: "
            "when there is no room for one more record, the guest cannot move any more"
        )
    return data


def check_place(path: Path | None) -> None:
    """A ledger can be made in this file, and would overwrite nothing else, which is better known before the move.

    Raises UsageError.
    """
    if path is None:
        return
    if path.exists():
        if not path.is_file():
            raise UsageError(f"{path} exists and is not a file")
        try:
            parse_ledger_untrusted(read_file(path, "ledger", MAX_LEDGER_BYTES))
        except MalformedData as error:
            raise UsageError(f"{path} exists and is not a ledger: {error}") from None
    try:
        # As what is written there first, whose name is the longest.
        descriptor, name = _temporary(beside(path, bytes(SESSION_ID_BYTES)))
        os.close(descriptor)
        Path(name).unlink()
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None


def beside(path: Path, session: bytes) -> Path:
    """Where the ledger for `path` is until the move of this session is complete."""
    return path.with_name(f"{path.name}.{session.hex()}.pending")


def keep_ledger(path: Path, data: bytes) -> Path:
    """Put the ledger into a file, or beside it where that has other moves than these; returns where.

    Whose guest comes is known only once it is here, when it is too late to refuse: so nothing is overwritten but what is
    in the new ledger, too. Raises OSError, and MalformedData for what is no ledger of a move.
    """
    records = parse_ledger_untrusted(data)
    if not records:
        raise MalformedData("it has no record")
    other = path.with_name(f"{path.name}.{records[-1].body.guest_id.hex()}")
    more = (other.with_name(f"{other.name}.{number}") for number in count(2))
    for place in chain((path, other), more):
        is_new = not place.exists()
        if is_new or _continues(records, place):
            # Another command's may be there by now, of another guest.
            with suppress(FileExistsError):
                write_ledger(place, data, is_new=is_new)
                return place
    raise AssertionError("there are no more numbers")


def write_ledger(path: Path, data: bytes, *, is_new: bool = False) -> None:
    """Put the ledger into a file that its owner alone can read, durably, whole or not at all.

    Raises OSError, which is FileExistsError where it is to be a new file and there is one.
    """
    descriptor, name = _temporary(path)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if not (is_new and _has_linked(name, path)):
            Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_folder(path)


class _Verifier:
    """Verifies the evidence of every move as its peer did then: up to the roots given, and under this policy.

    None stands for a pre-shared key's where the key was not given.
    """

    def __init__(
        self,
        policies: Mapping[Role, Policy] | None,
        psk: PskAttestor | None,
        crl: Sequence[bytes],
        authority: EmulatedAuthority | None,
        now: datetime,
    ) -> None:
        self._policies = policies
        self._psk = psk
        self._crl = crl
        self._authority = authority
        self._now = now
        self._source: SnpClaims | None = None

    def __call__(self, evidence: Evidence) -> Claims | None:
        if evidence.kind is AttestorKind.PSK:
            if self._policies is not None:
                check_psk(self._policies[evidence.role])
                check_moves(self._policies[evidence.role], evidence.move)
            return None if self._psk is None else self._psk.verify(evidence.data, evidence.report_data)
        claims = self._verified(evidence)
        check_report_data(claims, evidence.report_data)
        self._check_policy(evidence, claims)
        return as_claims(evidence.kind, claims)

    def _verified(self, evidence: Evidence) -> SnpClaims:
        if evidence.kind is AttestorKind.SNP:
            return self._whenever(evidence, AMD_ROOTS, self._crl)
        if self._authority is None:
            raise UsageError(
                f"move {evidence.move} has emulated evidence: give the --test-ca it was made with"
            )
        return self._whenever(evidence, (self._authority.root,), ())

    def _whenever(self, evidence: Evidence, roots: Sequence[Root], crl: Sequence[bytes]) -> SnpClaims:
        """As of whenever the certificates were valid: nobody's word says when a move was made."""
        return verify_evidence(evidence.data, at=self._now, roots=roots, crl=crl, whenever=True)

    def _check_policy(self, evidence: Evidence, claims: SnpClaims) -> None:
        """Each side under the rules for its role; rules about both of them once the destination is known, too."""
        source = self._source if evidence.role is Role.DESTINATION else None
        self._source = claims
        if self._policies is None:
            return
        check_policy(self._policies[evidence.role], claims, own=source, moves=evidence.move)
        if source is not None:
            check_policy(self._policies[Role.SOURCE], source, own=claims, moves=evidence.move)


def _policies(path: Path | None) -> dict[Role, Policy]:
    if path is None:
        return dict.fromkeys(Role, Policy(measurements=None, minimum_tcb=None, allow_psk=True))
    policies = load_policies(path)
    return {Role.SOURCE: policies.source, Role.DESTINATION: policies.destination}


def _print(moves: tuple[VerifiedMove, ...], error: LedgerRefused | None, *, as_json: bool) -> None:
    """The chain, which holds but for the evidence that `error` says was not verified."""
    last = moves[-1].record
    head: dict[str, object] = {
        "verified": error is None,
        "moves": len(moves),
        "guest-id": last.body.guest_id.hex(),
        "last-record": record_hash(last).hex(),
    }
    described = [_describe(move) for move in moves]
    if as_json:
        print_json({**head, "chain": described, **({} if error is None else _told(error))})
        return
    for move in described:
        head[f"move {move.pop('move')}"] = move
    print_table(head)


def _describe(move: VerifiedMove) -> dict[str, object]:
    body = move.record.body
    described: dict[str, object] = {
        "move": body.move,
        "verified": None not in (move.source, move.destination),
        "attestation": move.terms.kind.label,
        "freshness": body.freshness.label,
        "source": _side(move.source),
        "destination": _side(move.destination),
        "source-policy-digest": body.source_policy_digest.hex(),
        "destination-policy-digest": body.destination_policy_digest.hex(),
        "manifest-digest": body.manifest_digest.hex(),
        "record": record_hash(move.record).hex(),
    }
    sides = [side.details for side in (move.source, move.destination) if side is not None and side.details]
    if sides:
        described["certificates-valid-from"] = max(str(side[VALID_FROM]) for side in sides)
        described["certificates-valid-until"] = min(str(side[VALID_UNTIL]) for side in sides)
    if body.move > 1:
        described["continuous"] = "not known" if move.continuous is None else "yes"
    return described


def _side(claims: Claims | None) -> dict[str, object]:
    if claims is None:
        return {"evidence": "not verified: pre-shared key, which is not here"}
    told = {name: claims.details[name] for name in _TOLD if name in claims.details}
    return {"evidence": f"verified: {claims.subject}", **told}


def _refused(error: LedgerRefused, *, as_json: bool) -> int:
    if as_json:
        print_json({"verified": False, **_told(error)})
    note(str(error))
    return Outcome.REFUSED


def _told(error: LedgerRefused) -> dict[str, object]:
    return {"error": {"reason": "ledger", "rule": error.rule, "move": error.move, "message": str(error)}}


def _temporary(path: Path) -> tuple[int, str]:
    """A new file beside `path`, with mode 0600."""
    return tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)


def _has_linked(name: str, path: Path) -> bool:
    """Give a file its name where nothing has it. False where the file system has no links."""
    try:
        os.link(name, path)
    except FileExistsError:
        raise
    except OSError:
        return False
    Path(name).unlink()
    return True


def _continues(records: Sequence[Record], path: Path) -> bool:
    """Whether all that a file has is a beginning of `records`."""
    try:
        with path.open("rb") as file:
            kept = parse_ledger_untrusted(file.read(MAX_LEDGER_BYTES + 1))
    except MalformedData:
        return False
    return kept == records[: len(kept)]
