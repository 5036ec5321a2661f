"""R9 between two SVSMs: a channel's connection breaks, a new one takes its place, and nothing is lost or doubled."""

from __future__ import annotations

import struct
from contextlib import closing
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagexfer.errors import (
    IntegrityError,
    KeyExhausted,
    LocalProtocolError,
    RemoteProtocolError,
    ReplayError,
)
from pagexfer.svsm.sealing import Sealer
from pagexfer.wire.bundle import MAX_BUNDLE_BYTES, BundleKind, Direction
from pagexfer.wire.constants import FINAL_EPOCH, MAX_INCARNATIONS
from pagexfer.wire.slot import SessionStatus as State
from pagexfer.wire.token import pack_records, parse_records_untrusted

from .small_guests import PAGES, Move, a_move

if TYPE_CHECKING:
    from pagexfer.svsm.epoch import Replaced
    from pagexfer.testing import SvsmPair
    from pagexfer.testing.pair import Message

move = pytest.fixture(a_move)


def sealed(pair: SvsmPair, channel: int, pages: int = PAGES) -> list[Message]:
    """Every bundle of what is pending below `pages`, sealed for `channel` and not sent yet."""
    messages = []
    while message := pair.seal_pages(channel, 0, pages):
        messages.append(message)
    return messages


def opening(pair: SvsmPair, channel: int) -> memoryview:
    """The source's bundle for a new connection of `channel`."""
    buffer = memoryview(bytearray(MAX_BUNDLE_BYTES))
    return buffer[: pair.source.replace_channel(channel, buffer)]


def word(pair: SvsmPair, channel: int, package: memoryview) -> memoryview:
    """What the destination answers to whoever opens `channel` anew with `package`."""
    pair.destination.check_replacement_untrusted(channel, package)
    buffer = memoryview(bytearray(MAX_BUNDLE_BYTES))
    return buffer[: pair.destination.replace_channel(channel, buffer)]


def replaced(pair: SvsmPair, channel: int) -> Replaced:
    """The connection of `channel` broke; everything on it that was not delivered is lost."""
    return pair.source.channel_replaced(channel, word(pair, channel, opening(pair, channel)))


def to_the_end(pair: SvsmPair) -> None:
    """Black-out and all after it."""
    pair.park()
    pair.epoch()
    pair.vcpus()
    pair.manifest()
    pair.ready()
    pair.start()
    pair.running()
    pair.finish()


def assert_same(move: Move) -> None:
    assert move.pair.destination.state is State.RUNNING
    assert np.array_equal(move.memory.words, move.guest.memory.words)
    assert np.array_equal(move.memory.states, move.guest.memory.states)


def in_first_epoch(move: Move) -> SvsmPair:
    pair = move.pair
    pair.handshake()
    pair.open_channels()
    pair.ledger()
    pair.source.begin_epoch()
    return pair


@pytest.mark.parametrize("arrived", [0, 1, 2])
@pytest.mark.parametrize("channel", [0, 1])
def test_r9_lost_bundles_go_again_with_the_next_epoch(move: Move, channel: int, arrived: int) -> None:
    pair = in_first_epoch(move)
    messages = [m for start in range(0, PAGES, 4) for m in [pair.seal_pages(channel, start, start + 4)] if m]
    assert len(messages) > 2
    for message in messages[:arrived]:
        pair.deliver(message)
    lost = replaced(pair, channel)
    assert lost == (sum(m.header.entry_count for m in messages[arrived:]), False, False)
    pair.send(pair.seal_token(BundleKind.EPOCH_TOKEN))
    pending = pair.source.begin_epoch()
    assert pending.count() >= lost.pages
    for message in sealed(pair, channel):
        pair.send(message)
    pair.send(pair.seal_token(BundleKind.EPOCH_TOKEN))
    to_the_end(pair)
    assert_same(move)


def test_r9_token_and_ledger_that_were_lost_are_sealed_again(move: Move) -> None:
    pair = move.pair
    pair.handshake()
    pair.open_channels()
    pair.seal_token(BundleKind.LEDGER)
    assert replaced(pair, 0) == (0, False, True)
    pair.ledger()
    pair.source.begin_epoch()
    for message in sealed(pair, 1):
        pair.send(message)
    pair.seal_token(BundleKind.EPOCH_TOKEN)
    assert replaced(pair, 0) == (0, True, False)
    pair.send(pair.seal_token(BundleKind.EPOCH_TOKEN))
    to_the_end(pair)
    assert_same(move)


def test_r9_token_whose_channel_lost_pages_is_never_taken(move: Move) -> None:
    """The token was sealed before anybody knew of the loss: channel 0 is replaced, too, and the token counts anew."""
    pair = in_first_epoch(move)
    messages = sealed(pair, 1)
    pair.deliver(messages[0])
    pair.seal_token(BundleKind.EPOCH_TOKEN)
    lost = replaced(pair, 1)
    assert lost.pages == PAGES - messages[0].header.entry_count
    assert replaced(pair, 0).token
    pair.send(pair.seal_token(BundleKind.EPOCH_TOKEN))
    assert pair.source.begin_epoch().count() >= lost.pages
    for message in sealed(pair, 1):
        pair.send(message)
    pair.send(pair.seal_token(BundleKind.EPOCH_TOKEN))
    to_the_end(pair)
    assert_same(move)


