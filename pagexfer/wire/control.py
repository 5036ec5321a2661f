"""Control messages between the two engines: msgpack maps with exact key sets. The only user of msgpack.

Nothing here is trusted by either SVSM. Opaque handshake bytes pass through; page data never does.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Final

import msgpack

from ..errors import MalformedData
from .constants import PROTOCOL_VERSION
from .framing import MAX_CONTROL_BYTES


@dataclass(frozen=True, slots=True)
class Prepare:
    """Source: begin; the source SVSM's hello."""

    handshake: bytes


@dataclass(frozen=True, slots=True)
class Accept:
    """Destination: its SVSM's hello and evidence."""

    handshake: bytes


@dataclass(frozen=True, slots=True)
class Confirm:
    """Source: its SVSM's confirmation and evidence; what its hypervisor says of its machine, or nothing."""

    handshake: bytes
    platform: bytes


@dataclass(frozen=True, slots=True)
class Established:
    """Destination: its SVSM has keys and confirms them; channels may connect and name the session in these bytes."""

    handshake: bytes


@dataclass(frozen=True, slots=True)
class ChannelsOpen:
    """Destination: every channel has proved itself to the SVSM."""

    channels: int


@dataclass(frozen=True, slots=True)
class EpochClosed:
    """Destination: its SVSM counted the epoch complete."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Failed:
    """Either side: this side ends the migration. `reason` is machine readable, `message` one line for people."""

    reason: str
    message: str


ControlMessage = Prepare | Accept | Confirm | Established | ChannelsOpen | EpochClosed | Failed

_NAMES: Final[dict[str, type[ControlMessage]]] = {
    "prepare": Prepare,
    "accept": Accept,
    "confirm": Confirm,
    "established": Established,
    "channels-open": ChannelsOpen,
    "epoch-closed": EpochClosed,
    "failed": Failed,
}
_NAME_OF: Final[dict[type[object], str]] = {message_type: name for name, message_type in _NAMES.items()}
_FIELD_TYPES: Final[dict[str, type[bytes] | type[int] | type[str]]] = {"bytes": bytes, "int": int, "str": str}
_MAX_TEXT: Final = 2000
# Beside evidence of MAX_EVIDENCE_BYTES it fits a message.
MAX_PLATFORM_BYTES: Final = 1 << 14


def name_of(message_type: type[object]) -> str:
    """What a message is called in the protocol."""
    return _NAME_OF[message_type]


def pack_control(message: ControlMessage) -> bytes:
    """One control message as msgpack bytes; the version is the first key."""
    packed: bytes = msgpack.packb(
        {"version": PROTOCOL_VERSION, "type": _NAME_OF[type(message)], **asdict(message)}
    )
    return packed


def parse_control_untrusted(data: bytes) -> ControlMessage:
    """A control message. Raises MalformedData for anything but the exact keys and types of one message."""
    if len(data) > MAX_CONTROL_BYTES:
        raise MalformedData(f"control message of {len(data)} bytes is over the cap of {MAX_CONTROL_BYTES}")
    try:
        value = msgpack.unpackb(data, raw=False, strict_map_key=True, object_pairs_hook=_distinct)
    # msgpack documents ValueError as the root of its own errors; a str that is not UTF-8 and nesting are its subclasses
    except (ValueError, RecursionError):
        raise MalformedData("control message is not one msgpack map with each key once") from None
    if not isinstance(value, dict) or next(iter(value), None) != "version":
        raise MalformedData("control message is not a map that begins with its version")
    if type(value["version"]) is not int or value["version"] != PROTOCOL_VERSION:
        raise MalformedData(
            f"control message of another protocol version, this side speaks {PROTOCOL_VERSION}"
        )
    name = value.get("type")
    message_type = _NAMES.get(name) if isinstance(name, str) else None
    if message_type is None:
        raise MalformedData("control message of unknown type")
    expected = {field.name: _FIELD_TYPES[str(field.type)] for field in fields(message_type)}
    if set(value) != {"version", "type", *expected}:
        raise MalformedData(f"control message {name!r} with missing or unknown keys")
    for key, field_type in expected.items():
        if type(value[key]) is not field_type or (field_type is int and value[key] < 0):
            raise MalformedData(f"control message {name!r} with a bad {key!r}")
        if field_type is str and not (0 < len(value[key]) <= _MAX_TEXT and value[key].isprintable()):
            raise MalformedData(f"control message {name!r} with a {key!r} that is not one printable line")
    message = message_type(**{key: value[key] for key in expected})
    if isinstance(message, Confirm) and len(message.platform) > MAX_PLATFORM_BYTES:
        raise MalformedData(f"control message with a platform over the cap of {MAX_PLATFORM_BYTES} bytes")
    return message


def _distinct(pairs: list[tuple[str | bytes, object]]) -> dict[str | bytes, object]:
    """A map with each key once: of two, one reader could take the first and another the last."""
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key came twice")
    return value
