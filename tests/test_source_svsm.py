"""The source's SVSM: what is pending, what a bundle takes, parking, and what is left after the end."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest

from pagexfer.errors import GateError, GuestError, KeyPoisoned, LocalProtocolError, NotReady
from pagexfer.svsm.export import BUNDLE_PAGES, PackagerPool
from pagexfer.svsm.source import SourceSvsm
from pagexfer.wire.bundle import MAX_BUNDLE_BYTES, BundleKind
from pagexfer.wire.constants import FINAL_EPOCH, MAX_BUNDLE_ENTRIES
from pagexfer.wire.handshake import Freshness
from pagexfer.wire.slot import SessionStatus as State

from .small_guests import ATTESTOR, PAGES, VCPUS, Move, SmallGuest

BUFFER = memoryview(bytearray(MAX_BUNDLE_BYTES))


def in_first_epoch(pages: int = PAGES, *, tracked: bool = True) -> Move:
    move = Move(pages, tracked=tracked)
    move.pair.handshake()
    move.pair.open_channels()
    move.pair.source.begin_epoch()
    return move


def test_first_epoch_is_all_of_ram() -> None:
    move = in_first_epoch()
    assert move.pair.source.begin_epoch().count() == PAGES


def test_later_epochs_are_what_was_written_changed_or_hinted() -> None:
    move = Move()
    move.pair.until_precopy()
    assert not move.pair.source.begin_epoch().any()
    move.guest.write(3, 1)
    move.guest.memory.rmpadjust(np.array([70]), 1, 0)
    move.pair.source.hint(128, (1 << 4).to_bytes(8, "little"))
    assert move.pair.source.begin_epoch().gfns().tolist() == [3, 70, 132]


def test_pages_written_while_their_epoch_is_under_way_come_with_the_next() -> None:
    move = in_first_epoch()
    message = move.pair.seal_pages(0, 0, 100)
    assert message is not None
    move.pair.send(message)
    move.guest.write(0, 42)
    while message := move.pair.seal_pages(1, 0, PAGES):
        move.pair.send(message)
    move.pair.send(move.pair.seal_token(BundleKind.EPOCH_TOKEN))
    assert move.pair.source.begin_epoch().gfns().tolist() == [0]


@pytest.mark.parametrize(
    ("first_gfn", "log"),
    [
        (1, bytes(8)),
        (0, bytes(7)),
        (256, bytes(8)),
        (192, bytes(16)),
        (1 << 63, bytes(8)),
        (-64, bytes(8)),
        (192, (1 << 8).to_bytes(8, "little")),
        (0, bytes(1 << 16)),
    ],
)
def test_hint_that_does_not_fit_ram_is_refused(first_gfn: int, log: bytes) -> None:
    move = Move()
    move.pair.until_precopy()
    with pytest.raises(LocalProtocolError):
        move.pair.source.hint(first_gfn, log)
    assert not move.pair.source.begin_epoch().any()


def test_empty_hint_changes_nothing() -> None:
    move = Move()
    move.pair.until_precopy()
    move.pair.source.hint(0, b"")
    assert not move.pair.source.begin_epoch().any()


def test_bundle_takes_up_to_its_pages_and_says_whether_more_may_come() -> None:
    pages = 4 * BUNDLE_PAGES
    source = in_first_epoch(pages).pair.source
    first = source.export(0, 0, pages, BUFFER)
    assert (first.pages, first.zero_pages, first.more) == (BUNDLE_PAGES, 0, True)
    rest = source.export(1, 0, BUNDLE_PAGES + 12, BUFFER)
    assert (rest.pages, rest.zero_pages, rest.more) == (12, 0, False)
    assert source.export(0, 0, BUNDLE_PAGES + 12, BUFFER) == (0, 0, 0, False)


def test_zero_pages_come_by_the_hundreds_after_one_bundle_without_data() -> None:
    source = in_first_epoch(12000).pair.source  # of which the second half is zero
    sizes = [source.export(0, 6000, 6000 + BUNDLE_PAGES + 5000, BUFFER).pages for _ in range(4)]
    assert sizes == [BUNDLE_PAGES, MAX_BUNDLE_ENTRIES, 5000 - MAX_BUNDLE_ENTRIES, 0]


def test_a_small_buffer_gets_as_many_zero_pages_as_fit() -> None:
    source = in_first_epoch(12000).pair.source
    small = memoryview(bytearray((1 << 14) + 100))
    exported = [source.export(0, 6000, 12000, small) for _ in range(2)]
    assert [one.pages for one in exported] == [3, ((1 << 14) + 100 - 80) // 8]
    assert exported[1].length == len(small) - 4


def test_small_buffer_gets_small_bundles() -> None:
    move = in_first_epoch()
    small = memoryview(bytearray((1 << 16) - 64))
    exported = move.pair.source.export(0, 0, PAGES, small)
    assert exported.pages == 14
    assert exported.length <= len(small)


@pytest.mark.parametrize(("start", "stop"), [(0, PAGES + 1), (5, 4), (1 << 62, 1 << 63), (-1, 5)])
def test_range_out_of_ram_is_refused(start: int, stop: int) -> None:
    move = in_first_epoch()
    with pytest.raises(LocalProtocolError):
        move.pair.source.export(0, start, stop, BUFFER)
    assert move.pair.source.begin_epoch().count() == PAGES


@pytest.mark.parametrize("channel", [2, -1, 0xFFFF])
def test_unknown_channel_is_refused(channel: int) -> None:
    move = in_first_epoch()
    with pytest.raises(LocalProtocolError):
        move.pair.source.export(channel, 0, PAGES, BUFFER)
    with pytest.raises(LocalProtocolError):
        move.pair.source.open_channel(channel, BUFFER)


def test_channel_is_opened_once() -> None:
    move = in_first_epoch()
    with pytest.raises(LocalProtocolError):
        move.pair.source.open_channel(0, BUFFER)


def test_bundle_that_does_not_fit_uses_no_number() -> None:
    move = Move()
    move.pair.handshake()
    with pytest.raises(LocalProtocolError):
        move.pair.source.open_channel(0, BUFFER[:79])
    move.pair.open_channels()
    move.pair.epoch()
    assert np.array_equal(move.memory.words, move.guest.memory.words)


def test_last_epoch_number_is_never_used() -> None:
    move = Move()
    move.pair.until_precopy()
    move.pair.source._epoch.number = FINAL_EPOCH - 1
    with pytest.raises(LocalProtocolError):
        move.pair.source.epoch_token(BUFFER)


def test_vcpu_is_exported_once_and_only_if_it_exists() -> None:
    move = Move()
    move.pair.until_precopy()
    move.pair.park()
    move.pair.source.export_vcpu(0, BUFFER)
    for vcpu in (0, VCPUS, -1, 1 << 63):
        with pytest.raises(LocalProtocolError):
            move.pair.source.export_vcpu(vcpu, BUFFER)


def test_vcpu_that_cannot_be_saved_can_be_asked_again() -> None:
    move = Move()
    move.pair.until_precopy()
    move.pair.park()
    state, move.guest.gate.states[0] = move.guest.gate.states[0], b""
    with pytest.raises(GateError):
        move.pair.source.export_vcpu(0, BUFFER)
    move.guest.gate.states[0] = state
    assert move.pair.source.export_vcpu(0, BUFFER)


def test_park_in_the_middle_of_an_epoch() -> None:
    move = in_first_epoch()
    message = move.pair.seal_pages(0, 0, 100)
    assert message is not None
    move.pair.send(message)
    move.guest.write(0, 7)
    move.pair.park()
    while message := move.pair.seal_pages(0, 0, PAGES):
        move.pair.send(message)
    move.pair.send(move.pair.seal_token(BundleKind.EPOCH_TOKEN))
    move.pair.vcpus()
    move.pair.ledger()
    with pytest.raises(NotReady):
        move.pair.manifest()
    move.pair.epoch()
    move.pair.manifest()
    assert int(move.memory.words[0, 0]) == 7


@pytest.mark.parametrize("parked", [False, True])
def test_abort_gives_the_guest_back_whole(parked: bool) -> None:
    move = Move()
    move.pair.until_precopy()
    if parked:
        move.pair.park()
    else:
        move.guest.gate.slow.add(0)
        move.pair.source.park()
    move.pair.source.abort()
    assert move.pair.source.state is State.ABORTED
    assert (move.guest.gate.running, move.guest.gate.parked()) == (True, 0)
    with pytest.raises(LocalProtocolError):
        move.guest.tracker.collect()  # it was stopped
    with pytest.raises(KeyPoisoned):
        move.pair.source._session_streams().sealer(0).seal(BundleKind.PAGES, 1, b"", b"", BUFFER)
    move.pair.source.abort()


def test_guest_that_could_not_be_let_go_is_let_go_by_the_next_abort() -> None:
    move = Move()
    move.pair.until_precopy()
    move.pair.park()
    state, move.guest.gate.states[0] = move.guest.gate.states[0], b""
    with pytest.raises(GateError):
        move.pair.source.abort()
    move.guest.gate.states[0] = state
    move.pair.source.abort()
    assert move.guest.gate.running


@pytest.mark.parametrize("error", [GuestError("the tracker does not answer"), ValueError("a defect")])
def test_a_tracker_that_cannot_be_stopped_keeps_no_guest_parked(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail() -> None:
        raise error

    move = Move()
    move.pair.until_precopy()
    move.pair.park()
    monkeypatch.setattr(move.guest.tracker, "stop", fail)
    with nullcontext() if isinstance(error, GuestError) else pytest.raises(ValueError, match="a defect"):
        move.pair.source.abort()
    assert move.pair.source.local_fault == (str(error) if isinstance(error, GuestError) else "")
    assert (move.pair.source.state, move.guest.gate.running) == (State.ABORTED, True)
    move.guest.memory.require_unclaimed()


def test_without_memory_for_a_bundle_nothing_is_sealed_or_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_arguments: object, **_named: object) -> None:
        raise MemoryError

    move = in_first_epoch()
    with monkeypatch.context() as patch:
        patch.setattr(PackagerPool, "take", full)
        with pytest.raises(MemoryError):
            move.pair.source.export(0, 0, PAGES, BUFFER)
    assert move.pair.source._pending.pages.count() == PAGES
    move.pair.source.abort()
    move.guest.memory.require_unclaimed()


def test_finish_wipes_the_keys_and_leaves_the_guest_parked() -> None:
    move = Move()
    move.pair.migrate()
    assert not move.guest.gate.running
    with pytest.raises(KeyPoisoned):
        move.pair.source._session_streams().sealer(0).seal(BundleKind.PAGES, 1, b"", b"", BUFFER)
    move.pair.source.finish()
    with pytest.raises(LocalProtocolError):
        move.pair.source.abort()


def test_no_answer_is_opened_before_the_manifest() -> None:
    move = Move()
    move.pair.until_manifest()
    with pytest.raises(LocalProtocolError):
        move.pair.source.accept_untrusted(memoryview(bytes(200)))
    assert move.pair.source.state is State.PARKED


def test_running_before_the_start_token_ends_the_session() -> None:
    """An answer that is authentic but out of place: a destination that runs before it may."""
    move = Move()
    move.pair.until_manifest()
    move.pair.manifest()
    move.pair.ready()
    move.pair.start()
    running = move.pair.seal_answer(BundleKind.RUNNING)
    move.pair.source._machine.state = State.PARKED
    with pytest.raises(Exception, match="does not fit"):
        move.pair.deliver(running)


@pytest.mark.parametrize("tracked", [True, False])
def test_freshness_says_who_tracks(tracked: bool) -> None:
    move = Move(tracked=tracked)
    move.pair.handshake()
    expected = Freshness.SVSM_TRACKED if tracked else Freshness.HOST_REPORTED
    assert move.pair.source.freshness is move.pair.destination.freshness is expected


def test_tracker_is_started_with_the_first_epoch_and_not_before() -> None:
    guest = SmallGuest()
    source = SourceSvsm(guest.memory, guest.gate, guest.tracker, ATTESTOR, bytes(16))
    source.prepare(1)
    with pytest.raises(LocalProtocolError):
        guest.tracker.collect()