def test_r9_token_that_arrived_stays(move: Move) -> None:
    pair = move.pair
    pair.until_precopy()
    assert replaced(pair, 0) == (0, False, False)
    to_the_end(pair)
    assert_same(move)


def test_r9_openings_that_were_lost_too(move: Move) -> None:
    pair = in_first_epoch(move)
    messages = sealed(pair, 1)
    pair.deliver(messages[0])
    opening(pair, 1)  # never arrives
    word(pair, 1, opening(pair, 1))  # arrives, and its answer does not
    lost = replaced(pair, 1)
    assert lost.pages == PAGES - messages[0].header.entry_count
    pair.send(pair.seal_token(BundleKind.EPOCH_TOKEN))
    pair.epoch()
    to_the_end(pair)
    assert_same(move)


def test_r9_channel_that_never_opened(move: Move) -> None:
    pair = move.pair
    pair.handshake()
    pair.send(pair.seal_channel(0))
    pair.seal_channel(1)
    assert replaced(pair, 1) == (0, False, False)
    pair.ledger()
    pair.source.begin_epoch()
    pair._opened.add(1)
    for message in sealed(pair, 1):
        pair.send(message)
    pair.send(pair.seal_token(BundleKind.EPOCH_TOKEN))
    to_the_end(pair)
    assert_same(move)


def test_r9_nothing_of_the_incarnation_before_is_taken_any_more(move: Move) -> None:
    pair = move.pair
    pair.handshake()
    pair.open_channels()
    pair.source.begin_epoch()
    late = pair.seal_pages(1, 0, PAGES)
    assert late is not None
    replaced(pair, 1)
    with pytest.raises(RemoteProtocolError):
        pair.deliver(late)
    assert pair.destination.state is State.FAILED


def test_r9_a_channel_seals_nothing_until_the_destinations_word(move: Move) -> None:
    pair = move.pair
    pair.handshake()
    pair.open_channels()
    pair.source.begin_epoch()
    package = opening(pair, 1)
    with pytest.raises(LocalProtocolError):
        pair.seal_pages(1, 0, PAGES)
    assert pair.seal_pages(0, 0, 1)
    pair.source.channel_replaced(1, word(pair, 1, package))
    assert pair.seal_pages(1, 0, PAGES)


def test_r9_keys_and_numbers_are_new(move: Move) -> None:
    pair = move.pair
    pair.handshake()
    pair.open_channels()
    pair.source.begin_epoch()
    before = pair.seal_pages(1, 0, 1)
    replaced(pair, 1)
    after = pair.seal_pages(1, 1, 2)
    assert before is not None
    assert after is not None
    assert (before.header.incarnation, before.header.counter) == (0, 1)
    assert (after.header.incarnation, after.header.counter) == (1, 1)


@pytest.mark.parametrize("offset", [0, 6, 7, 10, 24, 26, 28, 32, 40, 44, 50, 70, -1])
def test_r8_forged_opening_is_a_strangers(move: Move, offset: int) -> None:
    pair = move.pair
    pair.handshake()
    pair.open_channels()
    package = opening(pair, 1)
    forged = memoryview(bytearray(package))
    forged[offset] ^= 1
    with pytest.raises(RemoteProtocolError):
        pair.destination.check_replacement_untrusted(1, forged)
    with pytest.raises(LocalProtocolError):
        pair.destination.replace_channel(1, memoryview(bytearray(MAX_BUNDLE_BYTES)))
    assert pair.destination.state is State.KEYED
    pair.source.channel_replaced(1, word(pair, 1, package))


def test_r8_replayed_or_crossed_opening_is_a_strangers(move: Move) -> None:
    pair = move.pair
    pair.handshake()
    pair.open_channels()
    first = opening(pair, 1)
    pair.source.channel_replaced(1, word(pair, 1, first))
    with pytest.raises(ReplayError):
        pair.destination.check_replacement_untrusted(1, first)
    second = opening(pair, 1)
    with pytest.raises(RemoteProtocolError):
        pair.destination.check_replacement_untrusted(0, second)
    pair.source.channel_replaced(1, word(pair, 1, second))


@pytest.mark.parametrize("offset", [6, 24, 26, 28, 32, 64, 72, 80, -1])
def test_r8_forged_word_ends_the_session(move: Move, offset: int) -> None:
    pair = move.pair
    pair.handshake()
    pair.open_channels()
    answer = word(pair, 1, opening(pair, 1))
    answer[offset] ^= 1
    with pytest.raises(RemoteProtocolError):
        pair.source.channel_replaced(1, answer)
    assert pair.source.state is State.ABORTED
    assert move.guest.gate.running


def test_r8_word_on_another_incarnation_ends_the_session(move: Move) -> None:
    pair = move.pair
    pair.handshake()
    pair.open_channels()
    old = word(pair, 1, opening(pair, 1))
    opening(pair, 1)
    with pytest.raises(RemoteProtocolError):
        pair.source.channel_replaced(1, old)
    assert pair.source.state is State.ABORTED


