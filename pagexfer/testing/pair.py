"""Two SVSMs and nothing between them: a whole move in memory, one call a step, with a place for an attacker.

Every sealed bundle becomes a `Message`; `send` shows it to `intercept`, which returns what really arrives: the message
itself, nothing, a changed copy, an older one, several. What a step sealed is kept in `sent`, and what the destination gave
out of a device state in `given_out`.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from ..svsm.destination import DestinationSvsm
from ..svsm.source import SourceSvsm
from ..wire.bundle import MAX_BUNDLE_BYTES, BundleKind, Direction, parse_header_untrusted
from ..wire.constants import GUEST_ID_BYTES
from ..wire.device_state import MAX_DEVICE_STATE_PART_BYTES, DevicePart
from ..wire.ledger import guest_id_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ..attestation import Attestor
    from ..dirty import DirtyTracker
    from ..svsm.compression import Compressor
    from ..svsm.gate import VcpuGate
    from ..svsm.journal import Journal, LedgerStore
    from ..svsm.memory import GuestMemory
    from ..wire.bundle import BundleHeader

_CHUNK_PAGES: Final = 64


@dataclass(frozen=True, slots=True)
class Message:
    """One sealed bundle on its way over `channel`."""

    direction: Direction
    channel: int
    data: bytes

    @property
    def header(self) -> BundleHeader:
        """The header, which travels in clear. Raises MalformedData for a message that is none any more."""
        return parse_header_untrusted(self.data, len(self.data))

    def flipped(self, offset: int, bits: int = 1) -> Message:
        """A copy with `bits` of the byte at `offset` (negative: from the end) flipped."""
        data = bytearray(self.data)
        data[offset] ^= bits
        return replace(self, data=bytes(data))

    def crossed(self, channel: int) -> Message:
        """A copy that arrives over another channel."""
        return replace(self, channel=channel)


class SvsmPair:
    """A source and a destination SVSM with one thread for all: every step seals, sends and delivers before it returns.

    `source` and `destination` are the SVSMs themselves, for steps of one's own; both have the one attestor but where
    the destination is given another. A step raises what either side refuses.
    """

    def __init__(
        self,
        source_memory: GuestMemory,
        source_gate: VcpuGate,
        destination_memory: GuestMemory,
        destination_gate: VcpuGate,
        attestor: Attestor,
        *,
        tracker: DirtyTracker | None = None,
        audit: bool = False,
        channels: int = 2,
        ledger: bytes = b"",
        destination_attestor: Attestor | None = None,
        compressor: Compressor | None = None,
        accept_compression: bool = False,
        intercept: Callable[[Message], Iterable[Message]] = lambda message: (message,),
        source_journal: Journal | None = None,
        destination_journal: Journal | None = None,
        store: LedgerStore | None = None,
    ) -> None:
        guest_id = guest_id_of(ledger) or secrets.token_bytes(GUEST_ID_BYTES)
        self.source = SourceSvsm(
            source_memory,
            source_gate,
            tracker,
            attestor,
            guest_id,
            audit=audit,
            compressor=compressor,
            ledger=ledger,
            journal=source_journal,
        )
        self.destination = DestinationSvsm(
            destination_memory,
            destination_gate,
            destination_attestor or attestor,
            accept_compression=accept_compression,
            journal=destination_journal,
            store=store,
        )
        self._audit = audit
        self.channels = channels
        self.intercept = intercept
        self.sent: list[Message] = []
        self.given_out = b""
        self._opened: set[int] = set()
        self._pages = source_memory.pages
        self._vcpus = source_gate.vcpus
        self._buffer = memoryview(bytearray(MAX_BUNDLE_BYTES))

    # Whole phases

    def handshake(self) -> None:
        """Both sides have keys."""
        reply = self.destination.answer(1, self.source.prepare(self.channels))
        self.source.confirm(self.destination.establish(1, self.source.establish(reply)))

    def open_channels(self) -> None:
        """Every channel has proved itself."""
        for channel in range(self.channels):
            self.send(self.seal_channel(channel))

    def ledger(self) -> None:
        """The ledger of the guest's moves so far."""
        self.send(self.seal_token(BundleKind.LEDGER))

    def epoch(self) -> None:
        """One epoch over all channels in turn, closed with its token."""
        self.source.begin_epoch()
        for number, start in enumerate(range(0, self._pages, _CHUNK_PAGES)):
            while message := self.seal_pages(number % self.channels, start, start + _CHUNK_PAGES):
                self.send(message)
        self.send(self.seal_token(BundleKind.EPOCH_TOKEN))

    def park(self) -> None:
        """Ask until all vCPUs are parked, which a gate with slow vCPUs never says."""
        while self.source.park()[0] < self._vcpus:
            pass

    def audit(self) -> int:
        """Hash all of RAM; returns the pages that were changed and not pending. Of a source that was made for it."""
        self.source.begin_epoch()
        found, more = 0, True
        while more:
            _, pages, more = self.source.audit()
            found += pages
        return found

    def vcpus(self) -> None:
        """The state of every vCPU."""
        for vcpu in range(self._vcpus):
            self.send(self.seal_vcpu(vcpu))

    def device_state(self, state: bytes, part_bytes: int = MAX_DEVICE_STATE_PART_BYTES) -> None:
        """The hypervisor's device state, in parts."""
        for offset in range(0, len(state), part_bytes):
            part = state[offset : offset + part_bytes]
            self.send(self.seal_device_part(DevicePart(len(state), offset, len(part)).pack_header() + part))

    def manifest(self) -> None:
        """The source's manifest."""
        self.send(self.seal_token(BundleKind.MANIFEST))

    def ready(self) -> None:
        """The destination found everything complete."""
        self.send(self.seal_answer(BundleKind.READY))

    def start(self) -> None:
        """The point of no return; the guest runs at the destination."""
        self.send(self.seal_token(BundleKind.START_TOKEN))

    def running(self) -> None:
        """The destination says that the guest runs there."""
        self.send(self.seal_answer(BundleKind.RUNNING))

    def finish(self) -> None:
        """Both sides forget their keys."""
        self.source.finish()
        self.destination.finish()

    def until_precopy(self) -> None:
        """Handshake, channels, ledger, and the first epoch."""
        self.handshake()
        self.open_channels()
        self.ledger()
        self.epoch()

    def until_manifest(self) -> None:
        """All before the manifest: parked, audited, the last epoch closed, vCPU states sent."""
        self.until_precopy()
        self.park()
        if self._audit:
            self.audit()
        self.epoch()
        self.vcpus()

    def migrate(self) -> None:
        """The whole move."""
        self.until_manifest()
        self.manifest()
        self.ready()
        self.start()
        self.running()
        self.finish()

    # One bundle

    def seal_channel(self, channel: int) -> Message:
        """The opening bundle of a channel."""
        return self._forward(channel, self.source.open_channel(channel, self._buffer))

    def seal_pages(self, channel: int, start: int, stop: int) -> Message | None:
        """The next bundle of pending pages from `start` to `stop` - 1 (at most all), None where none is pending."""
        exported = self.source.export(channel, start, min(stop, self._pages), self._buffer)
        return self._forward(channel, exported.length) if exported.length else None

    def seal_vcpu(self, vcpu: int) -> Message:
        """The state of one vCPU."""
        return self._forward(0, self.source.export_vcpu(vcpu, self._buffer))

    def seal_device_part(self, payload: bytes) -> Message:
        """The next part of the device state, with its header."""
        return self._forward(0, self.source.carry_untrusted(memoryview(payload), self._buffer))

    def seal_token(self, kind: BundleKind) -> Message:
        """Ledger, epoch token, manifest or start token."""
        seal = {
            BundleKind.LEDGER: self.source.ledger,
            BundleKind.EPOCH_TOKEN: self.source.epoch_token,
            BundleKind.MANIFEST: self.source.manifest,
            BundleKind.START_TOKEN: self.source.start_token,
        }[kind]
        return self._forward(0, seal(self._buffer))

    def seal_answer(self, kind: BundleKind) -> Message:
        """READY, RUNNING or the abort token."""
        length = self.destination.seal_answer(kind, self._buffer)
        return self._keep(Message(Direction.BACKWARD, 0, bytes(self._buffer[:length])))

    def send(self, message: Message) -> None:
        """Give a message to the attacker, and deliver what he lets through."""
        for arriving in self.intercept(message):
            self.deliver(arriving)

    def deliver(self, message: Message) -> None:
        """Have the receiving side take a message. Raises what that side refuses it with."""
        package = memoryview(bytearray(message.data))
        if message.direction is Direction.BACKWARD:
            self.source.accept_untrusted(package)
        elif message.channel in self._opened:
            self.given_out += self.destination.import_untrusted(message.channel, package).device_state
        else:
            self.destination.open_channel_untrusted(message.channel, package)
            self._opened.add(message.channel)

    def _forward(self, channel: int, length: int) -> Message:
        return self._keep(Message(Direction.FORWARD, channel, bytes(self._buffer[:length])))

    def _keep(self, message: Message) -> Message:
        self.sent.append(message)
        return message
