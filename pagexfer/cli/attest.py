"""`pagexfer attest verify` and `pagexfer attest show`: attestation reports in files; `attest make-test-ca`: emulated ones.

Exit codes: 0 verified and accepted, or made; 2 bad usage, or a file that is not what it should be; 3 it does not verify, or
the policy refuses it.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from ..attestation.insecure import EmulatedAuthority
from ..attestation.policy import Policy, check_policy, check_report_data
from ..attestation.policy_file import load_policies
from ..attestation.snp import Product, parse_endorsements_untrusted, parse_report_untrusted, verify_report
from ..attestation.snp.certificates import EndorsementNames
from ..attestation.snp.describe import describe_claims, describe_report
from ..attestation.snp.report import REPORT_DATA_BYTES
from ..errors import AttestationError, MalformedData, Outcome, UsageError
from .files import read_crls, read_file
from .output import note, print_answer, print_json

if TYPE_CHECKING:
    from ..attestation.snp import Endorsements, Report

_FILE: Final = click.Path(path_type=Path, dir_okay=False)
_JSON: Final = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on standard output."
)


class Moment(click.ParamType[datetime]):
    """A point in time in ISO 8601; one without time zone is UTC."""

    name = "time"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        if isinstance(value, datetime):
            return value
        try:
            moment = datetime.fromisoformat(str(value))
            return (moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment).astimezone(UTC)
        except (ValueError, OverflowError):
            self.fail(
                f"{value!r} is not a time: write it like 2026-01-31 or 2026-01-31T12:00:00Z", param, ctx
            )


class ReportData(click.ParamType[bytes]):
    """The 64 bytes that a report must cover, in hex."""

    name = "hex"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> bytes:
        if isinstance(value, bytes):
            return value
        try:
            data = bytes.fromhex(str(value))
        except ValueError:
            data = b""
        if len(data) != REPORT_DATA_BYTES:
            self.fail(f"{value!r} is not {REPORT_DATA_BYTES} bytes in hex", param, ctx)
        return data


@click.group()
def attest() -> None:
    """Show, verify and emulate attestation reports of AMD SEV-SNP."""


@attest.command()
@click.argument("report", type=_FILE)
@click.option(
    "--leaf", type=_FILE, required=True, help="Certificate of the report's key, VCEK or VLEK (DER or PEM)."
)
@click.option("--chain", type=_FILE, required=True, help="ASK or ASVK, and ARK, in one PEM file.")
@click.option(
    "--crl", type=_FILE, multiple=True, help="Revocation list of an ARK (DER or PEM); may be given again."
)
@click.option("--policy", "policy_file", type=_FILE, help="Rules that the report must meet (TOML or JSON).")
@click.option("--no-policy", is_flag=True, help="Check signatures only, and accept whatever the report says.")
@click.option(
    "--as",
    "role",
    type=click.Choice(["destination", "source"]),
    default="destination",
    show_default=True,
    help="Part of the peer in a move: which rules of the policy file hold for it.",
)
@click.option("--report-data", type=ReportData(), help="The 64 bytes that the report must cover.")
@click.option("--at", type=Moment(), help="Verify as of this time (ISO 8601). Default: now.")
@_JSON
def verify(
    report: Path,
    leaf: Path,
    chain: Path,
    crl: tuple[Path, ...],
    policy_file: Path | None,
    no_policy: bool,
    role: str,
    report_data: bytes | None,
    at: datetime | None,
    as_json: bool,
) -> int:
    """Verify a report up to AMD's root, and check what it says.

    Without --policy and --no-policy the built-in rules hold: no debugging, VMPL 0, no migration agent, no hidden chip
    id, no VLEK. They know no measurement and no firmware version: only a policy file can.

    Exit code 0: verified. 2: bad usage, or a file is no report, certificate or CRL. 3: it does not verify, or a rule
    refuses it.
    """
    if policy_file is not None and no_policy:
        raise UsageError("--policy and --no-policy exclude each other")
    policy = None if no_policy else _policy(policy_file, role)
    data, _ = _read_report(report)
    endorsements = _read_endorsements(leaf, chain, crl)
    try:
        claims = verify_report(data, endorsements, at=datetime.now(UTC) if at is None else at)
        if policy is not None:
            check_policy(policy, claims, own=None, moves=None)
        if report_data is not None:
            check_report_data(claims, report_data)
    except (AttestationError, MalformedData) as error:
        return _refused(error, as_json=as_json)
    print_answer({"verified": True, **describe_claims(claims)}, as_json=as_json)
    if policy_file is None:
        note("signature and certificates hold; the measurement was compared with nothing: give --policy")
    return Outcome.COMPLETED


@attest.command()
@click.argument("report", type=_FILE)
@_JSON
def show(report: Path, as_json: bool) -> int:
    """Print every field of a report, and verify nothing."""
    try:
        fields = describe_report(_read_report(report)[1])
    except MalformedData as error:
        raise UsageError(f"{report} is not a report: {error}") from None
    print_answer(fields, as_json=as_json)
    return Outcome.COMPLETED


@attest.command()
@click.argument("file", type=_FILE)
@click.option(
    "--product",
    type=click.Choice([product.value for product in Product]),
    default=Product.GENOA.value,
    show_default=True,
    help="What the emulated processors are.",
)
def make_test_ca(file: Path, product: str) -> int:
    """Make a test CA for --attest emulated, which proves nothing.

    It signs emulated reports. Both sides need the same file. It is valid for a year.
    """
    EmulatedAuthority.generate(Product(product), now=datetime.now(UTC)).save(file)
    note(f"made {file}: give it to both sides, for tests only")
    return Outcome.COMPLETED


def _policy(path: Path | None, role: str) -> Policy:
    if path is None:
        return Policy(measurements=None, minimum_tcb=None)
    policies = load_policies(path)
    return policies.source if role == "source" else policies.destination


def _read_report(path: Path) -> tuple[bytes, Report]:
    data = read_file(path, "report")
    try:
        return data, parse_report_untrusted(data)
    except MalformedData as error:
        raise UsageError(f"{path} is not a report: {error}") from None


def _read_endorsements(leaf: Path, chain: Path, crl: tuple[Path, ...]) -> Endorsements:
    files = read_file(leaf, "certificate"), read_file(chain, "certificate chain"), read_crls(crl)
    try:
        return parse_endorsements_untrusted(*files, EndorsementNames(str(leaf), str(chain)))
    except MalformedData as error:
        raise UsageError(str(error)) from None


def _refused(error: AttestationError | MalformedData, *, as_json: bool) -> int:
    reason = "attestation" if isinstance(error, AttestationError) else "malformed"
    if as_json:
        print_json({"verified": False, "error": {"reason": reason, "message": str(error)}})
    note(str(error))
    return Outcome.REFUSED
