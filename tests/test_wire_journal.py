"""The journal's record: layout, check, and what a damaged one is."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagexfer.wire.handshake import Role
from pagexfer.wire.journal import (
    JOURNAL_BYTES,
    JOURNALED,
    GuestProcess,
    JournalRecord,
    parse_journal_untrusted,
)
from pagexfer.wire.slot import SessionStatus

from .wire_vectors import Vector, data_of, is_refused, load, name_of, only_whole, value_or_malformed

VECTORS = load("journal")

ids = st.binary(min_size=16, max_size=16)
numbers = st.integers(0, (1 << 64) - 1)
processes = st.none() | st.builds(GuestProcess, ids, numbers, numbers.filter(bool), numbers)
records = st.sampled_from([(role, status) for role in Role for status in sorted(JOURNALED[role])]).flatmap(
    lambda pair: st.builds(
        JournalRecord,
        st.just(pair[0]),
        st.just(pair[1]),
        ids,
        ids,
        processes if pair[0] is Role.DESTINATION else st.none(),
    )
)


@pytest.mark.parametrize("vector", VECTORS["records"] + VECTORS["records_with_a_process"], ids=name_of)
def test_record_of_vector(vector: Vector) -> None:
    fields = vector["fields"]
    boot, *others = fields.get("process", [""])
    record = JournalRecord(
        Role(fields["role"]),
        SessionStatus(fields["status"]),
        bytes.fromhex(fields["session"]),
        bytes.fromhex(fields["guest_id"]),
        GuestProcess(bytes.fromhex(boot), *others) if boot else None,
    )
    assert parse_journal_untrusted(data_of(vector)) == record
    assert record.pack() == data_of(vector)
    only_whole(parse_journal_untrusted, data_of(vector))


@pytest.mark.parametrize("vector", VECTORS["refused_records"], ids=name_of)
def test_refused_record(vector: Vector) -> None:
    is_refused(parse_journal_untrusted, data_of(vector))


def test_the_vectors_have_every_role_and_status() -> None:
    told = {(vector["fields"]["role"], vector["fields"]["status"]) for vector in VECTORS["records"]}
    refused = {vector["name"] for vector in VECTORS["refused_records"]}
    for role, status in product(Role, SessionStatus):
        journaled = status in JOURNALED[role]
        assert journaled is ((role, status) in told)
        assert journaled or f"role {role:d}, status {status:d}" in refused


@given(records)
def test_round_trip(record: JournalRecord) -> None:
    assert len(record.pack()) == JOURNAL_BYTES
    assert parse_journal_untrusted(record.pack()) == record


@given(records, st.integers(0, JOURNAL_BYTES * 8 - 1))
def test_every_damaged_bit_is_found(record: JournalRecord, bit: int) -> None:
    damaged = bytearray(record.pack())
    damaged[bit // 8] ^= 1 << bit % 8
    is_refused(parse_journal_untrusted, bytes(damaged))


@given(st.binary(max_size=140) | st.binary(min_size=JOURNAL_BYTES, max_size=JOURNAL_BYTES))
def test_any_bytes_are_a_record_or_malformed(data: bytes) -> None:
    value_or_malformed(parse_journal_untrusted, data)
