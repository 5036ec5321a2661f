"""The destination's SVSM: opens what comes, checks that it is all there, and decides when the guest may run.

Every bundle comes in private memory (`service` sees to that) and reaches guest RAM only after its tag held (R10). The
first thing that is wrong ends the session for good (R8): FAILED, keys wiped, and the guest never runs here. Once the
source may wait for an answer, one key outlives that end: the abort token's.
"""

from __future__ import annotations

import hashlib
import threading
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from ..dirty import DirtyBitmap, as_run
from ..errors import (
    CompressionRefused,
    GeometryError,
    IntegrityError,
    JournalError,
    LocalProtocolError,
    PageStateError,
    PagexferError,
    ReplayError,
)
from ..wire.bundle import (
    DATA,
    HEADER_BYTES,
    PAGE_KINDS,
    ZERO,
    BundleHeader,
    BundleKind,
    parse_entries_untrusted,
    parse_header_untrusted,
)
from ..wire.constants import (
    FINAL_EPOCH,
    FIRST_EPOCH,
    MAX_BUNDLE_PAYLOAD_BYTES,
    WORDS_PER_PAGE,
)
from ..wire.device_state import PART_HEADER_BYTES
from ..wire.handshake import Role
from ..wire.ledger import parse_ledger_untrusted
from ..wire.slot import SessionStatus as State
from ..wire.token import (
    EpochTotals,
    Manifest,
    parse_epoch_totals_untrusted,
    parse_manifest_untrusted,
    split_start_untrusted,
)
from .compression import Decompressor
from .content import ContentTable
from .hand_over import HandOver, parse_vcpu_untrusted
from .handshake import Attempts, DestinationAttempt, Established
from .journal import SessionJournal
from .ledger import append, check_next, next_body
from .staging import StagingPool
from .states import DESTINATION, Event, StateMachine
from .streams import DestinationStreams

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..attestation import Attestor, Claims
    from ..wire.handshake import Freshness
    from ..wire.journal import GuestProcess
    from .gate import VcpuGate
    from .journal import Journal, LedgerStore
    from .memory import GuestMemory
    from .sealing import Opener

_STATE_FOR: Final = {
    BundleKind.READY: State.VERIFIED,
    BundleKind.RUNNING: State.RUNNING,
    BundleKind.ABORT_TOKEN: State.FAILED,
}


class Imported(NamedTuple):
    """What a bundle was, and how many pages it brought; `device_state` is the part that is the host's to have."""

    kind: BundleKind
    pages: int = 0
    zero_pages: int = 0
    device_state: bytes = b""


