"""The port of the handshake to whatever proves who the two sides are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from ..wire.constants import DIGEST_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..wire.handshake import AttestorKind
    from .secret import Secret


@dataclass(frozen=True, slots=True)
class Claims:
    """What verified evidence says of the peer: who it is in a few words, and by name what more there is to tell.

    `details` has plain values that JSON can hold: strings, numbers, booleans, None, and lists and tables of them.
    """

    kind: AttestorKind
    subject: str
    details: Mapping[str, object] = field(default_factory=dict)


# What a kind of evidence contributes, and names as its policy, that has no shared secret, or no policy.
NOTHING: Final = bytes(DIGEST_BYTES)


class Attestor(Protocol):
    """Gives evidence for this side and verifies the peer's."""

    @property
    def kind(self) -> AttestorKind:
        """What kind of evidence this is; both sides must have the same."""
        ...

    @property
    def policy_digest(self) -> bytes:
        """Digest of the policy under which `verify` judges the peer, 48 bytes; zeros for a kind without policy."""
        ...

    def evidence(self, report_data: bytes) -> bytes:
        """Evidence over 64 bytes of report data, 1 to 65536 bytes."""
        ...

    def verify(self, evidence: bytes, report_data: bytes) -> Claims:
        """Check a peer's evidence over the report data it must have used.

        Raises PolicyRefused where it is genuine and not accepted, AttestationError for anything else.
        """
        ...

    def check_move(self, move: int) -> None:
        """The policy lets the guest make the move that has this number in its life. Raises PolicyRefused."""
        ...

    def contribution(self) -> Secret:
        """What this kind adds to the input of the key schedule, 48 bytes: a secret that only peers share, or zeros."""
        ...
