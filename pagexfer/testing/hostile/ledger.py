"""Every use of every traffic key, as the ciphers of `svsm.sealing` themselves see it.

The trusted side has no hooks for tests. While a ledger is `installed`, the one name under which `svsm.sealing` makes its
ciphers stands for a cipher that writes down what it is asked for and then does it. One run at a time in a process.
"""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Final
from unittest.mock import patch

import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ...svsm import sealing
from ...wire.bundle import HEADER_BYTES, parse_header_untrusted
from ...wire.constants import TAG_BYTES
from .hold import Point, watched_reads
from .violation import Violation

if TYPE_CHECKING:
    import mmap
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from ...wire.bundle import BundleHeader
    from .hold import Hold
    from .world import Reply

_Bytes = bytes | bytearray | memoryview
Stream = tuple[bytes, int, int, int]


def stream_of(header: BundleHeader) -> Stream:
    """What a bundle's key belongs to: session, direction, channel, incarnation."""
    return header.session, header.direction, header.channel, header.incarnation


class WatchedCipher:
    """AES-GCM that tells its ledger first."""

    def __init__(self, ledger: CipherLedger, key: bytes) -> None:
        self._ledger = ledger
        self._key = key
        self._cipher = AESGCM(key)

    def encrypt_into(self, nonce: _Bytes, data: _Bytes, associated_data: _Bytes, buf: _Bytes) -> int:
        """As AESGCM's."""
        self._ledger.seals(self._key, bytes(nonce), bytes(associated_data), data, buf)
        return self._cipher.encrypt_into(nonce, data, associated_data, buf)

    def decrypt_into(self, nonce: _Bytes, data: _Bytes, associated_data: _Bytes, buf: _Bytes) -> int:
        """As AESGCM's."""
        self._ledger.opens(data, buf)
        return self._cipher.decrypt_into(nonce, data, associated_data, buf)


class CipherLedger:
    """All (key, nonce) pairs that ever sealed; and whose ciphers are alive.

    `owner` is whoever makes ciphers now, any hashable name.
    """

    def __init__(self) -> None:
        self.owner: object = None
        self.hold: Hold[Reply] | None = None  # an export that stands still, or is about to
        self.keys: dict[Stream, bytes] = {}
        self._used: set[bytes] = set()
        self._alive: dict[object, weakref.WeakSet[WatchedCipher]] = {}
        self._shared: Final[list[NDArray[np.uint8]]] = []

    @contextmanager
    def installed(self, shared: mmap.mmap) -> Iterator[None]:
        """Watch every cipher that is made meanwhile. `shared` is all memory that the host can reach."""
        self._shared[:] = [np.frombuffer(shared, dtype=np.uint8)]
        try:
            with (
                patch.object(sealing, "AESGCM", self._make),
                watched_reads(partial(self._pass_by, Point.READ)),
            ):
                yield
        finally:
            self._shared.clear()

    def forget_owners(self) -> None:
        """The sides of a schedule are gone; what their keys sealed stays written down."""
        self._alive.clear()
        self.keys.clear()

    def alive(self, owner: object) -> int:
        """How many ciphers of `owner` still hold their key; none that a thread is sealing with right now."""
        if self.hold is not None and self.hold.is_waiting and self.hold.owner is owner:
            return 0
        return len(self._alive.get(owner, ()))

    @property
    def seals_counted(self) -> int:
        """Different (key, nonce) pairs so far."""
        return len(self._used)

    def seals(self, key: bytes, nonce: bytes, aad: bytes, data: _Bytes, out: _Bytes) -> None:
        """A bundle is being sealed. Raises Violation where this key used this nonce before."""
        if key + nonce in self._used:
            raise Violation("R9", "a nonce was used twice under one key")
        self._used.add(key + nonce)
        size = len(aad) + memoryview(data).nbytes + TAG_BYTES
        self.keys[stream_of(parse_header_untrusted(aad[:HEADER_BYTES], size))] = key
        self._check_private(out)
        self._pass_by(Point.SEAL)

    def opens(self, data: _Bytes, out: _Bytes) -> None:
        """A bundle is being opened. Raises Violation where that happens in memory that the host can reach."""
        self._check_private(data)
        self._check_private(out)

    def _pass_by(self, point: Point) -> None:
        if self.hold is not None:
            self.hold.pass_by(point)

    def _make(self, key: bytes) -> WatchedCipher:
        cipher = WatchedCipher(self, key)
        self._alive.setdefault(self.owner, weakref.WeakSet()).add(cipher)
        return cipher

    def _check_private(self, buffer: _Bytes) -> None:
        if not memoryview(buffer).nbytes:
            return
        view = np.frombuffer(buffer, dtype=np.uint8)
        if any(np.may_share_memory(view, shared) for shared in self._shared):
            raise Violation("R10", "a cipher works in memory that the host can change meanwhile")
