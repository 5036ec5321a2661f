"""The journal of a session: each decision is written down before it takes effect, and not taken where it cannot be."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pagexfer.errors import IntegrityError, JournalError, KeyPoisoned, LocalProtocolError
from pagexfer.svsm.source import SourceSvsm
from pagexfer.testing import SvsmPair
from pagexfer.wire.bundle import HEADER_BYTES, MAX_BUNDLE_BYTES, BundleKind
from pagexfer.wire.handshake import Role
from pagexfer.wire.ledger import parse_ledger_untrusted
from pagexfer.wire.slot import SessionStatus as State

from .small_guests import ATTESTOR, Move

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pagexfer.wire.journal import JournalRecord


class Moment:
    """What was true when a record was written."""

    def __init__(self, journaled: JournaledMove, record: JournalRecord) -> None:
        pair = journaled.move.pair
        self.record = record
        self.status = record.status
        side = pair.source if record.role is Role.SOURCE else pair.destination
        self.before = side.state
        self.source_runs = journaled.move.guest.gate.running
        self.destination_runs = journaled.move.gate.running
        self.sealed = any(journaled.out)


class Probe:
    """A journal that notes the moments of its records, and has no room for those in `full`."""

    def __init__(self, journaled: JournaledMove) -> None:
        self._journaled = journaled
        self.moments: list[Moment] = []
        self.full: set[State] = set()
        self.kept: list[tuple[State, bytes, bytes]] = []
        self.no_room_for_ledger = False

    def record(self, record: JournalRecord) -> None:
        self.moments.append(Moment(self._journaled, record))
        if record.status in self.full:
            raise JournalError("no space left on device")

    def keep(self, session: bytes, ledger: bytes) -> None:
        """`LedgerStore`: a moment like any other."""
        self.kept.append((self._journaled.pair.destination.state, session, ledger))
        if self.no_room_for_ledger:
            raise OSError(28, "No space left on device")

    def drop(self) -> None:
        self.kept.clear()

    def statuses(self) -> list[State]:
        return [moment.status for moment in self.moments]

    def moment(self, status: State) -> Moment:
        return next(moment for moment in self.moments if moment.status is status)


class JournaledMove:
    """A small move with a journal at both sides. `out` is where `seal` has bundles sealed."""

    def __init__(self) -> None:
        self.source, self.destination = Probe(self), Probe(self)
        self.out = bytearray(MAX_BUNDLE_BYTES)
        self.move = Move()
        self.move.pair = self.pair = SvsmPair(
            self.move.guest.memory,
            self.move.guest.gate,
            self.move.memory,
            self.move.gate,
            ATTESTOR,
            tracker=self.move.guest.tracker,
            source_journal=self.source,
            destination_journal=self.destination,
            store=self.destination,
        )

    def until_ready(self) -> None:
        self.pair.until_manifest()
        self.pair.manifest()
        self.pair.ready()

    def seal(self, call: Callable[..., int], *arguments: object) -> int:
        """Seal into a clean buffer."""
        self.out[:] = bytes(len(self.out))
        return call(*arguments, memoryview(self.out))


@pytest.fixture
def journaled() -> Iterator[JournaledMove]:
    journaled = JournaledMove()
    yield journaled
    journaled.move.close()


# What is written, and when


def test_a_whole_move(journaled: JournaledMove) -> None:
    journaled.pair.migrate()
    assert journaled.source.statuses() == [State.KEYED, State.STARTED, State.FINISHED]
    assert journaled.destination.statuses() == [State.KEYED, State.VERIFIED, State.RUNNING]
    records = [moment.record for side in (journaled.source, journaled.destination) for moment in side.moments]
    assert {record.session for record in records} == {journaled.pair.destination.session}
    assert {record.guest_id for record in records} == {journaled.pair.source._guest_id}
    assert len(records[0].guest_id) == 16
    assert {moment.record.role for moment in journaled.source.moments} == {Role.SOURCE}
    assert {moment.record.role for moment in journaled.destination.moments} == {Role.DESTINATION}


def test_started_is_written_before_the_start_token_is_sealed(journaled: JournaledMove) -> None:
    journaled.until_ready()
    assert journaled.seal(journaled.pair.source.start_token)
    moment = journaled.source.moment(State.STARTED)
    assert (moment.before, moment.sealed) == (State.PARKED, False)
    assert any(journaled.out)


def test_verified_is_written_before_ready_can_be_had_and_running_before_a_vcpu_is_released(
    journaled: JournaledMove,
) -> None:
    journaled.pair.migrate()
    verified, running = (journaled.destination.moment(state) for state in (State.VERIFIED, State.RUNNING))
    assert verified.before is State.IMPORTING
    assert (running.before, running.destination_runs) == (State.VERIFIED, False)
    assert journaled.move.gate.running


def test_failed_is_written_before_the_abort_token_is_sealed(journaled: JournaledMove) -> None:
    journaled.until_ready()
    assert journaled.seal(journaled.pair.destination.seal_answer, BundleKind.ABORT_TOKEN)
    moments = [moment for moment in journaled.destination.moments if moment.status is State.FAILED]
    assert moments
    assert not any(moment.sealed for moment in moments)
    assert any(journaled.out)


def test_aborted_is_written_when_the_session_is_given_up(journaled: JournaledMove) -> None:
    journaled.pair.until_precopy()
    journaled.pair.source.abort()
    journaled.pair.destination.fail()
    assert journaled.source.statuses() == [State.KEYED, State.ABORTED]
    assert journaled.destination.statuses() == [State.KEYED]  # which says the same, and may be replaced


def test_failed_is_written_wherever_verified_may_have_been(journaled: JournaledMove) -> None:
    journaled.destination.full = {State.VERIFIED}
    journaled.pair.until_manifest()
    with pytest.raises(JournalError):
        journaled.pair.manifest()
    assert journaled.destination.statuses() == [State.KEYED, State.VERIFIED, State.FAILED]


def test_nothing_is_written_of_a_session_without_a_name(journaled: JournaledMove) -> None:
    journaled.pair.source.prepare(2)
    journaled.pair.source.abort()
    journaled.pair.destination.fail()
    assert journaled.source.statuses() == journaled.destination.statuses() == []


# What cannot be written is not done


def test_without_a_record_of_started_there_is_no_start_token(journaled: JournaledMove) -> None:
    journaled.until_ready()
    journaled.source.full = {State.STARTED}
    counter = journaled.pair.source._session_streams().sealer(0).counter
    with pytest.raises(JournalError):
        journaled.seal(journaled.pair.source.start_token)
    assert journaled.pair.source.state is State.PARKED
    assert not any(journaled.out)
    assert journaled.pair.source._session_streams().sealer(0).counter == counter
    journaled.pair.source.abort()
    assert journaled.move.guest.gate.running


def test_a_disk_with_room_again_lets_the_move_go_on(journaled: JournaledMove) -> None:
    journaled.until_ready()
    journaled.source.full = {State.STARTED}
    with pytest.raises(JournalError):
        journaled.pair.start()
    journaled.source.full = set()
    journaled.pair.start()
    journaled.pair.running()
    assert journaled.move.arrived()


def test_a_source_without_a_record_of_keyed_has_no_session(journaled: JournaledMove) -> None:
    journaled.source.full = {State.KEYED}
    with pytest.raises(JournalError):
        journaled.pair.handshake()
    assert journaled.pair.source.state is State.ABORTED
    assert journaled.move.guest.gate.running


def test_a_session_that_could_not_be_written_down_seals_nothing_and_cannot_be_confirmed_again(
    journaled: JournaledMove,
) -> None:
    """A second set of sealers under the same keys would begin to count at zero once more."""
    source, destination = journaled.pair.source, journaled.pair.destination
    end = destination.establish(1, source.establish(destination.answer(1, source.prepare(2))))
    journaled.source.full = {State.KEYED}
    with pytest.raises(JournalError):
        source.confirm(end)
    journaled.source.full = set()
    for call in (lambda: source.open_channel(0, memoryview(journaled.out)), lambda: source.confirm(end)):
        with pytest.raises(LocalProtocolError):
            call()


def test_a_guest_that_is_being_received_is_nobodys_to_move(journaled: JournaledMove) -> None:
    """A source over a destination's guest could let it go without a start token."""
    journaled.until_ready()
    other = SourceSvsm(journaled.move.memory, journaled.move.gate, None, ATTESTOR, bytes(16))
    with pytest.raises(LocalProtocolError):
        other.prepare(1)
    other.abort()
    assert not journaled.move.gate.running
    journaled.pair.start()
    journaled.pair.running()
    assert journaled.move.arrived()


