"""Pre-shared key: both sides know one secret, given to them by the operator over another way.

    secret        = HKDF-Extract(salt = "pagexfer v1 psk", input = pre-shared key)
    evidence      = HMAC-SHA-384(HKDF-Expand(secret, "pagexfer v1 psk evidence", 48), report data)
    contribution  = HKDF-Expand(secret, "pagexfer v1 psk contribution", 48)

It proves possession of the key and nothing of the platform. Whoever learns the key later can pretend to be either side, but
not open recorded traffic: the session's secret comes from ephemeral keys too.
"""

from __future__ import annotations

import hmac
import stat
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from ..errors import AttestationError, UsageError
from ..wire.constants import DIGEST_BYTES
from ..wire.handshake import AttestorKind
from .attestor import NOTHING, Claims
from .secret import Secret

if TYPE_CHECKING:
    from pathlib import Path

MIN_PSK_BYTES: Final = 16  # below 128 bits the key would be the weakest part of the session
MAX_PSK_BYTES: Final = 4096

_SALT: Final = b"pagexfer v1 psk"
_EVIDENCE_INFO: Final = b"pagexfer v1 psk evidence"
_CONTRIBUTION_INFO: Final = b"pagexfer v1 psk contribution"


class PskAttestor:
    """Both sides prove that they know `psk`, at least 16 random bytes. Raises UsageError where it is no such key."""

    def __init__(self, psk: bytes) -> None:
        given: object = psk
        if not isinstance(given, bytes | bytearray | memoryview):
            raise UsageError(f"a pre-shared key is bytes, not a {type(given).__name__}")
        if not MIN_PSK_BYTES <= len(psk) <= MAX_PSK_BYTES:
            raise UsageError(
                f"a pre-shared key has {MIN_PSK_BYTES} to {MAX_PSK_BYTES} bytes, this one {len(psk)}: "
                "make one with 'openssl rand -hex 32'"
            )
        self._secret = Secret(hmac.digest(_SALT, psk, "sha384"))

    @classmethod
    def from_file(cls, path: Path) -> PskAttestor:
        """The key in a file, one trailing newline aside. Raises UsageError where the file cannot be used."""
        try:
            with path.open("rb") as file:
                data = file.read(MAX_PSK_BYTES + 2)
        except OSError as error:
            raise UsageError(f"cannot read the pre-shared key in {path}: {error.strerror}") from None
        return cls(data.removesuffix(b"\n").removesuffix(b"\r"))

    @property
    def kind(self) -> AttestorKind:
        return AttestorKind.PSK

    @property
    def policy_digest(self) -> bytes:
        return NOTHING

    def evidence(self, report_data: bytes) -> bytes:
        return hmac.digest(self._expand(_EVIDENCE_INFO), report_data, "sha384")

    def verify(self, evidence: bytes, report_data: bytes) -> Claims:
        if not hmac.compare_digest(evidence, self.evidence(report_data)):
            raise AttestationError("the peer does not have the same pre-shared key")
        return Claims(self.kind, "holder of the pre-shared key")

    def check_move(self, move: int) -> None:
        pass  # a pre-shared key has no policy

    def contribution(self) -> Secret:
        return Secret(self._expand(_CONTRIBUTION_INFO))

    def _expand(self, info: bytes) -> bytes:
        return HKDFExpand(SHA384(), DIGEST_BYTES, info).derive(self._secret.reveal())


def readable_by_others(path: Path) -> bool:
    """Whether a key file may be read by more than its owner."""
    return bool(path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH))
