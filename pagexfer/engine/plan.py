"""How an epoch's pending pages become chunks of work for the channels. Pure functions.

pending pages of each region of RAM (the SVSM tells them)  ->  chunks: ranges of whole regions with about equal work
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

# A chunk gives a channel a few bundles' worth: enough that asking for work does not show, little enough that all
# channels end an epoch at about the same time.
MAX_CHUNK_PAGES: Final = 1024
MIN_CHUNK_PAGES: Final = 128


class Chunk(NamedTuple):
    """A range of gfns that one channel exports: first gfn and number of gfns, pending or not."""

    start: int
    pages: int


def chunk_pages(pending_pages: int, channels: int) -> int:
    """Pending pages that a chunk is to have: about a quarter of a channel's share, within the limits above."""
    return min(MAX_CHUNK_PAGES, max(MIN_CHUNK_PAGES, pending_pages // (4 * channels)))


def plan_chunks(
    counts: NDArray[np.uint32], region_pages: int, total_pages: int, channels: int
) -> list[Chunk]:
    """Chunks that cover all pending pages of an epoch, in order of gfns; each page is in at most one chunk.

    `counts` has the pending pages of each region of `region_pages`. A chunk has about `chunk_pages`, or one
    region where that has more.
    """
    dirty = np.flatnonzero(counts)
    if not dirty.size:
        return []
    before = np.cumsum(counts[dirty], dtype=np.int64) - counts[dirty]
    pending = int(before[-1] + counts[dirty[-1]])
    target = chunk_pages(pending, channels)
    number = before // target
    first = np.flatnonzero(np.diff(number, prepend=-1))
    starts = dirty[first] * region_pages
    ends = (dirty[np.append(first[1:], dirty.size) - 1] + 1) * region_pages
    return [
        Chunk(start, min(end, total_pages) - start)
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
    ]
