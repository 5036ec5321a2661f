"""Pre-shared key: both sides know one secret, given to them by the operator over another way.

    secret        = HKDF-Extract(salt = "pagexfer v1 psk", input = pre-shared key)
    evidence      = HMAC-SHA-384(HKDF-Expand(secret, "pagexfer v1 psk evidence", 48), report data)
    contribution  = HKDF-Expand(secret, "pagexfer v1 psk contribution", 48)

It proves possession of the key and nothing of the platform. Whoever learns the key later can pretend to be either side, but
not open recorded traffic: the session's secret comes from ephemeral keys too.
"""

from __future__ import annotations

import hmac
import os
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

MIN_PSK_BYTES: Final = (
    16  # below 128 bits the key would be the weakest part of the session, and text has fewer in 16 bytes
)
MAX_PSK_BYTES: Final = 4096

_SALT: Final = b"pagexfer v1 psk"
_EVIDENCE_INFO: Final = b"pagexfer v1 psk evidence"
_CONTRIBUTION_INFO: Final = b"pagexfer v1 psk contribution"


class PskAttestor:
    """Both sides prove that they know `psk`, at least 16 random bytes.

    Raises UsageError where it is too short or long, one byte again and again, or nothing but white space. How hard it is to
    guess is for whoever makes it: it is used as it is, and whoever records a handshake can try guesses.
    """

    def __init__(self, psk: bytes) -> None:
        given: object = psk
        if not isinstance(given, bytes | bytearray | memoryview):
            raise UsageError(f"a pre-shared key is bytes, not a {type(given).__name__}")
        if not MIN_PSK_BYTES <= len(psk) <= MAX_PSK_BYTES:
            raise UsageError(
                f"a pre-shared key has {MIN_PSK_BYTES} to {MAX_PSK_BYTES} bytes, this one {len(psk)}: "
                "make one with 'openssl rand -hex 32'"
            )
        if len(set(psk)) == 1 or not psk.strip():
            raise UsageError("this pre-shared key is none: make one with 'openssl rand -hex 32'")
        self._secret = Secret(hmac.digest(_SALT, psk, "sha384"))

    @classmethod
    def from_file(cls, path: Path) -> PskAttestor:
        """The key in a file, one trailing newline aside, LF or CR LF. Raises UsageError where the file cannot be used."""
        try:
            with path.open("rb") as file:
                data = file.read(MAX_PSK_BYTES + 2)
                mode = os.fstat(file.fileno()).st_mode
        except OSError as error:
            raise UsageError(f"cannot read the pre-shared key in {path}: {error.strerror}") from None
        if mode & (stat.S_IWGRP | stat.S_IWOTH):
            # Whoever can write it says which key is the peer's, and so who the peer is.
            raise UsageError(
                f"others can write the pre-shared key in {path}: run 'chmod 600 {path}', make a new one"
            )
        newline = b"\r\n" if data.endswith(b"\r\n") else b"\n"
        return cls(data.removesuffix(newline))

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
