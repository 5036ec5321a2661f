"""The destination's SVSM: opens what comes, checks that it is all there, and decides when the guest may run.

Every bundle comes in private memory (`service` sees to that) and reaches guest RAM only after its tag held (R10). The
first thing that is wrong ends the session for good (R8): FAILED, keys wiped, and the guest never runs here.
"""

from __future__ import annotations

import hashlib
import struct
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from ..dirty import DirtyBitmap
from ..errors import (
    GeometryError,
    IntegrityError,
    LocalProtocolError,
    MalformedData,
    PagexferError,
    ReplayError,
)
from ..wire.bundle import (
    DATA,
    HEADER_BYTES,
    ZERO,
    BundleHeader,
    BundleKind,
    Direction,
    parse_entries_untrusted,
    parse_header_untrusted,
)
from ..wire.constants import (
    FINAL_EPOCH,
    FIRST_EPOCH,
    MAX_BUNDLE_ENTRIES,
    PAGE_SIZE,
    TAG_BYTES,
    WORDS_PER_PAGE,
)
from ..wire.slot import SessionStatus as State
from ..wire.token import EpochTotals, Manifest, parse_epoch_totals_untrusted, parse_manifest_untrusted
from .content import ContentTable, state_digest, vcpu_digest
from .handshake import DestinationAttempt, Established
from .sealing import Opener, Sealer
from .states import DESTINATION, Event, StateMachine

if TYPE_CHECKING:
    from ..attestation import Attestor
    from ..wire.handshake import Freshness
    from .gate import VcpuGate
    from .memory import GuestMemory

# Open handshakes of peers that proved nothing yet; more than this many strangers at once push out the oldest.
MAX_ATTEMPTS: Final = 16

_VCPU: Final = struct.Struct("<I")


class Imported(NamedTuple):
    """What a bundle was, and how many pages it brought."""

    kind: BundleKind
    pages: int
    zero_pages: int


