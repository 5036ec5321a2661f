"""What each page's content is, without hashing RAM: the bundle that carried it last.

Both sides keep for every page a reference (channel, incarnation, counter) of the bundle that set its final content. The
bundle's tag binds the content under the session's key, the channels' transcripts bind every tag, so equal tables and equal
transcripts mean equal RAM as sent. One uint64 store for each page of a bundle; at black-out one hash over 8 bytes a page.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


class ContentTable:
    """For each page the bundle that carried it last; zero where none did."""

    def __init__(self, pages: int) -> None:
        # full, not zeros: every word will be written, and the page faults belong to the set-up.
        self._carrier = np.full(pages, 0, dtype="<u8")

    def record(self, gfns: NDArray[np.int64] | range, channel: int, incarnation: int, counter: int) -> None:
        """Pages `gfns` have the content that this bundle gave them."""
        # A counter stays below 2^32 - 1 (MAX_BUNDLES_PER_KEY), so one more fits: zero means no bundle.
        carrier = channel << 48 | incarnation << 32 | (counter + 1)
        if isinstance(gfns, range):
            self._carrier[gfns.start : gfns.stop] = carrier
        else:
            self._carrier[gfns] = carrier

    def complete(self) -> bool:
        """Whether every page was carried at least once."""
        return bool(self._carrier.all())

    def digest(self) -> bytes:
        """SHA-384 over the table, 48 bytes."""
        return hashlib.sha384(self._carrier.data).digest()


def state_digest(states: NDArray[np.uint32]) -> bytes:
    """SHA-384 over all page states, little endian uint32 each."""
    return hashlib.sha384(states.astype("<u4", copy=False).data).digest()


def vcpu_digest(states: dict[int, bytes]) -> bytes:
    """SHA-384 over the SHA-384 of each vCPU's state, in order of vCPU numbers."""
    digest = hashlib.sha384()
    for vcpu in sorted(states):
        digest.update(hashlib.sha384(states[vcpu]).digest())
    return digest.digest()
