"""The header of a part of the device state, against the vectors and any bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagexfer.wire.device_state import PART_HEADER_BYTES, DevicePart, parse_device_part_untrusted

from .wire_vectors import Vector, data_of, is_refused, load, name_of, value_or_malformed

VECTORS = load("bundles")


@pytest.mark.parametrize("vector", VECTORS["device_parts"], ids=name_of)
def test_part_of_vector(vector: Vector) -> None:
    part = DevicePart(vector["total_bytes"], vector["offset"], vector["part_bytes"])
    data = data_of(vector)
    assert parse_device_part_untrusted(data) == part
    assert part.pack_header() == data[:PART_HEADER_BYTES]
    assert part.end == vector["offset"] + len(data) - PART_HEADER_BYTES
    for length in range(PART_HEADER_BYTES + 1):
        is_refused(parse_device_part_untrusted, data[:length])
    if part.end == part.total_bytes:
        is_refused(parse_device_part_untrusted, data + b"\0")


@pytest.mark.parametrize("vector", VECTORS["refused_device_parts"], ids=name_of)
def test_refused_part(vector: Vector) -> None:
    is_refused(parse_device_part_untrusted, data_of(vector))


@given(st.binary(max_size=40))
def test_any_bytes_are_a_part_within_its_total_or_malformed(data: bytes) -> None:
    part = value_or_malformed(parse_device_part_untrusted, data)
    if part is not None:
        assert isinstance(part, DevicePart)
        assert part.offset < part.end <= part.total_bytes
        assert part.pack_header() + data[PART_HEADER_BYTES:] == data
