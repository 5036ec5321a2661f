"""What a QMP server says, line by line, as records. Pure: bytes in, records out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final

from ...errors import MalformedData

# The longest reply known is that of query-qmp-schema, 200 KiB; a line above this is no answer to what is asked here.
MAX_LINE_BYTES: Final = 4 << 20


@dataclass(frozen=True, slots=True)
class Greeting:
    """The first line of every connection."""

    version: tuple[int, int, int]
    capabilities: frozenset[str]


@dataclass(frozen=True, slots=True)
class Reply:
    """Success of the command with this id."""

    id: int
    value: object


@dataclass(frozen=True, slots=True)
class Refusal:
    """Failure of the command with this id; None where the server could not even tell which one it was."""

    id: int | None
    kind: str
    description: str


@dataclass(frozen=True, slots=True)
class QmpEvent:
    """Something that happened by itself."""

    name: str
    data: dict[str, object]


QmpMessage = Greeting | Reply | Refusal | QmpEvent


def parse_message_untrusted(line: bytes) -> QmpMessage:
    """One line of a QMP server. Raises MalformedData for anything that is none."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        raise MalformedData("a QMP line is not JSON") from None
    if not isinstance(message, dict):
        raise MalformedData("a QMP line is not an object")
    match message:
        case {
            "QMP": {"version": {"qemu": {"major": int(), "minor": int(), "micro": int()} as version}} as info
        }:
            capabilities = info.get("capabilities", [])
            if not isinstance(capabilities, list):
                raise MalformedData("a QMP greeting has capabilities that are no list")
            numbers = (version["major"], version["minor"], version["micro"])
            return Greeting(numbers, frozenset(map(str, capabilities)))
        case {"event": str(name)}:
            data = message.get("data", {})
            if not isinstance(data, dict):
                raise MalformedData("a QMP event has data that are no object")
            return QmpEvent(name, data)
        case {"error": {"class": str(kind), "desc": str(description)}}:
            return Refusal(_id_of(message) if "id" in message else None, kind, description)
        case {"return": value, "id": _}:
            return Reply(_id_of(message), value)
    raise MalformedData("a QMP line is no greeting, reply, error or event")


def _id_of(message: dict[str, object]) -> int:
    number = message["id"]
    if not isinstance(number, int) or isinstance(number, bool):
        raise MalformedData("a QMP reply has an id that was never given")
    return number
