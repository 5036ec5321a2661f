"""The bundle's header and entries: against the vectors, round trips, and everything that has to be refused."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagexfer.errors import MalformedData
from pagexfer.wire.bundle import (
    ENTRY_BYTES,
    HEADER_BYTES,
    MAX_BUNDLE_BYTES,
    PAGE_KINDS,
    BundleHeader,
    BundleKind,
    Direction,
    Entries,
    Operation,
    nonce,
    pack_entries,
    parse_entries_untrusted,
    parse_header_untrusted,
)
from pagexfer.wire.constants import MAX_BUNDLE_ENTRIES, MAX_BUNDLE_PAYLOAD_BYTES, PAGE_SIZE, TAG_BYTES
from pagexfer.wire.page_state import SHARED, STATE_MASK, VALIDATED

from .wire_vectors import Vector, data_of, is_refused, load, name_of, only_whole, value_or_malformed

VECTORS = load("bundles")
PAGES = VECTORS["session"]["ram_pages"]
PAGE_BUNDLES = [vector for vector in VECTORS["bundles"] if vector["kind"] in PAGE_KINDS]

headers = st.builds(
    BundleHeader,
    kind=st.sampled_from(BundleKind),
    direction=st.sampled_from(Direction),
    session=st.binary(min_size=16, max_size=16),
    channel=st.integers(0, 1023),
    incarnation=st.integers(0, 0xFFFF),
    epoch=st.integers(1, 0xFFFFFFFF),
    counter=st.integers(0, (1 << 64) - 1),
    entry_count=st.integers(0, MAX_BUNDLE_ENTRIES),
    payload_bytes=st.integers(0, MAX_BUNDLE_PAYLOAD_BYTES),
)


def parse_whole(data: bytes) -> BundleHeader:
    return parse_header_untrusted(data, len(data))


def parse_pages(data: bytes) -> Entries:
    header = parse_whole(data)
    return parse_entries_untrusted(data[HEADER_BYTES : header.aad_bytes], header, PAGES)


def header_for(entries: bytes, data_pages: int) -> BundleHeader:
    return BundleHeader(
        BundleKind.PAGES,
        Direction.FORWARD,
        bytes(16),
        0,
        0,
        1,
        1,
        len(entries) // ENTRY_BYTES,
        data_pages * PAGE_SIZE,
    )


@pytest.mark.parametrize("vector", VECTORS["bundles"], ids=name_of)
def test_header_of_vector(vector: Vector) -> None:
    data = data_of(vector)
    header = parse_whole(data)
    fields = ("kind", "direction", "channel", "incarnation", "epoch", "counter")
    assert [getattr(header, field) for field in fields] == [vector[field] for field in fields]
    assert header.session.hex() == VECTORS["session"]["session_id"]
    assert header.pack() == data[:HEADER_BYTES]
    assert data[: header.aad_bytes].hex() == vector["aad"]
    assert header.payload_bytes == len(vector["payload"]) // 2
    assert nonce(header.channel, header.incarnation, header.counter).hex() == vector["nonce"]


@pytest.mark.parametrize("vector", VECTORS["bundles"], ids=name_of)
def test_a_vector_is_taken_whole_only(vector: Vector) -> None:
    only_whole(parse_whole, data_of(vector))


def test_the_vectors_have_every_kind_and_operation() -> None:
    assert {vector["kind"] for vector in VECTORS["bundles"]} == set(BundleKind)
    operations = {entry["operation"] for vector in PAGE_BUNDLES for entry in vector["entries"]}
    assert operations == set(Operation)


@pytest.mark.parametrize("vector", VECTORS["refused_headers"], ids=name_of)
def test_refused_header(vector: Vector) -> None:
    is_refused(parse_whole, data_of(vector))


@pytest.mark.parametrize("vector", PAGE_BUNDLES, ids=name_of)
def test_entries_of_vector(vector: Vector) -> None:
    data = data_of(vector)
    entries = parse_pages(data)
    assert entries.gfns.tolist() == [entry["gfn"] for entry in vector["entries"]]
    assert entries.operations.tolist() == [entry["operation"] for entry in vector["entries"]]
    assert entries.states.tolist() == [entry["state"] for entry in vector["entries"]]
    packed = pack_entries(*entries)
    assert packed == data[HEADER_BYTES : HEADER_BYTES + len(packed)]


@pytest.mark.parametrize("vector", VECTORS["refused_entries"], ids=name_of)
def test_refused_entries(vector: Vector) -> None:
    data = data_of(vector)
    parse_whole(data)  # the header is fine
    is_refused(parse_pages, data)


@given(headers)
def test_header_round_trip(header: BundleHeader) -> None:
    packed = header.pack()
    assert parse_header_untrusted(packed, header.bundle_bytes) == header
    for wrong in (header.bundle_bytes - 1, header.bundle_bytes + 1, 0, HEADER_BYTES - 1):
        with pytest.raises(MalformedData):
            parse_header_untrusted(packed, wrong)


@given(headers, st.integers(0, HEADER_BYTES * 8 - 1))
def test_a_header_has_one_encoding(header: BundleHeader, bit: int) -> None:
    flipped = bytearray(header.pack())
    flipped[bit // 8] ^= 1 << bit % 8
    parsed = value_or_malformed(
        lambda data: parse_header_untrusted(data, header.bundle_bytes), bytes(flipped)
    )
    if parsed is not None:
        assert isinstance(parsed, BundleHeader)
        assert parsed != header
        assert parsed.pack() == bytes(flipped)


@given(st.binary(max_size=200), st.integers(0, MAX_BUNDLE_BYTES + 1))
def test_any_bytes_are_a_header_or_malformed(data: bytes, bundle_bytes: int) -> None:
    value_or_malformed(lambda data: parse_header_untrusted(data, bundle_bytes), data)


@st.composite
def page_entries(draw: st.DrawFn) -> list[tuple[int, Operation, int]]:
    """Entries that are allowed, ascending."""
    gfns = draw(st.lists(st.integers(0, PAGES - 1), min_size=1, max_size=40, unique=True))
    chosen = []
    for gfn in sorted(gfns):
        state = draw(st.integers(0, STATE_MASK))
        content = st.sampled_from((Operation.DATA, Operation.ZERO))
        operation = draw(content) if state & (VALIDATED | SHARED) else Operation.DROP
        chosen.append((gfn, operation, state))
    return chosen


def columns(entries: list[tuple[int, Operation, int]]) -> Entries:
    gfns, operations, states = zip(*entries, strict=True)
    return Entries(
        np.array(gfns, dtype=np.int64),
        np.array(operations, dtype=np.uint8),
        np.array(states, dtype=np.uint32),
    )


@given(page_entries())
def test_entries_round_trip(entries: list[tuple[int, Operation, int]]) -> None:
    packed = pack_entries(*columns(entries))
    data_pages = sum(operation is Operation.DATA for _, operation, _ in entries)
    header = header_for(packed, data_pages)
    parsed = parse_entries_untrusted(packed, header, PAGES)
    assert parsed.gfns.tolist() == [gfn for gfn, _, _ in entries]
    assert parsed.operations.tolist() == [operation for _, operation, _ in entries]
    assert parsed.states.tolist() == [state for _, _, state in entries]
    for wrong_header in (header_for(packed, data_pages + 1), header._replace(entry_count=len(entries) + 1)):
        with pytest.raises(MalformedData):
            parse_entries_untrusted(packed, wrong_header, PAGES)
    for wrong_bytes in (packed[:-1], packed + b"\0", packed[:-ENTRY_BYTES], packed + bytes(ENTRY_BYTES), b""):
        with pytest.raises(MalformedData):
            parse_entries_untrusted(wrong_bytes, header, PAGES)


def test_the_last_page_of_ram_is_the_last() -> None:
    packed = pack_entries(*columns([(PAGES - 1, Operation.ZERO, VALIDATED)]))
    parse_entries_untrusted(packed, header_for(packed, 0), PAGES)
    is_refused(lambda data: parse_entries_untrusted(data, header_for(data, 0), PAGES - 1), packed)


@given(st.binary(max_size=64), st.integers(0, MAX_BUNDLE_ENTRIES), st.integers(0, 3), st.integers(1, 1 << 40))
def test_any_bytes_are_entries_or_malformed(data: bytes, count: int, data_pages: int, pages: int) -> None:
    for entry_count in (count, len(data) // ENTRY_BYTES):
        header = header_for(b"", data_pages)._replace(entry_count=entry_count)
        parse = partial(parse_entries_untrusted, header=header, pages=pages)
        parsed = value_or_malformed(parse, data)
        if isinstance(parsed, Entries):
            assert pack_entries(*parsed) == data


@pytest.mark.parametrize(("data_pages", "zero_pages"), [(512, 0), (512, 3584), (0, 4096), (1, 4095)])
@pytest.mark.parametrize("kind", sorted(PAGE_KINDS))
def test_a_bundle_has_up_to_512_pages_with_content_among_4096(
    kind: BundleKind, data_pages: int, zero_pages: int
) -> None:
    def entries(data: int) -> bytes:
        operations = [Operation.DATA] * data + [Operation.ZERO] * (data_pages + zero_pages - data)
        return pack_entries(*columns([(gfn, op, VALIDATED) for gfn, op in enumerate(operations)]))

    def parse(packed: bytes, data: int) -> Entries:
        header = header_for(packed, data)._replace(kind=kind)
        if kind is BundleKind.PAGES_ZSTD:  # whose length says nothing of how many pages it has
            header = header._replace(payload_bytes=PAGE_SIZE // 2)
        return parse_entries_untrusted(packed, header, PAGES)

    if data_pages or kind is BundleKind.PAGES:
        assert len(parse(entries(data_pages), data_pages).gfns) == data_pages + zero_pages
    if zero_pages and data_pages == 512:
        with pytest.raises(MalformedData, match="513 DATA pages"):
            parse(entries(513), 513)


def test_more_entries_than_a_bundle_may_have_are_refused() -> None:
    header = header_for(bytes(4097 * ENTRY_BYTES), 0)
    with pytest.raises(MalformedData):
        parse_whole(header.pack() + bytes(header.bundle_bytes - HEADER_BYTES))


def test_the_largest_bundle() -> None:
    assert MAX_BUNDLE_BYTES == HEADER_BYTES + 4096 * 8 + 512 * 4096 + TAG_BYTES
    header = header_for(bytes(4096 * ENTRY_BYTES), 512)
    assert header.bundle_bytes == MAX_BUNDLE_BYTES
    assert parse_header_untrusted(header.pack(), MAX_BUNDLE_BYTES) == header
