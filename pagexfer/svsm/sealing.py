"""Sealing and opening bundles: one key, one counter, one stream each.

A stream is one direction of one channel in one incarnation. Its counter is raised before it is used and never goes back,
so no nonce can come twice under a key. Any failure poisons the stream: there is no second try under the same key.

A stream's transcript binds the tags of all its bundles, after the records of the streams whose place it took. The tags
since the last `settle` are kept one by one, 16 bytes for each, so that a source whose connection broke can tell whether the
other side's record of the bundles that arrived is true.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ..errors import (
    IntegrityError,
    KeyExhausted,
    KeyPoisoned,
    LocalProtocolError,
    ReflectionError,
    ReplayError,
)
from ..wire.bundle import HEADER_BYTES, BundleHeader, nonce
from ..wire.constants import MAX_BUNDLES_PER_KEY, MAX_BYTES_PER_KEY, TAG_BYTES
from ..wire.token import ChannelRecord, pack_records

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..wire.bundle import BundleKind, Direction
    from .keys import KeySchedule


class _Stream:
    """What sealing and opening one stream share: identity, key, counter, transcript of tags."""

    def __init__(self, keys: KeySchedule, direction: Direction, channel: int, incarnation: int = 0) -> None:
        self.session = keys.session
        self.direction = direction
        self.channel = channel
        self.incarnation = incarnation
        self.counter = 0
        self._payload_bytes = 0
        self._transcript = hashlib.sha384()
        self._tags = bytearray()
        self._follows = incarnation == 0
        secret = keys.traffic_key(direction, channel, incarnation)
        self._cipher: AESGCM | None = AESGCM(secret.reveal())
        secret.wipe()

    @property
    def place(self) -> tuple[int, int]:
        """Where the next bundle stands in the channel: incarnation and counter."""
        return self.incarnation, self.counter

    def record(self, bundles: int | None = None) -> ChannelRecord:
        """Count and transcript of the first `bundles` bundles, by default of all so far.

        Raises IntegrityError where there were not so many, or fewer than when the stream was settled last.
        """
        settled = self.counter - len(self._tags) // TAG_BYTES
        count = self.counter if bundles is None else bundles
        if not settled <= count <= self.counter:
            raise IntegrityError(f"a record of {count} bundles of channel {self.channel}, of {self.counter}")
        transcript = self._transcript.copy()
        transcript.update(self._tags[: (count - settled) * TAG_BYTES])
        return ChannelRecord(self.channel, self.incarnation, count, transcript.digest())

    def follow(self, records: Iterable[ChannelRecord]) -> None:
        """This stream took the place of those with these records, of the same channel. Only the first call counts."""
        if not self._follows:
            self._follows = True
            self._transcript.update(pack_records(records))

    def settle(self) -> None:
        """Nobody will ask for a record of fewer bundles than now."""
        self._transcript.update(self._tags)
        self._tags.clear()

    @property
    def wiped(self) -> bool:
        """Whether the key is gone."""
        return self._cipher is None

    def wipe(self) -> None:
        """Drop the key. OpenSSL wipes its own copy when the cipher object ends."""
        self._cipher = None

    def _checked_cipher(self, payload_bytes: int) -> AESGCM:
        if self._cipher is None:
            raise KeyPoisoned(f"the key of channel {self.channel} is gone")
        if self.counter >= MAX_BUNDLES_PER_KEY or self._payload_bytes + payload_bytes > MAX_BYTES_PER_KEY:
            raise KeyExhausted(f"the key of channel {self.channel} reached its limit")
        return self._cipher


class Sealer(_Stream):
    """Seals bundles of one stream in order."""

    def require_room(self, payload_bytes: int) -> None:
        """Raises KeyExhausted or KeyPoisoned, as `seal` would for so many bytes."""
        self._checked_cipher(payload_bytes)

    def seal(
        self, kind: BundleKind, epoch: int, entries: bytes, payload: bytes | memoryview, out: memoryview
    ) -> int:
        """Write one whole bundle to the start of `out` and return its length in bytes.

        `entries` are packed entries (may be empty), `payload` plaintext bytes, which may be guest RAM that is being written
        to: it is read once. `out` is private memory: AES-GCM may read its own ciphertext back to authenticate it, and a
        host that changed it in between would get a tag over bytes of its own. Raises KeyExhausted at the key's limit,
        KeyPoisoned after `wipe`, LocalProtocolError, with no number used, where the bundle does not fit `out`.
        """
        plaintext = memoryview(payload)
        length = HEADER_BYTES + len(entries) + len(plaintext) + TAG_BYTES
        if length > len(out):
            raise LocalProtocolError(f"a bundle of {length} bytes does not fit a buffer of {len(out)}")
        cipher = self._checked_cipher(len(plaintext))
        counter = self.counter
        self.counter = counter + 1
        self._payload_bytes += len(plaintext)
        header = BundleHeader(
            kind,
            self.direction,
            self.session,
            self.channel,
            self.incarnation,
            epoch,
            counter,
            len(entries) // 8,
            len(plaintext),
        )
        aad = header.pack() + entries
        end = len(aad) + len(plaintext) + TAG_BYTES
        out[: len(aad)] = aad
        cipher.encrypt_into(
            nonce(self.channel, self.incarnation, counter), plaintext, aad, out[len(aad) : end]
        )
        self._tags += out[end - TAG_BYTES : end]
        return end


class Opener(_Stream):
    """Opens bundles of one stream in order."""

    def open_untrusted(self, header: BundleHeader, aad: bytes, sealed: memoryview, out: memoryview) -> None:
        """Check that the bundle is the next one of this stream and decrypt `sealed` (ciphertext and tag) into `out`.

        All arguments are in private memory: AES-GCM may read `sealed` twice, once to check it and once to decrypt it.
        `aad` is header and entries as received; `header` was parsed from it. `out` has exactly payload size, and what it
        holds may be used only if the call returns. Raises ReflectionError for a bundle of another stream, ReplayError for
        another counter, IntegrityError for a bad tag, KeyPoisoned after any of these.
        """
        cipher = self._checked_cipher(len(out))
        try:
            self._check_place(header)
            cipher.decrypt_into(nonce(self.channel, self.incarnation, header.counter), sealed, aad, out)
        except InvalidTag:
            self.wipe()
            raise IntegrityError("bundle with a bad tag") from None
        except (ReflectionError, ReplayError):
            self.wipe()
            raise
        self.counter += 1
        self._payload_bytes += len(out)
        self._tags += sealed[-TAG_BYTES:]

    def _check_place(self, header: BundleHeader) -> None:
        if header.session != self.session:
            raise ReflectionError("bundle of another session")
        if header.direction is not self.direction:
            raise ReflectionError("bundle of the other direction")
        if (header.channel, header.incarnation) != (self.channel, self.incarnation):
            raise ReflectionError("bundle of another channel or incarnation")
        if header.counter != self.counter:
            raise ReplayError(f"bundle {header.counter} where {self.counter} is next")
