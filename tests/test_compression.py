"""Compressed pages: what a frame may be, what a session has to agree on, and that nothing else reaches guest RAM."""

from __future__ import annotations

import sys
import tracemalloc
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagexfer.errors import (
    AttestationError,
    CompressionRefused,
    IntegrityError,
    LocalProtocolError,
    MalformedData,
    RefusalCode,
    UsageError,
)
from pagexfer.svsm.compression import (
    MAX_LEVEL,
    MIN_LEVEL,
    Compressor,
    Decompressor,
    frame_head,
    need_zstd,
    pack,
)
from pagexfer.svsm.service import refusal_code
from pagexfer.wire.bundle import PAGE_KINDS, BundleKind, Direction, Operation, pack_entries
from pagexfer.wire.constants import MAX_BUNDLE_DATA_PAGES, PAGE_SIZE, WORDS_PER_PAGE
from pagexfer.wire.page_state import PRIVATE
from pagexfer.wire.slot import SessionStatus as State

from .handshakes import Session, destination, flipped, source
from .rule_breaking import one_page, open_pair, refused, sealed_by_source
from .small_guests import PAGES, Move
from .wire_vectors import Vector, data_of, is_refused, load, name_of, only_whole, value_or_malformed

if TYPE_CHECKING:
    from collections.abc import Iterator

pytest.importorskip("zstandard", reason="compression needs the zstd extra")

VECTORS = load("frames")
LINES = b"".join(b"%d bottles of beer on the wall, %d bottles of beer\n" % (n, n) for n in range(100_000))