def test_a_destination_without_a_record_of_keyed_fails(journaled: JournaledMove) -> None:
    journaled.destination.full = {State.KEYED}
    with pytest.raises(JournalError):
        journaled.pair.handshake()
    assert journaled.pair.destination.state is State.FAILED


def test_without_a_record_of_verified_there_is_no_ready(journaled: JournaledMove) -> None:
    journaled.destination.full = {State.VERIFIED}
    journaled.pair.until_manifest()
    with pytest.raises(JournalError):
        journaled.pair.manifest()
    assert journaled.pair.destination.state is State.FAILED
    for kind in (BundleKind.READY, BundleKind.ABORT_TOKEN):
        with pytest.raises(LocalProtocolError):
            journaled.pair.seal_answer(kind)
    journaled.pair.source.abort()
    assert journaled.move.guest.gate.running


def test_without_a_record_of_running_no_vcpu_runs_and_the_source_hears_of_it(
    journaled: JournaledMove,
) -> None:
    journaled.until_ready()
    journaled.destination.full = {State.RUNNING}
    with pytest.raises(JournalError):
        journaled.pair.start()
    assert not journaled.move.gate.running
    assert journaled.destination.statuses()[-1] is State.FAILED
    journaled.pair.send(journaled.pair.seal_answer(BundleKind.ABORT_TOKEN))
    assert journaled.pair.source.state is State.ABORTED
    assert journaled.move.guest.gate.running


