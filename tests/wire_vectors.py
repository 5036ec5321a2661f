"""Reading the vectors of tests/vectors, and what every parser must withstand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pagexfer.errors import MalformedData

if TYPE_CHECKING:
    from collections.abc import Callable

VECTORS = Path(__file__).parent / "vectors"

Vector = dict[str, Any]


def load(name: str) -> dict[str, Any]:
    """One vector file."""
    loaded: dict[str, Any] = json.loads((VECTORS / f"{name}.json").read_text())
    return loaded


def data_of(vector: Vector) -> bytes:
    """The bytes of a vector."""
    return bytes.fromhex(vector["bytes"]) + bytes(vector.get("zeros", 0))


def name_of(vector: Vector) -> str:
    """For pytest's ids."""
    return str(vector["name"])


def is_refused(parse: Callable[[bytes], object], data: bytes) -> None:
    """`data` raises MalformedData with one line, and nothing else."""
    with pytest.raises(MalformedData) as caught:
        parse(data)
    assert str(caught.value)
    assert "\n" not in str(caught.value)


def only_whole(parse: Callable[[bytes], object], data: bytes) -> None:
    """`data` parses, and neither any beginning of it nor anything longer does."""
    parse(data)
    for length in range(len(data)):
        is_refused(parse, data[:length])
    for tail in (b"\0", b"\xff", data):
        is_refused(parse, data + tail)


def value_or_malformed(parse: Callable[[bytes], object], data: bytes) -> object:
    """What `parse` makes of any bytes; None where it refuses them. Any other error passes through and fails the test."""
    try:
        return parse(data)
    except MalformedData:
        return None
