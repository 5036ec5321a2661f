"""Handshake messages: hello and reply."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagexfer.wire.constants import MAX_CHANNELS, MAX_PAGES, MAX_VCPUS
from pagexfer.wire.handshake import (
    HELLO_BYTES,
    MAX_EVIDENCE_BYTES,
    AttestorKind,
    Freshness,
    Hello,
    Role,
    parse_hello_untrusted,
    split_reply_untrusted,
)

from .wire_vectors import Vector, data_of, is_refused, load, name_of, only_whole, value_or_malformed

VECTORS = load("handshake")

hellos = st.builds(
    Hello,
    role=st.sampled_from(Role),
    attestor=st.sampled_from(AttestorKind),
    nonce=st.binary(min_size=32, max_size=32),
    guest_id=st.binary(min_size=16, max_size=16),
    ram_pages=st.integers(1, MAX_PAGES),
    vcpus=st.integers(1, MAX_VCPUS),
    channels=st.integers(1, MAX_CHANNELS),
    freshness=st.sampled_from(Freshness),
)


@pytest.mark.parametrize("vector", VECTORS["hellos"], ids=name_of)
def test_hello_of_vector(vector: Vector) -> None:
    hello = parse_hello_untrusted(data_of(vector))
    fields = {
        key: value.hex() if isinstance(value := getattr(hello, key), bytes) else value
        for key in vector["fields"]
    }
    assert fields == vector["fields"]
    assert hello.pack() == data_of(vector)
    only_whole(parse_hello_untrusted, data_of(vector))


@pytest.mark.parametrize("vector", VECTORS["refused_hellos"], ids=name_of)
def test_refused_hello(vector: Vector) -> None:
    is_refused(parse_hello_untrusted, data_of(vector))


@pytest.mark.parametrize("vector", VECTORS["replies"], ids=name_of)
def test_reply_of_vector(vector: Vector) -> None:
    hello, evidence = split_reply_untrusted(data_of(vector))
    assert (hello.hex(), evidence.hex()) == (vector["hello"], vector["evidence"])


@pytest.mark.parametrize("vector", VECTORS["refused_replies"], ids=name_of)
def test_refused_reply(vector: Vector) -> None:
    is_refused(split_reply_untrusted, data_of(vector))


def test_evidence_up_to_its_cap_is_taken() -> None:
    data = bytes(HELLO_BYTES + MAX_EVIDENCE_BYTES)
    assert split_reply_untrusted(data) == (data[:HELLO_BYTES], data[HELLO_BYTES:])
    assert len(split_reply_untrusted(data[: HELLO_BYTES + 1])[1]) == 1


@given(hellos)
def test_hello_round_trip(hello: Hello) -> None:
    assert parse_hello_untrusted(hello.pack()) == hello


@given(hellos, st.integers(0, HELLO_BYTES * 8 - 1))
def test_a_hello_has_one_encoding(hello: Hello, bit: int) -> None:
    flipped = bytearray(hello.pack())
    flipped[bit // 8] ^= 1 << bit % 8
    parsed = value_or_malformed(parse_hello_untrusted, bytes(flipped))
    if isinstance(parsed, Hello):
        assert parsed != hello
        assert parsed.pack() == bytes(flipped)


@given(st.binary(max_size=2 * HELLO_BYTES) | st.binary(min_size=HELLO_BYTES, max_size=HELLO_BYTES))
def test_any_bytes_are_a_message_or_malformed(data: bytes) -> None:
    value_or_malformed(parse_hello_untrusted, data)
    value_or_malformed(split_reply_untrusted, data)


def test_labels_of_freshness() -> None:
    assert [mode.label for mode in Freshness] == ["svsm-tracked", "digest-audit", "host-reported"]
