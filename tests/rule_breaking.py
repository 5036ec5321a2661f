"""What the tests of the rules share: bundles that no honest source makes, and what a refusal has to look like."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
import pytest

from pagexfer.errors import (
    KeyPoisoned,
    LocalProtocolError,
    PagexferError,
    RemoteProtocolError,
)
from pagexfer.testing import Message, SvsmPair
from pagexfer.wire.bundle import HEADER_BYTES, BundleKind, Direction, Operation, pack_entries
from pagexfer.wire.page_state import PRIVATE
from pagexfer.wire.slot import SessionStatus as State

from .small_guests import PAGES, Move

if TYPE_CHECKING:
    from collections.abc import Callable


def refused(move: Move, message: Message, error: type[PagexferError]) -> None:
    """The destination refuses `message`: RAM untouched, FAILED, keys wiped; and the guest goes on at the source."""
    before = move.memory.words.copy()
    states = move.memory.states.copy()
    with pytest.raises(error):
        move.pair.deliver(message)
    assert np.array_equal(move.memory.words, before)
    assert np.array_equal(move.memory.states, states)
    destination_is_dead(move)
    if move.pair.source.state is not State.STARTED:
        move.pair.source.abort()
        assert move.guest.gate.running


def destination_is_dead(move: Move) -> None:
    pair = move.pair
    assert pair.destination.state is State.FAILED
    assert not move.gate.running
    for message in pair.sent:
        if message.direction is Direction.FORWARD:
            with pytest.raises((LocalProtocolError, KeyPoisoned, RemoteProtocolError)):
                pair.deliver(message)
    with suppress(LocalProtocolError):
        pair.seal_answer(BundleKind.ABORT_TOKEN)  # the one that a destination gives that was verified
    for kind in (BundleKind.READY, BundleKind.RUNNING, BundleKind.ABORT_TOKEN):
        with pytest.raises(LocalProtocolError):
            pair.seal_answer(kind)
    assert pair.destination.state is State.FAILED


def source_is_dead(move: Move) -> None:
    """The source wiped its keys: it seals nothing any more."""
    seals: list[Callable[[], object]] = [
        lambda: move.pair.seal_pages(0, 0, PAGES),
        lambda: move.pair.seal_token(BundleKind.EPOCH_TOKEN),
        lambda: move.pair.seal_token(BundleKind.START_TOKEN),
    ]
    for seal in seals:
        with pytest.raises((LocalProtocolError, KeyPoisoned)):
            seal()


def sealed_by_source(
    pair: SvsmPair,
    kind: BundleKind,
    payload: bytes,
    *,
    channel: int = 0,
    epoch: int = 1,
    entries: bytes = b"",
) -> Message:
    """A bundle that an authentic source would never make, under its real key and next number."""
    out = memoryview(bytearray(HEADER_BYTES + len(entries) + len(payload) + 16))
    pair.source._session_streams().sealer(channel).seal(kind, epoch, entries, payload, out)
    return Message(Direction.FORWARD, channel, bytes(out))


def one_page(gfn: int) -> bytes:
    return pack_entries(
        np.array([gfn]), np.array([Operation.DATA], dtype=np.uint8), np.array([PRIVATE], dtype=np.uint32)
    )


def open_pair(move: Move) -> SvsmPair:
    move.pair.handshake()
    move.pair.open_channels()
    move.pair.source.begin_epoch()
    return move.pair


def pages(pair: SvsmPair, channel: int = 0) -> Message:
    """The first part of RAM, or once that was sealed, the rest."""
    message = pair.seal_pages(channel, 0, PAGES // 2) or pair.seal_pages(channel, PAGES // 2, PAGES)
    assert message is not None
    return message