class DestinationSvsm:
    """The trusted side of one incoming migration. The vCPUs behind `gate` are parked and never ran."""

    def __init__(self, memory: GuestMemory, gate: VcpuGate, attestor: Attestor) -> None:
        self._memory = memory
        self._gate = gate
        self._attestor = attestor
        self._machine = StateMachine(DESTINATION)
        self._attempts: dict[int, DestinationAttempt] = {}
        self._session: Established | None = None
        self._openers: list[Opener] = []
        self._sealer: Sealer | None = None
        self._epoch = FIRST_EPOCH
        self._epoch_bundles = 0
        self._seen = DirtyBitmap(memory.pages)
        self._content = ContentTable(memory.pages)
        self._vcpu_states: dict[int, bytes] = {}
        self._manifest = b""
        # One staging area for all channels: it stays in the cache, and holds plaintext for one call only.
        self._staging = np.empty((MAX_BUNDLE_ENTRIES, WORDS_PER_PAGE), dtype=np.uint64)
        self._staging_bytes = self._staging.data.cast("B")

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

    # Handshake

    def answer(self, attempt: int, hello: bytes) -> bytes:
        """Answer a source's hello; `attempt` names this handshake. Refused ones leave no trace."""
        self._machine.require(Event.ESTABLISH)
        opened = DestinationAttempt(self._attestor, hello, self._memory.pages, self._gate.vcpus)
        reply = opened.reply()
        self._attempts.pop(attempt, None)
        if len(self._attempts) >= MAX_ATTEMPTS:
            del self._attempts[next(iter(self._attempts))]
        self._attempts[attempt] = opened
        return reply

    def establish(self, attempt: int, evidence: bytes) -> bytes:
        """Take a source's evidence; returns the session's name. A handshake works once, and the first proven one wins.

        Raises AttestationError, after which other attempts are still welcome, or GeometryError, which ends this side.
        """
        self._machine.require(Event.ESTABLISH)
        opened = self._attempts.pop(attempt, None)
        if opened is None:
            raise LocalProtocolError("no such handshake is open")
        try:
            self._session = opened.finish(evidence)
        except GeometryError:
            self.fail()
            raise
        self._attempts.clear()
        keys = self._session.keys
        self._openers = [
            Opener(keys, Direction.FORWARD, channel) for channel in range(self._session.channels)
        ]
        self._sealer = Sealer(keys, Direction.BACKWARD, channel=0)
        self._machine.advance(Event.ESTABLISH)
        return keys.session

    def open_channel_untrusted(self, channel: int, package: memoryview) -> None:
        """Check that whoever sent `package` knows this session, before a connection becomes its `channel`.

        Raises RemoteProtocolError for a stranger, and the session goes on undisturbed (R8's exception).
        """
        self._established()
        opener = self._opener(channel)
        if opener.counter:
            raise ReplayError(f"channel {channel} is open already")
        data = bytes(package[: HEADER_BYTES + TAG_BYTES])
        header = parse_header_untrusted(data, len(package))
        if header.kind is not BundleKind.CHANNEL_OPEN or header.bundle_bytes != len(data):
            raise MalformedData("not the opening bundle of a channel")
        # A copy of the stream takes the risk: a stranger's bundle poisons that copy only.
        keys = self._established().keys
        trial = Opener(keys, Direction.FORWARD, channel)
        self._check_epoch(header)
        trial.open_untrusted(
            header, data[:HEADER_BYTES], memoryview(data)[HEADER_BYTES:], memoryview(bytearray())
        )
        self._openers[channel] = trial

    # Import

    def import_untrusted(self, channel: int, package: memoryview) -> Imported:
        """Take one bundle of an open channel. Anything wrong with it ends the session (R8) and raises.

        Raises RemoteProtocolError for a bad bundle, PageStateError or GateError where the guest's side refuses it, and
        LocalProtocolError, changing nothing, where this side is not importing or has no such channel.
        """
        if self._machine.state not in (State.KEYED, State.IMPORTING, State.VERIFIED):
            raise LocalProtocolError(f"nothing is imported in a session that is {self._machine.state.name}")
        opener = self._opener(channel)
        try:
            return self._import(opener, channel, package)
        except PagexferError as error:
            if self._machine.allows(Event.FAIL):
                self.fail()
            if isinstance(error, LocalProtocolError):
                # What does not fit the state here is the bundle that the peer sent, and the session is over.
                raise IntegrityError(f"bundle out of place: {error}") from error
            raise

    def seal_answer(self, kind: BundleKind, out: memoryview) -> int:
        """Seal READY (once verified), RUNNING (once running) or the abort token (once FAILED for good)."""
        state_for = {
            BundleKind.READY: State.VERIFIED,
            BundleKind.RUNNING: State.RUNNING,
            BundleKind.ABORT_TOKEN: State.VERIFIED,
        }
        if self._sealer is None or state_for.get(kind) is not self._machine.state:
            raise LocalProtocolError(f"{kind.name} does not fit a session that is {self._machine.state.name}")
        digest = hashlib.sha384(self._manifest).digest()
        sealer = self._sealer
        if kind is BundleKind.ABORT_TOKEN:
            # FAILED first, and only then the word that lets the source go on (R7).
            self._machine.advance(Event.FAIL)
        length = sealer.seal(kind, FINAL_EPOCH, b"", digest, out)
        if kind is BundleKind.ABORT_TOKEN:
            self._wipe()
        return length

    def finish(self) -> None:
        """The guest runs here and the source knows or will not: forget every key."""
        if self._machine.state is not State.RUNNING:
            raise LocalProtocolError(f"the move is not complete: {self._machine.state.name}")
        self._wipe()

    def fail(self) -> None:
        """End the session for good: FAILED, keys wiped. Raises LocalProtocolError once the guest runs here."""
        self._machine.advance(Event.FAIL)
        self._wipe()

    def _import(self, opener: Opener, channel: int, package: memoryview) -> Imported:
        if opener.counter == 0:
            raise IntegrityError(f"channel {channel} is not open")
        header = parse_header_untrusted(bytes(package[:HEADER_BYTES]), len(package))
        aad = bytes(package[: header.aad_bytes])
        sealed = package[len(aad) :]
        self._check_epoch(header)
        plaintext = self._staging_bytes[: header.payload_bytes]
        if header.kind is BundleKind.PAGES:
            return self._import_pages(opener, header, aad, sealed, plaintext)
        if header.entry_count or channel != 0:
            raise IntegrityError(f"{header.kind.name} bundle with entries or not on channel 0")
        # What the manifest must say counts everything before the manifest's own bundle.
        expected = self._own_manifest() if header.kind is BundleKind.MANIFEST else None
        opener.open_untrusted(header, aad, sealed, plaintext)
        payload = bytes(plaintext)
        match header.kind:
            case BundleKind.VCPU_STATE:
                self._import_vcpu(payload)
            case BundleKind.EPOCH_TOKEN:
                self._close_epoch(parse_epoch_totals_untrusted(payload))
            case BundleKind.MANIFEST:
                self._verify(parse_manifest_untrusted(payload), expected)
                self._manifest = payload
            case BundleKind.START_TOKEN:
                self._start(payload)
            case _:
                raise IntegrityError(f"{header.kind.name} bundle does not belong here")
        return Imported(header.kind, 0, 0)

    def _import_pages(
        self, opener: Opener, header: BundleHeader, aad: bytes, sealed: memoryview, plaintext: memoryview
    ) -> Imported:
        self._machine.advance(Event.IMPORT)
        gfns, operations, states = parse_entries_untrusted(aad[HEADER_BYTES:], header, self._memory.pages)
        if self._seen.test(gfns).any():
            raise ReplayError("a page came twice in one epoch")
        opener.open_untrusted(header, aad, sealed, plaintext)
        self._memory.adopt_states(gfns, states)
        data_pages = header.payload_bytes // PAGE_SIZE
        if data_pages == len(gfns):
            self._memory.write(gfns, self._staging[:data_pages])
        else:
            if data_pages:
                self._memory.write(gfns[operations == DATA], self._staging[:data_pages])
            self._memory.zero(gfns[operations != DATA])
        self._seen.set_gfns(gfns)
        self._content.record(gfns, header.channel, header.incarnation, header.counter)
        self._epoch_bundles += 1
        return Imported(header.kind, len(gfns), int(np.count_nonzero(operations == ZERO)))

    def _close_epoch(self, totals: EpochTotals) -> None:
        self._machine.advance(Event.IMPORT)
        if totals != EpochTotals(self._epoch_bundles, self._seen.count()):
            raise IntegrityError("the epoch is not complete: its token counts other bundles or pages")
        self._epoch += 1
        self._epoch_bundles = 0
        self._seen.clear()

    def _import_vcpu(self, payload: bytes) -> None:
        self._machine.advance(Event.IMPORT)
        if len(payload) <= _VCPU.size:
            raise MalformedData("vCPU state without content")
        vcpu = _VCPU.unpack_from(payload)[0]
        if vcpu >= self._gate.vcpus or vcpu in self._vcpu_states:
            raise ReplayError("state of an unknown vCPU, or a second one")
        self._vcpu_states[vcpu] = payload[_VCPU.size :]

    def _own_manifest(self) -> Manifest:
        return Manifest(
            self._memory.pages,
            self._epoch - 1,
            self._gate.vcpus,
            self.freshness,
            self._content.digest(),
            state_digest(self._memory.states),
            vcpu_digest(self._vcpu_states),
            tuple(opener.record() for opener in self._openers),
        )

    def _verify(self, manifest: Manifest, expected: Manifest | None) -> None:
        self._machine.require(Event.VERIFY)
        if manifest != expected or self._epoch_bundles or not self._content.complete():
            raise IntegrityError("the manifest does not describe what came")
        if len(self._vcpu_states) != self._gate.vcpus:
            raise IntegrityError("the state of a vCPU is missing")
        for vcpu, state in sorted(self._vcpu_states.items()):
            self._gate.load_state(vcpu, state)
        self._machine.advance(Event.VERIFY)

    def _start(self, payload: bytes) -> None:
        self._machine.require(Event.START)
        if payload != self._manifest:
            raise IntegrityError("the start token carries another manifest")
        self._machine.advance(Event.START)
        self._gate.release()

    def _check_epoch(self, header: BundleHeader) -> None:
        expected = FINAL_EPOCH if self._machine.state is State.VERIFIED else self._epoch
        if header.epoch != expected:
            raise ReplayError(f"bundle of epoch {header.epoch} in epoch {expected}")

    def _established(self) -> Established:
        if self._session is None:
            raise LocalProtocolError("there is no session yet")
        return self._session

    def _opener(self, channel: int) -> Opener:
        if not 0 <= channel < len(self._openers):
            raise LocalProtocolError(f"there is no channel {channel}")
        return self._openers[channel]

    def _wipe(self) -> None:
        self._attempts.clear()
        for stream in (*self._openers, *([self._sealer] if self._sealer else [])):
            stream.wipe()
        if self._session is not None:
            self._session.keys.wipe()
