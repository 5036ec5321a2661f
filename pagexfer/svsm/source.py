"""The source's SVSM: decides what has to be sent, seals it, and releases the start token.

Scheduling is the host's: it says from which range the next bundle comes. Completeness is decided here (R4): what is
pending is this side's own knowledge, and no token is sealed while anything is.
"""

from __future__ import annotations

import hashlib
import threading
from typing import TYPE_CHECKING

from ..dirty import as_run
from ..errors import IntegrityError, LocalProtocolError, NotReady, PagexferError, RemoteProtocolError
from ..wire.bundle import BundleKind
from ..wire.constants import FINAL_EPOCH, MAX_CHANNELS
from ..wire.handshake import Role
from ..wire.ledger import SIGNATURE_BYTES, parse_ledger_untrusted
from ..wire.slot import SessionStatus as State
from ..wire.token import Manifest, pack_start
from .compression import pack
from .content import ContentTable
from .epoch import EpochBook
from .export import BUNDLE_PAGES, Exported, PackagerPool, most_data_pages, most_entries
from .hand_over import HandOver, pack_vcpu
from .handshake import Established, SourceHandshake
from .journal import SessionJournal
from .ledger import check_chain, next_body
from .pending import PendingPages
from .staging import StagingPool
from .states import SOURCE, Event, StateMachine
from .streams import SourceStreams, open_answer_untrusted

if TYPE_CHECKING:
    from ..attestation import Attestor, Claims
    from ..dirty import DirtyBitmap, DirtyTracker
    from ..wire.handshake import Freshness
    from .audit import Audited
    from .compression import Compressor
    from .epoch import Replaced
    from .gate import VcpuGate
    from .journal import Journal
    from .memory import GuestMemory
    from .sealing import Sealer
    from .sweep import Looked


