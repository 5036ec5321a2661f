"""The port of the handshake to whatever proves who the two sides are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from ..wire.handshake import AttestorKind
    from .secret import Secret


@dataclass(frozen=True, slots=True)
class Claims:
    """What verified evidence says of the peer."""

    kind: AttestorKind
    subject: str


class Attestor(Protocol):
    """Gives evidence for this side and verifies the peer's."""

    @property
    def kind(self) -> AttestorKind:
        """What kind of evidence this is; both sides must have the same."""
        ...

    def evidence(self, report_data: bytes) -> bytes:
        """Evidence over 64 bytes of report data."""
        ...

    def verify(self, evidence: bytes, report_data: bytes) -> Claims:
        """Check a peer's evidence over the report data it must have used. Raises AttestationError."""
        ...

    def contribution(self) -> Secret:
        """What this kind adds to the input of the key schedule: a shared secret that only proven peers have."""
        ...
