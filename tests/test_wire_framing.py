"""Frames of the TCP streams: header, connection hello, barrier."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagexfer.wire.framing import (
    CONNECTION_HELLO_BYTES,
    FRAME_HEADER_BYTES,
    ConnectionHello,
    FrameHeader,
    FrameType,
    Purpose,
    pack_barrier,
    parse_barrier_untrusted,
    parse_connection_hello_untrusted,
    parse_frame_header_untrusted,
)

from .wire_vectors import Vector, data_of, is_refused, load, name_of, only_whole, value_or_malformed

VECTORS = load("framing")

connection_hellos = st.just(ConnectionHello(Purpose.CONTROL, 0, bytes(16))) | st.builds(
    ConnectionHello,
    purpose=st.just(Purpose.CHANNEL),
    channel=st.integers(0, 1023),
    session=st.binary(min_size=16, max_size=16),
)


@pytest.mark.parametrize("vector", VECTORS["headers"], ids=name_of)
def test_frame_header_of_vector(vector: Vector) -> None:
    header = FrameHeader(FrameType(vector["type"]), vector["payload_bytes"])
    assert parse_frame_header_untrusted(data_of(vector)) == header
    assert header.pack() == data_of(vector)
    only_whole(parse_frame_header_untrusted, data_of(vector))


def test_the_vectors_have_every_type() -> None:
    assert {vector["type"] for vector in VECTORS["headers"]} == set(FrameType)


@pytest.mark.parametrize("vector", VECTORS["refused_headers"], ids=name_of)
def test_refused_frame_header(vector: Vector) -> None:
    is_refused(parse_frame_header_untrusted, data_of(vector))


@pytest.mark.parametrize("vector", VECTORS["connection_hellos"], ids=name_of)
def test_connection_hello_of_vector(vector: Vector) -> None:
    session = bytes.fromhex(vector["session"])
    hello = ConnectionHello(Purpose(vector["purpose"]), vector["channel"], session)
    assert parse_connection_hello_untrusted(data_of(vector)) == hello
    assert hello.pack() == data_of(vector)
    only_whole(parse_connection_hello_untrusted, data_of(vector))


@pytest.mark.parametrize("vector", VECTORS["refused_connection_hellos"], ids=name_of)
def test_refused_connection_hello(vector: Vector) -> None:
    is_refused(parse_connection_hello_untrusted, data_of(vector))


@pytest.mark.parametrize("vector", VECTORS["barriers"], ids=name_of)
def test_barrier_of_vector(vector: Vector) -> None:
    assert parse_barrier_untrusted(data_of(vector)) == vector["epoch"]
    assert pack_barrier(vector["epoch"]) == data_of(vector)
    only_whole(parse_barrier_untrusted, data_of(vector))


@pytest.mark.parametrize("vector", VECTORS["refused_barriers"], ids=name_of)
def test_refused_barrier(vector: Vector) -> None:
    is_refused(parse_barrier_untrusted, data_of(vector))


@given(connection_hellos)
def test_connection_hello_round_trip(hello: ConnectionHello) -> None:
    assert parse_connection_hello_untrusted(hello.pack()) == hello


@given(connection_hellos, st.integers(0, CONNECTION_HELLO_BYTES * 8 - 1))
def test_a_connection_hello_has_one_encoding(hello: ConnectionHello, bit: int) -> None:
    flipped = bytearray(hello.pack())
    flipped[bit // 8] ^= 1 << bit % 8
    parsed = value_or_malformed(parse_connection_hello_untrusted, bytes(flipped))
    if isinstance(parsed, ConnectionHello):
        assert parsed != hello
        assert parsed.pack() == bytes(flipped)


@given(st.binary(max_size=64) | st.binary(min_size=8, max_size=8) | st.binary(min_size=32, max_size=32))
def test_any_bytes_are_a_frame_or_malformed(data: bytes) -> None:
    header = value_or_malformed(parse_frame_header_untrusted, data)
    if isinstance(header, FrameHeader):
        assert header.pack() == data
        assert len(data) == FRAME_HEADER_BYTES
    value_or_malformed(parse_connection_hello_untrusted, data)
    value_or_malformed(parse_barrier_untrusted, data)


@pytest.mark.parametrize(("channel", "session"), [(1, bytes(16)), (0, bytes(15) + b"\1")])
def test_a_control_connection_names_neither_channel_nor_session(channel: int, session: bytes) -> None:
    hello = ConnectionHello(Purpose.CONTROL, channel, session).pack()
    is_refused(parse_connection_hello_untrusted, hello)
