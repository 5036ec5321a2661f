"""The key schedule: from one input secret and the handshake's transcript to one key for each traffic stream.

    transcript     = SHA-384("pagexfer v1 transcript" || source hello || destination hello)
    session id     = first 16 bytes of SHA-384("pagexfer v1 session id" || transcript)
    report data    = 16-byte label of the role || SHA-384("pagexfer v1 evidence" || transcript)    (64 bytes, R11)
    session secret = HKDF-Extract(salt = transcript, input = the attestor's contribution)
    traffic key    = HKDF-Expand(session secret, "pagexfer v1 traffic key" || session id || direction u8
                                 || channel u16 || incarnation u16, 32 bytes)

HKDF is RFC 5869 with SHA-384; integers are little endian. The hellos have a fixed size, so the concatenations have one
reading only.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from ..attestation.secret import Secret
from ..wire.constants import KEY_BYTES, SESSION_ID_BYTES
from ..wire.handshake import Role

if TYPE_CHECKING:
    from ..wire.bundle import Direction

_TRANSCRIPT_LABEL: Final = b"pagexfer v1 transcript"
_SESSION_LABEL: Final = b"pagexfer v1 session id"
_EVIDENCE_LABEL: Final = b"pagexfer v1 evidence"
_TRAFFIC_LABEL: Final = b"pagexfer v1 traffic key"
_ROLE_LABELS: Final = {Role.SOURCE: b"pagexfer src v01", Role.DESTINATION: b"pagexfer dst v01"}
_TRAFFIC_INFO: Final = struct.Struct("<BHH")
assert all(len(label) == 16 for label in _ROLE_LABELS.values())


def transcript_digest(source_hello: bytes, destination_hello: bytes) -> bytes:
    """Digest over both hellos, 48 bytes."""
    return hashlib.sha384(_TRANSCRIPT_LABEL + source_hello + destination_hello).digest()


def report_data(role: Role, transcript: bytes) -> bytes:
    """The 64 bytes that `role` has its evidence made over."""
    return _ROLE_LABELS[role] + hashlib.sha384(_EVIDENCE_LABEL + transcript).digest()


def session_id(transcript: bytes) -> bytes:
    """The public name of the session, 16 bytes."""
    return hashlib.sha384(_SESSION_LABEL + transcript).digest()[:SESSION_ID_BYTES]


class KeySchedule:
    """Traffic keys of one session, derived when asked for."""

    def __init__(self, contribution: Secret, transcript: bytes) -> None:
        self.session = session_id(transcript)
        self._secret = Secret(hmac.digest(transcript, contribution.reveal(), "sha384"))

    def traffic_key(self, direction: Direction, channel: int, incarnation: int) -> Secret:
        """Key of one stream. Raises KeyPoisoned after `wipe`."""
        info = _TRAFFIC_LABEL + self.session + _TRAFFIC_INFO.pack(direction, channel, incarnation)
        return Secret(HKDFExpand(SHA384(), KEY_BYTES, info).derive(self._secret.reveal()))

    def wipe(self) -> None:
        """Forget the session secret: no key can be derived any more."""
        self._secret.wipe()
