"""The key schedule: from the secrets of one key exchange and the handshake's transcript to all keys of a session.

    transcript       = SHA-384("pagexfer v1 transcript" || source hello || destination hello)
    session id       = first 16 bytes of SHA-384("pagexfer v1 session id" || transcript)
    report data      = 16-byte label of the role || SHA-384("pagexfer v1 evidence" || transcript)    (64 bytes, R11)
    session secret   = HKDF-Extract(salt = transcript, input = X25519 secret || ML-KEM secret || contribution)
    traffic key      = HKDF-Expand(session secret, "pagexfer v1 traffic key" || session id || direction u8
                                   || channel u16 || incarnation u16, 32 bytes)
    proved           = SHA-384("pagexfer v1 confirmation" || transcript || SHA-384(destination evidence)
                               || SHA-384(source evidence))
    confirmation key = HKDF-Expand(session secret, label of the role || session id, 48 bytes)
    confirmation     = HMAC-SHA-384(confirmation key of the role that speaks, proved)

HKDF is RFC 5869 with SHA-384; integers are little endian. The hellos have a fixed size for each role, and the three parts
of the input 32, 32 and 48 bytes whatever the attestor, so the concatenations have one reading only.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from ..attestation.secret import Secret
from ..errors import AttestationError, LocalProtocolError
from ..wire.constants import DIGEST_BYTES, KEY_BYTES, SESSION_ID_BYTES
from ..wire.handshake import CONFIRMATION_BYTES, Role

if TYPE_CHECKING:
    from ..wire.bundle import Direction

SHARED_BYTES: Final = 64  # X25519 secret, ML-KEM secret
CONTRIBUTION_BYTES: Final = DIGEST_BYTES

_TRANSCRIPT_LABEL: Final = b"pagexfer v1 transcript"
_SESSION_LABEL: Final = b"pagexfer v1 session id"
_EVIDENCE_LABEL: Final = b"pagexfer v1 evidence"
_TRAFFIC_LABEL: Final = b"pagexfer v1 traffic key"
_PROVED_LABEL: Final = b"pagexfer v1 confirmation"
_ROLE_LABELS: Final = {Role.SOURCE: b"pagexfer src v01", Role.DESTINATION: b"pagexfer dst v01"}
_CONFIRMATION_LABELS: Final = {
    Role.SOURCE: b"pagexfer v1 source confirms",
    Role.DESTINATION: b"pagexfer v1 destination confirms",
}
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


def proved_digest(transcript: bytes, destination_evidence: bytes, source_evidence: bytes) -> bytes:
    """Digest over the hellos and both pieces of evidence, 48 bytes: what the confirmations are made over."""
    evidence = [hashlib.sha384(part).digest() for part in (destination_evidence, source_evidence)]
    return hashlib.sha384(_PROVED_LABEL + transcript + b"".join(evidence)).digest()


class KeySchedule:
    """Keys of one session, derived when asked for.

    `shared` is what the key exchange gave, 64 bytes, `contribution` the attestor's 48; both stay the caller's to wipe.
    """

    def __init__(self, shared: Secret, contribution: Secret, transcript: bytes) -> None:
        parts = shared.reveal(), contribution.reveal()
        if [len(part) for part in parts] != [SHARED_BYTES, CONTRIBUTION_BYTES]:
            raise LocalProtocolError("the parts of the key schedule's input have other sizes")
        self.session = session_id(transcript)
        self._secret = Secret(hmac.digest(transcript, b"".join(parts), "sha384"))

    def traffic_key(self, direction: Direction, channel: int, incarnation: int) -> Secret:
        """Key of one stream. Raises KeyPoisoned after `wipe`."""
        info = _TRAFFIC_LABEL + self.session + _TRAFFIC_INFO.pack(direction, channel, incarnation)
        return Secret(HKDFExpand(SHA384(), KEY_BYTES, info).derive(self._secret.reveal()))

    def confirmation(self, role: Role, proved: bytes) -> bytes:
        """What `role` shows to say that it has these keys, 48 bytes. Raises KeyPoisoned after `wipe`."""
        info = _CONFIRMATION_LABELS[role] + self.session
        key = HKDFExpand(SHA384(), CONFIRMATION_BYTES, info).derive(self._secret.reveal())
        return hmac.digest(key, proved, "sha384")

    def check_confirmation(self, role: Role, proved: bytes, shown: bytes) -> None:
        """`role` has these keys, and saw the same messages. Raises AttestationError."""
        if not hmac.compare_digest(shown, self.confirmation(role, proved)):
            raise AttestationError(f"the {role.name.lower()} did not confirm the keys of this session")

    def wipe(self) -> None:
        """Forget the session secret: no key can be derived any more."""
        self._secret.wipe()
