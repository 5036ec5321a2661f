"""Control messages: msgpack maps with exact keys, and everything else refused."""

from __future__ import annotations

from dataclasses import asdict
from typing import get_args

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagexfer.wire import control
from pagexfer.wire.control import (
    MAX_PLATFORM_BYTES,
    Accept,
    ChannelsOpen,
    Confirm,
    ControlMessage,
    EpochClosed,
    Established,
    Failed,
    Prepare,
    pack_control,
    parse_control_untrusted,
)
from pagexfer.wire.framing import MAX_CONTROL_BYTES

from .wire_vectors import Vector, data_of, is_refused, load, name_of, only_whole, value_or_malformed

VECTORS = load("control")

numbers = st.integers(0, (1 << 64) - 1)
texts = st.text(min_size=1, max_size=100).filter(str.isprintable)
messages: st.SearchStrategy[ControlMessage] = st.one_of(
    st.builds(Prepare, handshake=st.binary(max_size=1000)),
    st.builds(Accept, handshake=st.binary(max_size=1000)),
    st.builds(Confirm, handshake=st.binary(max_size=1000), platform=st.binary(max_size=MAX_PLATFORM_BYTES)),
    st.builds(Established, handshake=st.binary(max_size=1000)),
    st.builds(ChannelsOpen, channels=numbers),
    st.builds(EpochClosed, epoch=numbers),
    st.builds(Failed, reason=texts, message=texts),
)
plain = st.none() | st.booleans() | numbers | st.floats() | st.text(max_size=9) | st.binary(max_size=9)
values = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
)


@pytest.mark.parametrize("vector", VECTORS["messages"], ids=name_of)
def test_message_of_vector(vector: Vector) -> None:
    message = parse_control_untrusted(data_of(vector))
    assert type(message).__name__ == vector["class"]
    fields = {
        key: value.hex() if isinstance(value, bytes) else value for key, value in asdict(message).items()
    }
    assert fields == vector["fields"]
    assert pack_control(message) == data_of(vector)
    only_whole(parse_control_untrusted, data_of(vector))


def test_the_vectors_have_every_message() -> None:
    in_vectors = {vector["class"] for vector in VECTORS["messages"]}
    assert in_vectors == {message_type.__name__ for message_type in get_args(ControlMessage)}


@pytest.mark.parametrize("vector", VECTORS["refused"], ids=name_of)
def test_refused_message(vector: Vector) -> None:
    is_refused(parse_control_untrusted, data_of(vector))


@given(messages)
def test_message_round_trip(message: ControlMessage) -> None:
    assert parse_control_untrusted(pack_control(message)) == message


@given(messages, st.data())
def test_every_missing_extra_or_odd_key_is_refused(message: ControlMessage, data: st.DataObject) -> None:
    value = msgpack.unpackb(pack_control(message))
    key = data.draw(st.sampled_from([key for key in value if key != "version"]))
    without = {name: item for name, item in value.items() if name != key}
    is_refused(parse_control_untrusted, msgpack.packb(without))
    is_refused(parse_control_untrusted, msgpack.packb(value | {"more": 1}))
    odd = data.draw(values.filter(lambda item: type(item) is not type(value[key])))
    is_refused(parse_control_untrusted, msgpack.packb(value | {key: odd}))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_malformed(data: bytes) -> None:
    value_or_malformed(parse_control_untrusted, data)


@given(
    st.dictionaries(
        st.sampled_from(["version", "type", "epoch", "size", "reason"]) | st.text(max_size=3), values
    )
)
def test_any_map_is_a_message_or_malformed(value: dict[str, object]) -> None:
    value_or_malformed(parse_control_untrusted, msgpack.packb({"version": 1, **value}))
    value_or_malformed(
        parse_control_untrusted, msgpack.packb({"version": 1, "type": "epoch-closed", **value})
    )


@given(messages, st.data())
def test_a_flipped_bit_gives_a_message_or_malformed(message: ControlMessage, data: st.DataObject) -> None:
    flipped = bytearray(pack_control(message))
    bit = data.draw(st.integers(0, len(flipped) * 8 - 1))
    flipped[bit // 8] ^= 1 << bit % 8
    value_or_malformed(parse_control_untrusted, bytes(flipped))


def test_a_message_as_long_as_the_cap_is_taken() -> None:
    largest_platform = Confirm(b"", bytes(MAX_PLATFORM_BYTES))
    assert parse_control_untrusted(pack_control(largest_platform)) == largest_platform
    is_refused(parse_control_untrusted, pack_control(Confirm(b"", bytes(MAX_PLATFORM_BYTES + 1))))
    overhead = len(pack_control(Prepare(bytes(1 << 16)))) - (1 << 16)
    largest = pack_control(Prepare(bytes(MAX_CONTROL_BYTES - overhead)))
    assert len(largest) == MAX_CONTROL_BYTES
    assert parse_control_untrusted(largest) == Prepare(bytes(MAX_CONTROL_BYTES - overhead))


def test_every_message_has_a_name() -> None:
    assert set(control._NAMES.values()) == set(get_args(ControlMessage))
