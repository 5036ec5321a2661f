"""The security contract, continued: who may run the guest (R7), how a session ends (R8), and shared memory (R10)."""

from __future__ import annotations

import hashlib
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from pagexfer.errors import (
    GateError,
    IntegrityError,
    LocalProtocolError,
    PagexferError,
    ReflectionError,
    RefusalCode,
    RemoteProtocolError,
    ReplayError,
)
from pagexfer.svsm import sealing
from pagexfer.svsm.commands import destination_channel, source_channel
from pagexfer.testing import Message, SvsmPair
from pagexfer.wire.bundle import HEADER_BYTES, BundleKind, Direction
from pagexfer.wire.constants import FINAL_EPOCH, PAGE_SIZE
from pagexfer.wire.slot import Command, SlotStatus
from pagexfer.wire.slot import SessionStatus as State

from .host_slot import HostSlot
from .rule_breaking import (
    destination_is_dead,
    open_pair,
    pages,
    refused,
    source_is_dead,
)
from .small_guests import ATTESTOR, PAGES, Move, a_move

if TYPE_CHECKING:
    from collections.abc import Iterator


BUFFER_BYTES = 1 << 20  # a bundle with all of the small guest's pages fits


@pytest.fixture
def move() -> Iterator[Move]:
    yield from a_move()


# R7: never both


def test_r7_before_the_start_token_the_source_resumes_alone(move: Move) -> None:
    pair = move.pair
    pair.until_manifest()
    pair.manifest()
    pair.ready()
    pair.source.abort()
    assert move.guest.gate.running
    source_is_dead(move)
    assert not move.gate.running


def test_r7_after_the_start_token_nothing_at_the_source_resumes_it(move: Move) -> None:
    pair = started(move)
    with pytest.raises(LocalProtocolError):
        pair.source.abort()
    with pytest.raises(RemoteProtocolError):
        pair.source.accept_untrusted(memoryview(b"rubbish"))
    with pytest.raises(LocalProtocolError):
        pair.source.abort()
    assert pair.source.state is State.STARTED
    assert not move.guest.gate.running
    source_is_dead(move)


def test_r7_abort_token_comes_only_from_a_destination_that_is_failed_for_good(move: Move) -> None:
    pair = started(move)
    word = pair.seal_answer(BundleKind.ABORT_TOKEN)
    destination_is_dead(move)
    assert not move.guest.gate.running
    pair.send(word)
    assert pair.source.state is State.ABORTED
    assert move.guest.gate.running


def test_r7_destination_that_runs_gives_no_abort_token(move: Move) -> None:
    pair = started(move)
    pair.send(pair.sent[-1])
    assert move.gate.running
    with pytest.raises(LocalProtocolError):
        pair.seal_answer(BundleKind.ABORT_TOKEN)
    with pytest.raises(LocalProtocolError):
        pair.destination.fail()
    assert pair.destination.state is State.RUNNING


def test_r7_destination_before_its_verdict_gives_no_abort_token(move: Move) -> None:
    move.pair.until_manifest()
    with pytest.raises(LocalProtocolError):
        move.pair.seal_answer(BundleKind.ABORT_TOKEN)
    assert move.pair.destination.state is State.IMPORTING


def test_r7_forged_abort_token_does_not_resume_the_source(move: Move) -> None:
    pair = started(move)
    word = pair.seal_answer(BundleKind.ABORT_TOKEN)
    with pytest.raises(IntegrityError):
        pair.deliver(word.flipped(-1))
    assert pair.source.state is State.STARTED
    assert not move.guest.gate.running


def test_r7_old_sessions_abort_does_not_free_the_vcpus_of_a_new_one() -> None:
    """A fork: the first session is over, the second has parked the guest, the host aborts the first once more."""
    first = Move()
    first.pair.until_precopy()
    first.pair.source.abort()
    second = another_move_of(first)
    second.until_manifest()
    second.manifest()
    second.ready()
    second.start()
    first.pair.source.abort()
    assert not first.guest.gate.running
    assert second.destination.state is State.RUNNING
    first.close()


def test_r7_unused_sessions_abort_does_not_free_the_vcpus(move: Move) -> None:
    unused = another_move_of(move)
    move.pair.migrate()
    unused.source.abort()
    assert not move.guest.gate.running


@pytest.mark.parametrize("finished", [False, True])
def test_r7_guest_is_moved_by_one_session_at_a_time_and_by_none_after_it_left(
    move: Move, finished: bool
) -> None:
    if finished:
        move.pair.migrate()
    else:
        move.pair.handshake()
    second = another_move_of(move)
    with pytest.raises(LocalProtocolError):
        second.handshake()
    assert second.source.state is State.IDLE
    second.source.abort()
    assert move.guest.gate.running is not finished


def test_r7_guest_that_stayed_can_be_moved_again(move: Move) -> None:
    move.pair.until_manifest()
    move.pair.source.abort()
    move.guest.write(1, 77)
    second = another_move_of(move)
    second.migrate()
    assert move.arrived()


