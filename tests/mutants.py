"""The rules of protocol.md, each taken out of the running code: a mutation replaces one check of the trusted side by one
that holds always.
"""

from __future__ import annotations

import hashlib
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from unittest.mock import patch

import numpy as np
from cryptography.exceptions import InvalidTag

from pagexfer.attestation import Claims, PskAttestor
from pagexfer.dirty import DirtyBitmap
from pagexfer.dirty.content import ContentTracker
from pagexfer.errors import IntegrityError, RemoteProtocolError
from pagexfer.svsm import ledger, sealing, service
from pagexfer.svsm.audit import PageDigests
from pagexfer.svsm.content import ContentTable
from pagexfer.svsm.destination import DestinationSvsm
from pagexfer.svsm.device_state import Carried
from pagexfer.svsm.epoch import EpochBook, Replaced
from pagexfer.svsm.keys import KeySchedule
from pagexfer.svsm.memory import GuestMemory
from pagexfer.svsm.pending import PendingPages
from pagexfer.svsm.sealing import Opener, Sealer, _Stream
from pagexfer.svsm.source import SourceSvsm
from pagexfer.svsm.states import SOURCE, Event
from pagexfer.svsm.sweep import Looked, Sweep
from pagexfer.wire.bundle import HEADER_BYTES, MAX_BUNDLE_BYTES, BundleKind, nonce, parse_entries_untrusted
from pagexfer.wire.constants import FINAL_EPOCH
from pagexfer.wire.device_state import parse_device_part_untrusted
from pagexfer.wire.handshake import AttestorKind
from pagexfer.wire.slot import SessionStatus as State
from pagexfer.wire.token import EpochTotals

from .held_mutants import as_if_nothing_were_sealed, leaves_an_ended_session, replaced

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from pagexfer.attestation.secret import Secret
    from pagexfer.svsm.destination import Imported
    from pagexfer.svsm.export import Exported
    from pagexfer.svsm.staging import StagingPool
    from pagexfer.svsm.streams import Lost
    from pagexfer.wire.bundle import BundleHeader, Direction
    from pagexfer.wire.slot import SlotMemory
    from pagexfer.wire.token import Manifest


_Parts = tuple["Opener", "BundleHeader", bytes, memoryview, memoryview]
_NO_CLAIMS: Final = Claims(AttestorKind.PSK, "anybody")


@dataclass(frozen=True, slots=True)
class Mutation:
    """One rule that does not hold any more while `apply` is entered."""

    rule: str
    what: str
    apply: Callable[[ExitStack], None]
    also: tuple[str, ...] = ()  # other properties that its absence may break first

    @property
    def found_as(self) -> set[str]:
        """What a violation may be reported as."""
        return {self.rule, *self.also}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The code is broken meanwhile."""
        with ExitStack() as stack:
            self.apply(stack)
            yield


# R1


def _nothing_seen(stack: ExitStack) -> None:
    """The destination's bitmap of this epoch is always empty to whom asks; its counts stay right."""
    import_pages = DestinationSvsm._import_pages

    def blind(self: DestinationSvsm, *arguments: *_Parts) -> Imported:
        seen, self._seen = self._seen, DirtyBitmap(self._memory.pages)
        try:
            return import_pages(self, *arguments)
        finally:
            seen.union(self._seen)
            self._seen = seen

    stack.enter_context(patch.object(DestinationSvsm, "_import_pages", blind))


def _pages_stay_pending(stack: ExitStack) -> None:
    """The source forgets that it sealed a page."""
    export = SourceSvsm.export

    def forgetful(self: SourceSvsm, channel: int, start: int, stop: int, out: memoryview) -> Exported:
        before = self._pending.pages.gfns()
        exported = export(self, channel, start, stop, out)
        self._pending.pages.set_gfns(before)
        return exported

    stack.enter_context(patch.object(SourceSvsm, "export", forgetful))


# R2


def _any_counter(stack: ExitStack) -> None:
    check = Opener._check_place

    def careless(self: Opener, header: BundleHeader) -> None:
        check(self, header._replace(counter=self.counter))

    stack.enter_context(patch.object(Opener, "_check_place", careless))


# R3


def _any_totals(stack: ExitStack) -> None:
    close = DestinationSvsm._close_epoch

    def careless(self: DestinationSvsm, _totals: EpochTotals) -> None:
        close(self, EpochTotals(self._epoch_bundles, self._seen.count()))

    stack.enter_context(patch.object(DestinationSvsm, "_close_epoch", careless))


