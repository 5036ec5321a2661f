"""Dirty pages of any memory that can be read, found by digests of what was sent: nobody has to report writes.

Whoever sends pages tells `sent` what each of them was, and a scan reports the pages whose content has another digest. It
costs one read of the memory at about its own speed, whether pages are written or not; other trackers are cheaper where
they can be had. It is the one that works on memory that another process writes to (RAM of a virtual machine in a shared
file).

What is kept is always the digest of a private copy: of the one that was sent, or of one that a scan made. A block of 32
pages is hashed where it is, in one call. Where that is not the digest of this block's last copy, the block is copied, and
block and pages are hashed again from the copy: so what is kept for a block and for its pages is of the very same bytes.
Were it not, a word that goes from 0 to 1 between two readings, and back to 0 later, could be kept as 0 with its block and
as 1 with its page, and never be reported.

A block that is sent whole is kept as such only, without its pages' digests, which cost several times as much to make:
should it change, all of its pages are reported. From then on it has digests of its pages. For a guest that writes to many
places this would send more than it saves, so blocks that were sent are probed meanwhile, and once enough of them have
changed, pages that are sent are kept one by one.

Why no write is lost. For each page one of three things holds at any time between two calls: it was reported and not sent
since; or what is kept, for itself or for its block, is the digest of the copy that was sent last (of zero, where none was);
or nothing is known of it, and the next scan reports it.

- `sent` makes it the second, from the very bytes that are sealed: when, and how often, the guest wrote between scan, copy
  and sealing does not matter. A page that was other while it was sent and is back since differs from what is kept. A part
  of a block that was kept as a whole makes it the third for the other pages.
- A scan that does not report a page has read each of its bytes as it stands in that copy (but for a collision), torn or
  not, and leaves the digest as it is. One that reports it makes it the first.
- Where sending fails after `sent`, or the sent bundle is lost, the sender has the page to send again: for the tracker it
  counts as reported.

So a scan of a guest that stands still, after which everything reported or left is sent, leaves the destination with what
RAM is. That is the digest audit (R13), without a second scan: nobody has to be believed about writes, before that scan or
since.

Several threads may be in `sent` at once, with different pages. What they write is theirs: a page's digest, and the digest
of a block of which they have all pages. Of a block that they have a part of, they only set marks, or forget the digests of
its other pages; the worst of that is a page that is reported although it did not change.

The digest is the caller's: 16 bytes, of a page and of a block. What holds of its collisions holds of the scan, against
whoever chooses what is in RAM: two contents of a block with one digest are a write that is not reported, of any page in it.
So where nobody is to be believed about writes, it has to be under a key, as `svsm.page_digest` is.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from ..errors import LocalProtocolError
from .bitmap import DirtyBitmap, as_run
from .probes import Probes
from .ram import PAGE_SIZE, PageCopies, check_form

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

# 128 KiB: a call over so much costs little more than what its hashing costs, and threads that make such calls do not fight
# for the interpreter's lock, as they do at 32 KiB. A block that differs is few pages to look at, and to send.
BLOCK_PAGES: Final = 32
# Blocks that one thread takes at a time: 32 MiB, a few milliseconds.
_TASK_BLOCKS: Final = 256
_STEP_BLOCKS: Final = 16 * _TASK_BLOCKS
# No page has this digest, but for a chance of 2^-128: it would be sent again for nothing.
_UNKNOWN: Final = 0


class _Data(NamedTuple):
    """Pages that may be other than zero, blocks with some of them, and blocks of nothing else."""

    held: DirtyBitmap
    some: NDArray[np.bool_]
    whole: NDArray[np.bool_]


class ContentTracker:
    """Comparing tracker over `words`, uint64 of shape (pages, 512) in contiguous memory that others may write to.

    `digest` gives 16 bytes, and threads may call it at the same time.

    `data` gives (start, stop) of all gfns that may be other than zero, as SEEK_DATA does for a file: nothing else is read
    unless it was other than zero before. Default: all. `workers` threads scan; more than one pays where one core does not
    take all of the memory's bandwidth. 16 bytes are kept for each page, and 19 for each block. Only one thread scans,
    starts and stops.
    """

    def __init__(
        self,
        words: NDArray[np.uint64],
        digest: Callable[[memoryview], bytes],
        *,
        data: Callable[[], Iterable[tuple[int, int]]] | None = None,
        workers: int = 1,
    ) -> None:
        """Raises LocalProtocolError where `words` is not whole pages, one after the other."""
        check_form(words)
        self._words = words
        self._octets = words.reshape(-1).view(np.uint8).data
        self._pages = len(words)
        self._data = data
        self._workers = workers
        self._hash = digest
        blocks = -(-self._pages // BLOCK_PAGES)
        zeros = memoryview(bytes(BLOCK_PAGES * PAGE_SIZE))
        self._zero_page = self._digest([zeros[:PAGE_SIZE]])
        # The last block may be shorter.
        self._zero_block = self._digest([zeros])
        self._zero_last = self._digest([zeros[: len(self._block(blocks - 1))]])
        # Digest of each page, and of each block's copy.
        self._kept: NDArray[np.uint64] = np.empty((self._pages, 2), dtype=np.uint64)
        self._kept_blocks: NDArray[np.uint64] = np.empty((blocks, 2), dtype=np.uint64)
        # Blocks of which a page was sent that was other than in that copy.
        self._stale: NDArray[np.bool_] = np.empty(blocks, dtype=np.bool_)
        # Blocks whose pages have no digests, and blocks whose pages always get some.
        self._merged: NDArray[np.bool_] = np.empty(blocks, dtype=np.bool_)
        self._split: NDArray[np.bool_] = np.empty(blocks, dtype=np.bool_)
        self._where = _Data(DirtyBitmap(self._pages), self._stale, self._stale)
        self._probes = Probes()
        self._started = False

    def start(self) -> None:
        """Nothing was sent yet: every page counts as zero. Where it is started already, nothing changes."""
        if self._started:
            return
        self._kept[:] = self._zero_page
        self._kept_blocks[:] = self._zero_block
        self._kept_blocks[-1] = self._zero_last
        for marks in (self._stale, self._merged, self._split):
            marks.fill(False)
        self._probes = Probes()
        self._started = True

    def collect(self) -> DirtyBitmap:
        """Pages that are not as they were sent last or, where they were reported since, as they were then.

        Of a block that was sent whole, all pages are among them the first time that one is. Read them after this returned,
        never before. Raises LocalProtocolError where the tracker is not started.
        """
        bitmap = DirtyBitmap(self._pages)
        bitmap.set_gfns(self.collect_part(0, self._pages))
        return bitmap

    @property
    def step_pages(self) -> int:
        """512 MiB: some 30 ms for one thread. A multiple of a block."""
        return _STEP_BLOCKS * BLOCK_PAGES

    def collect_part(self, start: int, stop: int) -> NDArray[np.int64]:
        """As `collect`, of the pages `start` to `stop` - 1, whole blocks but for the last one of all.

        Where data is, is asked with the first part.
        """
        self._require_started()
        if start == 0:
            self._where = self._where_data_is()
        data, part = self._where, slice(start // BLOCK_PAGES, -(-stop // BLOCK_PAGES))
        # A hole that was none before has become zero.
        were_data = (self._kept_blocks[part] != self._zero_block).any(axis=1)
        blocks = part.start + np.flatnonzero(data.some[part] | self._stale[part] | were_data)
        tasks = [blocks[task : task + _TASK_BLOCKS] for task in range(0, len(blocks), _TASK_BLOCKS)]
        # Hashing a block and copying it both work without the interpreter's lock, so threads are enough.
        with ThreadPoolExecutor(self._workers) as pool:
            return np.concatenate([np.zeros(0, dtype=np.int64), *pool.map(self._look, repeat(data), tasks)])

    def sent(self, gfns: NDArray[np.int64], copies: PageCopies, in_use: NDArray[np.bool_]) -> None:
        """See `ComparingTracker`. Raises LocalProtocolError where the tracker is not started."""
        self._require_started()
        run = as_run(gfns)
        if not isinstance(run, range):
            self._keep_pages(gfns, copies, in_use, 0)
            return
        # Blocks of which all pages were sent; the last one of RAM may be shorter.
        first, end = -(-run.start // BLOCK_PAGES), run.stop // BLOCK_PAGES
        if run.stop == self._pages:
            end = len(self._kept_blocks)
        first = min(first, end)
        # Where the first of them begins, and the last one ends.
        head, tail = (min(max(block * BLOCK_PAGES - run.start, 0), len(run)) for block in (first, end))
        if first < end:
            self._keep_blocks(first, end, head, copies, in_use)
        for start, stop in ((0, head), (tail, len(run))):
            if start < stop:
                self._keep_pages(gfns[start:stop], copies, in_use[start:stop], start)

    def _keep_pages(
        self, gfns: NDArray[np.int64], copies: PageCopies, in_use: NDArray[np.bool_], at: int
    ) -> None:
        """Pages whose blocks were not sent whole, the first of which is copy `at`."""
        digests = self._page_digests(copies, in_use, at)
        blocks = gfns // BLOCK_PAGES
        merged = blocks[self._merged[blocks]]  # ascending, as gfns are
        if merged.size:
            self._forget_pages(merged[np.flatnonzero(np.diff(merged, prepend=-1))])
        others = (self._kept[gfns] != digests).any(axis=1)
        self._stale[blocks[others]] = True
        self._split[blocks] = True
        self._kept[gfns] = digests

    def _forget_pages(self, blocks: NDArray[np.int64]) -> None:
        """Nothing is known of single pages of these blocks: the next scan reports those that are not sent until then."""
        pages = (blocks[:, None] * BLOCK_PAGES + np.arange(BLOCK_PAGES)).reshape(-1)
        self._kept[pages[pages < self._pages]] = _UNKNOWN
        self._stale[blocks] = True
        self._merged[blocks] = False

    def _keep_blocks(
        self, first: int, end: int, at: int, copies: PageCopies, in_use: NDArray[np.bool_]
    ) -> None:
        """Blocks `first` to `end` - 1, the first of which begins with copy `at`."""
        pages = slice(first * BLOCK_PAGES, min(end * BLOCK_PAGES, self._pages))
        used = in_use[at : at + pages.stop - pages.start]
        starts = np.arange(0, len(used), BLOCK_PAGES)
        holds = np.logical_or.reduceat(used, starts)
        single = holds & (self._split[first:end] | self._probes.many_change)
        self._stale[first:end] = True  # until the digests are made, should that fail
        kept = self._kept[pages]
        if np.count_nonzero(single):
            self._split[first:end] |= single
            kept[:] = self._page_digests(copies, used & np.repeat(single, BLOCK_PAGES)[: len(used)], at)
        elif np.count_nonzero(holds) < len(holds):
            kept[:] = self._zero_page
        blocks = self._kept_blocks[first:end]
        blocks[:] = self._zero_block
        if end == len(self._kept_blocks):
            blocks[-1] = self._zero_last
        offsets = ((at + starts[holds]) * PAGE_SIZE).tolist()
        stop = (at + len(used)) * PAGE_SIZE
        size = BLOCK_PAGES * PAGE_SIZE
        blocks[holds] = self._digest([copies.octets[start : min(start + size, stop)] for start in offsets])
        self._merged[first:end] = holds & ~single
        self._stale[first:end] = False
        # Reading a block with a hole would have the kernel provide memory for it.
        probed = first + np.flatnonzero(np.logical_and.reduceat(used, starts))
        if probed.size:
            self._probes.add(probed, self._has_changed)

    def _has_changed(self, block: int) -> bool:
        """Whether a block is other than when it was sent, as far as that is known without a closer look."""
        differs = (self._digest([self._block(block)]) != self._kept_blocks[block]).any()
        return bool(differs) and not self._stale[block]

    def _page_digests(self, copies: PageCopies, in_use: NDArray[np.bool_], at: int) -> NDArray[np.uint64]:
        """Digests of copies from `at` on, of zero for pages not in use."""
        # Counted, as numpy's own all() and any() cost several times as much for so few.
        used = np.count_nonzero(in_use)
        if used == len(in_use):
            return self._digest(copies.each[at : at + used])
        digests = np.repeat(self._zero_page, len(in_use), axis=0)
        if used:
            digests[in_use] = self._digest(
                [copies.each[page] for page in (at + np.flatnonzero(in_use)).tolist()]
            )
        return digests

    def stop(self) -> None:
        """Stop tracking. Calling it again changes nothing."""
        self._started = False

    def _require_started(self) -> None:
        if not self._started:
            raise LocalProtocolError("the content tracker is not started: call start first")

    def _where_data_is(self) -> _Data:
        held = DirtyBitmap.full(self._pages)
        if self._data is not None:
            held.clear()
            for start, stop in self._data():
                held.set_range(start, stop)
        marks = held.words.view("<u4")[: len(self._stale)]  # a block's are one word
        all_marked = np.full(len(marks), (1 << BLOCK_PAGES) - 1, dtype="<u4")
        all_marked[-1] = (1 << self._pages - (len(marks) - 1) * BLOCK_PAGES) - 1
        return _Data(held, marks != 0, marks == all_marked)

    def _look(self, data: _Data, blocks: NDArray[np.int64]) -> NDArray[np.int64]:
        """gfns of these blocks that changed, sorted."""
        copies = PageCopies(BLOCK_PAGES)
        # Each is hashed before the next one is made. Reading a hole would have the kernel provide memory for it.
        parts = (
            self._block(block) if whole else self._copy(data, block, copies)
            for block, whole in zip(blocks.tolist(), data.whole[blocks].tolist(), strict=True)
        )
        differ = (self._digest(parts) != self._kept_blocks[blocks]).any(axis=1) | self._stale[blocks]
        found = [self._look_closer(data, block, copies) for block in blocks[differ].tolist()]
        return np.concatenate([np.zeros(0, dtype=np.int64), *found])

    def _look_closer(self, data: _Data, block: int, copies: PageCopies) -> NDArray[np.int64]:
        """gfns of this block that changed, sorted."""
        octets = self._copy(data, block, copies)
        first = block * BLOCK_PAGES
        kept = self._kept[first : first + BLOCK_PAGES]
        if self._merged[block]:
            kept[:] = _UNKNOWN
        actual = self._digest(copies.each[: len(kept)])
        changed: NDArray[np.int64] = np.flatnonzero((actual != kept).any(axis=1))
        self._stale[block] = True  # until the block's digest is made, should that fail
        kept[:] = actual
        self._kept_blocks[block] = self._digest([octets])
        self._split[block] |= self._merged[block]
        self._merged[block] = False
        self._stale[block] = False
        changed += first
        return changed

    def _copy(self, data: _Data, block: int, copies: PageCopies) -> memoryview:
        """Copy a block, with zeros for what is a hole of it."""
        first = block * BLOCK_PAGES
        words = self._words[first : first + BLOCK_PAGES]
        copy = copies.words[: len(words)]
        if data.whole[block]:
            copy[:] = words
        else:
            there = data.held.test(np.arange(first, first + len(words)))
            copy.fill(0)
            copy[there] = words[there]
        return copies.octets[: len(words) * PAGE_SIZE]

    def _block(self, block: int) -> memoryview:
        return self._octets[block * BLOCK_PAGES * PAGE_SIZE : (block + 1) * BLOCK_PAGES * PAGE_SIZE]

    def _digest(self, parts: Iterable[memoryview]) -> NDArray[np.uint64]:
        """Digests of these parts, uint64 of shape (n, 2)."""
        digests = b"".join(map(self._hash, parts))
        return np.frombuffer(digests, dtype=np.uint64).reshape(-1, 2)
