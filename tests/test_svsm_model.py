"""Any host against both SVSMs: hypothesis writes pages, gives commands in any order and does anything with the messages."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pagexfer.errors import PagexferError
from pagexfer.svsm.ledger import check_chain
from pagexfer.testing import Message
from pagexfer.wire.bundle import BundleKind, Direction
from pagexfer.wire.ledger import parse_ledger_untrusted
from pagexfer.wire.page_state import VALIDATED
from pagexfer.wire.slot import SessionStatus as State

from .small_guests import Move

if TYPE_CHECKING:
    from collections.abc import Callable

PAGES = 24
CHANNELS = 2
STEP_PAGES = 10
_TOKENS = [BundleKind.LEDGER, BundleKind.EPOCH_TOKEN, BundleKind.MANIFEST, BundleKind.START_TOKEN]
_ANSWERS = [BundleKind.READY, BundleKind.RUNNING, BundleKind.ABORT_TOKEN]


class AnyHost(RuleBasedStateMachine):
    """The host holds every message that was ever sealed (`pair.sent`) and decides alone what arrives when.

    `queue` is what an honest host would deliver next, so that long honest stretches are likely too.
    """

    @initialize(
        hostile=st.booleans(),
        how=st.sampled_from(["tracked", "audited", "compared"]),
        done=st.integers(0, 9),
    )
    def begin(self, hostile: bool, how: str, done: int) -> None:
        """Where the run begins, and whether the network is an enemy too; a wild one seldom lets a session live for long.

        Nobody tells the SVSM what the guest writes unless it is `tracked`.
        """
        self.hostile = hostile
        audit, compared = how == "audited", how == "compared"
        self.move = Move(
            pages=PAGES,
            channels=CHANNELS,
            tracked=not audit,
            audit=audit,
            compared=compared,
            step_pages=STEP_PAGES,
        )
        self.pair = self.move.pair
        self.queue: list[Message] = []
        self.at_black_out: tuple[bytes, bytes, list[bytes]] | None = None
        self.pair.handshake()
        pair = self.pair
        park = [pair.park, pair.audit] if audit else [pair.park]
        way = [pair.open_channels, pair.ledger, pair.epoch, *park, pair.epoch, pair.vcpus]
        way += [pair.manifest, pair.ready]
        for step in way[: max(0, done - 1)]:
            step()

    def attempt(self, step: Callable[[], Message | object | None]) -> None:
        """The host tries; a refusal is an answer like any other, anything but our own errors a defect."""
        try:
            sealed = step()
        except PagexferError:
            return
        if isinstance(sealed, Message):
            self.queue.append(sealed)

    # The guest

    @precondition(lambda self: self.move.guest.gate.running)
    @rule(gfns=st.sets(st.integers(0, PAGES - 1), min_size=1), word=st.integers(0, 3))
    def guest_writes(self, gfns: set[int], word: int) -> None:
        for gfn in gfns:
            if self.move.guest.memory.states[gfn] & VALIDATED:
                self.move.guest.write(gfn, word)

    @precondition(lambda self: self.move.guest.gate.running)
    @rule(gfn=st.integers(0, PAGES - 1), permissions=st.integers(0, 31), adjust=st.booleans())
    def guest_changes_a_page_state(self, gfn: int, permissions: int, adjust: bool) -> None:
        memory, gfns = self.move.guest.memory, np.array([gfn])
        validated = bool(memory.states[gfn] & VALIDATED)
        if adjust and validated:
            memory.rmpadjust(gfns, 1, permissions)
            return
        memory.pvalidate(gfns, validated=not validated)
        memory.words[gfn] = 0  # a page that changes hands has lost its content

    # Commands to the source

    @rule(channel=st.integers(0, CHANNELS - 1))
    def open_channel(self, channel: int) -> None:
        self.attempt(lambda: self.pair.seal_channel(channel))

    @rule()
    def begin_epoch(self) -> None:
        self.attempt(self.pair.source.begin_epoch)

    @rule()
    def collect_part(self) -> None:
        self.attempt(self.pair.source.collect_part)

    @rule()
    def audit(self) -> None:
        self.attempt(self.pair.source.audit)

    @rule(channel=st.integers(0, CHANNELS - 1), start=st.integers(0, PAGES), pages=st.integers(0, PAGES))
    def export(self, channel: int, start: int, pages: int) -> None:
        self.attempt(lambda: self.pair.seal_pages(channel, start, start + pages))

    @rule(kind=st.sampled_from(_TOKENS))
    def token(self, kind: BundleKind) -> None:
        self.attempt(lambda: self.pair.seal_token(kind))

    @rule(slow=st.sets(st.integers(0, 1), max_size=1))
    def park(self, slow: set[int]) -> None:
        self.move.guest.gate.slow = slow if self.move.guest.gate.running else set()
        self.attempt(self.pair.source.park)

    @rule(vcpu=st.integers(0, 2))
    def vcpu(self, vcpu: int) -> None:
        self.attempt(lambda: self.pair.seal_vcpu(vcpu))

    @rule(first=st.sampled_from([0, 64]), log=st.integers(0, (1 << PAGES) - 1))
    def hint(self, first: int, log: int) -> None:
        self.attempt(lambda: self.pair.source.hint(first, log.to_bytes(8, "little")))

    @rule(kind=st.sampled_from(_ANSWERS))
    def answer(self, kind: BundleKind) -> None:
        self.attempt(lambda: self.pair.seal_answer(kind))

    @rule(end=st.sampled_from(["finish source", "finish destination"]))
    def finish(self, end: str) -> None:
        side = self.pair.source if end == "finish source" else self.pair.destination
        self.attempt(side.finish)

    # Long honest stretches, or hardly any run would come far

    @precondition(lambda self: self.pair.destination.state is State.KEYED)
    @rule()
    def honest_channels(self) -> None:
        self.deliver_all()
        for channel in range(CHANNELS):
            self.attempt(partial(self.pair.seal_channel, channel))
        self.attempt(partial(self.pair.seal_token, BundleKind.LEDGER))
        self.deliver_all()

    @rule()
    def honest_epoch(self) -> None:
        self.attempt(self.pair.source.begin_epoch)
        for channel in (0, 1, 0, 1):
            self.attempt(partial(self.pair.seal_pages, channel, 0, PAGES))
        self.attempt(lambda: self.pair.seal_token(BundleKind.EPOCH_TOKEN))
        self.deliver_all()

    @rule(audit=st.booleans())
    def honest_black_out(self, audit: bool) -> None:
        self.move.guest.gate.slow = set()
        self.attempt(self.pair.source.park)
        if audit:
            self.attempt(self.pair.source.audit)
        self.honest_epoch()
        for vcpu in range(2):
            self.attempt(partial(self.pair.seal_vcpu, vcpu))
        self.attempt(lambda: self.pair.seal_token(BundleKind.MANIFEST))
        self.deliver_all()
        self.attempt(lambda: self.pair.seal_answer(BundleKind.READY))
        self.deliver_all()

    @rule(confirm=st.booleans())
    def honest_hand_over(self, confirm: bool) -> None:
        self.attempt(partial(self.pair.seal_token, BundleKind.START_TOKEN))
        self.deliver_all()
        if confirm:
            self.attempt(partial(self.pair.seal_answer, BundleKind.RUNNING))
            self.deliver_all()

    @rule()
    def deliver_all(self) -> None:
        while self.queue:
            message = self.queue.pop(0)
            self.attempt(partial(self.pair.deliver, message))

    # The network

    @precondition(lambda self: self.queue)
    @rule()
    def deliver_next(self) -> None:
        self.attempt(lambda: self.pair.deliver(self.queue.pop(0)))

    @precondition(lambda self: self.hostile and self.queue)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        self.queue.pop(data.draw(st.integers(0, len(self.queue) - 1)))

    @precondition(lambda self: self.hostile and len(self.queue) > 1)
    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        self.queue.append(self.queue.pop(data.draw(st.integers(0, len(self.queue) - 2))))

    @precondition(lambda self: self.hostile and self.pair.sent)
    @rule(data=st.data())
    def replay(self, data: st.DataObject) -> None:
        self.queue.insert(0, data.draw(st.sampled_from(self.pair.sent)))

    @precondition(lambda self: self.hostile and self.queue)
    @rule(offset=st.integers(-40, 100), bits=st.integers(1, 255))
    def flip(self, offset: int, bits: int) -> None:
        size = len(self.queue[0].data)
        self.queue[0] = self.queue[0].flipped(offset % size, bits)

    @precondition(lambda self: self.hostile and self.queue)
    @rule(channel=st.integers(0, CHANNELS - 1), reflect=st.booleans())
    def cross(self, channel: int, reflect: bool) -> None:
        message = self.queue[0].crossed(channel)
        if reflect:
            message = Message(Direction(3 - message.direction), channel, message.data)
        self.queue[0] = message

    @precondition(lambda self: self.hostile)
    @rule(source=st.booleans(), sure=st.booleans())
    def abort(self, source: bool, sure: bool) -> None:
        if sure or self.pair.source.state is State.STARTED:  # not too often, or most runs end early
            self.attempt(self.pair.source.abort if source else self.pair.destination.fail)

    # What holds whatever the host does

    @invariant()
    def destination_runs_only_the_very_guest(self) -> None:
        if self.pair.source.state is State.PARKED and self.at_black_out is None:
            self.at_black_out = (
                self.move.guest.memory.words.tobytes(),
                self.move.guest.memory.states.tobytes(),
                list(self.move.guest.gate.states),
            )
        assert self.move.gate.running is (self.pair.destination.state is State.RUNNING)
        if self.move.gate.running:
            assert self.at_black_out == (
                self.move.memory.words.tobytes(),
                self.move.memory.states.tobytes(),
                self.move.gate.states,
            )
            # The record stands and is signed by both before the guest runs.
            assert len(check_chain(parse_ledger_untrusted(self.pair.destination.ledger))) == 1

    @invariant()
    def never_both_run(self) -> None:
        may_run_at_source = self.pair.source.state not in (State.PARKED, State.STARTED, State.FINISHED)
        assert self.move.guest.gate.running is may_run_at_source
        assert not (self.move.guest.gate.running and self.move.gate.running)
        if self.move.gate.running:
            assert self.pair.source.state in (State.STARTED, State.FINISHED)
        if self.pair.source.state is State.ABORTED:
            assert self.pair.destination.state is not State.RUNNING

    @invariant()
    def no_nonce_twice(self) -> None:
        numbers = [
            (message.direction, header.session, header.channel, header.incarnation, header.counter)
            for message in self.pair.sent
            for header in [message.header]
        ]
        assert len(numbers) == len(set(numbers))

    def teardown(self) -> None:
        if hasattr(self, "move"):
            self.move.close()


AnyHost.TestCase.settings = settings(max_examples=250, stateful_step_count=30, deadline=None)
TestAnyHost = AnyHost.TestCase