class Watcher(Compressor):
    """A compressor that keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[memoryview] = []

    def compress(self, payload: memoryview) -> bytes:
        self.given.append(payload)
        return super().compress(payload)


def decompress(data: bytes, pages: int) -> bytes:
    return Decompressor().decompress_untrusted(memoryview(data), pages)


def some_pages(first: int, last: int) -> bytes:
    """Entries of DATA pages."""
    gfns = np.arange(first, last)
    operations = np.full(len(gfns), Operation.DATA, dtype=np.uint8)
    return pack_entries(gfns, operations, np.full(len(gfns), PRIVATE, dtype=np.uint32))


def write_lines(move: Move) -> None:
    """The first pages of the guest are text, the next cannot be compressed, the rest is zero."""
    words = np.frombuffer(LINES[: PAGES // 4 * PAGE_SIZE], dtype=np.uint64)
    move.guest.memory.words[: PAGES // 4] = words.reshape(-1, WORDS_PER_PAGE)


@pytest.fixture
def move() -> Iterator[Move]:
    move = Move(compressor=Compressor())
    write_lines(move)
    yield move
    move.close()


# Frames


@pytest.mark.parametrize("vector", VECTORS["frames"], ids=name_of)
def test_frame_of_vector(vector: Vector) -> None:
    content = b"".join(bytes.fromhex(part["bytes"]) * part["times"] for part in vector["content"])
    assert decompress(data_of(vector), vector["pages"]) == content
    assert data_of(vector).startswith(frame_head(vector["pages"]))


@pytest.mark.parametrize("vector", VECTORS["refused_frames"], ids=name_of)
def test_refused_frame(vector: Vector) -> None:
    is_refused(lambda data: decompress(data, vector["pages"]), data_of(vector))


@pytest.mark.parametrize("pages", [1, 2, 16, 17, 512])
def test_a_frame_is_taken_whole_only(pages: int) -> None:
    frame = Compressor().compress(memoryview(b"\1" * pages * PAGE_SIZE))
    only_whole(lambda data: decompress(data, pages), frame)


@pytest.mark.parametrize("level", range(MIN_LEVEL, MAX_LEVEL + 1))
def test_every_frame_that_is_made_has_the_one_header(level: int) -> None:
    compressor = Compressor(level)
    for pages in (*range(1, 19), 128, 129, 255, 256, 257, MAX_BUNDLE_DATA_PAGES):
        text = LINES[: pages * PAGE_SIZE]
        frame = compressor.compress(memoryview(text))
        assert frame.startswith(frame_head(pages))
        assert len(frame) < len(text) // 2
        assert decompress(frame, pages) == text


@given(st.data())
def test_a_changed_frame_gives_its_pages_or_malformed(data: st.DataObject) -> None:
    pages = data.draw(st.integers(1, 3))
    frame = bytearray(Compressor().compress(memoryview(LINES[: pages * PAGE_SIZE])))
    for _ in range(data.draw(st.integers(1, 3))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    content = value_or_malformed(lambda changed: decompress(changed, pages), bytes(frame))
    assert content is None or len(content) == pages * PAGE_SIZE  # type: ignore[arg-type]  # bytes


def test_a_bomb_takes_no_more_memory_than_its_pages() -> None:
    bomb = next(vector for vector in VECTORS["refused_frames"] if "thousand" in vector["name"])
    decompressor = Decompressor()
    tracemalloc.start()
    try:
        with pytest.raises(MalformedData):
            decompressor.decompress_untrusted(memoryview(data_of(bomb)), bomb["pages"])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16 * PAGE_SIZE


def test_what_does_not_get_smaller_stays_as_it_is() -> None:
    noise = memoryview(np.random.default_rng(1).bytes(4 * PAGE_SIZE))
    assert pack(noise, Compressor()) == (BundleKind.PAGES, noise)
    assert pack(noise[:0], Compressor()) == (BundleKind.PAGES, b"")
    text = memoryview(LINES[: 4 * PAGE_SIZE])
    assert pack(text, None) == (BundleKind.PAGES, text)
    kind, frame = pack(text, Compressor())
    assert kind is BundleKind.PAGES_ZSTD
    assert decompress(bytes(frame), 4) == text


class _TakenMeanwhile(list[object]):
    """Has a context when it is looked at, and none any more when it is asked for it."""

    def __bool__(self) -> bool:
        return True


def test_a_context_that_another_thread_takes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    compressor, decompressor = Compressor(), Decompressor()
    for pool in (compressor, decompressor):
        monkeypatch.setattr(pool, "_free", _TakenMeanwhile())
    frame = compressor.compress(memoryview(LINES[:PAGE_SIZE]))
    assert decompressor.decompress_untrusted(memoryview(frame), 1) == LINES[:PAGE_SIZE]


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    need_zstd()
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(UsageError, match=r"pip install 'pagexfer\[zstd\]'"):
        need_zstd()


# Moves


@pytest.mark.parametrize("audit", [False, True])
def test_a_guest_arrives(audit: bool) -> None:
    move = Move(compressor=Compressor(), audit=audit)
    write_lines(move)
    pair = move.pair
    pair.until_precopy()
    move.guest.write(3, 1234)
    move.guest.write(PAGES - 1, 5678)
    pair.park()
    if audit:
        pair.audit()
    pair.epoch()
    pair.vcpus()
    for step in (pair.manifest, pair.ready, pair.start, pair.running, pair.finish):
        step()
    assert move.arrived()
    headers = [message.header for message in pair.sent if message.header.kind in PAGE_KINDS]
    assert {header.kind for header in headers} == PAGE_KINDS
    sent_bytes = sum(header.payload_bytes for header in headers)
    assert sent_bytes < (PAGES // 2 + 2) * PAGE_SIZE - PAGES // 4 * PAGE_SIZE // 2
    move.close()


def test_a_guest_that_does_not_ask_for_it_is_never_compressed() -> None:
    move = Move()
    write_lines(move)
    move.pair.migrate()
    assert move.arrived()
    assert BundleKind.PAGES_ZSTD not in {message.header.kind for message in move.pair.sent}
    move.close()


def test_guest_ram_is_not_what_is_compressed() -> None:
    """It may be written meanwhile: then a frame could hold for one page what another had."""
    compressor = Watcher()
    move = Move(compressor=compressor)
    write_lines(move)
    move.pair.until_precopy()
    assert compressor.given
    for payload in compressor.given:
        assert not np.shares_memory(np.frombuffer(payload, np.uint8), move.guest.memory.words)
    move.close()


# Anything wrong ends the session (R8)


@pytest.mark.parametrize(
    "vector", [vector for vector in VECTORS["refused_frames"] if vector["bytes"]], ids=name_of
)
def test_r8_a_bad_frame_ends_the_session_and_leaves_ram_alone(move: Move, vector: Vector) -> None:
    frame = data_of(vector)
    entries = some_pages(0, vector["pages"])
    bad = sealed_by_source(open_pair(move), BundleKind.PAGES_ZSTD, frame, entries=entries)
    refused(move, bad, MalformedData)


@pytest.mark.parametrize("size", [0, PAGE_SIZE, PAGE_SIZE + 1])
def test_r8_compressed_pages_are_smaller_than_pages(move: Move, size: int) -> None:
    bad = sealed_by_source(open_pair(move), BundleKind.PAGES_ZSTD, bytes(size), entries=one_page(0))
    refused(move, bad, MalformedData)


def test_r10_no_frame_is_looked_at_before_the_tag_held(move: Move, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    original = Decompressor.decompress_untrusted

    def watched(self: Decompressor, frame: memoryview, pages: int) -> bytes:
        looked.append(pages)
        return original(self, frame, pages)

    monkeypatch.setattr(Decompressor, "decompress_untrusted", watched)
    message = open_pair(move).seal_pages(0, 0, PAGES // 4)
    assert message is not None
    assert message.header.kind is BundleKind.PAGES_ZSTD
    refused(move, message.flipped(-20), IntegrityError)
    assert not looked


@pytest.mark.parametrize("first", [0, PAGES // 4])
def test_g2_the_kind_cannot_be_changed(move: Move, first: int) -> None:
    message = open_pair(move).seal_pages(0, first, first + 8)
    assert message is not None
    kind = BundleKind.PAGES if first else BundleKind.PAGES_ZSTD
    assert message.header.kind is kind
    refused(move, message.flipped(6, BundleKind.PAGES ^ BundleKind.PAGES_ZSTD), MalformedData)


def test_g2_the_kind_is_covered_by_the_tag(move: Move) -> None:
    """Also where the changed header fits: a page that came as it is, of a bundle that says to be compressed."""
    pair = open_pair(move)
    frame = Compressor().compress(memoryview(bytes(b"\1" * PAGE_SIZE)))
    honest = sealed_by_source(pair, BundleKind.VCPU_STATE, frame, entries=one_page(0))
    changed = honest.flipped(6, BundleKind.VCPU_STATE ^ BundleKind.PAGES_ZSTD)
    assert changed.header.kind is BundleKind.PAGES_ZSTD
    refused(move, changed, IntegrityError)


def test_r1_counts_compressed_pages(move: Move) -> None:
    pair = open_pair(move)
    frame = Compressor().compress(memoryview(bytes(b"\1" * PAGE_SIZE)))
    pair.send(sealed_by_source(pair, BundleKind.PAGES_ZSTD, frame, entries=one_page(7)))
    assert (move.memory.words[7] == 0x0101010101010101).all()
    again = sealed_by_source(pair, BundleKind.PAGES_ZSTD, frame, entries=one_page(7), channel=1)
    refused(move, again, IntegrityError)


def test_r8_compressed_pages_that_were_not_agreed_on() -> None:
    move = Move()
    frame = Compressor().compress(memoryview(bytes(b"\1" * PAGE_SIZE)))
    bad = sealed_by_source(open_pair(move), BundleKind.PAGES_ZSTD, frame, entries=one_page(0))
    assert bad.direction is Direction.FORWARD
    refused(move, bad, IntegrityError)
    move.close()


# The handshake


def test_r11_destination_that_was_not_told_to_accept_it_refuses_once_the_source_is_proved() -> None:
    session = Session(source(compressor=Compressor()), destination()).until(3)
    with pytest.raises(CompressionRefused) as caught:
        session.send(4)
    assert refusal_code(caught.value) is RefusalCode.COMPRESSION
    assert session.far.state is State.FAILED
    with pytest.raises(LocalProtocolError):
        session.far.answer(2, session.sent[1])
    assert session.is_over()


def test_r11_stranger_that_asks_for_it_ends_nothing() -> None:
    session = Session(source(compressor=Compressor()), destination()).until(3)
    with pytest.raises(AttestationError):
        session.step(4, flipped(session.sent[3], 0))
    assert session.far.state is State.IDLE


@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("number", [1, 2])
def test_r11_host_that_changes_what_is_agreed_on(asks: bool, number: int) -> None:
    near = source(compressor=Compressor() if asks else None)
    session = Session(near, destination(accept_compression=True))
    with pytest.raises(AttestationError):
        session.run(lambda each, data: flipped(data, 75) if each == number else data)
    assert near.state is State.ABORTED
    assert not session.is_established()


@pytest.mark.parametrize("asks", [False, True])
def test_r11_both_sides_know_what_was_agreed_on(asks: bool) -> None:
    session = Session(source(compressor=Compressor() if asks else None), destination(accept_compression=True))
    session.run()
    for side in (session.near, session.far):
        assert side._session is not None
        assert side._session.compressed is asks
