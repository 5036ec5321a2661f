"""Sealing and opening: against the vectors, and every way in which a bundle can be wrong, out of place or out of turn."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagexfer.attestation.secret import Secret
from pagexfer.errors import (
    IntegrityError,
    KeyExhausted,
    KeyPoisoned,
    LocalProtocolError,
    MalformedData,
    ReflectionError,
    RemoteProtocolError,
    ReplayError,
)
from pagexfer.svsm import sealing
from pagexfer.svsm.keys import KeySchedule
from pagexfer.svsm.sealing import Opener, Sealer
from pagexfer.wire.bundle import HEADER_BYTES, BundleKind, Direction, parse_header_untrusted
from pagexfer.wire.constants import MAX_CHANNELS, TAG_BYTES

from .wire_vectors import Vector, data_of, load, name_of

if TYPE_CHECKING:
    from collections.abc import Callable

VECTORS = load("bundles")
SHARED = bytes.fromhex(VECTORS["session"]["shared"])
CONTRIBUTION = bytes.fromhex(VECTORS["session"]["contribution"])
TRANSCRIPT = bytes.fromhex(VECTORS["session"]["transcript"])
OUT_BYTES = 1 << 16

# Header fields by offset and size; what a flipped bit in each must raise, where that does not depend on the bit.
FIELDS: dict[str, tuple[int, int, type[Exception] | None]] = {
    "magic": (0, 4, MalformedData),
    "version": (4, 2, MalformedData),
    "kind": (6, 1, None),
    "direction": (7, 1, MalformedData),
    "session": (8, 16, ReflectionError),
    "channel": (24, 2, None),
    "incarnation": (26, 2, ReflectionError),
    "epoch": (28, 4, IntegrityError),
    "counter": (32, 8, ReplayError),
    "entry count": (40, 4, MalformedData),
    "payload bytes": (44, 4, MalformedData),
    "reserved": (48, 16, MalformedData),
}


def schedule(contribution: bytes = CONTRIBUTION, transcript: bytes = TRANSCRIPT) -> KeySchedule:
    return KeySchedule(Secret(SHARED), Secret(contribution), transcript)


def pair(
    direction: Direction = Direction.FORWARD, channel: int = 0, incarnation: int = 0
) -> tuple[Sealer, Opener]:
    """Both ends of one stream."""
    stream = direction, channel, incarnation
    return Sealer(schedule(), *stream), Opener(schedule(), *stream)


def seal(
    sealer: Sealer, payload: bytes, kind: BundleKind = BundleKind.PAGES, epoch: int = 1, entries: bytes = b""
) -> bytes:
    out = bytearray(OUT_BYTES)
    length = sealer.seal(kind, epoch, entries, payload, memoryview(out))
    assert not any(out[length:])
    return bytes(out[:length])


def open_bundle(opener: Opener, data: bytes, out: bytearray | None = None) -> bytes:
    """The payload; `out` lets the caller see what stands there after a refusal."""
    header = parse_header_untrusted(data, len(data))
    plaintext = bytearray(header.payload_bytes) if out is None else out
    sealed = memoryview(data)[header.aad_bytes :]
    opener.open_untrusted(header, data[: header.aad_bytes], sealed, memoryview(plaintext))
    return bytes(plaintext)


def opener_of(vector: Vector) -> Opener:
    """An opener whose next bundle is this one."""
    opener = Opener(schedule(), Direction(vector["direction"]), vector["channel"], vector["incarnation"])
    opener.counter = vector["counter"]
    return opener


def refusal(vector: Vector, data: bytes) -> type[Exception]:
    """What opening `data` in the place of `vector` raises. Whatever the opener refuses poisons it."""
    opener = opener_of(vector)
    with pytest.raises(RemoteProtocolError) as caught:
        open_bundle(opener, data)
    assert opener.counter == vector["counter"]
    if caught.type is not MalformedData:
        with pytest.raises(KeyPoisoned):
            open_bundle(opener, data_of(vector))
    return caught.type


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def patched(data: bytes, offset: int, new: bytes) -> bytes:
    return data[:offset] + new + data[offset + len(new) :]


MIXED = next(vector for vector in VECTORS["bundles"] if vector["name"].startswith("data, zero, drop"))


# Vectors


@pytest.mark.parametrize("vector", VECTORS["bundles"], ids=name_of)
def test_vector_opens(vector: Vector) -> None:
    opener = opener_of(vector)
    assert open_bundle(opener, data_of(vector)).hex() == vector["payload"]
    assert opener.record().bundles == vector["counter"] + 1
    assert opener.record().transcript == hashlib.sha384(data_of(vector)[-TAG_BYTES:]).digest()


@pytest.mark.parametrize("vector", VECTORS["bundles"], ids=name_of)
def test_vector_is_sealed_to_the_byte(vector: Vector) -> None:
    sealer = Sealer(schedule(), Direction(vector["direction"]), vector["channel"], vector["incarnation"])
    sealer.counter = vector["counter"]
    entries = bytes.fromhex(vector["aad"])[HEADER_BYTES:]
    payload = bytes.fromhex(vector["payload"])
    assert seal(sealer, payload, BundleKind(vector["kind"]), vector["epoch"], entries) == data_of(vector)


@given(
    st.lists(st.tuples(st.integers(0, 5), st.binary(max_size=300)), max_size=8), st.sampled_from(Direction)
)
def test_what_is_sealed_opens_in_order(bundles: list[tuple[int, bytes]], direction: Direction) -> None:
    sealer, opener = pair(direction, 3, 1)
    tags = b""
    for entries, payload in bundles:
        data = seal(sealer, payload, entries=bytes(range(8)) * entries)
        tags += data[-TAG_BYTES:]
        assert open_bundle(opener, data) == payload
    assert sealer.record() == opener.record()
    assert sealer.record().bundles == len(bundles)
    assert sealer.record().transcript == hashlib.sha384(tags).digest()


# One bundle, changed


@pytest.mark.parametrize("field", FIELDS)
def test_every_bit_of_the_header_counts(field: str) -> None:
    offset, size, error = FIELDS[field]
    data = data_of(MIXED)
    for bit in range(offset * 8, (offset + size) * 8):
        changed = flipped(data, bit)
        expected = error
        if field == "kind":
            expected = IntegrityError if changed[offset] in set(map(int, BundleKind)) else MalformedData
        elif field == "channel":
            channel = int.from_bytes(changed[offset : offset + size], "little")
            expected = ReflectionError if channel < MAX_CHANNELS else MalformedData
        assert refusal(MIXED, changed) is expected


def test_the_fields_are_the_whole_header() -> None:
    covered = [byte for offset, size, _ in FIELDS.values() for byte in range(offset, offset + size)]
    assert covered == list(range(HEADER_BYTES))


def test_every_bit_of_entries_and_tag_counts() -> None:
    data = data_of(MIXED)
    entries_end = HEADER_BYTES + 8 * len(MIXED["entries"])
    bits = [*range(HEADER_BYTES * 8, entries_end * 8), *range((len(data) - TAG_BYTES) * 8, len(data) * 8)]
    for bit in bits:
        assert refusal(MIXED, flipped(data, bit)) is IntegrityError


@given(st.sampled_from(VECTORS["bundles"]), st.data())
def test_any_flipped_bits_are_refused(vector: Vector, data: st.DataObject) -> None:
    whole = data_of(vector)
    bits = data.draw(st.sets(st.integers(0, len(whole) * 8 - 1), min_size=1, max_size=4))
    changed = whole
    for bit in bits:
        changed = flipped(changed, bit)
    refusal(vector, changed)


@pytest.mark.parametrize("vector", VECTORS["bundles"], ids=name_of)
def test_payload_and_ends_of_every_kind_count(vector: Vector) -> None:
    data = data_of(vector)
    start = len(vector["aad"]) // 2
    for byte in {start, (start + len(data)) // 2, len(data) - TAG_BYTES - 1, len(data) - 1} - {start - 1}:
        assert refusal(vector, flipped(data, byte * 8 + 7)) is IntegrityError
    assert refusal(vector, data[:-1]) is MalformedData
    assert refusal(vector, data + b"\0") is MalformedData


def test_bytes_moved_between_entries_and_payload_are_refused() -> None:
    sealer = Sealer(schedule(), Direction.FORWARD, 1)
    data = seal(sealer, bytes(16), entries=bytes(8))
    counts = (2).to_bytes(4, "little") + (8).to_bytes(4, "little")
    moved = patched(data, 40, counts)
    assert parse_header_untrusted(moved, len(moved)).entry_count == 2
    with pytest.raises(IntegrityError, match="bad tag"):
        open_bundle(Opener(schedule(), Direction.FORWARD, 1), moved)


def test_nothing_is_written_for_a_bundle_out_of_place() -> None:
    for changed, error in (
        (patched(data_of(MIXED), 8, bytes(16)), ReflectionError),
        (patched(data_of(MIXED), 32, bytes(8)), ReplayError),
    ):
        out = bytearray(b"\xaa" * 4096)
        with pytest.raises(error):
            open_bundle(opener_of(MIXED), changed, out)
        assert out == b"\xaa" * 4096


# The right bundle, out of turn


def test_a_replayed_bundle_is_refused_and_ends_the_stream() -> None:
    sealer, opener = pair()
    first, second = seal(sealer, b"first"), seal(sealer, b"second")
    assert open_bundle(opener, first) == b"first"
    with pytest.raises(ReplayError):
        open_bundle(opener, first)
    with pytest.raises(KeyPoisoned):
        open_bundle(opener, second)


@given(st.integers(2, 6), st.data())
def test_bundles_open_in_their_order_only(count: int, data: st.DataObject) -> None:
    sealer, opener = pair()
    bundles = [seal(sealer, bytes([number])) for number in range(count)]
    order = data.draw(st.permutations(range(count)))
    for position, number in enumerate(order):
        if number == position:
            assert open_bundle(opener, bundles[number]) == bytes([number])
            continue
        with pytest.raises(ReplayError):
            open_bundle(opener, bundles[number])
        with pytest.raises(KeyPoisoned):
            open_bundle(opener, bundles[position])
        return


def test_a_lost_bundle_is_noticed() -> None:
    sealer, opener = pair()
    seal(sealer, b"lost")
    with pytest.raises(ReplayError, match="0 is next"):
        open_bundle(opener, seal(sealer, b"next"))


# The right bundle, in another stream

Place = tuple[Direction, int, int]
HOME: Place = (Direction.FORWARD, 1, 0)
ELSEWHERE: dict[str, Place] = {
    "direction": (Direction.BACKWARD, 1, 0),
    "channel": (Direction.FORWARD, 2, 0),
    "incarnation": (Direction.FORWARD, 1, 1),
}


@pytest.mark.parametrize("place", ELSEWHERE.values(), ids=ELSEWHERE)
def test_a_bundle_of_another_stream_is_refused(place: Place) -> None:
    data = seal(Sealer(schedule(), *place), b"payload")
    opener = Opener(schedule(), *HOME)
    with pytest.raises(ReflectionError):
        open_bundle(opener, data)
    with pytest.raises(KeyPoisoned):
        open_bundle(opener, seal(Sealer(schedule(), *HOME), b"payload"))


@pytest.mark.parametrize("place", ELSEWHERE.values(), ids=ELSEWHERE)
def test_a_bundle_relabelled_for_another_stream_is_refused(place: Place) -> None:
    data = seal(Sealer(schedule(), *place), b"payload")
    home = seal(Sealer(schedule(), *HOME), b"payload")
    relabelled = home[:HEADER_BYTES] + data[HEADER_BYTES:]
    with pytest.raises(IntegrityError, match="bad tag"):
        open_bundle(Opener(schedule(), *HOME), relabelled)


def test_a_bundle_of_another_session_is_refused() -> None:
    other = schedule(transcript=bytes(48))
    data = seal(Sealer(other, *HOME), b"payload")
    with pytest.raises(ReflectionError, match="another session"):
        open_bundle(Opener(schedule(), *HOME), data)
    with pytest.raises(IntegrityError, match="bad tag"):
        open_bundle(Opener(schedule(), *HOME), patched(data, 8, schedule().session))


def test_the_same_session_under_another_secret_is_refused() -> None:
    data = seal(Sealer(schedule(contribution=bytes(48)), *HOME), b"payload")
    with pytest.raises(IntegrityError, match="bad tag"):
        open_bundle(Opener(schedule(), *HOME), data)


@given(st.binary(max_size=200), st.integers(0, 3), st.integers(0, 400))
def test_a_bundle_that_does_not_fit_uses_no_number(payload: bytes, entries: int, room: int) -> None:
    sealer, opener = pair(*HOME)
    out = bytearray(b"\xaa" * room)
    length = HEADER_BYTES + 8 * entries + len(payload) + TAG_BYTES
    if length > room:
        with pytest.raises(LocalProtocolError, match="does not fit"):
            sealer.seal(BundleKind.PAGES, 1, bytes(8 * entries), payload, memoryview(out))
        assert sealer.counter == 0
        assert out == b"\xaa" * room
        out = bytearray(length)
    assert sealer.seal(BundleKind.PAGES, 1, bytes(8 * entries), payload, memoryview(out)) == length
    assert out[length:] == (b"\xaa" * room)[length:]
    assert open_bundle(opener, bytes(out[:length])) == payload


# Ends of a key


def test_a_wiped_stream_seals_and_opens_nothing() -> None:
    sealer, opener = pair(*HOME)
    data = seal(sealer, b"payload")
    record = sealer.record()
    sealer.wipe()
    opener.wipe()
    with pytest.raises(KeyPoisoned):
        seal(sealer, b"payload")
    with pytest.raises(KeyPoisoned):
        open_bundle(opener, data)
    assert sealer.record() == record


def test_a_key_carries_so_many_bundles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "MAX_BUNDLES_PER_KEY", 2)
    at_its_limit(lambda sealer: [seal(sealer, b""), seal(sealer, b"payload")], b"")


def test_a_key_carries_so_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "MAX_BYTES_PER_KEY", 100)
    at_its_limit(lambda sealer: [seal(sealer, bytes(60)), seal(sealer, bytes(40)), seal(sealer, b"")], b"x")


def at_its_limit(fill: Callable[[Sealer], list[bytes]], more: bytes) -> None:
    """After `fill` either side takes no bundle with payload `more`, and writes and counts nothing for it."""
    sealer, opener = pair(*HOME)
    bundles = fill(sealer)
    for data in bundles:
        open_bundle(opener, data)
    out = bytearray(OUT_BYTES)
    with pytest.raises(KeyExhausted):
        sealer.seal(BundleKind.PAGES, 1, b"", more, memoryview(out))
    assert not any(out)
    # What only a sealer without limits would send: the opener has the same limit.
    beyond = Sealer(schedule(), *HOME)
    beyond.counter = len(bundles)
    with pytest.MonkeyPatch.context() as unlimited:
        unlimited.setattr(sealing, "MAX_BUNDLES_PER_KEY", 1 << 32)
        unlimited.setattr(sealing, "MAX_BYTES_PER_KEY", 1 << 46)
        data = seal(beyond, more)
    with pytest.raises(KeyExhausted):
        open_bundle(opener, data)
    assert sealer.record() == opener.record()
    assert sealer.record().bundles == len(bundles)


@dataclass(frozen=True)
class Try:
    """A payload to seal into `room` bytes, which may be too few."""

    payload: bytes
    room: int


tries = st.builds(Try, payload=st.binary(max_size=64), room=st.integers(0, 160))


@given(st.lists(tries, max_size=12))
def test_no_nonce_comes_twice_whatever_fails(attempts: list[Try]) -> None:
    sealer = Sealer(schedule(), *HOME)
    counters = []
    for attempt in attempts:
        out = bytearray(attempt.room)
        try:
            sealer.seal(BundleKind.PAGES, 1, b"", attempt.payload, memoryview(out))
        except LocalProtocolError:  # the room was too small
            assert attempt.room < HEADER_BYTES + len(attempt.payload) + TAG_BYTES
            assert not any(out)
            continue
        counters.append(int.from_bytes(out[32:40], "little"))
    assert counters == sorted(set(counters))
    assert all(counter < sealer.counter for counter in counters)
