"""Fixed-layout messages of the handshake, which the engine carries as opaque bytes.

    source       -> destination   hello
    destination  -> source        hello · evidence
    source       -> destination   confirmation · evidence
    destination  -> source        session id · confirmation

Everything here is authenticated, by the evidence or by the confirmations, so it is fixed-layout bytes with one encoding.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Final

from ..errors import MalformedData
from .constants import (
    DIGEST_BYTES,
    GUEST_ID_BYTES,
    MAX_CHANNELS,
    MAX_PAGES,
    MAX_VCPUS,
    NONCE_BYTES,
    PAGE_SIZE,
    PROTOCOL_VERSION,
    SESSION_ID_BYTES,
)

HELLO_MAGIC: Final = int.from_bytes(b"PGXH", "little")
# An SNP report with its certificate table stays below 32 KiB.
MAX_EVIDENCE_BYTES: Final = 1 << 16

X25519_BYTES: Final = 32  # RFC 7748
LEDGER_KEY_BYTES: Final = 32  # Ed25519, RFC 8032
# ML-KEM-768 (FIPS 203, table 3)
ENCAPSULATION_KEY_BYTES: Final = 1184
CIPHERTEXT_BYTES: Final = 1088
CONFIRMATION_BYTES: Final = DIGEST_BYTES  # HMAC-SHA-384


class Role(enum.IntEnum):
    """Which side speaks."""

    SOURCE = 1
    DESTINATION = 2


class AttestorKind(enum.IntEnum):
    """What kind of evidence a side gives and expects."""

    PSK = 1
    SNP = 2
    EMULATED = 3  # SNP reports under a certificate authority that anybody can make

    @property
    def label(self) -> str:
        """The name used in reports and on command lines."""
        return self.name.lower()


class Freshness(enum.IntEnum):
    """Who vouches that no written page was hidden (R13)."""

    SVSM_TRACKED = 1
    DIGEST_AUDIT = 2
    HOST_REPORTED = 3

    @property
    def label(self) -> str:
        """The name used in reports."""
        return self.name.lower().replace("_", "-")

    @property
    def meaning(self) -> str:
        """What a user is to know about it, in one line."""
        return {
            Freshness.SVSM_TRACKED: "the SVSM saw every write",
            Freshness.DIGEST_AUDIT: "all RAM was hashed in black-out against what was sent",
            Freshness.HOST_REPORTED: "the host was believed: a write that it did not report is lost",
        }[self]


# Hello:
#   offset  size  field
#        0     4  magic "PGXH"
#        4     2  version
#        6     1  role
#        7     1  attestor kind
#        8    32  nonce
#       40    16  guest id
#       56     8  RAM pages
#       64     4  page size
#       68     4  vCPUs
#       72     2  channels
#       74     1  freshness mode
#       75     1  flags: bit 0 says that PAGES_ZSTD bundles may come, the other bits are reserved, zero
#       76     4  reserved, zero
#       80     8  session counter
#       88    48  policy digest
#      136    32  ledger key
#      168    32  X25519 public key
# Then the KEM part: of a source the encapsulation key, of a destination the ciphertext.
_HELLO: Final = struct.Struct("<IHBB32s16sQIIHBB4sQ48s32s32s")
_COMPRESSED: Final = 1
_KEM_BYTES: Final = {Role.SOURCE: ENCAPSULATION_KEY_BYTES, Role.DESTINATION: CIPHERTEXT_BYTES}
SOURCE_HELLO_BYTES: Final = 1384
DESTINATION_HELLO_BYTES: Final = 1288
assert _HELLO.size == 200
assert struct.calcsize("<IHBB32s16s") == 56
assert struct.calcsize("<IHBB32s16sQIIHB") == 75
assert struct.calcsize("<IHBB32s16sQIIHBB4sQ48s") == 136
assert _HELLO.size + ENCAPSULATION_KEY_BYTES == SOURCE_HELLO_BYTES
assert _HELLO.size + CIPHERTEXT_BYTES == DESTINATION_HELLO_BYTES

# Fourth message: session id, the destination's confirmation
_ESTABLISHED: Final = struct.Struct("<16s48s")
assert _ESTABLISHED.size == SESSION_ID_BYTES + CONFIRMATION_BYTES == 64


# Ed25519 keys of small order, as 32 octets without the sign (RFC 8032, 5.1): y of the points of order 1, 2, 4 and 8, and
# what is the same modulo p. Under such a key there are signatures that hold for every message.
_P: Final = 2**255 - 19
_Y_OF_ORDER_8: Final = 0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826
_SMALL_ORDER: Final = frozenset(
    y.to_bytes(32, "little") for y in (0, 1, _Y_OF_ORDER_8, _P - _Y_OF_ORDER_8, _P - 1, _P, _P + 1)
)


@dataclass(frozen=True, slots=True)
class Hello:
    """What one side says of itself before anything is proved.

    A destination repeats the source's guest id, channels, freshness mode, session counter and `compressed`, which says that
    PAGES_ZSTD bundles may come: it accepts them by going on.
    `policy_digest` is that of the policy under which this side judges its peer, `ledger_key` what this side will sign its
    ledger record with. `kem` is an encapsulation key of 1184 bytes from a source, a ciphertext of 1088 from a destination.
    """

    role: Role
    attestor: AttestorKind
    nonce: bytes
    guest_id: bytes
    ram_pages: int
    vcpus: int
    channels: int
    freshness: Freshness
    session_counter: int
    policy_digest: bytes
    ledger_key: bytes
    x25519: bytes
    kem: bytes
    compressed: bool = False

    def pack(self) -> bytes:
        head = _HELLO.pack(
            HELLO_MAGIC,
            PROTOCOL_VERSION,
            self.role,
            self.attestor,
            self.nonce,
            self.guest_id,
            self.ram_pages,
            PAGE_SIZE,
            self.vcpus,
            self.channels,
            self.freshness,
            _COMPRESSED if self.compressed else 0,
            bytes(4),
            self.session_counter,
            self.policy_digest,
            self.ledger_key,
            self.x25519,
        )
        return head + self.kem


def parse_hello_untrusted(data: bytes) -> Hello:
    """A hello of exactly the size of its role. Raises MalformedData where any field is outside of its range."""
    if len(data) < _HELLO.size:
        raise MalformedData(f"hello of {len(data)} bytes, expected at least {_HELLO.size}")
    (
        magic,
        version,
        role,
        attestor,
        nonce,
        guest_id,
        ram_pages,
        page_size,
        vcpus,
        channels,
        freshness,
        flags,
        reserved,
        session_counter,
        policy_digest,
        ledger_key,
        x25519,
    ) = _HELLO.unpack_from(data)
    if magic != HELLO_MAGIC:
        raise MalformedData("not a hello: wrong magic")
    if version != PROTOCOL_VERSION:
        raise MalformedData(f"hello of protocol version {version}, this side speaks {PROTOCOL_VERSION}")
    if page_size != PAGE_SIZE:
        raise MalformedData(f"hello with pages of {page_size} bytes, this side has {PAGE_SIZE}")
    if not (0 < ram_pages <= MAX_PAGES and 0 < vcpus <= MAX_VCPUS and 0 < channels <= MAX_CHANNELS):
        raise MalformedData("hello with RAM, vCPUs or channels out of range")
    if not session_counter:
        raise MalformedData("hello with session counter 0, the first one is 1")
    if reserved != bytes(4) or flags & ~_COMPRESSED:
        raise MalformedData("hello with reserved bits set")
    if bytes([*ledger_key[:-1], ledger_key[-1] & 0x7F]) in _SMALL_ORDER:
        raise MalformedData("hello with a ledger key of small order")
    kem = data[_HELLO.size :]
    if len(kem) != _KEM_BYTES.get(role):
        raise MalformedData(f"hello of {len(data)} bytes does not fit its role {role}")
    try:
        return Hello(
            Role(role),
            AttestorKind(attestor),
            nonce,
            guest_id,
            ram_pages,
            vcpus,
            channels,
            Freshness(freshness),
            session_counter,
            policy_digest,
            ledger_key,
            x25519,
            kem,
            bool(flags & _COMPRESSED),
        )
    except ValueError as error:
        raise MalformedData(f"hello with an unknown value: {error}") from None


def split_reply_untrusted(data: bytes) -> tuple[bytes, bytes]:
    """A destination's answer as (hello, evidence). Raises MalformedData where it cannot be one."""
    return _split_untrusted(data, DESTINATION_HELLO_BYTES, "reply")