def another_move_of(move: Move) -> SvsmPair:
    """A second session for the same guest, to a destination that knows nothing of the first."""
    fresh = Move()
    pair = SvsmPair(
        move.guest.memory, move.guest.gate, fresh.memory, fresh.gate, ATTESTOR, tracker=move.guest.tracker
    )
    move.memory, move.gate = fresh.memory, fresh.gate
    return pair


def started(move: Move) -> SvsmPair:
    """The start token is sealed and in the host's hands."""
    pair = move.pair
    pair.until_manifest()
    pair.manifest()
    pair.ready()
    pair.seal_token(BundleKind.START_TOKEN)
    assert pair.source.state is State.STARTED
    return pair


# R8: the first bad thing ends the session; strangers do not count


def test_r8_every_byte_of_header_entries_and_tag_counts(move: Move) -> None:
    """Every bit that the host flips is refused, and no byte of the bundle reaches RAM."""
    length = HEADER_BYTES + 8 + PAGE_SIZE + 16
    offsets = [*range(HEADER_BYTES + 8), HEADER_BYTES + 100, *range(length - 16, length)]
    for offset in offsets:
        attacked = Move(pages=2)
        attacked.guest.write(1, 3)
        pair = open_pair(attacked)
        message = pair.seal_pages(0, 0, 1)
        assert message is not None
        assert len(message.data) == length
        refused(attacked, message.flipped(offset, 1 << offset % 8), RemoteProtocolError)
        attacked.close()


def test_r8_truncated_and_lengthened_bundles_are_refused() -> None:
    for cut in (0, 10, HEADER_BYTES, HEADER_BYTES + 15, -1, None):
        attacked = Move()
        pair = open_pair(attacked)
        message = pages(pair)
        data = message.data + b"\0" if cut is None else message.data[:cut]
        refused(attacked, Message(message.direction, 0, data), RemoteProtocolError)
        attacked.close()


def test_r8_crossed_channel_is_refused(move: Move) -> None:
    pair = open_pair(move)
    refused(move, pages(pair).crossed(1), ReflectionError)


def test_r8_bundle_of_another_session_is_refused(move: Move) -> None:
    other = Move()
    refused_message = pages(open_pair(other))
    open_pair(move)
    refused(move, refused_message, ReflectionError)
    other.close()


def test_r8_answer_reflected_to_the_destination_is_refused(move: Move) -> None:
    pair = move.pair
    pair.until_manifest()
    pair.manifest()
    ready = pair.seal_answer(BundleKind.READY)
    refused(move, Message(Direction.FORWARD, 0, ready.data), PagexferError)


def test_r8_answer_sent_forward_reflected_to_the_source_is_refused(move: Move) -> None:
    pair = move.pair
    pair.until_manifest()
    pair.manifest()
    with pytest.raises(ReflectionError):
        pair.deliver(Message(Direction.BACKWARD, 0, pair.sent[-1].data))
    assert pair.source.state is State.ABORTED
    assert move.guest.gate.running
    source_is_dead(move)


@pytest.mark.parametrize("forge", ["flip", "entries", "rubbish", "replay"])
def test_r8_forged_answer_ends_the_session_at_the_source(move: Move, forge: str) -> None:
    pair = move.pair
    pair.until_manifest()
    pair.manifest()
    ready = pair.seal_answer(BundleKind.READY)
    match forge:
        case "flip":
            bad = ready.flipped(HEADER_BYTES + 3)
        case "entries":
            header = ready.header._replace(entry_count=1)
            bad = Message(Direction.BACKWARD, 0, header.pack() + bytes(8) + ready.data[HEADER_BYTES:])
        case "rubbish":
            bad = Message(Direction.BACKWARD, 0, b"rubbish")
        case _:
            pair.send(ready)
            bad = ready
    with pytest.raises(RemoteProtocolError):
        pair.deliver(bad)
    assert pair.source.state is State.ABORTED
    assert move.guest.gate.running
    source_is_dead(move)


@pytest.mark.parametrize(("epoch", "digest"), [(3, None), (FINAL_EPOCH, bytes(48)), (FINAL_EPOCH, b"")])
def test_r8_authentic_answer_to_something_else_ends_the_session(
    move: Move, epoch: int, digest: bytes | None
) -> None:
    pair = move.pair
    pair.until_manifest()
    pair.manifest()
    sealer = pair.destination._session_streams().answers
    if digest is None:
        digest = hashlib.sha384(pair.source._manifest).digest()
    out = memoryview(bytearray(HEADER_BYTES + len(digest) + 16))
    sealer.seal(BundleKind.READY, epoch, b"", digest, out)
    with pytest.raises(IntegrityError):
        pair.source.accept_untrusted(out)
    assert pair.source.state is State.ABORTED
    assert move.guest.gate.running


