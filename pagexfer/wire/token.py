"""Payloads of the tokens: what the two SVSMs tell each other about whole epochs and the whole guest.

They are sealed like pages and have one fixed layout each; READY, RUNNING and ABORT carry only the digest of the manifest
that they answer, the start token the manifest and the source's signature under the ledger's record of the move.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ..errors import MalformedData
from .constants import DIGEST_BYTES, MAX_CHANNELS
from .handshake import Freshness
from .ledger import SIGNATURE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable

# Epoch token:
#   offset  size  field
#        0     8  bundles of this epoch over all channels
#        8     8  pages of this epoch over all channels
_EPOCH_TOTALS: Final = struct.Struct("<QQ")

# Manifest, followed by one channel record for each channel:
#   offset  size  field
#        0     8  RAM pages
#        8     4  last closed epoch
#       12     4  vCPUs
#       16     1  freshness mode
#       17     1  reserved, zero
#       18     2  channels
#       20    48  content digest
#       68    48  page state digest
#      116    48  vCPU state digest
#      164    48  ledger digest
_MANIFEST: Final = struct.Struct("<QIIBBH48s48s48s48s")
assert _MANIFEST.size == 212

# Channel record:
#   offset  size  field
#        0     2  channel
#        2     2  incarnation
#        4     8  bundles sealed, that is the next counter
#       12    48  transcript: digest over the records of the channel's incarnations before that
#                   brought anything, and the tags of all bundles, in order
_CHANNEL: Final = struct.Struct("<HHQ48s")
assert _CHANNEL.size == 60


@dataclass(frozen=True, slots=True)
class EpochTotals:
    """Counts of one epoch over all channels (R3)."""

    bundles: int
    pages: int

    def pack(self) -> bytes:
        return _EPOCH_TOTALS.pack(self.bundles, self.pages)


@dataclass(frozen=True, slots=True)
class ChannelRecord:
    """What went over one channel in one incarnation."""

    channel: int
    incarnation: int
    bundles: int
    transcript: bytes

    def pack(self) -> bytes:
        return _CHANNEL.pack(self.channel, self.incarnation, self.bundles, self.transcript)


@dataclass(frozen=True, slots=True)
class Manifest:
    """Digest of the guest's final state (R6). Both sides compute it by themselves; the importer compares."""

    ram_pages: int
    last_epoch: int
    vcpus: int
    freshness: Freshness
    content_digest: bytes
    state_digest: bytes
    vcpu_digest: bytes
    ledger_digest: bytes
    channels: tuple[ChannelRecord, ...]

    def pack(self) -> bytes:
        head = _MANIFEST.pack(
            self.ram_pages,
            self.last_epoch,
            self.vcpus,
            self.freshness,
            0,
            len(self.channels),
            self.content_digest,
            self.state_digest,
            self.vcpu_digest,
            self.ledger_digest,
        )
        return head + pack_records(self.channels)


def parse_epoch_totals_untrusted(data: bytes) -> EpochTotals:
    """Payload of an epoch token. Raises MalformedData."""
    if len(data) != _EPOCH_TOTALS.size:
        raise MalformedData(f"epoch token of {len(data)} bytes")
    return EpochTotals(*_EPOCH_TOTALS.unpack(data))


def pack_records(records: Iterable[ChannelRecord]) -> bytes:
    """Channel records one after the other."""
    return b"".join(record.pack() for record in records)


def parse_records_untrusted(data: bytes) -> tuple[ChannelRecord, ...]:
    """Channel records one after the other, maybe none. Raises MalformedData."""
    if len(data) % _CHANNEL.size:
        raise MalformedData(f"channel records of {len(data)} bytes")
    return tuple(ChannelRecord(*fields) for fields in _CHANNEL.iter_unpack(data))


def parse_manifest_untrusted(data: bytes) -> Manifest:
    """A manifest with its channel records. Raises MalformedData where sizes or fields do not fit."""
    if len(data) < _MANIFEST.size:
        raise MalformedData(f"manifest of {len(data)} bytes")
    (
        pages,
        epoch,
        vcpus,
        freshness,
        reserved,
        channels,
        content,
        states,
        vcpu_states,
        ledger,
    ) = _MANIFEST.unpack_from(data)
    if reserved or not 0 < channels <= MAX_CHANNELS:
        raise MalformedData("manifest with reserved byte set or channels out of range")
    if len(data) != _MANIFEST.size + channels * _CHANNEL.size:
        raise MalformedData(f"manifest of {len(data)} bytes for {channels} channels")
    if freshness not in Freshness.__members__.values():
        raise MalformedData(f"manifest with unknown freshness mode {freshness}")
    records = parse_records_untrusted(data[_MANIFEST.size :])
    return Manifest(pages, epoch, vcpus, Freshness(freshness), content, states, vcpu_states, ledger, records)


def pack_start(manifest: bytes, signature: bytes) -> bytes:
    """Payload of the start token: the manifest's bytes again, and the source's signature of the ledger's record."""
    return manifest + signature


def split_start_untrusted(data: bytes) -> tuple[bytes, bytes]:
    """Payload of a start token as (manifest, signature). Raises MalformedData where it is too short for that."""
    if len(data) <= SIGNATURE_BYTES:
        raise MalformedData(f"start token of {len(data)} bytes")
    return data[:-SIGNATURE_BYTES], data[-SIGNATURE_BYTES:]


assert DIGEST_BYTES == 48
