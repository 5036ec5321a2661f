"""How an epoch's pending pages become chunks of work for the channels. Pure functions.

pending pages of each region of RAM (the SVSM tells them)  ->  chunks: ranges with about equal work

A region with more than a chunk's work is divided evenly: where in it the pending pages are is not known, but every division
is right, and channels that end an epoch together send it sooner. It is divided by a power of two, as it is one itself: so
bundles begin where the blocks do over which a comparing tracker makes its digests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

# A chunk gives a channel a few bundles' worth, or one of the most zero pages: enough that asking for work does not show,
# little enough that all channels end an epoch at about the same time.
MAX_CHUNK_PAGES: Final = 4096
MIN_CHUNK_PAGES: Final = 64
# Sums of parts fall short of whole numbers by less than this.
_ROUNDING: Final = 1e-6


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

    `counts` has the pending pages of each region of `region_pages`. A chunk has about `chunk_pages`.
    """
    dirty = np.flatnonzero(counts)
    if not dirty.size:
        return []
    pending = counts[dirty].astype(np.int64)
    target = chunk_pages(int(pending.sum()), channels)
    halvings = np.ceil(np.log2(np.maximum(pending / target, 1))).astype(np.int64)
    parts = np.minimum(np.int64(1) << halvings, max(region_pages // MIN_CHUNK_PAGES, 1))
    region, of = np.repeat(dirty, parts), np.repeat(parts, parts)
    part = np.arange(len(region)) - np.repeat(np.cumsum(parts) - parts, parts)
    starts = region * region_pages + part * region_pages // of
    ends = region * region_pages + (part + 1) * region_pages // of
    work = np.repeat(pending / parts, parts)
    number = ((np.cumsum(work) - work) / target + _ROUNDING).astype(np.int64)
    first = np.flatnonzero(np.diff(number, prepend=-1))
    chunks = zip(starts[first].tolist(), ends[np.append(first[1:], len(region)) - 1].tolist(), strict=True)
    # What lies behind the end of RAM is no chunk's.
    return [Chunk(start, min(end, total_pages) - start) for start, end in chunks if start < total_pages]
