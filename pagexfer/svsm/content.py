"""What each page's content and state are, without hashing RAM: the bundle that carried it last, and its state word.

Both sides keep for every page a reference (channel, incarnation, counter) of the bundle that set its final content. The
bundle's tag binds the content under the session's key, the channels' transcripts bind every tag, so equal tables and equal
transcripts mean equal RAM as sent.

Digests are made in two levels: each region of 4096 pages has its own, kept until a bundle brings a page of that region, and
the manifest has the digest over all of these. Regions are hashed again at the end of each epoch, so that black-out pays for
what came in the last one. What is hashed are runs of equal words: a bundle gives one word to all of its pages, so a region
has few, and hashing every word of it takes several times as long.
"""

from __future__ import annotations

import hashlib
import struct
from typing import TYPE_CHECKING, Final

import numpy as np

from ..wire.constants import DIGEST_BYTES

if TYPE_CHECKING:
    from numpy.typing import NDArray

REGION_PAGES: Final = 4096

_REGION_SHIFT: Final = 12
_CONTENT_LABEL: Final = b"pagexfer v1 content"
_STATE_LABEL: Final = b"pagexfer v1 page states"
_PAGES: Final = struct.Struct("<Q")

assert REGION_PAGES == 1 << _REGION_SHIFT


class ContentTable:
    """For each page the bundle that carried it last, zero where none did; `states` are the pages' state words."""

    def __init__(self, states: NDArray[np.uint32]) -> None:
        # full, not zeros: every word will be written, and the page faults belong to the set-up.
        self._carrier = np.full(len(states), 0, dtype="<u8")
        self._content = _TableDigest(_CONTENT_LABEL, self._carrier)
        self._states = _TableDigest(_STATE_LABEL, states)
        regions = -(-len(states) // REGION_PAGES)
        self._touched = np.ones(regions, dtype=np.bool_)
        self._complete = np.zeros(regions, dtype=np.bool_)

    def record(self, gfns: NDArray[np.int64] | range, channel: int, incarnation: int, counter: int) -> None:
        """Pages `gfns` have the content that this bundle gave them, and their states came with it."""
        # A counter stays below 2^32 - 1 (MAX_BUNDLES_PER_KEY), so one more fits: zero means no bundle.
        carrier = channel << 48 | incarnation << 32 | (counter + 1)
        if isinstance(gfns, range):
            self._carrier[gfns.start : gfns.stop] = carrier
            self._touched[gfns.start >> _REGION_SHIFT : (gfns.stop - 1 >> _REGION_SHIFT) + 1] = True
        else:
            self._carrier[gfns] = carrier
            self._touched[gfns >> _REGION_SHIFT] = True

    def withdraw(self, channel: int, incarnation: int, received: int) -> NDArray[np.int64]:
        """Of that stream only the first `received` bundles arrived: gfns that a later one carried last, sorted.

        They have no bundle now. Looks at every page.
        """
        stream = channel << 48 | incarnation << 32
        lost = np.flatnonzero(
            self._carrier - np.uint64(stream + received + 1) < np.uint64(2**32 - received - 1)
        )
        self._carrier[lost] = 0
        self._touched[lost >> _REGION_SHIFT] = True
        return lost

    def refresh(self) -> None:
        """Hash the regions again that were touched since the last call."""
        for region in np.flatnonzero(self._touched).tolist():
            self._complete[region] = self._content.refresh(region).all()
            self._states.refresh(region)
        self._touched.fill(False)

    def complete(self) -> bool:
        """Whether every page was carried at least once."""
        self.refresh()
        return bool(self._complete.all())

    def content_digest(self) -> bytes:
        """The manifest's content digest, 48 bytes."""
        self.refresh()
        return self._content.digest()

    def state_digest(self) -> bytes:
        """The manifest's page state digest, 48 bytes: states as they were when their pages came last."""
        self.refresh()
        return self._states.digest()


class _TableDigest:
    """SHA-384 over a table with one word a page, by way of a digest for each region."""

    def __init__(self, label: bytes, table: NDArray[np.uint64] | NDArray[np.uint32]) -> None:
        self._head = label + _PAGES.pack(len(table))
        self._table = table
        self._digests = bytearray(-(-len(table) // REGION_PAGES) * DIGEST_BYTES)

    def refresh(self, region: int) -> NDArray[np.uint64]:
        """Hash one region again; returns the words of its runs."""
        words = self._table[region * REGION_PAGES : (region + 1) * REGION_PAGES]
        ends = np.flatnonzero(words[1:] != words[:-1])
        runs = np.empty((len(ends) + 1, 2), dtype="<u8")
        runs[0] = 0, words[0]
        runs[1:, 0] = ends + 1
        runs[1:, 1] = words[ends + 1]
        self._digests[region * DIGEST_BYTES : (region + 1) * DIGEST_BYTES] = hashlib.sha384(
            runs.data
        ).digest()
        return runs[:, 1]

    def digest(self) -> bytes:
        digest = hashlib.sha384(self._head)
        digest.update(self._digests)
        return digest.digest()


def vcpu_digest(states: dict[int, bytes]) -> bytes:
    """SHA-384 over the SHA-384 of each vCPU's state, in order of vCPU numbers."""
    digest = hashlib.sha384()
    for vcpu in sorted(states):
        digest.update(hashlib.sha384(states[vcpu]).digest())
    return digest.digest()