class DestinationSvsm:
    """The trusted side of one incoming migration. The vCPUs behind `gate` are parked and never ran.

    Compressed pages come only with `accept_compression`: otherwise a source that would send them is refused.

    Slots may be served by threads of their own: every call is made with `lock` held, but for `import_untrusted`, which
    takes it where it needs it, so that channels open in parallel.

    `process` is the one that has the guest, where it outlives this one: the journal names it. `store` gets the ledger.
    """

    def __init__(
        self,
        memory: GuestMemory,
        gate: VcpuGate,
        attestor: Attestor,
        *,
        accept_compression: bool = False,
        journal: Journal | None = None,
        process: GuestProcess | None = None,
        store: LedgerStore | None = None,
    ) -> None:
        self.lock = threading.Lock()
        self.staging = StagingPool()
        self.local_fault = ""
        memory.note_content()
        self._memory = memory
        self._gate = gate
        self._attestor = attestor
        self._accept_compression = accept_compression
        self._decompressor = Decompressor()
        self._journal = SessionJournal(Role.DESTINATION, journal, process, store)
        self._machine = StateMachine(DESTINATION, self._journal.before_entering)
        self._attempts = Attempts()
        self._session: Established | None = None
        self._streams: DestinationStreams | None = None
        self._epoch = FIRST_EPOCH
        self._epoch_bundles = 0
        self._opening = 0
        self._seen = DirtyBitmap(memory.pages)
        self._content = ContentTable(memory.states)
        self._hand_over = HandOver(gate)
        self._manifest = b""
        self._ledger: bytes | None = None

    @property
    def state(self) -> State:
        return self._machine.state

    @property
    def freshness(self) -> Freshness:
        """Who vouches for the source's dirty pages. Raises LocalProtocolError before the handshake."""
        return self._established().freshness

    @property
    def session(self) -> bytes:
        """Public name of the session, 16 bytes. Raises LocalProtocolError before the handshake."""
        return self._established().keys.session

    @property
    def channels(self) -> int:
        """Channels of the session. Raises LocalProtocolError before the handshake."""
        return self._established().channels

    @property
    def peer(self) -> Claims:
        """What the source proved of itself. Raises LocalProtocolError before the handshake."""
        return self._established().peer

    @property
    def ledger(self) -> bytes:
        """The guest's ledger with the record of this move. Raises LocalProtocolError before the guest runs here."""
        if self._machine.state is not State.RUNNING or self._ledger is None:
            raise LocalProtocolError(f"the move is not complete: {self._machine.state.name}")
        return self._ledger

    # Handshake

    def answer(self, attempt: int, hello: bytes) -> bytes:
        """Answer a source's hello; `attempt` names this handshake. Refused ones leave no trace."""
        self._machine.require(Event.ESTABLISH)
        pages, vcpus, accept = self._memory.pages, self._gate.vcpus, self._accept_compression
        opened = DestinationAttempt(self._attestor, hello, pages, vcpus, accept_compression=accept)
        self._attempts.keep(attempt, opened)
        return opened.reply()

    def establish(self, attempt: int, proof: bytes) -> bytes:
        """Take a source's proof; returns the last message. A handshake works once, and the first proven one wins.

        Raises MalformedData or AttestationError, after which other attempts are still welcome; GeometryError,
        CompressionRefused, JournalError, and PageStateError where another session has the guest, end this side.
        """
        self._machine.require(Event.ESTABLISH)
        opened = self._attempts.take(attempt)
        try:
            self._session, established = opened.finish(proof)
            # Nobody may move a guest on, or let it go, while it is being received, nor after that failed (G5).
            self._memory.claim(vacant=True)
        except (GeometryError, CompressionRefused, LocalProtocolError) as error:
            self.fail()
            if isinstance(error, LocalProtocolError):
                raise PageStateError(str(error)) from error
            raise
        self._attempts.drop_all()
        keys = self._session.keys
        self._streams = DestinationStreams(keys, self._session.channels)
        self._journal.begin(keys.session, self._session.hello.guest_id)
        try:
            self._machine.advance(Event.ESTABLISH)
        except JournalError:
            self.fail()
            raise
        return established

    def forget(self, attempt: int) -> None:
        """A handshake will not go on: its peer is gone, or was refused. One that is not open is none."""
        self._attempts.drop(attempt)

    def open_channel_untrusted(self, channel: int, package: memoryview) -> None:
        """Check that whoever sent `package` knows this session, before a connection becomes its `channel`.

        Raises RemoteProtocolError for a stranger, and the session goes on undisturbed (R8's exception).
        """
        self._session_streams().open_untrusted(channel, package)

    def check_replacement_untrusted(self, channel: int, package: memoryview) -> None:
        """Check that whoever sent `package` knows this session, before `replace_channel` takes his connection.

        Raises RemoteProtocolError for a stranger, and the session goes on undisturbed; LocalProtocolError where no
        connection is replaced any more.
        """
        self._require_replaceable()
        self._session_streams().check_replacement_untrusted(channel, package)

    def replace_channel(self, channel: int, out: memoryview) -> int:
        """Take the checked connection as `channel` from here on; seals the record of what arrived before (R9).

        Nothing that was sent over the one before may be imported any more: it would end the session.
        """
        self._require_replaceable()
        return self._session_streams().replace(channel, out)

    # Import

    def import_untrusted(self, channel: int, package: memoryview) -> Imported:
        """Take one bundle of an open channel. Anything wrong with it ends the session (R8) and raises.

        Raises RemoteProtocolError for a bad bundle, PageStateError or GateError where the guest's side refuses it, and
        LocalProtocolError, changing nothing, where this side is not importing or has no such channel.
        """
        with self.lock:
            if self._machine.state not in (State.KEYED, State.IMPORTING, State.VERIFIED):
                raise LocalProtocolError(
                    f"nothing is imported in a session that is {self._machine.state.name}"
                )
            opener = self._session_streams().opener(channel)
        try:
            # Plaintext stays in staging for one call only; an area that was used last is still in the cache.
            with self.staging.area(MAX_BUNDLE_PAYLOAD_BYTES) as staging:
                return self._import(opener, channel, package, staging)
        except PagexferError as error:
            with self.lock:
                if self._machine.allows(Event.FAIL):
                    self.fail()
            if isinstance(error, LocalProtocolError):
                # What does not fit the state here is the bundle that the peer sent, and the session is over.
                raise IntegrityError(f"bundle out of place: {error}") from error
            raise

    def seal_answer(self, kind: BundleKind, out: memoryview) -> int:
        """Seal READY (once verified), RUNNING (once running) or, once, the abort token of a side that was verified.

        Raises LocalProtocolError out of place, JournalError where FAILED cannot be written down before the abort token.
        """
        if kind is BundleKind.ABORT_TOKEN and self._machine.state is State.VERIFIED:
            self.fail()
        answers = None if self._streams is None else self._streams.answers
        if answers is None or answers.wiped or _STATE_FOR.get(kind) is not self._machine.state:
            raise LocalProtocolError(f"{kind.name} does not fit a session that is {self._machine.state.name}")
        if kind is BundleKind.ABORT_TOKEN:
            # FAILED for good first, and only then the word that lets the source go on (R7).
            self._journal.insist(State.FAILED)
        length = answers.seal(kind, FINAL_EPOCH, b"", hashlib.sha384(self._manifest).digest(), out)
        if kind is BundleKind.ABORT_TOKEN:
            self._wipe()
        return length

    def finish(self) -> None:
        """The guest runs here and the source knows or will not: forget every key."""
        if self._machine.state is not State.RUNNING:
            raise LocalProtocolError(f"the move is not complete: {self._machine.state.name}")
        self._wipe()

    def fail(self) -> None:
        """End the session for good: FAILED, keys wiped. Raises LocalProtocolError once the guest runs here.

        Where READY may have left, the source may wait for a word: the key for one abort token stays.
        """
        keep_answer = self._machine.state in (State.VERIFIED, State.FAILED)
        self._machine.advance(Event.FAIL)
        self._wipe(keep_answer=keep_answer)

    def _import(self, opener: Opener, channel: int, package: memoryview, staging: memoryview) -> Imported:
        if opener.counter == 0:
            raise IntegrityError(f"channel {channel} is not open")
        header = parse_header_untrusted(bytes(package[:HEADER_BYTES]), len(package))
        aad = bytes(package[: header.aad_bytes])
        sealed = package[len(aad) :]
        plaintext = staging[: header.payload_bytes]
        if header.kind in PAGE_KINDS:
            return self._import_pages(opener, header, aad, sealed, plaintext)
        with self.lock:
            return self._import_word(opener, channel, header, aad, sealed, plaintext)

    def _import_word(
        self,
        opener: Opener,
        channel: int,
        header: BundleHeader,
        aad: bytes,
        sealed: memoryview,
        plaintext: memoryview,
    ) -> Imported:
        """Everything that is not pages."""
        self._check_epoch(header)
        # The ledger says nothing of pages: it is sent before the first, and may be looked at after others' first.
        if self._opening and header.kind is not BundleKind.LEDGER:
            raise IntegrityError(f"{header.kind.name} bundle while pages are still being opened")
        if header.entry_count or channel != 0:
            raise IntegrityError(f"{header.kind.name} bundle with entries or not on channel 0")
        # What the manifest must say counts everything before the manifest's own bundle.
        expected = self._own_manifest() if header.kind is BundleKind.MANIFEST else None
        opener.open_untrusted(header, aad, sealed, plaintext)
        if header.kind is BundleKind.DEVICE_STATE:
            return Imported(header.kind, device_state=self._carry(plaintext))
        payload = bytes(plaintext)
        match header.kind:
            case BundleKind.VCPU_STATE:
                self._import_vcpu(payload)
            case BundleKind.EPOCH_TOKEN:
                self._close_epoch(parse_epoch_totals_untrusted(payload))
            case BundleKind.LEDGER:
                self._import_ledger(payload)
            case BundleKind.MANIFEST:
                self._verify(parse_manifest_untrusted(payload), expected)
                self._manifest = payload
            case BundleKind.START_TOKEN:
                self._start(payload)
            case _:
                raise IntegrityError(f"{header.kind.name} bundle does not belong here")
        return Imported(header.kind)

    def _import_pages(
        self, opener: Opener, header: BundleHeader, aad: bytes, sealed: memoryview, plaintext: memoryview
    ) -> Imported:
        with self.lock:
            self._check_epoch(header)
            if header.kind is BundleKind.PAGES_ZSTD and not self._established().compressed:
                raise IntegrityError("compressed pages in a session without compression")
            self._machine.advance(Event.IMPORT)
            gfns, operations, states = parse_entries_untrusted(aad[HEADER_BYTES:], header, self._memory.pages)
            pages = as_run(gfns)
            if self._seen.any_of(pages):
                raise ReplayError("a page came twice in one epoch")
            # Seen at once, so that no two channels write to one page; a bundle that does not open ends the session.
            self._seen.set_gfns(pages)
            self._opening += 1
        brought = 0
        try:
            opener.open_untrusted(header, aad, sealed, plaintext)
            content = self._decompressor.content_untrusted(header.kind, plaintext, operations)
            self._memory.adopt_states(pages, states)
            zero_pages = self._write(pages, gfns, operations, content)
            brought = len(gfns)
        finally:
            with self.lock:
                self._opening -= 1
                if brought:  # counted before anybody can see that nothing is being opened any more
                    self._content.record(pages, header.channel, header.incarnation, header.counter)
                    self._epoch_bundles += 1
        return Imported(header.kind, brought, zero_pages)

    def _write(
        self,
        pages: NDArray[np.int64] | range,
        gfns: NDArray[np.int64],
        operations: NDArray[np.uint8],
        plaintext: bytes | memoryview,
    ) -> int:
        """Bring opened pages to RAM; returns how many of them are zero."""
        content = np.frombuffer(plaintext, dtype=np.uint64).reshape(-1, WORDS_PER_PAGE)
        if len(content) == len(gfns):
            self._memory.write(pages, content)
            return 0
        if len(content):
            self._memory.write(gfns[operations == DATA], content)
        self._memory.zero(gfns[operations != DATA])
        return int(np.count_nonzero(operations == ZERO))

    def _close_epoch(self, totals: EpochTotals) -> None:
        self._machine.advance(Event.IMPORT)
        if totals != EpochTotals(self._epoch_bundles, self._seen.count()):
            raise IntegrityError("the epoch is not complete: its token counts other bundles or pages")
        self._epoch += 1
        self._epoch_bundles = 0
        self._seen.clear()
        self._session_streams().close_epoch()
        self._content.refresh()

    def _import_vcpu(self, payload: bytes) -> None:
        self._machine.advance(Event.IMPORT)
        vcpu, state = parse_vcpu_untrusted(payload)
        if not self._hand_over.may_come(vcpu):
            raise ReplayError("state of an unknown vCPU, or a second one")
        self._hand_over.add(vcpu, state)

    def _carry(self, payload: memoryview) -> bytes:
        self._machine.advance(Event.IMPORT)
        self._hand_over.device_state = self._hand_over.device_state.after_untrusted(payload)
        return bytes(payload[PART_HEADER_BYTES:])

    def _import_ledger(self, payload: bytes) -> None:
        self._machine.advance(Event.IMPORT)
        if self._ledger is not None:
            raise ReplayError("a second ledger")
        self._attestor.check_move(check_next(payload, self._established().proofs))
        self._ledger = payload

    def _own_manifest(self) -> Manifest:
        return Manifest(
            self._memory.pages,
            self._epoch - 1,
            self._gate.vcpus,
            self.freshness,
            self._content.content_digest(),
            self._content.state_digest(),
            self._hand_over.vcpu_digest(),
            hashlib.sha384(self._ledger or b"").digest(),
            self._session_streams().records(),
        )

    def _verify(self, manifest: Manifest, expected: Manifest | None) -> None:
        self._machine.require(Event.VERIFY)
        if manifest != expected or self._epoch_bundles or not self._content.complete():
            raise IntegrityError("the manifest does not describe what came")
        missing = self._hand_over.missing or ("the ledger is missing" if self._ledger is None else "")
        if missing:
            raise IntegrityError(missing)
        self._hand_over.load()
        self._machine.advance(Event.VERIFY)

    def _start(self, payload: bytes) -> None:
        self._machine.require(Event.START)
        manifest, signature = split_start_untrusted(payload)
        if manifest != self._manifest or self._ledger is None:
            raise IntegrityError("the start token carries another manifest")
        session = self._established()
        records = parse_ledger_untrusted(self._ledger)
        body = next_body(records, session.proofs, manifest)
        ledger = append(records, body, session.proofs, signature, session.ledger_key)
        # From RUNNING on nobody else has the record of this move (R12).
        self._journal.keep(ledger)
        self._machine.advance(Event.START)
        self._ledger = ledger
        self._gate.release()
        self._memory.disclaim()

    def _check_epoch(self, header: BundleHeader) -> None:
        expected = FINAL_EPOCH if self._machine.state is State.VERIFIED else self._epoch
        if header.epoch != expected:
            raise ReplayError(f"bundle of epoch {header.epoch} in epoch {expected}")

    def _established(self) -> Established:
        if self._session is None:
            raise LocalProtocolError("there is no session yet")
        return self._session

    def _session_streams(self) -> DestinationStreams:
        if self._streams is None:
            raise LocalProtocolError("there is no session yet")
        return self._streams

    def _require_replaceable(self) -> None:
        if self._hand_over.begun or self._machine.state not in (State.KEYED, State.IMPORTING):
            raise LocalProtocolError(
                "no connection is replaced before there are keys, nor after the last epoch"
            )

    def _wipe(self, *, keep_answer: bool = False) -> None:
        self._attempts.drop_all()
        if self._streams is not None:
            self._streams.wipe(keep_answers=keep_answer)
        if self._session is not None:
            self._session.keys.wipe()
            self._session.ledger_key.drop()
