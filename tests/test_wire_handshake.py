"""Handshake messages: hello, reply, proof and end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagexfer.wire.constants import MAX_CHANNELS, MAX_PAGES, MAX_VCPUS
from pagexfer.wire.handshake import (
    CONFIRMATION_BYTES,
    DESTINATION_HELLO_BYTES,
    MAX_EVIDENCE_BYTES,
    SOURCE_HELLO_BYTES,
    AttestorKind,
    Freshness,
    Hello,
    Role,
    pack_established,
    parse_established_untrusted,
    parse_hello_untrusted,
    split_proof_untrusted,
    split_reply_untrusted,
)

from .wire_vectors import Vector, data_of, is_refused, load, name_of, only_whole, value_or_malformed

VECTORS = load("handshake")

KEM_BYTES = {Role.SOURCE: 1184, Role.DESTINATION: 1088}


def exactly(size: int) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=size, max_size=size)


def hello_of(role: Role, kem: bytes, **fields: object) -> Hello:
    return Hello(role=role, kem=kem[: KEM_BYTES[role]], **fields)  # type: ignore[arg-type]  # the strategies below


hellos = st.builds(
    hello_of,
    role=st.sampled_from(Role),
    kem=st.randoms(use_true_random=False).map(lambda random: random.randbytes(1184)),
    attestor=st.sampled_from(AttestorKind),
    nonce=exactly(32),
    guest_id=exactly(16),
    ram_pages=st.integers(1, MAX_PAGES),
    vcpus=st.integers(1, MAX_VCPUS),
    channels=st.integers(1, MAX_CHANNELS),
    freshness=st.sampled_from(Freshness),
    session_counter=st.integers(1, (1 << 64) - 1),
    policy_digest=exactly(48),
    ledger_key=exactly(32).map(lambda key: b"\2" + key[1:]),  # none that is of small order
    x25519=exactly(32),
    compressed=st.booleans(),
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
    for split, head_bytes in (
        (split_reply_untrusted, DESTINATION_HELLO_BYTES),
        (split_proof_untrusted, CONFIRMATION_BYTES),
    ):
        data = bytes(head_bytes + MAX_EVIDENCE_BYTES)
        assert split(data) == (data[:head_bytes], data[head_bytes:])
        assert len(split(data[: head_bytes + 1])[1]) == 1


@pytest.mark.parametrize("vector", VECTORS["proofs"], ids=name_of)
def test_proof_of_vector(vector: Vector) -> None:
    confirmation, evidence = split_proof_untrusted(data_of(vector))
    assert (confirmation.hex(), evidence.hex()) == (vector["confirmation"], vector["evidence"])


@pytest.mark.parametrize("vector", VECTORS["refused_proofs"], ids=name_of)
def test_refused_proof(vector: Vector) -> None:
    is_refused(split_proof_untrusted, data_of(vector))


@pytest.mark.parametrize("vector", VECTORS["ends"], ids=name_of)
def test_end_of_vector(vector: Vector) -> None:
    session, confirmation = parse_established_untrusted(data_of(vector))
    assert (session.hex(), confirmation.hex()) == (vector["session"], vector["confirmation"])
    assert pack_established(session, confirmation) == data_of(vector)
    only_whole(parse_established_untrusted, data_of(vector))


@pytest.mark.parametrize("vector", VECTORS["refused_ends"], ids=name_of)
def test_refused_end(vector: Vector) -> None:
    is_refused(parse_established_untrusted, data_of(vector))


@given(hellos)
def test_hello_round_trip(hello: Hello) -> None:
    assert parse_hello_untrusted(hello.pack()) == hello


@given(hellos, st.integers(0, 200 * 8 - 1) | st.integers(0, DESTINATION_HELLO_BYTES * 8 - 1))
def test_a_hello_has_one_encoding(hello: Hello, bit: int) -> None:
    flipped = bytearray(hello.pack())
    flipped[bit // 8] ^= 1 << bit % 8
    parsed = value_or_malformed(parse_hello_untrusted, bytes(flipped))
    if isinstance(parsed, Hello):
        assert parsed != hello
        assert parsed.pack() == bytes(flipped)


@given(st.binary(max_size=300) | st.sampled_from([SOURCE_HELLO_BYTES, DESTINATION_HELLO_BYTES]).map(bytes))
def test_any_bytes_are_a_message_or_malformed(data: bytes) -> None:
    value_or_malformed(parse_hello_untrusted, data)
    value_or_malformed(split_reply_untrusted, data)
    value_or_malformed(split_proof_untrusted, data)
    value_or_malformed(parse_established_untrusted, data)


def test_labels() -> None:
    assert [kind.label for kind in AttestorKind] == ["psk", "snp", "emulated"]
    assert [mode.label for mode in Freshness] == ["svsm-tracked", "digest-audit", "host-reported"]