def test_r8_stranger_at_a_channel_does_not_disturb_the_session(move: Move) -> None:
    pair = move.pair
    pair.handshake()
    other = Move()
    other.pair.handshake()
    genuine = pair.seal_channel(0)
    strangers = [
        Message(Direction.FORWARD, 0, b""),
        Message(Direction.FORWARD, 0, b"GET / HTTP/1.1\r\n\r\n"),
        Message(Direction.FORWARD, 0, bytes(HEADER_BYTES + 16)),
        other.pair.seal_channel(0),
        pair.seal_channel(1).crossed(0),
        *(genuine.flipped(offset) for offset in range(len(genuine.data))),
    ]
    for stranger in strangers:
        with pytest.raises(RemoteProtocolError):
            pair.deliver(stranger)
        assert pair.destination.state is State.KEYED
    pair.send(genuine)
    with pytest.raises(ReplayError):  # a second connection that shows the same proof
        pair.destination.open_channel_untrusted(0, memoryview(genuine.data))
    pair.send(pair.sent[-1])
    pair.epoch()
    assert move.memory.words.any()
    other.close()


def test_r8_bundle_for_a_channel_that_never_proved_itself_ends_the_session(move: Move) -> None:
    pair = move.pair
    pair.handshake()
    pair.send(pair.seal_channel(0))
    pair.source.begin_epoch()
    with pytest.raises(IntegrityError):
        pair.destination.import_untrusted(1, memoryview(pages(pair, 1).data))
    destination_is_dead(move)


# R10: what the host can still change is never looked at twice


class _RacingHost:
    """AES-GCM with the host at work in the slot's buffers at the worst moments: right before or after the cipher runs."""

    slots: ClassVar[list[HostSlot]] = []

    def __init__(self, key: bytes) -> None:
        self._cipher = AESGCM(key)

    def encrypt_into(self, nonce: bytes, data: memoryview, aad: bytes, out: memoryview) -> int:
        length = self._cipher.encrypt_into(nonce, data, aad, out)
        self._scribble()
        return length

    def decrypt_into(self, nonce: bytes, data: memoryview, aad: bytes, out: memoryview) -> int:
        self._scribble()
        return self._cipher.decrypt_into(nonce, data, aad, out)

    def _scribble(self) -> None:
        for slot in self.slots:
            for package in slot.memory.packages:
                package[:] = b"\xa5" * len(package)


@pytest.fixture
def racing_slots(monkeypatch: pytest.MonkeyPatch) -> list[HostSlot]:
    """Slots over whose buffers the host scribbles whenever a cipher runs."""
    slots: list[HostSlot] = []
    monkeypatch.setattr(_RacingHost, "slots", slots)
    monkeypatch.setattr(sealing, "AESGCM", _RacingHost)
    return slots


@pytest.mark.parametrize("shared", [True, False])
def test_r10_bundle_is_opened_from_a_private_copy(
    move: Move, racing_slots: list[HostSlot], *, shared: bool
) -> None:
    pair = open_pair(move)
    message = pages(pair)
    slot = HostSlot(
        0, partial(destination_channel, svsm=pair.destination, channel=0, shared=shared), BUFFER_BYTES
    )
    racing_slots.append(slot)
    answer, _ = slot.call(Command.IMPORT, package=message.data)
    if shared:
        assert answer.status is SlotStatus.OK
        pages_in = answer.result2 >> 32
        assert np.array_equal(move.memory.words[:pages_in], move.guest.memory.words[:pages_in])
    else:  # nobody may reach the buffers of a slot that is not shared: this host does, and the tag shows it
        assert answer.error is RefusalCode.INTEGRITY
        destination_is_dead(move)


def test_r10_answer_is_opened_from_a_private_copy(move: Move, racing_slots: list[HostSlot]) -> None:
    pair = move.pair
    pair.until_manifest()
    pair.manifest()
    ready = pair.seal_answer(BundleKind.READY)
    slot = HostSlot(0, partial(source_channel, svsm=pair.source, channel=0))
    racing_slots.append(slot)
    answer, _ = slot.call(Command.IMPORT, package=ready.data)
    assert answer.result == BundleKind.READY


@pytest.mark.parametrize("shared", [True, False])
def test_r10_bundle_is_sealed_in_private_memory_before_it_is_published(
    move: Move, racing_slots: list[HostSlot], *, shared: bool
) -> None:
    """AES-GCM may read its ciphertext back from where it wrote it; the host must not be able to change it there."""
    pair = open_pair(move)
    slot = HostSlot(0, partial(source_channel, svsm=pair.source, channel=0, shared=shared), BUFFER_BYTES)
    racing_slots.append(slot)
    answer, data = slot.call(Command.EXPORT, 0, PAGES)
    assert answer.result == PAGES
    if shared:
        pair.deliver(Message(Direction.FORWARD, 0, data))
        assert np.array_equal(move.memory.words, move.guest.memory.words)
    else:
        refused(move, Message(Direction.FORWARD, 0, data), RemoteProtocolError)


def test_r10_state_of_a_page_is_not_adopted_from_a_forged_bundle(move: Move) -> None:
    pair = open_pair(move)
    message = pages(pair)
    refused(move, message.flipped(HEADER_BYTES + 5, 1 << 4), RemoteProtocolError)


def test_guest_that_refuses_a_vcpu_state_ends_the_session_and_never_runs(move: Move) -> None:
    pair = move.pair
    pair.until_manifest()
    move.gate.slow.add(0)
    refused(move, pair.seal_token(BundleKind.MANIFEST), GateError)