class SourceSvsm:
    """The trusted side of one outgoing migration of one guest.

    With `audit` it relies on no tracker: after the park it hashes all of RAM again and sends what is not as it was sent.
    With a comparing tracker, the epoch that begins after the park does that already. With a `compressor` pages are
    compressed before they are sealed.

    Every method either does what it says or raises and leaves the guest as it was; errors of the state machine change
    nothing. A bundle that fails to open before the start token ends the session, and the guest goes on here.

    Slots may be served by threads of their own: every call is made with `lock` held, but for `export`, which takes it where
    it needs it, so that channels seal in parallel.

    `ledger` is that of the guest's moves so far. Raises MalformedData or LedgerRefused where it is none, and
    LocalProtocolError where it is another guest's.
    """

    def __init__(
        self,
        memory: GuestMemory,
        gate: VcpuGate,
        tracker: DirtyTracker | None,
        attestor: Attestor,
        guest_id: bytes,
        *,
        audit: bool = False,
        bundle_pages: int = BUNDLE_PAGES,
        compressor: Compressor | None = None,
        ledger: bytes = b"",
        journal: Journal | None = None,
    ) -> None:
        self.lock = threading.Lock()
        self.staging = StagingPool()
        self.local_fault = ""
        self._records = parse_ledger_untrusted(ledger)
        chain = check_chain(self._records)
        if chain and chain[0].guest_id != guest_id:
            raise LocalProtocolError("the ledger is of another guest")
        self._ledger = ledger
        self._memory = memory
        self._gate = gate
        self._attestor = attestor
        self._guest_id = guest_id
        self._journal = SessionJournal(Role.SOURCE, journal)
        self._machine = StateMachine(SOURCE, self._journal.before_entering)
        self._handshake: SourceHandshake | None = None
        self._session: Established | None = None
        self._streams: SourceStreams | None = None
        self._bundle_pages = bundle_pages
        self._compressor = compressor
        self._sealing = 0
        self._pending = PendingPages(memory, tracker, audit=audit)
        self._packagers = PackagerPool(memory, stage=self._pending.staged or compressor is not None)
        self._content = ContentTable(memory.states)
        self._epoch = EpochBook(memory.pages)
        self._hand_over = HandOver(gate)
        self._manifest: bytes = b""
        self._peer_ready = False
        self._zero_run = False
        self._claimed = False
        self._released = False

    @property
    def state(self) -> State:
        return self._machine.state

    @property
    def freshness(self) -> Freshness:
        """Who vouches for this guest's dirty pages."""
        return self._pending.freshness

    @property
    def peer(self) -> Claims:
        """What the destination proved of itself. Raises LocalProtocolError before the handshake."""
        if self._session is None:
            raise LocalProtocolError("there is no session yet")
        return self._session.peer

    # Handshake

    def prepare(self, channels: int) -> bytes:
        """Begin a session over `channels` channels; returns the hello to send.

        Raises, changing nothing, LocalProtocolError where another session moves this guest or has moved it, and
        PolicyRefused where it has moved as often as it may.
        """
        self._machine.require(Event.PREPARE)
        self._memory.require_unclaimed()  # a guest that has left makes no other move, however many it might
        self._attestor.check_move(len(self._records) + 1)
        if not 1 <= channels <= MAX_CHANNELS:
            raise LocalProtocolError(f"a session has 1 to {MAX_CHANNELS} channels, not {channels}")
        session_counter = self._memory.claim()
        self._claimed = True
        self._machine.advance(Event.PREPARE)
        pages, vcpus, compressed = self._memory.pages, self._gate.vcpus, self._compressor is not None
        terms = pages, vcpus, channels, self.freshness, session_counter, compressed
        self._handshake = SourceHandshake(self._attestor, self._guest_id, *terms)
        return self._handshake.hello()

    def establish(self, reply: bytes) -> bytes:
        """Take the destination's reply; returns the proof to send. A failure aborts the session."""
        self._machine.require(Event.ESTABLISH)
        assert self._handshake is not None
        try:
            proof = self._handshake.prove(reply)
        except PagexferError:  # also where this side's own evidence cannot be had
            self.abort()
            raise
        self._machine.advance(Event.ESTABLISH)
        return proof

    def confirm(self, established: bytes) -> None:
        """Take the destination's last message, before which nothing is sealed. A refused one aborts the session."""
        self._machine.require(Event.KEY_CONFIRMED)
        assert self._handshake is not None
        try:
            session = self._handshake.confirm(established)
            self._journal.begin(session.keys.session, self._guest_id)
            self._machine.advance(Event.KEY_CONFIRMED)
        except PagexferError:  # also where the session cannot be written down: no second try under its keys
            self.abort()
            raise
        self._session = session
        self._streams = SourceStreams(session.keys, session.channels)

    def open_channel(self, channel: int, out: memoryview) -> int:
        """Seal the bundle that proves to the destination that a connection is this session's `channel`."""
        return self._session_streams().open(channel, out)

    def replace_channel(self, channel: int, out: memoryview) -> int:
        """As `open_channel`, for a connection that takes the place of a broken one (R9).

        Nothing goes over the channel before `channel_replaced`. Raises LocalProtocolError once a state was sealed,
        KeyExhausted for a channel that breaks again and again.
        """
        self._require_replaceable()
        return self._session_streams().replace(channel, out)

    def channel_replaced(self, channel: int, package: memoryview) -> Replaced:
        """Take the destination's word on what arrived over a channel before it was replaced. A forged one ends the session.

        Pages that did not arrive are pending again from the next epoch on.
        """
        self._require_replaceable()
        try:
            lost = self._session_streams().settle(channel, bytes(package))
            return self._epoch.account(lost, self._content)
        except RemoteProtocolError:
            self._fail()
            raise

    def ledger(self, out: memoryview) -> int:
        """Seal the ledger of the guest's moves so far, once, and before the manifest."""
        self._require_no_manifest()
        if self._epoch.ledger is not None:
            raise LocalProtocolError("the ledger was sealed already")
        place = self._sealer(0).place
        length = self._seal(BundleKind.LEDGER, self._epoch.next_number, self._ledger, out)
        self._epoch.ledger = place
        return length

    # Epochs

    def hint(self, first_gfn: int, log: bytes) -> None:
        """Part of the hypervisor's dirty log, from `first_gfn` (a multiple of 64) on; it counts from the next epoch on.

        Raises LocalProtocolError, changing nothing, where it does not fit RAM.
        """
        self._pending.hint(first_gfn, log)

    def collect_part(self) -> Looked:
        """The next step of taking in what was written since the last epoch; `begin_epoch` takes all that are left.

        Raises LocalProtocolError once a bundle of the current epoch was sealed: a page goes at most once an epoch (R1).
        """
        self._machine.require(Event.EPOCH)
        if not self._pending.is_collecting:
            self._require_no_manifest()
            self._commit_epoch()
            if self._epoch.bundles or self._sealing:
                raise LocalProtocolError("the epoch is under way: close it with its token first")
            if self._machine.state is State.KEYED:
                self._pending.start()
            self._machine.advance(Event.EPOCH)
        return self._pending.collect_part()

    def begin_epoch(self) -> DirtyBitmap:
        """Take in what was written since the last epoch; returns what is pending now (not to be changed)."""
        while self.collect_part().more:
            pass
        self._pending.close(self._epoch.lost, parked=self._machine.state is State.PARKED)
        return self._pending.pages

    def export(self, channel: int, start: int, stop: int, out: memoryview) -> Exported:
        """Seal the next bundle of what is pending in gfns `start` to `stop` - 1 into `out`."""
        capacity = min(self._bundle_pages, most_data_pages(len(out)))
        with self.lock:
            self._require_epoch()
            sealer = self._sealer(channel)
            # Zero pages cost 8 bytes each: after a bundle without data, look at as many pages as entries allow.
            look = most_entries(len(out)) if self._zero_run else capacity
            found = self._pending.pages.first(start, stop, look)
            if not found.size:
                return Exported(0, 0, 0, more=False)
            packager = self._packagers.take()
            # Taken at once, so that no other channel takes them; no epoch ends while something is being sealed.
            self._pending.pages.clear_gfns(as_run(found))
            self._sealing += 1
        sent = 0
        try:
            package = packager.package(found, capacity)
            self._pending.record(package)
            kind, carried = pack(package.payload, self._compressor)
            counter = sealer.counter
            length = sealer.seal(kind, self._epoch.number, package.entries, carried, out)
            sent = len(package.gfns)
        finally:
            with self.lock:
                self._packagers.give_back(packager)
                self._sealing -= 1
                self._disclaim()
                self._pending.pages.set_gfns(found[sent:])
                if sent:
                    # Counted before anybody can see that nothing is being sealed any more, and close the epoch.
                    self._require_epoch()  # the session may have ended meanwhile: then nothing leaves
                    self._content.record(as_run(package.gfns), channel, sealer.incarnation, counter)
                    self._epoch.add(sent)
                    self._zero_run = len(package.payload) == 0
        return Exported(length, sent, package.zero_pages, more=len(found) == look or len(found) > sent)

    def epoch_token(self, out: memoryview) -> int:
        """Seal the token that closes the epoch (R3). Raises NotReady while anything is pending."""
        self._require_epoch()
        self._commit_epoch()
        if self._pending.pages.any() or self._sealing:
            raise NotReady(
                f"{self._pending.pages.count()} pages are pending, {self._sealing} bundles being sealed"
            )
        if self._epoch.number + 1 >= FINAL_EPOCH:
            raise LocalProtocolError("the epoch counter is used up")
        place = self._sealer(0).place
        length = self._seal(BundleKind.EPOCH_TOKEN, self._epoch.number, self._epoch.totals.pack(), out)
        self._epoch.seal(place)
        self._content.refresh()
        self._pending.settle()
        return length

    # Black-out

    def park(self) -> tuple[int, int]:
        """Raise the global flag; returns parked and all vCPUs. The guest is parked when they are equal (R5)."""
        self._machine.require(Event.PARK)
        self._pending.require_collected()  # an epoch that begins after the park has looked at all pages since
        self._gate.raise_flag()
        parked = self._gate.parked()
        if parked == self._gate.vcpus:
            self._machine.advance(Event.PARK)
        return parked, self._gate.vcpus

    def audit(self) -> Audited:
        """The next step of hashing all RAM against what was sent (R13); what differs is pending from the next epoch on.

        Before the park it is a trial: it hashes one step and changes nothing, so that what the audit costs can be measured.
        Pages that are pending are not looked at, as they are sent anyway.
        """
        self._require_epoch()
        parked = self._machine.state is State.PARKED
        # What is being sealed is not pending any more, is not digested yet, and may have been read before the park.
        if parked and self._sealing:
            raise LocalProtocolError(f"{self._sealing} bundles are being sealed: audit after them")
        return self._pending.audit(parked=parked)

    def export_vcpu(self, vcpu: int, out: memoryview) -> int:
        """Seal the state of one parked vCPU. Raises GateError where its state cannot be saved."""
        self._require_parked()
        if not self._hand_over.may_come(vcpu):
            raise LocalProtocolError(f"vCPU {vcpu} was exported already or does not exist")
        self._commit_epoch()
        state = self._hand_over.save(vcpu)
        length = self._seal(BundleKind.VCPU_STATE, self._epoch.number, pack_vcpu(vcpu, state), out)
        self._hand_over.add(vcpu, state)
        return length

    def carry_untrusted(self, part: memoryview, out: memoryview) -> int:
        """Seal the next part of the host's device state. Raises MalformedData, changing nothing, for any other part."""
        self._require_parked()
        self._require_no_manifest()
        carried = self._hand_over.device_state.after_untrusted(part)
        self._commit_epoch()
        length = self._seal(BundleKind.DEVICE_STATE, self._epoch.number, part, out)
        self._hand_over.device_state = carried
        return length

    def manifest(self, out: memoryview) -> int:
        """Seal the manifest (R6). Raises NotReady while a page is dirty or unsent or a vCPU is not exported."""
        self._require_parked()
        self._require_no_manifest()
        self._commit_epoch()
        if not (self._epoch.bundles or self._sealing):  # what is being sealed goes once in this epoch (R1)
            self._pending.collect_reports(self._epoch.lost)
        if self._epoch.bundles or self._sealing or self._pending.pages.any() or not self._content.complete():
            raise NotReady("pages are dirty or unsent, or the epoch is open")
        if self._hand_over.missing:
            raise NotReady(self._hand_over.missing)
        if self._epoch.ledger is None:
            raise NotReady("the ledger was not sent")
        if not self._pending.compared:
            raise NotReady("RAM was not compared with what was sent since the vCPUs were parked")
        manifest = Manifest(
            self._memory.pages,
            self._epoch.number - 1,
            self._gate.vcpus,
            self.freshness,
            self._content.content_digest(),
            self._content.state_digest(),
            self._hand_over.vcpu_digest(),
            hashlib.sha384(self._ledger).digest(),
            self._session_streams().records(),
        )
        self._manifest = manifest.pack()
        return self._seal(BundleKind.MANIFEST, self._epoch.number, self._manifest, out)

    def start_token(self, out: memoryview) -> int:
        """Seal the start token: the point of no return, and durably so before the token exists (R7).

        Raises NotReady before the destination's READY, and for good where a page changed after the manifest (R6) or a vCPU
        runs again (R5); with the session still PARKED, KeyExhausted where no token can be sealed any more, and JournalError
        where STARTED cannot be written down.
        """
        self._machine.require(Event.START)
        self._require_parked()
        if not self._peer_ready:
            raise NotReady("the destination did not say READY")
        self._pending.collect_reports(self._epoch.lost)
        if self._pending.pages.any():
            raise NotReady("a page changed after the manifest: abort")
        assert self._session is not None
        self._sealer(0).require_room(len(pack_start(self._manifest, bytes(SIGNATURE_BYTES))))
        self._machine.advance(Event.START)
        body = next_body(self._records, self._session.proofs, self._manifest)
        signature = self._session.ledger_key.sign(Role.SOURCE, body)  # which the key does once
        return self._seal(BundleKind.START_TOKEN, FINAL_EPOCH, pack_start(self._manifest, signature), out)

    def accept_untrusted(self, package: memoryview) -> BundleKind:
        """Open the destination's READY, RUNNING or abort token. A forged one ends the session (R8)."""
        try:
            return self._accept(bytes(package))
        except RemoteProtocolError:
            self._fail()
            raise

    def finish(self) -> None:
        """The destination runs the guest: forget every key. The vCPUs here stay parked for good."""
        if self._machine.state is not State.FINISHED:
            raise LocalProtocolError(f"the move is not complete: {self._machine.state.name}")
        self._wipe()

    def abort(self) -> None:
        """Give the session up and let the guest go on here. Raises LocalProtocolError from STARTED on (R7)."""
        self._machine.advance(Event.ABORT)
        self._let_go()

    def _accept(self, package: bytes) -> BundleKind:
        if self._streams is None or not self._manifest:
            raise LocalProtocolError("no answer is awaited")
        header, digest = open_answer_untrusted(self._streams.answers, package)
        if digest != hashlib.sha384(self._manifest).digest():
            raise IntegrityError("answer to another manifest")
        match header.kind:
            case BundleKind.READY if self._machine.state is State.PARKED:
                self._peer_ready = True
            case BundleKind.RUNNING if self._machine.allows(Event.CONFIRMED):
                self._machine.advance(Event.CONFIRMED)
            case BundleKind.ABORT_TOKEN if self._machine.allows(Event.PEER_FAILED):
                self._machine.advance(Event.PEER_FAILED)
                self._let_go()
            case BundleKind.ABORT_TOKEN:
                self.abort()
            case _:
                raise IntegrityError("answer that does not fit the session's state")
        return header.kind

    def _commit_epoch(self) -> None:
        if self._epoch.commit():
            self._session_streams().close_epoch()

    def _session_streams(self) -> SourceStreams:
        if self._streams is None:
            raise LocalProtocolError("there is no session yet")
        return self._streams

    def _sealer(self, channel: int) -> Sealer:
        return self._session_streams().sealer(channel)

    def _seal(self, kind: BundleKind, epoch: int, payload: bytes | memoryview, out: memoryview) -> int:
        """Seal what is not pages, which goes over channel 0."""
        return self._sealer(0).seal(kind, epoch, b"", payload, out)

    def _require_epoch(self) -> None:
        if self._machine.state not in (State.PRECOPY, State.PARKED):
            raise LocalProtocolError(f"no epoch is open in a session that is {self._machine.state.name}")
        self._pending.require_collected()
        self._require_no_manifest()

    def _require_replaceable(self) -> None:
        if self._hand_over.begun or self._machine.state not in (State.KEYED, State.PRECOPY, State.PARKED):
            raise LocalProtocolError(
                "no connection is replaced before there are keys, nor after the last epoch"
            )

    def _require_no_manifest(self) -> None:
        if self._manifest:
            raise LocalProtocolError("the manifest was sealed: nothing but the start token comes after it")

    def _require_parked(self) -> None:
        if self._machine.state is not State.PARKED:
            raise LocalProtocolError(f"the vCPUs are not parked: {self._machine.state.name}")
        # Where the park is emulated, whoever has the hypervisor can undo it.
        if self._gate.parked() < self._gate.vcpus:
            raise NotReady("a vCPU runs again: abort")
        self._pending.require_collected()

    def _fail(self) -> None:
        # After the start token the guest stays parked: without an authentic answer nobody here may let it go.
        if self._machine.allows(Event.ABORT):
            self.abort()
        else:
            self._wipe()

    def _let_go(self) -> None:
        self._wipe()
        # The vCPUs may be parked for another session by now, or for good: only the one that has the guest frees it.
        if not self._claimed:
            return
        try:
            self._pending.stop()
        except PagexferError as error:  # a tracker that fails keeps no guest parked
            self.local_fault = self.local_fault or str(error)
        finally:
            self._gate.release()
            self._claimed, self._released = False, True
            self._disclaim()

    def _disclaim(self) -> None:
        """Let another session have the guest, once no thread of this one is still telling the tracker what it sent."""
        if self._released and not self._sealing:
            self._memory.disclaim()

    def _wipe(self) -> None:
        for secrets in (self._streams, self._handshake):
            if secrets is not None:
                secrets.wipe()
