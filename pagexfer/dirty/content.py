"""Dirty pages of any memory that can be read, found by digests of what was sent: nobody has to report writes.

Whoever sends pages tells `sent` what each of them was, and a scan reports the pages whose content has another digest. It
costs one read of the memory at about its own speed, whether pages are written or not; other trackers are cheaper where
they can be had. It is the one that works on memory that another process writes to (RAM of a virtual machine in a shared
file).

What is kept is always the digest of a private copy: of the one that was sent, or of one that a scan made. A run of 128
pages is hashed where it is, in one call. Where that is not the digest of this run's last copy, the run is copied, and run
and pages are hashed again from the copy: so what is kept for a run and for its pages is of the very same bytes. Were it
not, a word that goes from 0 to 1 between two readings, and back to 0 later, could be kept as 0 with its run and as 1 with
its page, and never be reported.

Why no write is lost. For each page one of two things holds at any time between two calls: it was reported and not sent
since, or what is kept is the digest of the copy that was sent last (of zero, where none was).

- `sent` makes it the second, from the very bytes that are sealed: when, and how often, the guest wrote between scan, copy
  and sealing does not matter. A page that was other while it was sent and is back since differs from what is kept.
- A scan that does not report a page has read each of its bytes as it stands in that copy (but for a collision), torn or
  not, and leaves the digest as it is. One that reports it makes it the first.
- Where sending fails after `sent`, or the sent bundle is lost, the sender has the page to send again: for the tracker it
  counts as reported.

So a scan of a guest that stands still, after which everything reported or left is sent, leaves the destination with what
RAM is. That is the digest audit (R13), without a second scan: nobody has to be believed about writes, before that scan or
since.

Several threads may be in `sent` at once, with different pages. What they write is theirs: a page's digest, and the digest
of a run of which they have all pages. Of a run that they have a part of, they only set the mark that its digest is stale.

The digest is the caller's: 16 bytes, of a page and of a run. What holds of its collisions holds of the scan, against
whoever chooses what is in RAM: two contents of a run with one digest are a write that is not reported, of any page in it.
So where nobody is to be believed about writes, it has to be under a key, as `svsm.page_digest` is.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from ..errors import LocalProtocolError
from .bitmap import DirtyBitmap, as_run
from .ram import PAGE_SIZE, PageCopies, check_form

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

# 512 KiB: a call over so much costs what its hashing costs and lets the interpreter's lock go, a copy of it stays in the
# second-level cache, and a run that differs is few pages to look at one by one.
_RUN_PAGES: Final = 128
# Runs that one thread takes at a time: 32 MiB, a few milliseconds.
_TASK_RUNS: Final = 64
_STEP_RUNS: Final = 1024


class _Data(NamedTuple):
    """Pages that may be other than zero, runs with some of them, and runs of nothing else."""

    held: DirtyBitmap
    some: NDArray[np.bool_]
    whole: NDArray[np.bool_]


class ContentTracker:
    """Comparing tracker over `words`, uint64 of shape (pages, 512) in contiguous memory that others may write to.

    `digest` gives 16 bytes, and threads may call it at the same time.

    `data` gives (start, stop) of all gfns that may be other than zero, as SEEK_DATA does for a file: nothing else is read
    unless it was other than zero before. Default: all. `workers` threads scan; more than one pays where one core does not
    take all of the memory's bandwidth. 16 bytes are kept for each page. Only one thread scans, starts and stops.
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
        runs = -(-self._pages // _RUN_PAGES)
        zeros = memoryview(bytes(_RUN_PAGES * PAGE_SIZE))
        self._zero_page = self._digest([zeros[:PAGE_SIZE]])
        # The last run may be shorter.
        self._zero_runs = np.repeat(self._digest([zeros]), runs, axis=0)
        self._zero_runs[-1] = self._digest([zeros[: len(self._run(runs - 1))]])
        # Digest of each page, and of each run's copy; stale runs had a page sent that was other than in that copy.
        self._kept: NDArray[np.uint64] = np.empty((self._pages, 2), dtype=np.uint64)
        self._kept_runs = np.empty_like(self._zero_runs)
        self._stale: NDArray[np.bool_] = np.empty(runs, dtype=np.bool_)
        self._where = _Data(DirtyBitmap(self._pages), self._stale, self._stale)
        self._started = False

    def start(self) -> None:
        """Nothing was sent yet: every page counts as zero. Where it is started already, nothing changes."""
        if self._started:
            return
        self._kept[:] = self._zero_page
        self._kept_runs[:] = self._zero_runs
        self._stale.fill(False)
        self._started = True

    def collect(self) -> DirtyBitmap:
        """Pages that are not as they were sent last or, where they were reported since, as they were then.

        Read them after this returned, never before. Raises LocalProtocolError where the tracker is not started.
        """
        bitmap = DirtyBitmap(self._pages)
        bitmap.set_gfns(self.collect_part(0, self._pages))
        return bitmap

    @property
    def step_pages(self) -> int:
        """512 MiB: some 30 ms for one thread. A multiple of a run."""
        return _STEP_RUNS * _RUN_PAGES

    def collect_part(self, start: int, stop: int) -> NDArray[np.int64]:
        """As `collect`, of the pages `start` to `stop` - 1, whole runs but for the last one of all.

        Where data is, is asked with the first part.
        """
        self._require_started()
        if start == 0:
            self._where = self._where_data_is()
        data, part = self._where, slice(start // _RUN_PAGES, -(-stop // _RUN_PAGES))
        # A hole that was none before has become zero.
        were_data = (self._kept_runs[part] != self._zero_runs[part]).any(axis=1)
        runs = part.start + np.flatnonzero(data.some[part] | self._stale[part] | were_data)
        tasks = [runs[task : task + _TASK_RUNS] for task in range(0, len(runs), _TASK_RUNS)]
        # Hashing a run and copying it both work without the interpreter's lock, so threads are enough.
        with ThreadPoolExecutor(self._workers) as pool:
            return np.concatenate([np.zeros(0, dtype=np.int64), *pool.map(self._look, repeat(data), tasks)])

    def sent(self, gfns: NDArray[np.int64], copies: PageCopies, in_use: NDArray[np.bool_]) -> None:
        """See `ComparingTracker`. Raises LocalProtocolError where the tracker is not started."""
        self._require_started()
        # Counted, as numpy's own all() and any() cost several times as much for so few.
        used = np.count_nonzero(in_use)
        if used == len(gfns):
            digests = self._digest(copies.each[:used])
        else:
            digests = np.repeat(self._zero_page, len(gfns), axis=0)
            if used:
                digests[in_use] = self._digest(
                    [copies.each[page] for page in np.flatnonzero(in_use).tolist()]
                )
        run = as_run(gfns)
        if isinstance(run, range):
            self._keep_range(run, digests, copies, in_use)
        else:
            self._keep(run, digests)

    def _keep(self, gfns: NDArray[np.int64], digests: NDArray[np.uint64]) -> None:
        """Pages whose runs were not sent whole."""
        others = (self._kept[gfns] != digests).any(axis=1)
        self._stale[gfns[others] // _RUN_PAGES] = True
        self._kept[gfns] = digests

    def _keep_range(
        self, gfns: range, digests: NDArray[np.uint64], copies: PageCopies, in_use: NDArray[np.bool_]
    ) -> None:
        """Consecutive pages. Of whole runs the digest is kept too, or the next scan would look at every run closely."""
        first, end = -(-gfns.start // _RUN_PAGES), gfns.stop // _RUN_PAGES
        if gfns.stop == self._pages:
            end = len(self._kept_runs)
        first = min(first, end)
        # Where the first whole run begins, and the last one ends.
        head, tail = (min(max(run * _RUN_PAGES - gfns.start, 0), len(gfns)) for run in (first, end))
        for outer in (slice(0, head), slice(tail, len(gfns))):
            if outer.start < outer.stop:
                self._keep(np.arange(gfns.start + outer.start, gfns.start + outer.stop), digests[outer])
        self._stale[first:end] = True  # until the run's digest is made, should that fail
        self._kept[gfns.start + head : gfns.start + tail] = digests[head:tail]
        for run in range(first, end):
            start = run * _RUN_PAGES - gfns.start
            stop = min(start + _RUN_PAGES, len(gfns))
            if np.count_nonzero(in_use[start:stop]):
                self._kept_runs[run] = self._digest([copies.octets[start * PAGE_SIZE : stop * PAGE_SIZE]])
            else:
                self._kept_runs[run] = self._zero_runs[run]
            self._stale[run] = False

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
        counts = held.region_counts(_RUN_PAGES)
        run_pages = np.full(len(counts), _RUN_PAGES)
        run_pages[-1] = self._pages - (len(counts) - 1) * _RUN_PAGES
        return _Data(held, counts != 0, counts == run_pages)

    def _look(self, data: _Data, runs: NDArray[np.int64]) -> NDArray[np.int64]:
        """gfns of these runs that changed, sorted."""
        copies = PageCopies(_RUN_PAGES)
        # Each is hashed before the next one is made. Reading a hole would have the kernel provide memory for it.
        parts = (
            self._run(run) if whole else self._copy(data, run, copies)
            for run, whole in zip(runs.tolist(), data.whole[runs].tolist(), strict=True)
        )
        differ = (self._digest(parts) != self._kept_runs[runs]).any(axis=1) | self._stale[runs]
        found = [self._look_closer(data, run, copies) for run in runs[differ].tolist()]
        return np.concatenate([np.zeros(0, dtype=np.int64), *found])

    def _look_closer(self, data: _Data, run: int, copies: PageCopies) -> NDArray[np.int64]:
        """gfns of this run that changed, sorted."""
        octets = self._copy(data, run, copies)
        first = run * _RUN_PAGES
        kept = self._kept[first : first + _RUN_PAGES]
        actual = self._digest(copies.each[: len(kept)])
        changed: NDArray[np.int64] = np.flatnonzero((actual != kept).any(axis=1))
        self._stale[run] = True  # until the run's digest is made, should that fail
        kept[:] = actual
        self._kept_runs[run] = self._digest([octets])
        self._stale[run] = False
        changed += first
        return changed

    def _copy(self, data: _Data, run: int, copies: PageCopies) -> memoryview:
        """Copy a run, with zeros for what is a hole of it."""
        first = run * _RUN_PAGES
        words = self._words[first : first + _RUN_PAGES]
        copy = copies.words[: len(words)]
        if data.whole[run]:
            copy[:] = words
        else:
            there = data.held.test(np.arange(first, first + len(words)))
            copy.fill(0)
            copy[there] = words[there]
        return copies.octets[: len(words) * PAGE_SIZE]

    def _run(self, run: int) -> memoryview:
        return self._octets[run * _RUN_PAGES * PAGE_SIZE : (run + 1) * _RUN_PAGES * PAGE_SIZE]

    def _digest(self, parts: Iterable[memoryview]) -> NDArray[np.uint64]:
        """Digests of these parts, uint64 of shape (n, 2)."""
        digests = b"".join(map(self._hash, parts))
        return np.frombuffer(digests, dtype=np.uint64).reshape(-1, 2)