def split_proof_untrusted(data: bytes) -> tuple[bytes, bytes]:
    """A source's proof as (confirmation, evidence). Raises MalformedData where it cannot be one."""
    return _split_untrusted(data, CONFIRMATION_BYTES, "proof")


def pack_established(session: bytes, confirmation: bytes) -> bytes:
    """The destination's last message."""
    return _ESTABLISHED.pack(session, confirmation)


def parse_established_untrusted(data: bytes) -> tuple[bytes, bytes]:
    """The destination's last message as (session id, confirmation). Raises MalformedData where it cannot be one."""
    if len(data) != _ESTABLISHED.size:
        raise MalformedData(f"end of a handshake with {len(data)} bytes, expected {_ESTABLISHED.size}")
    session, confirmation = _ESTABLISHED.unpack(data)
    return session, confirmation


def _split_untrusted(data: bytes, head_bytes: int, what: str) -> tuple[bytes, bytes]:
    """A head of fixed size and the evidence after it."""
    if not head_bytes < len(data) <= head_bytes + MAX_EVIDENCE_BYTES:
        raise MalformedData(f"handshake {what} of {len(data)} bytes")
    return data[:head_bytes], data[head_bytes:]


assert NONCE_BYTES == 32
assert GUEST_ID_BYTES == 16