def test_without_a_record_of_failed_there_is_no_abort_token(journaled: JournaledMove) -> None:
    journaled.until_ready()
    journaled.destination.full = {State.FAILED}
    for _ in range(2):
        with pytest.raises(JournalError):
            journaled.seal(journaled.pair.destination.seal_answer, BundleKind.ABORT_TOKEN)
        assert not any(journaled.out)
        assert journaled.pair.destination.state is State.FAILED  # for good, though nobody may be told so
    journaled.destination.full = set()
    journaled.pair.destination.fail()
    journaled.pair.send(journaled.pair.seal_answer(BundleKind.ABORT_TOKEN))
    assert journaled.move.guest.gate.running


def test_a_guest_that_goes_on_or_has_moved_needs_no_room_on_a_disk(journaled: JournaledMove) -> None:
    journaled.source.full = {State.ABORTED, State.FINISHED}
    journaled.pair.migrate()
    assert journaled.pair.source.state is State.FINISHED
    other = JournaledMove()
    other.source.full = {State.ABORTED}
    other.pair.until_precopy()
    other.pair.source.abort()
    assert other.move.guest.gate.running
    other.move.close()


# The ledger


def test_the_ledger_is_kept_before_the_guest_runs(journaled: JournaledMove) -> None:
    journaled.until_ready()
    assert not journaled.destination.kept
    journaled.pair.start()
    session = journaled.pair.destination.session
    assert journaled.destination.kept == [(State.VERIFIED, session, journaled.pair.destination.ledger)]
    assert len(parse_ledger_untrusted(journaled.pair.destination.ledger)) == 1
    journaled.pair.running()
    journaled.pair.finish()
    assert journaled.destination.kept


def test_a_ledger_that_cannot_be_kept_is_as_a_journal_that_cannot_be_written(
    journaled: JournaledMove,
) -> None:
    journaled.until_ready()
    journaled.destination.no_room_for_ledger = True
    with pytest.raises(JournalError, match="the ledger cannot be written: No space left on device"):
        journaled.pair.start()
    source_goes_on_and_no_ledger_is_left(journaled)


