"""The destination's SVSM: what it takes when, how it writes pages and states, and its end."""

from __future__ import annotations

import mmap
from functools import partial

import numpy as np
import pytest

from pagexfer.errors import (
    GateError,
    IntegrityError,
    KeyPoisoned,
    LocalProtocolError,
    MalformedData,
    PageStateError,
    RemoteProtocolError,
)
from pagexfer.isolation.sides import RECEIVING_BUFFER_BYTES
from pagexfer.svsm.commands import destination_channel
from pagexfer.svsm.destination import DestinationSvsm, Imported
from pagexfer.svsm.memory import GuestMemory
from pagexfer.testing import BytesGate, SvsmPair
from pagexfer.testing.slot import HostSlot
from pagexfer.wire.bundle import MAX_BUNDLE_BYTES, BundleKind
from pagexfer.wire.constants import MAX_BUNDLE_DATA_PAGES, MAX_STATE_BYTES, PAGE_SIZE
from pagexfer.wire.page_state import PRIVATE, SHARED, SIZE_2M, VALIDATED, VMSA
from pagexfer.wire.slot import Command, SlotStatus
from pagexfer.wire.slot import SessionStatus as State

from .small_guests import ATTESTOR, PAGES, VCPUS, Move

BUFFER = memoryview(bytearray(1 << 20))


def open_move() -> Move:
    move = Move()
    move.pair.handshake()
    move.pair.open_channels()
    move.pair.source.begin_epoch()
    return move


def test_nothing_is_known_before_the_handshake() -> None:
    svsm = DestinationSvsm(GuestMemory.allocate(PAGE_SIZE), BytesGate.waiting(1), ATTESTOR)
    for read in (lambda: svsm.freshness, lambda: svsm.session, lambda: svsm.channels, lambda: svsm.peer):
        with pytest.raises(LocalProtocolError):
            read()
    with pytest.raises(LocalProtocolError):
        svsm.open_channel_untrusted(0, memoryview(bytes(80)))
    with pytest.raises(LocalProtocolError):
        svsm.import_untrusted(0, memoryview(bytes(80)))
    assert svsm.state is State.IDLE


def test_a_guest_that_another_session_has_is_refused_for_good() -> None:
    move = Move()
    move.memory.claim()
    with pytest.raises(PageStateError, match="another session"):
        move.pair.handshake()
    assert move.pair.destination.state is State.FAILED


def test_a_guest_that_lives_here_is_not_overwritten() -> None:
    """Neither one that was booted here nor one that came: who has an accepted source has no claim to it."""
    booted = Move()
    booted.memory.launch()
    came = Move()
    came.pair.migrate()
    for victim in (booted.memory, came.memory):
        before = victim.words.copy()
        move = Move()
        pair = SvsmPair(move.guest.memory, move.guest.gate, victim, BytesGate.waiting(VCPUS), ATTESTOR)
        with pytest.raises(PageStateError, match="a guest in this RAM"):
            pair.migrate()
        assert pair.destination.state is State.FAILED
        assert np.array_equal(victim.words, before)
        assert move.guest.gate.running
    assert came.gate.running


def test_a_guest_that_came_may_be_sent_on() -> None:
    first = Move()
    first.pair.migrate()
    target = GuestMemory.allocate(PAGES * PAGE_SIZE)
    pair = SvsmPair(first.memory, first.gate, target, BytesGate.waiting(VCPUS), ATTESTOR)
    pair.migrate()
    assert np.array_equal(target.words, first.guest.memory.words)