def lying_word(pair: SvsmPair, records: bytes, kind: BundleKind = BundleKind.CHANNEL_STATE) -> memoryview:
    """Records that no honest destination seals, under the very key that it would seal them with."""
    opening(pair, 1)
    keys = pair.destination._established().keys
    sealer = Sealer(keys, Direction.BACKWARD, 1, pair.source._session_streams()._current(1).incarnation)
    buffer = memoryview(bytearray(MAX_BUNDLE_BYTES))
    return buffer[: sealer.seal(kind, FINAL_EPOCH, b"", records, buffer)]


def lies(pair: SvsmPair) -> dict[str, bytes]:
    """The true record is that of two bundles; `after` is that of three, of which one is on its way."""
    true = pair.destination._session_streams().opener(1).record()
    packed = true.pack()
    return {
        "another transcript": packed[:12] + bytes(48),
        "one bundle less under the same transcript": packed[:4]
        + struct.pack("<Q", true.bundles - 1)
        + packed[12:],
        "more than were sealed": packed[:4] + struct.pack("<Q", 99) + packed[12:],
        "another channel": b"\0\0" + packed[2:],
        "an incarnation that never was": packed[:2] + b"\7\0" + packed[4:],
        "twice the same": packed + packed,
        "half a record": packed[:-1],
    }


LIES = [
    "another transcript",
    "one bundle less under the same transcript",
    "more than were sealed",
    "another channel",
    "an incarnation that never was",
    "twice the same",
    "half a record",
]


@pytest.mark.parametrize("lie", LIES)
def test_r9_record_that_cannot_be_ends_the_session(move: Move, lie: str) -> None:
    pair = move.pair
    pair.handshake()
    pair.open_channels()
    pair.source.begin_epoch()
    for message in (pair.seal_pages(1, 0, 1), pair.seal_pages(1, 1, 2)):
        assert message is not None
    pair.deliver(pair.sent[-2])
    with pytest.raises(RemoteProtocolError):
        pair.source.channel_replaced(1, lying_word(pair, lies(pair)[lie]))
    assert pair.source.state is State.ABORTED


def test_r9_another_kind_under_that_key_ends_the_session(move: Move) -> None:
    pair = move.pair
    pair.handshake()
    pair.open_channels()
    with pytest.raises(IntegrityError):
        pair.source.channel_replaced(1, lying_word(pair, b"", BundleKind.READY))
    assert pair.source.state is State.ABORTED


def test_r9_bundles_of_a_closed_epoch_cannot_be_lost(move: Move) -> None:
    pair = move.pair
    pair.until_precopy()
    pair.source.begin_epoch()
    with pytest.raises(IntegrityError):
        pair.source.channel_replaced(1, lying_word(pair, b""))
    assert pair.source.state is State.ABORTED


def test_no_replacement_outside_of_the_epochs(move: Move) -> None:
    pair = move.pair
    with pytest.raises(LocalProtocolError):
        opening(pair, 0)
    pair.until_manifest()
    with pytest.raises(LocalProtocolError):
        opening(pair, 0)
    with pytest.raises(LocalProtocolError):
        pair.destination.check_replacement_untrusted(0, memoryview(bytearray(80)))
    pair.manifest()
    with pytest.raises(LocalProtocolError):
        opening(pair, 1)


def test_a_channel_that_breaks_again_and_again_ends(move: Move) -> None:
    pair = move.pair
    pair.handshake()
    pair.open_channels()
    for _ in range(MAX_INCARNATIONS - 1):
        replaced(pair, 1)
    with pytest.raises(KeyExhausted):
        opening(pair, 1)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_r9_any_losses_at_any_time(data: st.DataObject) -> None:
    """Epochs in which channels break anywhere, tokens among what is lost; at the end both guests are the same."""
    with closing(Move()) as move:
        pair = move.pair
        pair.handshake()
        pair.open_channels()
        pair.ledger()
        pair._opened |= {0, 1}
        for _ in range(data.draw(st.integers(1, 3))):
            pair.source.begin_epoch()
            dirty = False
            for start in range(0, PAGES, 4):
                channel = data.draw(st.integers(0, 1))
                message = pair.seal_pages(channel, start, start + 4)
                if message is None:
                    continue
                if data.draw(st.booleans()):
                    pair.deliver(message)
                else:
                    dirty |= replaced(pair, channel).pages > 0
            token = pair.seal_token(BundleKind.EPOCH_TOKEN)
            if data.draw(st.booleans()):
                pair.deliver(token)
            else:
                assert replaced(pair, 0).token
                pair.send(pair.seal_token(BundleKind.EPOCH_TOKEN))
        to_the_end(pair)
        assert_same(move)


def test_records_of_any_size_parse_to_themselves() -> None:
    assert parse_records_untrusted(b"") == ()
    packed = bytes(range(60)) * 3
    assert pack_records(parse_records_untrusted(packed)) == packed
