"""Freshness by comparing: a move whose SVSM is told of no write, and whose tracker is told what was sent.

The destination has what the source's RAM is once the vCPUs are parked, whenever the guest writes, also between a page's
copy and its sealing, and whatever it puts back.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from pagexfer.dirty import PageCopies, content
from pagexfer.dirty.content import ContentTracker
from pagexfer.errors import KeyExhausted, LocalProtocolError, NotReady
from pagexfer.svsm.export import Packager
from pagexfer.svsm.page_digest import fresh_digest
from pagexfer.svsm.sealing import Sealer
from pagexfer.wire.bundle import MAX_BUNDLE_BYTES, BundleKind
from pagexfer.wire.handshake import Freshness

from .small_guests import Move

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

PAGES = 300  # nine whole blocks of 32 pages and a part of one
CHANNELS = 2
EDGES = [0, 127, 128, 255, 256, PAGES - 1]
# Where the guest may write while a bundle is made.
INSTANTS = [(Packager, "package"), (ContentTracker, "sent"), (Sealer, "seal")]


@pytest.fixture
def move() -> Iterator[Move]:
    made = Move(PAGES, compared=True)
    yield made
    made.close()


def meanwhile(stack: ExitStack, owner: type, name: str, act: Callable[[], None], *, after: bool) -> None:
    """Have `act` done at each call of a method, before or after it."""
    method = getattr(owner, name)

    def acting(*arguments: object) -> object:
        if not after:
            act()
        done = method(*arguments)
        if after:
            act()
        return done

    stack.enter_context(patch.object(owner, name, acting))


def hand_over(move: Move) -> None:
    """From the park to the end, as an honest host does it."""
    pair = move.pair
    for step in (pair.park, pair.epoch, pair.vcpus, pair.manifest, pair.ready, pair.start, pair.running):
        step()


def put_back_while_sent(move: Move) -> bool:
    """A page goes 0, 1, 0 around its copy for the first bundle; returns whether the destination has the 0."""
    words = move.guest.memory.words
    words[7] = 0
    move.pair.handshake()
    move.pair.open_channels()
    move.pair.ledger()
    with ExitStack() as stack:
        meanwhile(stack, Packager, "package", lambda: words[7].fill(1), after=False)
        meanwhile(stack, Packager, "package", lambda: words[7].fill(0), after=True)
        move.pair.epoch()
    assert move.memory.words[7, 0] == 1
    hand_over(move)
    return move.arrived()


def test_a_page_that_was_other_while_it_was_sent_is_sent_again(move: Move) -> None:
    assert put_back_while_sent(move)
    assert move.pair.source.freshness is move.pair.destination.freshness is Freshness.DIGEST_AUDIT


def test_it_would_be_lost_if_the_tracker_were_not_told(move: Move, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ContentTracker, "sent", lambda *_arguments: None)
    assert not put_back_while_sent(move)


def test_pages_that_nobody_writes_go_once(move: Move) -> None:
    move.pair.until_precopy()
    assert not move.pair.source.begin_epoch().any()


def test_no_manifest_before_ram_was_compared_after_the_park(move: Move) -> None:
    move.pair.until_precopy()
    move.pair.source.begin_epoch()
    move.guest.memory.words[9] += 1
    move.pair.park()
    move.pair.vcpus()
    with pytest.raises(NotReady, match="compared"):
        move.pair.manifest()
    assert move.pair.source.begin_epoch().gfns().tolist() == list(
        range(32)
    )  # its block, which was sent whole
    with pytest.raises(NotReady, match="dirty or unsent"):
        move.pair.manifest()


def test_a_guest_is_not_another_sessions_while_a_thread_still_tells_what_it_sent(move: Move) -> None:
    """Or what the first session sent would count as sent by the second."""
    told, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        told.set()
        assert go_on.wait(30)

    move.pair.handshake()
    source = move.pair.source
    source.begin_epoch()
    buffer = memoryview(bytearray(MAX_BUNDLE_BYTES))

    def export() -> None:
        with suppress(LocalProtocolError):
            source.export(0, 0, PAGES, buffer)

    with ExitStack() as stack:
        meanwhile(stack, ContentTracker, "sent", wait, after=False)
        thread = threading.Thread(target=export)
        thread.start()
        try:
            assert told.wait(30)
            source.abort()
            assert move.guest.gate.running
            with pytest.raises(LocalProtocolError, match="another session"):
                move.guest.memory.claim()
        finally:
            go_on.set()
            thread.join(30)
    move.guest.memory.claim()


@pytest.mark.parametrize("part", [16, 64, 128])
def test_threads_may_tell_of_their_pages_at_once(part: int) -> None:
    ram = np.random.default_rng(1).integers(1, 1 << 63, (PAGES, 512), dtype=np.uint64)
    tracker = ContentTracker(ram, fresh_digest())
    tracker.start()
    barrier = threading.Barrier(4)

    def tell(thread: int) -> None:
        barrier.wait(30)
        for first in range(thread * part, PAGES, 4 * part):
            gfns = np.arange(first, min(first + part, PAGES))
            copies = PageCopies(part)
            copies.words[: len(gfns)] = ram[gfns]
            tracker.sent(gfns, copies, np.ones(len(gfns), dtype=np.bool_))

    threads = [threading.Thread(target=tell, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not tracker.collect().any()
    blocks = {gfn // content.BLOCK_PAGES for gfn in EDGES}
    for expected in ([gfn for gfn in range(PAGES) if gfn // content.BLOCK_PAGES in blocks], EDGES):
        ram[EDGES, 511] ^= np.uint64(1 << 63)
        found = tracker.collect().gfns().tolist()
        assert set(EDGES) <= set(found) <= set(expected)


class WritingGuest(RuleBasedStateMachine):
    """The guest writes between and within the host's steps, also of one pass; bundles fail; and then it is parked."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = patch.object(content, "_STEP_BLOCKS", 1)
        self.steps.start()
        self.move = Move(PAGES, compared=True)
        self.open = False
        pair = self.move.pair
        pair.handshake()
        pair.open_channels()
        pair.ledger()

    def store(self, writes: dict[int, int]) -> None:
        words: NDArray[np.uint64] = self.move.guest.memory.words
        for gfn, value in writes.items():
            words[gfn] = value

    writes = st.dictionaries(st.sampled_from(EDGES), st.integers(0, 2), max_size=4)

    @rule(writes=writes)
    def write(self, writes: dict[int, int]) -> None:
        self.store(writes)

    @precondition(lambda self: not self.open)
    @rule()
    def look_at_a_part(self) -> None:
        self.move.pair.source.collect_part()

    @precondition(lambda self: not self.open)
    @rule()
    def begin_epoch(self) -> None:
        self.move.pair.source.begin_epoch()
        self.open = True

    @precondition(lambda self: self.open)
    @rule(
        channel=st.integers(0, CHANNELS - 1),
        start=st.sampled_from([0, 100, 128, 256]),
        first=writes,
        then=writes,
        instant=st.sampled_from(INSTANTS),
    )
    def export(
        self, channel: int, start: int, first: dict[int, int], then: dict[int, int], instant: tuple[type, str]
    ) -> None:
        with ExitStack() as stack:
            meanwhile(stack, *instant, lambda: self.store(first), after=False)
            meanwhile(stack, *instant, lambda: self.store(then), after=True)
            message = self.move.pair.seal_pages(channel, start, PAGES)
        if message is not None:
            self.move.pair.send(message)

    @precondition(lambda self: self.open)
    @rule(start=st.sampled_from(EDGES))
    def fail_to_export(self, start: int) -> None:
        """After the tracker was told."""
        with (
            patch.object(Sealer, "seal", side_effect=KeyExhausted("used up")),
            suppress(KeyExhausted),
        ):
            self.move.pair.seal_pages(0, start, PAGES)

    @precondition(lambda self: self.open)
    @rule()
    def close_epoch(self) -> None:
        while message := self.move.pair.seal_pages(0, 0, PAGES):
            self.move.pair.send(message)
        self.move.pair.send(self.move.pair.seal_token(BundleKind.EPOCH_TOKEN))
        self.open = False

    def teardown(self) -> None:
        if not self.open:
            self.begin_epoch()
        self.close_epoch()
        hand_over(self.move)
        assert self.move.arrived()
        self.move.close()
        self.steps.stop()


TestWritingGuest = WritingGuest.TestCase
TestWritingGuest.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
