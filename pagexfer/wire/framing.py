"""Frames of the TCP streams: a length, a type, a payload. Engine to engine, untrusted at both ends.

Every connection opens with a hello frame that says what it is for. A control connection then carries control messages, a
channel connection carries bundles and barriers.
"""

from __future__ import annotations

import enum
import struct
from typing import Final, NamedTuple

from ..errors import MalformedData
from .bundle import MAX_BUNDLE_BYTES
from .constants import MAX_CHANNELS, PROTOCOL_VERSION, SESSION_ID_BYTES


class FrameType(enum.IntEnum):
    """Wire numbers: never reused, 0 invalid. 5 was device state, which goes in bundles now."""

    HELLO = 1
    CONTROL = 2
    BUNDLE = 3
    BARRIER = 4  # all bundles of an epoch on this channel stand before it


class Purpose(enum.IntEnum):
    """What a connection is for."""

    CONTROL = 1
    CHANNEL = 2


# Frame header:
#   offset  size  field
#        0     4  payload bytes
#        4     1  type
#        5     3  reserved, zero
_FRAME: Final = struct.Struct("<IB3s")
FRAME_HEADER_BYTES: Final = 8
assert _FRAME.size == FRAME_HEADER_BYTES

# Hello frame's payload:
#   offset  size  field
#        0     8  magic "PAGEXFER"
#        8     2  version
#       10     1  purpose
#       11     1  reserved, zero
#       12     2  channel (0 for control)
#       14     2  reserved, zero
#       16    16  session id (zero for control)
_HELLO: Final = struct.Struct("<8sHBBHH16s")
CONNECTION_HELLO_BYTES: Final = 32
CONNECTION_MAGIC: Final = b"PAGEXFER"
assert _HELLO.size == CONNECTION_HELLO_BYTES
assert SESSION_ID_BYTES == 16

_BARRIER: Final = struct.Struct("<I")

# A control message is a handshake message at most: hello and evidence.
MAX_CONTROL_BYTES: Final = 1 << 17

_MAX_PAYLOAD: Final = {
    FrameType.HELLO: CONNECTION_HELLO_BYTES,
    FrameType.CONTROL: MAX_CONTROL_BYTES,
    FrameType.BUNDLE: MAX_BUNDLE_BYTES,
    FrameType.BARRIER: _BARRIER.size,
}
_TYPES: Final = {int(kind): kind for kind in FrameType}


class FrameHeader(NamedTuple):
    """What a frame holds and how long it is."""

    type: FrameType
    payload_bytes: int

    def pack(self) -> bytes:
        return _FRAME.pack(self.payload_bytes, self.type, b"\0\0\0")


class ConnectionHello(NamedTuple):
    """First frame of a connection."""

    purpose: Purpose
    channel: int
    session: bytes

    def pack(self) -> bytes:
        return _HELLO.pack(CONNECTION_MAGIC, PROTOCOL_VERSION, self.purpose, 0, self.channel, 0, self.session)


def parse_frame_header_untrusted(data: bytes) -> FrameHeader:
    """Header of a frame. Raises MalformedData where the type is unknown or the length is over the type's cap."""
    if len(data) != FRAME_HEADER_BYTES:
        raise MalformedData(f"frame header of {len(data)} bytes")
    length, type_number, reserved = _FRAME.unpack(data)
    frame_type = _TYPES.get(type_number)
    if frame_type is None or reserved != b"\0\0\0":
        raise MalformedData("not a frame of this protocol")
    if length > _MAX_PAYLOAD[frame_type]:
        raise MalformedData(f"{frame_type.name} frame of {length} bytes is over the cap")
    return FrameHeader(frame_type, length)


def parse_connection_hello_untrusted(data: bytes) -> ConnectionHello:
    """Payload of a hello frame. Raises MalformedData."""
    if len(data) != CONNECTION_HELLO_BYTES:
        raise MalformedData(f"hello frame of {len(data)} bytes")
    magic, version, purpose, reserved1, channel, reserved2, session = _HELLO.unpack(data)
    if magic != CONNECTION_MAGIC:
        raise MalformedData("hello frame without the protocol's magic")
    if version != PROTOCOL_VERSION:
        raise MalformedData(f"peer speaks protocol version {version}, this side {PROTOCOL_VERSION}")
    if reserved1 or reserved2 or channel >= MAX_CHANNELS or purpose not in Purpose.__members__.values():
        raise MalformedData("hello frame with a field out of range")
    if purpose == Purpose.CONTROL and (channel or any(session)):
        raise MalformedData("hello frame of a control connection that names a channel or a session")
    return ConnectionHello(Purpose(purpose), channel, session)


def pack_barrier(epoch: int) -> bytes:
    """Payload of a barrier frame."""
    return _BARRIER.pack(epoch)


def parse_barrier_untrusted(data: bytes) -> int:
    """Epoch of a barrier frame. Raises MalformedData."""
    if len(data) != _BARRIER.size:
        raise MalformedData(f"barrier frame of {len(data)} bytes")
    epoch: int = _BARRIER.unpack(data)[0]
    return epoch
