"""Fixed-layout messages of the handshake, which the engine carries as opaque bytes.

    source       -> destination   hello
    destination  -> source        hello · evidence
    source       -> destination   evidence

Everything here is authenticated by the evidence, so it is fixed-layout bytes with one encoding.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Final

from ..errors import MalformedData
from .constants import (
    GUEST_ID_BYTES,
    MAX_CHANNELS,
    MAX_PAGES,
    MAX_VCPUS,
    NONCE_BYTES,
    PAGE_SIZE,
    PROTOCOL_VERSION,
)

HELLO_MAGIC: Final = int.from_bytes(b"PGXH", "little")
# An SNP report with its certificate table stays below 32 KiB.
MAX_EVIDENCE_BYTES: Final = 1 << 16


class Role(enum.IntEnum):
    """Which side speaks."""

    SOURCE = 1
    DESTINATION = 2


class AttestorKind(enum.IntEnum):
    """What kind of evidence a side gives and expects."""

    PSK = 1


class Freshness(enum.IntEnum):
    """Who vouches that no written page was hidden (R13)."""

    SVSM_TRACKED = 1
    DIGEST_AUDIT = 2
    HOST_REPORTED = 3

    @property
    def label(self) -> str:
        """The name used in reports."""
        return self.name.lower().replace("_", "-")


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
#       75     5  reserved, zero
_HELLO: Final = struct.Struct("<IHBB32s16sQIIHB5s")
HELLO_BYTES: Final = 80
assert _HELLO.size == HELLO_BYTES
assert struct.calcsize("<IHBB32s16s") == 56


@dataclass(frozen=True, slots=True)
class Hello:
    """What one side says of itself before anything is proved.

    A destination repeats the source's guest id, channels and freshness mode: it accepts them by going on.
    """

    role: Role
    attestor: AttestorKind
    nonce: bytes
    guest_id: bytes
    ram_pages: int
    vcpus: int
    channels: int
    freshness: Freshness

    def pack(self) -> bytes:
        return _HELLO.pack(
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
            bytes(5),
        )


def parse_hello_untrusted(data: bytes) -> Hello:
    """A hello of exactly 80 bytes. Raises MalformedData where any field is outside of its range."""
    if len(data) != HELLO_BYTES:
        raise MalformedData(f"hello of {len(data)} bytes, expected {HELLO_BYTES}")
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
        reserved,
    ) = _HELLO.unpack(data)
    if magic != HELLO_MAGIC:
        raise MalformedData("not a hello: wrong magic")
    if version != PROTOCOL_VERSION:
        raise MalformedData(f"hello of protocol version {version}, this side speaks {PROTOCOL_VERSION}")
    if page_size != PAGE_SIZE:
        raise MalformedData(f"hello with pages of {page_size} bytes, this side has {PAGE_SIZE}")
    if not (0 < ram_pages <= MAX_PAGES and 0 < vcpus <= MAX_VCPUS and 0 < channels <= MAX_CHANNELS):
        raise MalformedData("hello with RAM, vCPUs or channels out of range")
    if reserved != bytes(5):
        raise MalformedData("hello with reserved bytes set")
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
        )
    except ValueError as error:
        raise MalformedData(f"hello with an unknown value: {error}") from None


def split_reply_untrusted(data: bytes) -> tuple[bytes, bytes]:
    """A destination's answer as (hello, evidence). Raises MalformedData where it cannot be one."""
    if not HELLO_BYTES < len(data) <= HELLO_BYTES + MAX_EVIDENCE_BYTES:
        raise MalformedData(f"handshake reply of {len(data)} bytes")
    return data[:HELLO_BYTES], data[HELLO_BYTES:]


assert NONCE_BYTES == 32
assert GUEST_ID_BYTES == 16
