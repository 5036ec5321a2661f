"""Options that say how a side proves who it is, and the attestor that they make."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from ..attestation import PskAttestor
from ..attestation.insecure import EmulatedAttestor, EmulatedAuthority
from ..attestation.policy_file import load_policies
from ..attestation.psk import readable_by_others
from ..attestation.snp import find_provider
from ..attestation.snp.attestor import SnpAttestor
from ..errors import UsageError
from ..wire.handshake import AttestorKind, Role
from .files import read_crls
from .output import note

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from ..attestation import Attestor, Claims
    from ..attestation.policy import Policy

_FILE: Final = click.Path(path_type=Path, dir_okay=False)
# The files that each kind takes, and those without which it cannot be.
_TAKES: Final = {
    AttestorKind.PSK: ("psk_file",),
    AttestorKind.SNP: ("policy", "crl"),
    AttestorKind.EMULATED: ("test_ca", "policy"),
}
_NEEDS: Final = {
    AttestorKind.PSK: "psk_file",
    AttestorKind.SNP: "policy",
    AttestorKind.EMULATED: "test_ca",
}


def attest_option(*kinds: AttestorKind) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """--attest with these kinds, the first of them the default."""
    return click.option(
        "--attest",
        type=click.Choice([kind.label for kind in kinds]),
        default=kinds[0].label,
        show_default=True,
        help="How the sides prove who they are; emulated proves nothing and is for tests.",
    )


def attestor_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--attest, and the files that its kinds need."""
    for option in (
        click.option(
            "--crl",
            type=_FILE,
            multiple=True,
            help="snp: revocation list of a root key of AMD's (DER or PEM); may be given again, for each product one.",
        ),
        click.option("--policy", type=_FILE, help="snp, emulated: rules for the peer (TOML or JSON)."),
        click.option(
            "--test-ca", type=_FILE, help="emulated: file of 'attest make-test-ca', for both sides."
        ),
        click.option("--psk-file", type=_FILE, help="psk: file with the pre-shared key, for both sides."),
        attest_option(*AttestorKind),
    ):
        command = option(command)
    return command


def make_attestor(role: Role, attest: str, crl: tuple[Path, ...], files: dict[str, Path | None]) -> Attestor:
    """The attestor of the side `role`. Raises UsageError where a file is missing, not for this kind, or unusable."""
    kind = AttestorKind[attest.upper()]
    for name, given in {**files, "crl": crl}.items():
        if given and name not in _TAKES[kind]:
            raise UsageError(f"{_option(name)} is of no use with --attest {attest}")
    needed = files[_NEEDS[kind]]
    if needed is None:
        raise UsageError(f"--attest {attest} needs {_option(_NEEDS[kind])}")
    match kind:
        case AttestorKind.PSK:
            psk = PskAttestor.from_file(needed)
            _warn_if_readable(needed, "pre-shared key")
            return psk
        case AttestorKind.SNP:
            policy = _policy(needed, role)
            return SnpAttestor(find_provider(), policy, crl=read_crls(crl), on_refused=note)
        case AttestorKind.EMULATED:
            authority = EmulatedAuthority.load(needed)
            _warn_if_readable(needed, "test CA")
            note("warning: emulated attestation proves nothing: whoever has the test CA can be either side")
            rules = files["policy"]
            return EmulatedAttestor(
                authority,
                None if rules is None else _policy(rules, role),
                now=lambda: datetime.now(UTC),
                on_refused=note,
            )


def describe_peer(peer: Claims) -> dict[str, object]:
    """What a report says of the peer's attestation."""
    return {"kind": peer.kind.label, "peer": {"subject": peer.subject, **peer.details}}


def _policy(path: Path, role: Role) -> Policy:
    """The rules for the peer, which has the other role."""
    policies = load_policies(path)
    return policies.destination if role is Role.SOURCE else policies.source


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _warn_if_readable(path: Path, what: str) -> None:
    if readable_by_others(path):
        note(f"warning: others can read the {what} in {path}: run 'chmod 600 {path}'")