# R4


def _nothing_pending(stack: ExitStack) -> None:
    token = SourceSvsm.epoch_token

    def careless(self: SourceSvsm, out: memoryview) -> int:
        pending = self._pending.pages
        self._pending.pages = DirtyBitmap(self._memory.pages)
        try:
            return token(self, out)
        finally:
            self._pending.pages = pending

    stack.enter_context(patch.object(SourceSvsm, "epoch_token", careless))


def _hint_believed(stack: ExitStack) -> None:
    """What the hypervisor's dirty log does not name is taken for clean, whatever the SVSM's own tracker saw."""

    step = Sweep.step

    def blind(self: Sweep, _pending: DirtyBitmap) -> Looked:
        return step(self, DirtyBitmap(self._pages))

    def gullible(self: PendingPages, lost: DirtyBitmap) -> None:
        self._take_reports(lost)

    stack.enter_context(patch.object(Sweep, "step", blind))
    stack.enter_context(patch.object(PendingPages, "collect_reports", gullible))


# R5


def _park_believed(stack: ExitStack) -> None:
    park = SourceSvsm.park

    def gullible(self: SourceSvsm) -> tuple[int, int]:
        parked, vcpus = park(self)
        if parked < vcpus:
            self._machine.advance(Event.PARK)
        return vcpus, vcpus

    stack.enter_context(patch.object(SourceSvsm, "park", gullible))


def _parked_enough(stack: ExitStack) -> None:
    stack.enter_context(patch.object(SourceSvsm, "_require_parked", lambda _self: None))


# R6


def _any_manifest(stack: ExitStack) -> None:
    verify = DestinationSvsm._verify

    def careless(self: DestinationSvsm, manifest: Manifest, _expected: Manifest | None) -> None:
        verify(self, manifest, manifest)

    stack.enter_context(patch.object(DestinationSvsm, "_verify", careless))


def _any_start_payload(stack: ExitStack) -> None:
    start = DestinationSvsm._start
    stack.enter_context(
        patch.object(
            DestinationSvsm, "_start", lambda self, payload: start(self, self._manifest + payload[-64:])
        )
    )


def _unsent_is_fine(stack: ExitStack) -> None:
    """The manifest is sealed whatever is dirty or unsent."""
    manifest = SourceSvsm.manifest

    def careless(self: SourceSvsm, out: memoryview) -> int:
        pending = self._pending.pages
        self._pending.pages = DirtyBitmap(self._memory.pages)
        bundles, self._epoch.bundles = self._epoch.bundles, 0
        try:
            with patch.object(PendingPages, "collect_reports", lambda _self, _lost: None):
                return manifest(self, out)
        finally:
            self._pending.pages, self._epoch.bundles = pending, bundles

    stack.enter_context(patch.object(SourceSvsm, "manifest", careless))
    stack.enter_context(patch.object(ContentTable, "complete", lambda _self: True))


def _no_vcpu_needed(stack: ExitStack) -> None:
    """The manifest is sealed however many vCPUs were exported."""
    manifest = SourceSvsm.manifest

    def careless(self: SourceSvsm, out: memoryview) -> int:
        states = self._hand_over._vcpu_states
        unexported = [vcpu for vcpu in range(self._gate.vcpus) if vcpu not in states]
        states.update((vcpu, b"") for vcpu in unexported)
        try:
            return manifest(self, out)
        finally:
            for vcpu in unexported:
                del states[vcpu]

    stack.enter_context(patch.object(SourceSvsm, "manifest", careless))


def _parts_are_enough(stack: ExitStack) -> None:
    """A device state that was begun counts as whole."""
    stack.enter_context(patch.object(Carried, "complete", True))


def _any_part(stack: ExitStack) -> None:
    """A part of the device state may stand anywhere in it."""

    def careless(self: Carried, payload: bytes) -> Carried:
        part = parse_device_part_untrusted(payload)
        return Carried(part.total_bytes, part.end)

    stack.enter_context(patch.object(Carried, "after_untrusted", careless))


# R7


def _no_ready_needed(stack: ExitStack) -> None:
    start = SourceSvsm.start_token

    def hasty(self: SourceSvsm, out: memoryview) -> int:
        self._peer_ready = bool(self._manifest)
        return start(self, out)

    stack.enter_context(patch.object(SourceSvsm, "start_token", hasty))


def _abort_after_start(stack: ExitStack) -> None:
    stack.enter_context(patch.dict(SOURCE, {(State.STARTED, Event.ABORT): State.ABORTED}))