def test_a_move_that_fails_leaves_no_ledger(journaled: JournaledMove) -> None:
    journaled.until_ready()
    journaled.destination.full = {State.RUNNING}
    with pytest.raises(JournalError):
        journaled.pair.start()
    source_goes_on_and_no_ledger_is_left(journaled)


def test_a_ledger_is_kept_as_long_as_the_journal_may_say_that_the_guest_runs_here(
    journaled: JournaledMove,
) -> None:
    """A disk that fails may have written RUNNING; what goes by that, as a QEMU that lives, needs the record of the move."""
    journaled.until_ready()
    journaled.destination.full = {State.RUNNING, State.FAILED}
    with pytest.raises(JournalError):
        journaled.pair.start()
    assert journaled.destination.statuses()[-2:] == [State.RUNNING, State.FAILED]
    assert len(journaled.destination.kept) == 1
    journaled.destination.full = set()
    word = journaled.pair.seal_answer(BundleKind.ABORT_TOKEN)
    assert not journaled.destination.kept
    journaled.pair.send(word)
    assert journaled.move.guest.gate.running


def test_a_ledger_that_no_record_needs_is_dropped_though_the_disk_fails(journaled: JournaledMove) -> None:
    journaled.until_ready()
    journaled.destination.no_room_for_ledger = True
    journaled.destination.full = {State.FAILED}
    with pytest.raises(JournalError, match="ledger"):
        journaled.pair.start()
    assert not journaled.destination.kept


def source_goes_on_and_no_ledger_is_left(journaled: JournaledMove) -> None:
    assert not journaled.destination.kept
    assert not journaled.move.gate.running
    assert journaled.pair.destination.state is State.FAILED
    journaled.pair.send(journaled.pair.seal_answer(BundleKind.ABORT_TOKEN))
    assert journaled.move.guest.gate.running


# A destination that fails once it may have said READY


@pytest.mark.parametrize("fails", ["damaged start token", "replayed manifest", "told to"])
def test_a_destination_that_fails_once_verified_gives_one_abort_token(
    journaled: JournaledMove, fails: str
) -> None:
    journaled.until_ready()
    pair = journaled.pair
    manifest = next(message for message in pair.sent if message.header.kind is BundleKind.MANIFEST)
    token = pair.seal_token(BundleKind.START_TOKEN)
    match fails:
        case "told to":
            pair.destination.fail()
        case "replayed manifest":
            with pytest.raises(IntegrityError):
                pair.deliver(manifest)
        case _:
            with pytest.raises(IntegrityError):
                pair.deliver(token.flipped(HEADER_BYTES + 7))
    assert pair.destination.state is State.FAILED
    assert journaled.destination.statuses()[-1] is State.FAILED
    for kind in (BundleKind.READY, BundleKind.RUNNING):
        with pytest.raises(LocalProtocolError):
            pair.seal_answer(kind)
    with pytest.raises(KeyPoisoned):  # that one key is all that is left
        pair.destination._session_streams().opener(0)._checked_cipher(0)
    with pytest.raises(KeyPoisoned):
        pair.destination._established().keys._secret.reveal()
    pair.destination.fail()
    word = pair.seal_answer(BundleKind.ABORT_TOKEN)
    with pytest.raises(LocalProtocolError):
        pair.seal_answer(BundleKind.ABORT_TOKEN)
    with pytest.raises(LocalProtocolError):
        pair.deliver(token)
    assert not journaled.move.gate.running
    pair.send(word)
    assert pair.source.state is State.ABORTED
    assert journaled.move.guest.gate.running


def test_a_destination_that_never_was_verified_gives_no_abort_token(journaled: JournaledMove) -> None:
    journaled.pair.until_manifest()
    message = journaled.pair.seal_token(BundleKind.MANIFEST)
    with pytest.raises(IntegrityError):
        journaled.pair.deliver(message.flipped(-1))
    with pytest.raises(LocalProtocolError):
        journaled.pair.seal_answer(BundleKind.ABORT_TOKEN)
