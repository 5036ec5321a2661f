"""The streams of one session at each side, and how a channel whose connection broke gets a new one (R9).

A new connection is a new incarnation of its channel: a new key, and counters from 0. The source seals an opening bundle
for it; the destination that takes it takes nothing of the incarnation before any more, and answers with a sealed record of
every earlier incarnation of that channel: how many bundles arrived, and the digest of their tags. The source checks these
against what it sealed, and so knows which bundles are lost. Nothing is sealed again under a number that was used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ..errors import IntegrityError, KeyExhausted, LocalProtocolError, MalformedData, ReplayError
from ..wire.bundle import HEADER_BYTES, BundleKind, Direction, parse_header_untrusted
from ..wire.constants import FINAL_EPOCH, FIRST_EPOCH, MAX_INCARNATIONS, TAG_BYTES
from ..wire.token import ChannelRecord, pack_records, parse_records_untrusted
from .sealing import Opener, Sealer

if TYPE_CHECKING:
    from ..wire.bundle import BundleHeader
    from .keys import KeySchedule


class Lost(NamedTuple):
    """Of a replaced incarnation of a channel, `received` of `sealed` bundles arrived."""

    channel: int
    incarnation: int
    received: int
    sealed: int


class SourceStreams:
    """A source's sealer for each channel, and the opener of the destination's answers."""

    def __init__(self, keys: KeySchedule, channels: int) -> None:
        self._keys = keys
        self._sealers = [Sealer(keys, Direction.FORWARD, channel) for channel in range(channels)]
        self._replaced: list[dict[int, Sealer]] = [{} for _ in range(channels)]
        self._received: dict[tuple[int, int], int] = {}
        self._awaited: dict[int, Opener] = {}
        self.answers = Opener(keys, Direction.BACKWARD, channel=0)

    def sealer(self, channel: int) -> Sealer:
        """The stream of a channel. Raises LocalProtocolError where there is none, or not yet again."""
        if channel in self._awaited:
            raise LocalProtocolError(f"channel {channel} awaits the destination's word on its new connection")
        return self._current(channel)

    def open(self, channel: int, out: memoryview) -> int:
        """Seal the first bundle of a channel. Raises LocalProtocolError where it is open already."""
        sealer = self.sealer(channel)
        if sealer.counter:
            raise LocalProtocolError(f"channel {channel} is open already")
        return sealer.seal(BundleKind.CHANNEL_OPEN, FIRST_EPOCH, b"", b"", out)

    def replace(self, channel: int, out: memoryview) -> int:
        """Seal the first bundle of a channel's next incarnation; the channel seals nothing else until `settle`.

        Raises KeyExhausted after MAX_INCARNATIONS.
        """
        old = self._current(channel)
        incarnation = old.incarnation + 1
        if incarnation >= MAX_INCARNATIONS:
            raise KeyExhausted(f"channel {channel} was replaced {old.incarnation} times")
        old.wipe()
        self._replaced[channel][old.incarnation] = old
        sealer = self._sealers[channel] = Sealer(self._keys, Direction.FORWARD, channel, incarnation)
        self._awaited[channel] = Opener(self._keys, Direction.BACKWARD, channel, incarnation)
        return sealer.seal(BundleKind.CHANNEL_OPEN, FIRST_EPOCH, b"", b"", out)

    def settle(self, channel: int, package: bytes) -> list[Lost]:
        """Take the destination's word on a replaced channel; returns what was not known to be lost before.

        Raises RemoteProtocolError where it is forged or says what cannot be, LocalProtocolError where none is awaited.
        """
        opener = self._awaited.get(channel)
        if opener is None:
            raise LocalProtocolError(f"channel {channel} was not replaced")
        header, payload = open_answer_untrusted(opener, package)
        if header.kind is not BundleKind.CHANNEL_STATE:
            raise IntegrityError(f"{header.kind.name} bundle where CHANNEL_STATE is due")
        records = parse_records_untrusted(payload)
        replaced = self._replaced[channel]
        known = {record.incarnation: record for record in records if record.channel == channel}
        if list(known.values()) != list(records) or not known.keys() <= replaced.keys():
            raise IntegrityError("records of other channels or incarnations")
        lost = [self._lost(stream, known) for stream in replaced.values()]
        news = [loss for loss in lost if (channel, loss.incarnation) not in self._received]
        for loss in lost:
            if self._received.setdefault((channel, loss.incarnation), loss.received) != loss.received:
                raise IntegrityError("another record of an incarnation than before")
        self._current(channel).follow(records)
        del self._awaited[channel]
        if channel == 0:
            self.answers.wipe()
            self.answers = opener
        else:
            opener.wipe()
        return news

    def close_epoch(self) -> None:
        """The destination has every bundle so far."""
        for sealer in self._sealers:
            sealer.settle()

    def records(self) -> tuple[ChannelRecord, ...]:
        """What was sealed on each channel, as the manifest has it. Raises LocalProtocolError while one awaits a word."""
        return tuple(self.sealer(channel).record() for channel in range(len(self._sealers)))

    def wipe(self) -> None:
        """Drop every key."""
        for stream in (*self._sealers, *self._awaited.values(), self.answers):
            stream.wipe()

    def _current(self, channel: int) -> Sealer:
        if not 0 <= channel < len(self._sealers):
            raise LocalProtocolError(f"there is no channel {channel}")
        return self._sealers[channel]

    def _lost(self, stream: Sealer, known: dict[int, ChannelRecord]) -> Lost:
        """What `known` says of a replaced stream; none of its bundles arrived where it says nothing."""
        stream.follow(record for record in known.values() if record.incarnation < stream.incarnation)
        record = known.get(stream.incarnation)
        if record is not None and stream.record(record.bundles) != record:
            raise IntegrityError("a record of other bundles than were sealed")
        return Lost(
            stream.channel, stream.incarnation, record.bundles if record is not None else 0, stream.counter
        )


class DestinationStreams:
    """A destination's opener for each channel, and the sealer of its answers."""

    def __init__(self, keys: KeySchedule, channels: int) -> None:
        self._keys = keys
        self._openers = [Opener(keys, Direction.FORWARD, channel) for channel in range(channels)]
        self._retired: list[list[ChannelRecord]] = [[] for _ in range(channels)]
        self._candidates: dict[int, Opener] = {}
        self.answers = Sealer(keys, Direction.BACKWARD, channel=0)

    def opener(self, channel: int) -> Opener:
        """The stream of a channel. Raises LocalProtocolError where there is none."""
        if not 0 <= channel < len(self._openers):
            raise LocalProtocolError(f"there is no channel {channel}")
        return self._openers[channel]

    def open_untrusted(self, channel: int, package: memoryview) -> None:
        """Open a channel for the first time. Raises RemoteProtocolError for a stranger, changing nothing."""
        if self.opener(channel).counter:
            raise ReplayError(f"channel {channel} is open already")
        self._openers[channel] = self._introduced(channel, 0, package)

    def check_replacement_untrusted(self, channel: int, package: memoryview) -> None:
        """Whoever sent `package` may take the place of a channel's connection once `replace` is called.

        Raises RemoteProtocolError for a stranger, changing nothing.
        """
        current = self.opener(channel)
        incarnation = parse_header_untrusted(bytes(package[:HEADER_BYTES]), len(package)).incarnation
        if not current.incarnation < incarnation < MAX_INCARNATIONS:
            raise ReplayError(f"incarnation {incarnation} of a channel that is in {current.incarnation}")
        candidate = self._introduced(channel, incarnation, package)
        self._drop_candidate(channel)
        self._candidates[channel] = candidate

    def replace(self, channel: int, out: memoryview) -> int:
        """End a channel's stream and go on with the checked one; seals the record of all that ended.

        Raises LocalProtocolError where none was checked.
        """
        opener = self._candidates.pop(channel, None)
        if opener is None:
            raise LocalProtocolError(f"nothing may replace the connection of channel {channel}")
        old, retired = self._openers[channel], self._retired[channel]
        if old.counter:
            retired.append(old.record())
        old.wipe()
        opener.follow(retired)
        self._openers[channel] = opener
        answers = Sealer(self._keys, Direction.BACKWARD, channel, opener.incarnation)
        length = answers.seal(BundleKind.CHANNEL_STATE, FINAL_EPOCH, b"", pack_records(retired), out)
        if channel == 0:
            self.answers.wipe()
            self.answers = answers
        else:
            answers.wipe()
        return length

    def close_epoch(self) -> None:
        """The epoch's bundles are all here."""
        for opener in self._openers:
            opener.settle()

    def records(self) -> tuple[ChannelRecord, ...]:
        """What came over each channel, as the manifest must have it."""
        return tuple(opener.record() for opener in self._openers)

    def wipe(self, *, keep_answers: bool) -> None:
        """Drop every key; with `keep_answers` all but that of the last word."""
        for channel in list(self._candidates):
            self._drop_candidate(channel)
        for opener in self._openers:
            opener.wipe()
        if not keep_answers:
            self.answers.wipe()

    def _introduced(self, channel: int, incarnation: int, package: memoryview) -> Opener:
        """A stream that took its opening bundle, apart from all others: a stranger's bundle poisons nothing but that."""
        data = bytes(package[: HEADER_BYTES + TAG_BYTES])
        header = parse_header_untrusted(data, len(package))
        if header.kind is not BundleKind.CHANNEL_OPEN or header.bundle_bytes != len(data):
            raise MalformedData("not the opening bundle of a channel")
        if header.epoch != FIRST_EPOCH:
            raise ReplayError(f"opening bundle of epoch {header.epoch}")
        trial = Opener(self._keys, Direction.FORWARD, channel, incarnation)
        trial.open_untrusted(
            header, data[:HEADER_BYTES], memoryview(data)[HEADER_BYTES:], memoryview(bytearray())
        )
        return trial

    def _drop_candidate(self, channel: int) -> None:
        candidate = self._candidates.pop(channel, None)
        if candidate is not None:
            candidate.wipe()


def open_answer_untrusted(opener: Opener, package: bytes) -> tuple[BundleHeader, bytes]:
    """Open a bundle of the destination's; returns header and payload. Raises RemoteProtocolError."""
    header = parse_header_untrusted(package, len(package))
    if header.entry_count:
        raise IntegrityError("answer with entries")
    payload = bytearray(header.payload_bytes)
    opener.open_untrusted(
        header, package[:HEADER_BYTES], memoryview(package)[HEADER_BYTES:], memoryview(payload)
    )
    if header.epoch != FINAL_EPOCH:
        raise IntegrityError("answer of another epoch")
    return header, bytes(payload)