def _abort_token_without_failing(stack: ExitStack) -> None:
    seal = DestinationSvsm.seal_answer

    def lying(self: DestinationSvsm, kind: BundleKind, out: memoryview) -> int:
        if kind is not BundleKind.ABORT_TOKEN or self._streams is None:
            return seal(self, kind, out)
        return self._streams.answers.seal(
            kind, FINAL_EPOCH, b"", hashlib.sha384(self._manifest).digest(), out
        )

    stack.enter_context(patch.object(DestinationSvsm, "seal_answer", lying))


def _guest_is_anybodys(stack: ExitStack) -> None:
    """A second session may move a guest that one moves already, or has moved."""
    stack.enter_context(patch.object(GuestMemory, "claim", lambda _self, **_how: 1))


# R8


def _goes_on_after_a_bad_bundle(stack: ExitStack) -> None:
    def lenient(self: DestinationSvsm, channel: int, package: memoryview) -> Imported:
        opener = self._session_streams().opener(channel)
        with self.staging.area(MAX_BUNDLE_BYTES) as staging:
            return self._import(opener, channel, package, staging)

    stack.enter_context(patch.object(DestinationSvsm, "import_untrusted", lenient))


def _nothing_wiped(stack: ExitStack) -> None:
    stack.enter_context(patch.object(_Stream, "wipe", lambda _self: None))


def _stranger_ends_it(stack: ExitStack) -> None:
    open_channel = DestinationSvsm.open_channel_untrusted

    def strict(self: DestinationSvsm, channel: int, package: memoryview) -> None:
        try:
            open_channel(self, channel, package)
        except RemoteProtocolError:
            if self._machine.allows(Event.FAIL):
                self.fail()
            raise

    stack.enter_context(patch.object(DestinationSvsm, "open_channel_untrusted", strict))


# R9


def _counter_not_raised(stack: ExitStack) -> None:
    seal = Sealer.seal

    def stuck(
        self: Sealer, kind: BundleKind, epoch: int, entries: bytes, payload: bytes, out: memoryview
    ) -> int:
        length = seal(self, kind, epoch, entries, payload, out)
        self.counter -= 1
        return length

    stack.enter_context(patch.object(Sealer, "seal", stuck))


def _losses_forgotten(stack: ExitStack) -> None:
    """What a lost connection did not bring counts as sent."""

    def forgetful(self: EpochBook, lost: list[Lost], content: ContentTable) -> Replaced:
        return Replaced(0, token=False, ledger=False)

    stack.enter_context(patch.object(EpochBook, "account", forgetful))


def _same_key_again(stack: ExitStack) -> None:
    """A new connection goes on under the key of the first."""
    traffic_key = KeySchedule.traffic_key

    def stuck(self: KeySchedule, direction: Direction, channel: int, incarnation: int) -> Secret:
        return traffic_key(self, direction, channel, 0)

    stack.enter_context(patch.object(KeySchedule, "traffic_key", stuck))
    stack.enter_context(
        patch.object(sealing, "nonce", lambda channel, _incarnation, counter: nonce(channel, 0, counter))
    )


# R10


def _used_in_place(stack: ExitStack) -> None:
    border = service.Border.__init__

    def trusting(self: service.Border, slot: SlotMemory, staging: StagingPool, *, shared: bool) -> None:
        border(self, slot, staging, shared=False)

    stack.enter_context(patch.object(service.Border, "__init__", trusting))


def _written_before_the_tag(stack: ExitStack) -> None:
    """Pages are brought to their new states, and cleared to make room, before the tag is looked at."""
    import_pages = DestinationSvsm._import_pages

    def eager(self: DestinationSvsm, *parts: *_Parts) -> Imported:
        _, header, aad, *_ = parts
        gfns, _, states = parse_entries_untrusted(aad[HEADER_BYTES:], header, self._memory.pages)
        self._memory.adopt_states(gfns, states)
        self._memory.zero(gfns)
        return import_pages(self, *parts)

    stack.enter_context(patch.object(DestinationSvsm, "_import_pages", eager))


def _any_tag(stack: ExitStack) -> None:
    """A wrong tag is overlooked; the cipher's output counts, whatever it is."""
    open_untrusted = Opener.open_untrusted

    def careless(self: Opener, header: BundleHeader, aad: bytes, sealed: memoryview, out: memoryview) -> None:
        cipher = self._cipher
        try:
            open_untrusted(self, header, aad, sealed, out)
        except IntegrityError as error:
            if not isinstance(error.__context__, InvalidTag):
                raise
            self._cipher = cipher
            self.counter += 1
            self._tags += sealed[-16:]

    stack.enter_context(patch.object(Opener, "open_untrusted", careless))


