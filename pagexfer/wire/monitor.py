"""Messages between an engine's process and the one that started it, as a monitor has them: JSON, and bytes behind it.

The engine asks for what a hypervisor does and reports how the migration goes; the other side gives it its task, and may
cancel it. Neither side believes the other's bytes.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import struct
import types
import typing
from typing import Final, TypeVar

from ..errors import MalformedData, UsageError
from .device_state import MAX_DEVICE_STATE_BYTES

RecordT = TypeVar("RecordT")
Fields = dict[str, object]

# length of the JSON u32, length of the payload u32
_HEAD: Final = struct.Struct("<II")
HEAD_BYTES: Final = _HEAD.size
MAX_JSON_BYTES: Final = 1 << 20
MAX_NUMBER: Final = 1 << 63  # no count is as large, and every float and format takes what is less
MAX_PAYLOAD_BYTES: Final = MAX_DEVICE_STATE_BYTES  # the largest that is asked for


def pack_message(fields: Fields, payload: bytes = b"") -> bytes:
    """One message. Raises MalformedData where the payload is over its cap."""
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise MalformedData(f"monitor message with {len(payload)} bytes is over its cap")
    text = json.dumps(fields).encode()
    return _HEAD.pack(len(text), len(payload)) + text + payload


def parse_head_untrusted(head: bytes) -> tuple[int, int]:
    """Lengths of a message's JSON and payload. Raises MalformedData where one is over its cap."""
    if len(head) != HEAD_BYTES:
        raise MalformedData("monitor message with a short head")
    text, payload = _HEAD.unpack(head)
    if text > MAX_JSON_BYTES or payload > MAX_PAYLOAD_BYTES:
        raise MalformedData("monitor message over its cap")
    return text, payload


def parse_fields_untrusted(text: bytes) -> Fields:
    """The JSON of a message. Raises MalformedData where it is no object."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        raise MalformedData("monitor message that is no JSON") from None
    if not isinstance(fields, dict):
        raise MalformedData("monitor message that is no object")
    return fields


def as_fields(record: object) -> object:
    """A record as JSON has it: dataclasses as objects, enumerations as their values."""
    if dataclasses.is_dataclass(record):
        return {field.name: as_fields(getattr(record, field.name)) for field in dataclasses.fields(record)}
    if isinstance(record, enum.Enum):
        return record.value
    if isinstance(record, tuple):
        return [as_fields(part) for part in record]
    return record


def from_fields_untrusted(kind: type[RecordT], value: object) -> RecordT:
    """The record that `as_fields` described. Raises MalformedData where a field is missing, unknown or of another type."""
    record = _build(kind, value)
    assert isinstance(record, kind)
    return record


def _build(kind: object, value: object) -> object:
    if isinstance(kind, types.UnionType):
        return _build_any(typing.get_args(kind), value)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise MalformedData("monitor message without a list where one is due")
        return tuple(_build(typing.get_args(kind)[0], part) for part in value)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        if not isinstance(value, dict) or value.keys() != hints.keys():
            raise MalformedData(f"monitor message with other fields than those of {kind.__name__}")
        try:
            return kind(**{name: _build(hint, value[name]) for name, hint in hints.items()})
        except UsageError as error:
            raise MalformedData(f"monitor message with a {kind.__name__} that cannot be: {error}") from None
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        try:
            return kind(value)
        except ValueError:
            raise MalformedData(f"monitor message with an unknown {kind.__name__}") from None
    if type(value) is int and abs(value) >= MAX_NUMBER:
        raise MalformedData("monitor message with a number over its cap")
    if kind is float and type(value) is int:
        return float(value)
    if not isinstance(kind, type) or type(value) is not kind:
        raise MalformedData(f"monitor message with a value of type {type(value).__name__}")
    if isinstance(value, float) and math.isnan(value):
        raise MalformedData("monitor message with a number that is none")
    return value


def _build_any(kinds: tuple[object, ...], value: object) -> object:
    for kind in kinds:
        try:
            return _build(kind, value)
        except MalformedData:
            continue
    raise MalformedData(f"monitor message with a value of type {type(value).__name__}")
