"""Slots served by threads of their own: what one of them may find while another is in the middle of a bundle."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from pagexfer.errors import NotReady
from pagexfer.testing import Message
from pagexfer.wire.bundle import MAX_BUNDLE_BYTES, BundleKind, Direction

from .small_guests import PAGES, Move, a_move

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

move = pytest.fixture(a_move)


class TurnTaking:
    """A lock behind which another thread is always next: at each release it does `act`, the number of the release given."""

    def __init__(self, act: Callable[[int], None]) -> None:
        self._lock = threading.Lock()
        self._act = act
        self._releases = 0
        self._acting = False

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._lock.release()
        if not self._acting:
            self._acting = True
            self._releases += 1
            self._act(self._releases)
            self._acting = False


def test_no_token_leaves_a_bundle_out_that_is_being_sealed(
    move: Move, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R3: as soon as nothing is being sealed any more, everything is counted."""
    pair = move.pair
    pair.handshake()
    pair.open_channels()
    pair.ledger()
    pair.source.begin_epoch()
    token = memoryview(bytearray(MAX_BUNDLE_BYTES))
    closed: list[Message] = []

    def close(_release: int) -> None:
        try:
            length = pair.source.epoch_token(token)
        except NotReady:
            return
        closed.append(Message(Direction.FORWARD, 0, bytes(token[:length])))

    monkeypatch.setattr(pair.source, "lock", TurnTaking(close))
    pages = pair.seal_pages(1, 0, PAGES)
    assert pages is not None
    pair.deliver(pages)
    assert closed
    pair.deliver(closed[0])


def test_no_epoch_ends_before_what_was_opened_counts(move: Move, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = move.pair
    pair.handshake()
    pair.open_channels()
    pair.ledger()
    pair.source.begin_epoch()
    pages = pair.seal_pages(1, 0, PAGES)
    assert pages is not None
    token = pair.seal_token(BundleKind.EPOCH_TOKEN)

    def close(release: int) -> None:
        if release == 3:  # the channel was found, the entries were checked, the pages were brought to RAM
            pair.deliver(token)

    monkeypatch.setattr(pair.destination, "lock", TurnTaking(close))
    pair.deliver(pages)
    pair.park()
    pair.epoch()
    pair.vcpus()
    pair.manifest()
    assert move.arrived()