# R11


def _any_evidence(stack: ExitStack) -> None:
    stack.enter_context(patch.object(PskAttestor, "verify", lambda _self, _evidence, _data: _NO_CLAIMS))


def _any_signature(stack: ExitStack) -> None:
    stack.enter_context(patch.object(ledger, "_check_signature", lambda *_arguments: None))


# R13


def _found_nothing(
    _self: object, start: int, _stop: int, _excused: DirtyBitmap | None = None
) -> NDArray[np.int64]:
    return np.arange(start, start)


_any_epoch = replaced(DestinationSvsm, "_check_epoch", lambda _self, _header: None)
_nothing_compared = replaced(PendingPages, "compared", True)
_audit_is_blind = replaced(PageDigests, "changed", _found_nothing)
_comparison_is_blind = replaced(ContentTracker, "collect_part", _found_nothing)
_sweep_is_over = replaced(Sweep, "require_closed", lambda _self: None)

MUTATIONS: Final = (
    Mutation("R1", "destination: seen bitmap never says that a page came", _nothing_seen),
    Mutation("R1", "source: a sealed page stays pending", _pages_stay_pending),
    Mutation("R2", "any counter is the next", _any_counter),
    Mutation("R2", "any epoch is the current one", _any_epoch),
    Mutation("R3", "totals of the epoch token ignored", _any_totals),
    Mutation("R4", "epoch token while pages are pending", _nothing_pending),
    Mutation("R4", "bundles while an epoch is being begun", _sweep_is_over, ("R1",)),
    Mutation("R4", "the host's dirty log believed", _hint_believed, ("R6",)),
    Mutation(
        "R4", "epoch token while a bundle is being sealed", as_if_nothing_were_sealed("epoch_token"), ("R2",)
    ),
    Mutation(
        "R4",
        "an epoch begins while a bundle is being sealed",
        as_if_nothing_were_sealed("collect_part"),
        ("R1",),
    ),
    Mutation("R5", "parked at the first word", _park_believed),
    Mutation("R5", "vCPUs saved without parking", _parked_enough),
    Mutation("R6", "destination: any manifest holds", _any_manifest),
    Mutation("R6", "destination: any start token holds", _any_start_payload),
    Mutation("R6", "source: manifest while pages are unsent", _unsent_is_fine),
    Mutation("R6", "source: manifest without all vCPUs", _no_vcpu_needed),
    Mutation("R6", "a manifest without the whole device state", _parts_are_enough),
    Mutation("R6", "parts of the device state in any order", _any_part),
    Mutation("R7", "start token without READY", _no_ready_needed),
    Mutation("R7", "abort after the start token", _abort_after_start),
    Mutation("R7", "abort token without FAILED", _abort_token_without_failing),
    Mutation("R7", "two sessions move one guest", _guest_is_anybodys, ("R5",)),
    Mutation("R8", "the session goes on after a bad bundle", _goes_on_after_a_bad_bundle),
    Mutation("R8", "keys are not wiped", _nothing_wiped),
    Mutation("R8", "a stranger ends the session", _stranger_ends_it),
    Mutation("R8", "a bundle leaves a session that ended as it was sealed", leaves_an_ended_session),
    Mutation("R9", "the counter is not raised", _counter_not_raised),
    Mutation(
        "R9", "source: what a lost connection did not bring is forgotten", _losses_forgotten, ("R1", "R3")
    ),
    Mutation("R9", "a new connection under the old key", _same_key_again),
    Mutation("R10", "packages used in shared memory", _used_in_place),
    Mutation("R10", "pages written before the tag held", _written_before_the_tag),
    Mutation("R10", "the tag is not looked at", _any_tag, ("G2",)),
    Mutation("R11", "evidence is not verified", _any_evidence),
    Mutation("R12", "the source's signature of the move is not checked", _any_signature, ("R6",)),
    Mutation("R13", "manifest without a comparison after the park", _nothing_compared),
    Mutation("R13", "the audit finds nothing", _audit_is_blind, ("R4",)),
    Mutation(
        "R13",
        "an audit while a bundle is being sealed",
        as_if_nothing_were_sealed("audit"),
        ("R1", "R4", "R6"),
    ),
    Mutation("R13", "a comparing tracker finds nothing", _comparison_is_blind, ("R4",)),
)