@pytest.mark.parametrize("over", [False, True])
def test_what_was_in_ram_before_does_not_stay_where_the_source_has_zero(over: bool) -> None:
    """A firmware that the monitor loaded, or what the host put there."""
    move = Move()
    memory = GuestMemory.over(move.memory.words, lambda: [(0, PAGES)]) if over else move.memory
    others = mmap.mmap(move.memory.ram_fd, PAGES * PAGE_SIZE)
    others[:] = bytes([0xA5]) * len(others)
    pair = SvsmPair(
        move.guest.memory, move.guest.gate, memory, move.gate, ATTESTOR, tracker=move.guest.tracker
    )
    assert not move.guest.memory.words[PAGES // 2 :].any()
    pair.migrate()
    assert np.array_equal(memory.words, move.guest.memory.words)


@pytest.mark.parametrize("size", [0, MAX_STATE_BYTES + 1])
def test_a_vcpu_state_that_no_bundle_may_carry(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    move = Move()
    monkeypatch.setattr(move.guest.gate, "save_state", lambda _vcpu: bytes(size))
    with pytest.raises(GateError, match=f"has {size} bytes"):
        move.pair.migrate()
    assert move.pair.source.state is State.PARKED  # the host may abort, and the guest goes on


@pytest.mark.parametrize("size", [0, MAX_STATE_BYTES + 1])
def test_a_vcpu_state_that_no_source_may_seal_is_refused(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagexfer.svsm.hand_over.HandOver.save", lambda _self, _vcpu: bytes(size))
    move = Move()
    with pytest.raises(MalformedData, match=f"payload of {size + 4} bytes"):
        move.pair.migrate()
    assert move.pair.destination.state is State.FAILED


def test_the_largest_vcpu_state_moves() -> None:
    move = Move()
    move.guest.gate.states[0] = bytes(MAX_STATE_BYTES)
    move.pair.migrate()
    assert move.gate.states[0] == bytes(MAX_STATE_BYTES)


def test_the_largest_bundle_fits_a_destinations_slot() -> None:
    move = Move(pages=1024, channels=1)
    pair = move.pair
    pair.source._bundle_pages = MAX_BUNDLE_DATA_PAGES
    pair.handshake()
    pair.open_channels()
    pair.source.begin_epoch()
    buffer = memoryview(bytearray(MAX_BUNDLE_BYTES))
    exported = pair.source.export(0, 0, 1024, buffer)
    assert exported.pages == MAX_BUNDLE_DATA_PAGES
    serve = partial(destination_channel, svsm=pair.destination, channel=0)
    answer, _ = HostSlot(0, serve, RECEIVING_BUFFER_BYTES).call(
        Command.IMPORT, package=bytes(buffer[: exported.length])
    )
    assert answer.status is SlotStatus.OK
    assert np.array_equal(move.memory.words[:512], move.guest.memory.words[:512])


def test_every_page_state_arrives() -> None:
    move = open_move()
    memory = move.guest.memory
    memory.adopt_states(
        np.arange(5),
        np.array([SHARED, 0, VALIDATED | VMSA, PRIVATE | SIZE_2M, PRIVATE ^ 1 << 5], dtype=np.uint32),
    )
    memory.words[1] = 0
    move.pair.epoch()
    assert np.array_equal(move.memory.states, memory.states)
    assert np.array_equal(move.memory.words, memory.words)


def test_page_that_became_zero_or_was_given_up_is_zero_at_the_destination() -> None:
    move = Move()
    move.pair.until_precopy()
    assert move.memory.words[7:9].any(axis=1).all()
    move.guest.write(7, 0)
    move.guest.memory.pvalidate(np.array([8]), validated=False)
    move.pair.epoch()
    assert not move.memory.words[7:9].any()
    assert move.memory.states[7:9].tolist() == [PRIVATE, PRIVATE ^ VALIDATED]


@pytest.mark.parametrize("kind", [BundleKind.LEDGER, BundleKind.EPOCH_TOKEN])
def test_what_arrives_while_another_channel_opens_pages(
    kind: BundleKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    move = open_move()
    source, destination = move.pair.source, move.pair.destination
    if kind is BundleKind.LEDGER:
        word = bytes(BUFFER[: source.ledger(BUFFER)])
        pages = bytes(BUFFER[: source.export(1, 0, PAGES, BUFFER).length])
    else:
        pages = bytes(BUFFER[: source.export(1, 0, PAGES, BUFFER).length])
        word = bytes(BUFFER[: source.epoch_token(BUFFER)])
    adopt_states = move.memory.adopt_states
    arrived: list[Imported] = []

    def adopt_and_import(*arguments: object) -> None:
        adopt_states(*arguments)  # type: ignore[arg-type]
        arrived.append(destination.import_untrusted(0, memoryview(word)))

    monkeypatch.setattr(move.memory, "adopt_states", adopt_and_import)
    if kind is BundleKind.LEDGER:
        destination.import_untrusted(1, memoryview(pages))
        assert [imported.kind for imported in arrived] == [kind]
    else:
        with pytest.raises(IntegrityError, match="while pages are still being opened"):
            destination.import_untrusted(1, memoryview(pages))
        assert destination.state is State.FAILED


def test_import_counts_pages() -> None:
    move = open_move()
    exported = move.pair.source.export(0, PAGES // 2 - 10, PAGES // 2 + 10, BUFFER)
    assert move.pair.destination.import_untrusted(0, BUFFER[: exported.length]) == Imported(
        BundleKind.PAGES, 20, 10
    )


@pytest.mark.parametrize("channel", [2, -1])
def test_unknown_channel(channel: int) -> None:
    move = open_move()
    with pytest.raises(LocalProtocolError):
        move.pair.destination.open_channel_untrusted(channel, memoryview(bytes(80)))
    assert move.pair.destination.state is State.KEYED


def test_bundle_larger_than_any_is_refused() -> None:
    move = open_move()
    with pytest.raises(MalformedData):
        move.pair.destination.import_untrusted(0, memoryview(bytes(MAX_BUNDLE_BYTES + 1)))
    assert move.pair.destination.state is State.FAILED


@pytest.mark.parametrize(
    "kind", [BundleKind.CHANNEL_OPEN, BundleKind.READY, BundleKind.RUNNING, BundleKind.ABORT_TOKEN]
)
def test_authentic_bundle_of_a_kind_that_does_not_belong_here(kind: BundleKind) -> None:
    move = open_move()
    length = move.pair.source._session_streams().sealer(0).seal(kind, 1, b"", b"", BUFFER)
    with pytest.raises(IntegrityError):
        move.pair.destination.import_untrusted(0, BUFFER[:length])
    assert move.pair.destination.state is State.FAILED


@pytest.mark.parametrize("payload", [b"", b"\0\0\0\0", VCPUS.to_bytes(4, "little") + b"state", b"\xff" * 9])
def test_bad_vcpu_state(payload: bytes) -> None:
    move = Move()
    move.pair.until_precopy()
    length = (
        move.pair.source._session_streams().sealer(0).seal(BundleKind.VCPU_STATE, 2, b"", payload, BUFFER)
    )
    with pytest.raises(RemoteProtocolError):
        move.pair.destination.import_untrusted(0, BUFFER[:length])
    assert move.pair.destination.state is State.FAILED
    assert move.gate.states == [b""] * VCPUS


def test_vcpus_get_their_states_with_the_manifest_and_run_with_the_start_token() -> None:
    move = Move()
    move.pair.until_manifest()
    assert move.gate.states == [b""] * VCPUS
    move.pair.manifest()
    assert move.gate.states == move.guest.gate.states
    assert move.pair.destination.state is State.VERIFIED
    assert not move.gate.running
    move.pair.ready()
    move.pair.start()
    assert move.gate.running


def test_guest_that_cannot_be_released_is_said_so() -> None:
    move = Move()
    move.pair.until_manifest()
    move.pair.manifest()
    move.pair.ready()
    move.gate.states[0] = b""
    with pytest.raises(GateError):
        move.pair.start()
    assert move.pair.destination.state is State.RUNNING  # nobody may say any more that it does not
    assert not move.gate.running
    with pytest.raises(LocalProtocolError):
        move.pair.seal_answer(BundleKind.ABORT_TOKEN)


@pytest.mark.parametrize(
    ("stage", "sealed"),
    [
        ("verified", {BundleKind.READY, BundleKind.ABORT_TOKEN}),
        ("running", {BundleKind.RUNNING}),
        ("importing", set()),
    ],
)
def test_answers_by_state(stage: str, sealed: set[BundleKind]) -> None:
    for kind in BundleKind:
        move = Move()
        move.pair.until_manifest()
        if stage != "importing":
            move.pair.manifest()
        if stage == "running":
            move.pair.ready()
            move.pair.start()
        if kind in sealed:
            assert move.pair.destination.seal_answer(kind, BUFFER) > 0
        else:
            before = move.pair.destination.state
            with pytest.raises(LocalProtocolError):
                move.pair.destination.seal_answer(kind, BUFFER)
            assert move.pair.destination.state is before
        move.close()


def test_finish_only_once_the_guest_runs() -> None:
    move = Move()
    move.pair.until_manifest()
    move.pair.manifest()
    with pytest.raises(LocalProtocolError):
        move.pair.destination.finish()
    move.pair.ready()
    move.pair.start()
    move.pair.running()
    move.pair.finish()
    with pytest.raises(KeyPoisoned):
        move.pair.destination._session_streams().opener(0)._checked_cipher(0)


def test_fail_is_for_good_and_wipes() -> None:
    move = open_move()
    move.pair.destination.fail()
    move.pair.destination.fail()
    assert move.pair.destination.state is State.FAILED
    with pytest.raises(KeyPoisoned):
        move.pair.destination._session_streams().opener(0)._checked_cipher(0)
    with pytest.raises(LocalProtocolError):
        move.pair.destination.answer(9, bytes(80))


def test_guest_that_arrived_can_be_moved_on() -> None:
    """A chain: the destination's guest becomes the source of the next move."""
    move = Move()
    move.pair.migrate()
    memory, gate = GuestMemory.allocate(PAGES * PAGE_SIZE), BytesGate.waiting(VCPUS)
    SvsmPair(move.memory, move.gate, memory, gate, ATTESTOR).migrate()
    assert np.array_equal(memory.words, move.guest.memory.words)
    assert (move.gate.running, gate.running) == (False, True)
    memory.close()
