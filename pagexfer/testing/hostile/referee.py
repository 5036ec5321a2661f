"""The referee: what must hold after every answer of an SVSM, rule by rule, whatever the host does.

It judges by what it can see from outside: gates, memory, the headers of bundles, and the guest's own truth. So it needs no
word of the SVSMs, and finds a broken rule at the first answer that the rule forbids, also where another rule would
have caught the consequence later.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ...errors import RefusalCode
from ...wire.bundle import HEADER_BYTES, BundleKind, parse_entries_untrusted, parse_header_untrusted
from ...wire.constants import FINAL_EPOCH, FIRST_EPOCH
from ...wire.handshake import parse_established_untrusted
from ...wire.slot import Command, SlotStatus
from ...wire.slot import SessionStatus as State
from .ledger import stream_of
from .schedule import Tracking
from .violation import Violation

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from ...wire.bundle import BundleHeader
    from ...wire.slot import StatusRegisters
    from .guest import HostileGuest
    from .ledger import CipherLedger, Stream
    from .world import Side

_KEYED_COMMANDS = (
    Command.SETUP,
    Command.REPLACE,
    Command.EPOCH,
    Command.EXPORT,
    Command.IMPORT,
    Command.STATE,
    Command.TOKEN,
)
_LAST_WORD = (Command.TOKEN, BundleKind.ABORT_TOKEN)  # of a destination that was VERIFIED (R7)
_NOTHING_CHANGED = (RefusalCode.COMMAND, RefusalCode.STATE, RefusalCode.NOT_READY)
_PARKED = (State.PARKED, State.STARTED, State.FINISHED)


_Channel = tuple[int, int]  # number, incarnation
_Place = tuple[int, int, int]  # and counter


class Before(NamedTuple):
    """How a side stood before a command; RAM and page states of a destination."""

    state: State
    words: NDArray[np.uint64] | None
    states: NDArray[np.uint32] | None
    sent: Mapping[int, tuple[int, bytes]] | None = (
        None  # what pages were when they were read, if not what they are
    )


class Answered(NamedTuple):
    """A command and its answer. `slot` 0 is the control slot, c + 1 that of channel c."""

    slot: int
    command: int
    argument: int
    package: bytes
    status: StatusRegisters
    data: bytes


@dataclass
class _Book:
    """What one side has done so far, as seen from outside."""

    session: bytes = b""
    said: dict[int, bytes] = field(default_factory=dict)  # by handshake attempt
    proof: bytes = b""
    over: bool = False
    epoch: int = FIRST_EPOCH
    gfns: set[int] = field(default_factory=set)  # of this epoch
    bundles: set[_Place] = field(default_factory=set)  # this epoch's PAGES
    sealed: Counter[_Channel] = field(default_factory=Counter)  # bundles of each channel
    taken: Counter[_Channel] = field(default_factory=Counter)
    incarnations: Counter[int] = field(default_factory=Counter)
    # A source's
    sent: dict[int, tuple[int, bytes]] = field(default_factory=dict)  # what each page was as sent last
    due: set[int] = field(default_factory=set)
    beginning: bool = False  # EPOCH was given, and is not complete
    compared: int = 0  # pages that were compared with what was sent since the park
    carried: dict[_Place, set[int]] = field(default_factory=dict)
    closed: dict[int, set[_Place]] = field(default_factory=dict)
    token: tuple[_Place, set[int]] | None = None  # where this epoch's token is, and the epoch's pages
    vcpus: set[int] = field(default_factory=set)
    parts: dict[_Place, bytes] = field(default_factory=dict)  # of the device state, as handed in
    device_bytes: int = 0  # that the parts say of the whole
    at_manifest: Counter[_Channel] = field(default_factory=Counter)
    ready: bool = False
    started: bool = False
    let_go: bool = False
    # A destination's
    given_out: int = 0  # bytes of the device state
    owes_word: bool = False  # READY may have left: the source may wait for an abort token
    altered: bool = False
    opened: bool = False

    @property
    def handed_in(self) -> int:
        """Bytes of the device state that a source has sealed."""
        return sum(map(len, self.parts.values()))


class Referee:
    """Sees every answer; raises Violation. `altered` holds the bundles that were sealed anew with other content."""

    def __init__(self, guest: HostileGuest, ledger: CipherLedger) -> None:
        self._guest = guest
        self._ledger = ledger
        self._books: defaultdict[Side, _Book] = defaultdict(_Book)
        self._sealed: dict[tuple[Stream, int], bytes] = {}
        self._heard: dict[bytes, bytes] = {}
        self.altered: set[bytes] = set()
        self.handed_over = False

    def before(self, side: Side, command: int) -> Before:
        """To be asked before each command."""
        if side.is_source or command not in (Command.IMPORT, Command.SETUP, Command.REPLACE):
            return Before(side.svsm.state, None, None)
        memory = side.machine.memory
        return Before(side.svsm.state, memory.words.copy(), memory.states.copy())

    def answered(self, side: Side, before: Before, answer: Answered) -> None:
        """To be told after each command."""
        book = self._books[side]
        if answer.status.status is SlotStatus.REFUSED:
            self._refused(side, book, before, answer)
        else:
            last_word = book.owes_word and (answer.command, answer.argument) == _LAST_WORD
            goes_on = book.over and answer.command in _KEYED_COMMANDS and not last_word
            _rule("R8", not goes_on, "a session that is over goes on")
            book.owes_word &= not last_word
            if side.is_source:
                self._source_did(book, before, answer)
            else:
                self._destination_did(side, book, before, answer)
        book.over |= answer.status.session in (State.ABORTED, State.FAILED)
        book.over |= answer.command == Command.FINISH and answer.status.status is SlotStatus.OK
        book.owes_word |= before.state is not State.VERIFIED and answer.status.session is State.VERIFIED
        book.owes_word &= answer.status.session in (State.VERIFIED, State.FAILED)
        keys = self._ledger.alive(side)
        _rule("R8", not book.over or keys <= book.owes_word, "keys outlive their session")
        self.check()

    def check(self) -> None:
        """What holds at any time: who runs, and whether he may."""
        source_runs = self._guest.gate.any_moving
        running = int(source_runs)
        for side, book in self._books.items():
            if side.is_source:
                _rule("R5", not (source_runs and side.svsm.state in _PARKED), "parked, but a vCPU runs")
                _rule(
                    "R7", not (source_runs and book.started and not book.let_go), "runs after the start token"
                )
            elif side.machine.gate.any_moving:
                running += 1
                if not book.opened:
                    book.opened = self.handed_over = True
                    _rule(
                        "R6",
                        side.machine.same_as(self._guest),
                        "the guest that was let go is not the source's",
                    )
        _rule("R7", running < 2, "both run")
        _rule("R7", not (self.handed_over and source_runs), "the source runs a guest that was handed over")

    # Refusals

    def _refused(self, side: Side, book: _Book, before: Before, answer: Answered) -> None:
        code, after = answer.status.error, answer.status.session
        _rule("R8", not answer.data, "a refusal with a package")
        _rule("R8", code not in (None, RefusalCode.INTERNAL), "a refusal without a documented code")
        if before.words is not None and before.states is not None:
            memory = side.machine.memory
            same = np.array_equal(before.words, memory.words) and np.array_equal(before.states, memory.states)
            _rule("R10", same, "a refused bundle changed guest memory")
        if code in _NOTHING_CHANGED:
            _rule("R8", after is before.state, f"refused with {code.name}, but the state changed")
        elif answer.command in (Command.IMPORT, Command.REPLACE) and side.is_source and answer.package:
            book.over = True
            _rule("R8", after in (State.ABORTED, State.STARTED, State.FINISHED), "goes on after a bad answer")
        elif answer.command == Command.IMPORT:
            _rule("R8", after in (State.FAILED, State.RUNNING), "goes on after a bad bundle")
        elif answer.command == Command.REPLACE or (answer.command == Command.SETUP and answer.slot):
            _rule("R8", after is before.state, "a stranger disturbed the session")

    # A source

    def _source_did(self, book: _Book, before: Before, answer: Answered) -> None:
        match answer.command:
            case Command.PREPARE:
                book.said[0] = answer.data
            case Command.SETUP if answer.slot == 0:
                _rule(
                    "R11",
                    self._heard.get(answer.package) == book.said[0],
                    "a reply that none gave to this hello",
                )
                self._heard[answer.data] = answer.package
                book.proof = answer.data
            case Command.CONFIRM:
                _rule(
                    "R11",
                    self._heard.get(answer.package) == book.proof,
                    "an end that none gave to this proof",
                )
            case Command.EPOCH:
                if not book.beginning:
                    book.token = None
                    book.due = self._known_unsent(book)
                book.beginning = answer.status.status is SlotStatus.INCOMPLETE
                if self._guest.tracking is Tracking.COMPARISON and answer.status.session is State.PARKED:
                    book.compared = 0 if book.beginning else self._guest.memory.pages
            case Command.AUDIT if answer.status.session is State.PARKED:
                book.compared += answer.status.result
            case Command.REPLACE if answer.package:
                self._settled(book, answer)
            case Command.REPLACE:
                self._seal(book, answer.data)
            case Command.IMPORT:
                self._answer_taken(book, answer)
            case Command.SETUP | Command.EXPORT | Command.STATE | Command.TOKEN if answer.data:
                header = self._seal(book, answer.data)
                self._source_sealed(book, before, header, answer)

    def _source_sealed(self, book: _Book, before: Before, header: BundleHeader, answer: Answered) -> None:
        guest = self._guest
        match header.kind:
            case BundleKind.PAGES:
                gfns = _gfns(header, answer.data, guest.memory.pages)
                _rule("R4", not book.beginning, "pages sealed while an epoch is being begun")
                _rule("R1", not gfns & book.gfns, "a page was sealed twice in one epoch")
                _rule("R2", header.epoch == book.epoch, "pages sealed for another epoch")
                book.gfns |= gfns
                book.bundles.add(_place(header))
                book.carried[_place(header)] = gfns
                book.sent.update(
                    (gfn, before.sent[gfn] if before.sent else guest.is_now(gfn)) for gfn in gfns
                )
            case BundleKind.EPOCH_TOKEN:
                _rule(
                    "R4",
                    not book.beginning and book.due <= book.gfns,
                    "an epoch token while a page is pending",
                )
                _rule("R3", header.epoch == book.epoch, "a token of another epoch")
                book.closed[book.epoch] = set(book.bundles)
                book.token = _place(header), set(book.gfns)
                book.epoch += 1
                book.gfns.clear()
                book.bundles.clear()
                book.due.clear()
            case BundleKind.VCPU_STATE:
                _rule("R5", not guest.gate.any_moving, "a vCPU was saved while one runs")
                book.vcpus.add(answer.argument)
            case BundleKind.DEVICE_STATE:
                _rule("R5", not guest.gate.any_moving, "devices were saved while a vCPU runs")
                self._handed_in(book, header, answer.package)
            case BundleKind.MANIFEST:
                self._all_sent(book, "manifest")
                _rule("R6", book.handed_in == book.device_bytes, "a manifest without the whole device state")
                book.at_manifest = Counter(book.sealed)
            case BundleKind.START_TOKEN:
                _rule("R7", book.ready, "a start token before READY")
                self._all_sent(book, "start token")
                book.started = True

    def _handed_in(self, book: _Book, header: BundleHeader, package: bytes) -> None:
        total, offset = (int.from_bytes(package[at : at + 4], "little") for at in (0, 4))
        known = book.device_bytes or total
        next_one = (total, offset) == (known, book.handed_in) and offset < offset + len(package) - 8 <= total
        _rule("R6", next_one, "a part of the device state that is not the next one")
        book.parts[_place(header)] = package[8:]
        book.device_bytes = total

    def _all_sent(self, book: _Book, what: str) -> None:
        _rule("R5", not self._guest.gate.any_moving, f"a {what} while a vCPU runs")
        compared = not self._guest.tracking.compares or book.compared == self._guest.memory.pages
        _rule("R13", compared, f"a {what}, but RAM was not compared with what was sent")
        _rule("R6", not self._unsent(book) and not book.bundles, f"a {what} while a page is dirty or unsent")
        _rule("R6", len(book.vcpus) == self._guest.gate.vcpus, f"a {what} without all vCPUs")

    def _unsent(self, book: _Book) -> set[int]:
        guest = self._guest
        return {gfn for gfn in range(guest.memory.pages) if book.sent.get(gfn) != guest.is_now(gfn)}

    def _known_unsent(self, book: _Book) -> set[int]:
        """Without those that the SVSM cannot know of before its audit is done."""
        unsent = self._unsent(book)
        is_blind = self._guest.tracking is Tracking.AUDIT and book.compared < self._guest.memory.pages
        return unsent - book.sent.keys() if is_blind else unsent

    def _settled(self, book: _Book, answer: Answered) -> None:
        """A channel was replaced: of its incarnations before, what the destination did not take is not sent."""
        header = parse_header_untrusted(answer.package, len(answer.package))
        self._is_genuine(header, answer.package)
        taken = next(
            (
                other.taken
                for side, other in self._books.items()
                if not side.is_source and other.session == header.session
            ),
            Counter[_Channel](),
        )
        lost: set[_Place] = set()
        for channel in [
            key for key in book.sealed if key[0] == header.channel and key[1] < header.incarnation
        ]:
            lost |= {(*channel, counter) for counter in range(taken[channel], book.sealed[channel])}
            book.sealed[channel] = taken[channel]
        book.sealed = +book.sealed
        for place in lost & book.carried.keys():
            for gfn in book.carried.pop(place):
                book.sent.pop(gfn, None)
        if book.token is not None:
            book.closed[book.epoch - 1] -= lost
            place, gfns = book.token
            if place in lost:
                book.epoch -= 1
                book.gfns, book.bundles, book.token = gfns, book.closed.pop(book.epoch), None
        book.bundles -= lost

    def _answer_taken(self, book: _Book, answer: Answered) -> None:
        header = parse_header_untrusted(answer.package, len(answer.package))
        self._is_genuine(header, answer.package)
        book.ready |= header.kind is BundleKind.READY
        if header.kind is BundleKind.ABORT_TOKEN:
            book.let_go = True
            for side, other in self._books.items():
                if other.session == header.session and not side.is_source and side.alive:
                    _rule("R7", side.svsm.state is State.FAILED, "an abort token of one that may still run")

    # A destination

    def _destination_did(self, side: Side, book: _Book, before: Before, answer: Answered) -> None:
        match answer.command:
            case Command.PREPARE:
                book.said[answer.argument] = answer.data
                self._heard[answer.data] = answer.package
            case Command.SETUP if answer.slot == 0:
                heard = self._heard.get(answer.package)
                _rule("R11", heard == book.said[answer.argument], "evidence that none gave for this reply")
                self._heard[answer.data] = answer.package
                book.session, _ = parse_established_untrusted(answer.data)
            case Command.SETUP | Command.IMPORT:
                self._accepted(book, before, answer)
            case Command.REPLACE if answer.package:
                header = parse_header_untrusted(answer.package, len(answer.package))
                self._is_genuine(header, answer.package)
                _rule(
                    "R9",
                    header.incarnation > book.incarnations[answer.argument],
                    "an old connection came back",
                )
            case Command.REPLACE:
                header = self._seal(book, answer.data)
                book.incarnations[header.channel] = header.incarnation
                book.taken[header.channel, header.incarnation] = 1
            case Command.TOKEN:
                header = self._seal(book, answer.data)
                if header.kind is BundleKind.ABORT_TOKEN:
                    _rule("R7", side.svsm.state is State.FAILED, "an abort token of one that is not FAILED")

    def _accepted(self, book: _Book, before: Before, answer: Answered) -> None:
        header = parse_header_untrusted(answer.package, len(answer.package))
        altered = answer.package in self.altered
        if not altered:
            self._is_genuine(header, answer.package)
        place = (header.session, header.channel)
        _rule("G6", place == (book.session, answer.slot - 1), "a bundle of another session or channel")
        epoch = FINAL_EPOCH if before.state is State.VERIFIED else book.epoch
        if header.kind is BundleKind.CHANNEL_OPEN:
            epoch = FIRST_EPOCH
        _rule("R2", header.epoch == epoch, f"a bundle of epoch {header.epoch} in epoch {epoch}")
        channel = header.channel, header.incarnation
        _rule("R9", channel[1] == book.incarnations[channel[0]], "a bundle of a connection that was replaced")
        _rule("R2", header.counter == book.taken[channel], "a bundle that is not the next one")
        book.taken[channel] += 1
        book.altered |= altered
        source = self._source_of(header.session)
        match header.kind:
            case BundleKind.PAGES:
                gfns = _gfns(header, answer.package, self._guest.memory.pages)
                _rule("R1", not gfns & book.gfns, "a page came twice in one epoch")
                book.gfns |= gfns
                book.bundles.add(_place(header))
            case BundleKind.EPOCH_TOKEN:
                complete = source.closed.get(header.epoch) == book.bundles
                _rule("R3", complete and not altered, "an epoch was closed that is not complete")
                book.epoch += 1
                book.gfns.clear()
                book.bundles.clear()
            case BundleKind.DEVICE_STATE:
                same = altered or source.parts.get(_place(header)) == answer.data
                _rule("G2", same, "another device state was given out than was handed in")
                book.given_out += len(answer.data)
            case BundleKind.MANIFEST:
                _rule(
                    "R6",
                    book.given_out == source.device_bytes,
                    "a manifest before the device state was given out",
                )
                whole = book.taken == source.at_manifest and not book.altered
                _rule("R6", whole, "a manifest of something else")
            case BundleKind.START_TOKEN:
                _rule("R6", not altered, "another start token")
                _rule("R7", source.started, "a start token that none gave")

    def _source_of(self, session: bytes) -> _Book:
        books = (book for side, book in self._books.items() if side.is_source and book.session == session)
        return next(books, _Book())

    # Both

    def _seal(self, book: _Book, data: bytes) -> BundleHeader:
        header = parse_header_untrusted(data, len(data))
        book.session = header.session
        channel = header.channel, header.incarnation
        _rule("R9", header.counter == book.sealed[channel], "a number that is not the next was sealed")
        book.sealed[channel] += 1
        self._sealed[stream_of(header), header.counter] = data
        return header

    def _is_genuine(self, header: BundleHeader, data: bytes) -> None:
        genuine = self._sealed.get((stream_of(header), header.counter)) == data
        _rule("G2", genuine, "a bundle was taken that no SVSM sealed")


def _place(header: BundleHeader) -> _Place:
    return header.channel, header.incarnation, header.counter


def _rule(name: str, holds: bool, otherwise: str) -> None:
    if not holds:
        raise Violation(name, otherwise)


def _gfns(header: BundleHeader, data: bytes, pages: int) -> set[int]:
    entries = parse_entries_untrusted(data[HEADER_BYTES : header.aad_bytes], header, pages)
    return set(entries.gfns.tolist())
