"""The form of a ledger."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagexfer.wire.handshake import Freshness
from pagexfer.wire.ledger import (
    BODY_BYTES,
    MAX_LEDGER_BYTES,
    Proofs,
    Record,
    RecordBody,
    bytes_with_record,
    guest_id_of,
    pack_ledger,
    parse_body_untrusted,
    parse_ledger_untrusted,
)
from pagexfer.wire.slot import HEADROOM_BYTES

from .wire_vectors import Vector, data_of, is_refused, load, name_of, value_or_malformed

VECTORS = load("ledger")
RECORD = parse_ledger_untrusted(data_of(VECTORS["ledgers"][1]))[0]
HEADER_BYTES = 16


def exactly(size: int) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=size, max_size=size)


parts = st.binary(min_size=1, max_size=40)
bodies = st.builds(
    RecordBody,
    move=st.integers(1, (1 << 64) - 1),
    guest_id=exactly(16),
    freshness=st.sampled_from(Freshness),
    **{name: exactly(48) for name in RecordBody.__slots__ if name not in ("move", "guest_id", "freshness")},
)
records = st.builds(
    Record,
    body=bodies,
    source_signature=exactly(64),
    destination_signature=exactly(64),
    proofs=st.builds(Proofs, parts, parts, parts, parts),
)


@pytest.mark.parametrize("vector", VECTORS["ledgers"], ids=name_of)
def test_ledger_of_vector(vector: Vector) -> None:
    parsed = parse_ledger_untrusted(data_of(vector))
    assert pack_ledger(parsed) == data_of(vector)
    assert len(parsed) == len(vector["records"])
    for record, values in zip(parsed, vector["records"], strict=True):
        shown = {
            name: getattr(part, name)
            for part in (record.body, record.proofs, record)
            for name in part.__slots__
        }
        same = shown.keys() & values.keys()
        assert len(same) == 13
        for name in same:
            value = shown[name]
            assert (value.hex() if isinstance(value, bytes) else value) == values[name], name


@pytest.mark.parametrize("vector", VECTORS["refused_ledgers"], ids=name_of)
def test_refused_ledger(vector: Vector) -> None:
    is_refused(parse_ledger_untrusted, data_of(vector))


@given(st.lists(records, max_size=3))
def test_a_ledger_comes_back_as_it_was_and_only_whole(made: list[Record]) -> None:
    packed = pack_ledger(made)
    assert parse_ledger_untrusted(packed) == tuple(made)
    # Every end between two records is that of a ledger, too: nobody can see from its form that more came after.
    ends = {len(pack_ledger(made[:count])) for count in range(len(made) + 1)}
    for length in range(len(packed)):
        if length not in ends:
            is_refused(parse_ledger_untrusted, packed[:length])
    if packed:
        is_refused(parse_ledger_untrusted, packed + b"\0")


@given(st.lists(records, min_size=1, max_size=2), st.data())
def test_a_ledger_has_one_encoding(made: list[Record], data: st.DataObject) -> None:
    flipped = bytearray(pack_ledger(made))
    bit = data.draw(st.integers(0, len(flipped) * 8 - 1))
    flipped[bit // 8] ^= 1 << bit % 8
    parsed = value_or_malformed(parse_ledger_untrusted, bytes(flipped))
    if isinstance(parsed, tuple):
        assert parsed != tuple(made)
        assert pack_ledger(parsed) == bytes(flipped)


@given(st.binary(max_size=600) | st.binary(max_size=1000).map(lambda data: pack_ledger([RECORD])[:20] + data))
def test_any_bytes_are_a_ledger_or_malformed(data: bytes) -> None:
    value_or_malformed(parse_ledger_untrusted, data)
    value_or_malformed(parse_body_untrusted, data)


def test_a_body_has_its_exact_size() -> None:
    packed = RECORD.body.pack()
    assert parse_body_untrusted(packed) == RECORD.body
    assert len(packed) == BODY_BYTES
    is_refused(parse_body_untrusted, packed[:-1])
    is_refused(parse_body_untrusted, packed + b"\0")


def test_the_guest_is_that_of_the_first_record() -> None:
    assert guest_id_of(b"") is None
    other = replace(RECORD, body=replace(RECORD.body, guest_id=bytes(16)))
    assert guest_id_of(pack_ledger([RECORD, other])) == RECORD.body.guest_id


def test_the_size_with_one_more_record_is_known_before_it_is_made() -> None:
    assert bytes_with_record(b"", RECORD.proofs) == len(pack_ledger([RECORD]))
    one = pack_ledger([RECORD])
    assert bytes_with_record(one, RECORD.proofs) == len(pack_ledger([RECORD, RECORD]))


def test_the_largest_ledger_fits_the_bundle_of_a_slot_of_2_mib() -> None:
    record = replace(RECORD, proofs=replace(RECORD.proofs, source_evidence=b"e"))
    count = MAX_LEDGER_BYTES // len(record.pack())
    rest = MAX_LEDGER_BYTES - HEADER_BYTES - count * len(record.pack())
    padded = replace(record, proofs=replace(record.proofs, source_evidence=bytes(1 + rest)))
    largest = pack_ledger([*[record] * (count - 1), padded])
    assert len(largest) == MAX_LEDGER_BYTES
    assert len(parse_ledger_untrusted(largest)) == count
    longer = replace(record, proofs=replace(record.proofs, source_evidence=bytes(2 + rest)))
    is_refused(parse_ledger_untrusted, pack_ledger([*[record] * (count - 1), longer]))
    bundle_header, tag = 64, 16
    assert MAX_LEDGER_BYTES + bundle_header + tag + HEADROOM_BYTES <= 2 << 20
