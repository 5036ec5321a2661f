"""Dirty pages of any memory that can be read, found by digests of what was last seen or sent: nobody has to report writes.

The first scan keeps a digest of every page, and every later one reports the pages whose content has another. It costs one
read of the memory at about its own speed, whether pages are written or not; other trackers are cheaper where they can be
had. It is the one that works on memory that another process writes to (RAM of a virtual machine in a shared file).

What is kept is always the digest of a private copy. A run of 128 pages is hashed where it is, in one call. Where that is
not the digest of this run's last copy, the run is copied, and run and pages are hashed again from the copy: so what is kept
for a run and for its pages is of the very same bytes. Were it not, a word that goes from 0 to 1 between two readings, and
back to 0 later, could be kept as 0 with its run and as 1 with its page, and never be reported.

Why no write is lost. Let C be the copy whose digest is kept for a page. A later scan that does not report the page has read
each byte of it as it stands in C (but for a collision): torn or not, C need not ever have been the content as a whole. So
once the guest stands still, what is not reported is C. That C is also what the destination has, is the sender's part:

- Pages that were sent from a private copy are told to `sent`, and C is that copy. Then nothing else matters: when, and how
  often, a page was written between the scan and the sending.
- Without that, C is what the scan saw, and the page is read again when it is sent. What is written in between is sent, and
  is reported once more. What is written after it is reported as well - unless it puts back exactly what the scan had seen:
  a lock that was free, was taken when the page was sent, and is free again. A scan cannot see this. So without `sent` what
  the tracker says is a hint, and the migration needs the SVSM's digest audit in black-out (R13), which remembers what was
  sent.

XXH3 with 128 bits: 12.2 GB/s for one page of 4 KiB a call, 27.7 GB/s for runs of 512 KiB, on one core of a Zen 4. GMAC does
3.1 and 20.9 there, a keyed BLAKE3 1.7 and 4.7; inner products in numpy with random factors take as long as XXH3 and mix a
word's high bits poorly. Two contents that were not made to collide do so with probability 2^-128; for 1 TiB, scanned a
thousand times, a page is missed with probability below 2^-90. The seed is secret and new for every tracker, so whoever
writes pages cannot aim, but no bound is proven for XXH3 against one who tries. What such a guest could win is a page of its
own, both of whose contents it wrote itself, that is old at the destination: it could as well have written the old content.
The audit's GMAC has a proven bound.
"""

from __future__ import annotations

import secrets
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import TYPE_CHECKING, Final

import numpy as np
from xxhash import xxh3_128_digest

from ..errors import LocalProtocolError
from .bitmap import DirtyBitmap
from .ram import PAGE_SIZE, check_form

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray

_SEED_BITS: Final = 64

# 512 KiB: a call over so much costs what its hashing costs and lets the interpreter's lock go, a copy of it stays in the
# second-level cache, and a run that differs is few pages to look at one by one.
_RUN_PAGES: Final = 128
# Runs that one thread takes at a time: 32 MiB, a few milliseconds.
_TASK_RUNS: Final = 64
_STEP_RUNS: Final = 1024


class ContentTracker:
    """Dirty tracker over `words`, uint64 of shape (pages, 512) in contiguous memory that others may write to.

    `data` gives (start, stop) of all gfns that may be other than zero, as SEEK_DATA does for a file: nothing else is read
    unless it was other than zero before. Default: all. `workers` threads scan; more than one pays where one core does not
    take all of the memory's bandwidth. 16 bytes are kept for each page. Only one thread calls the tracker.
    """

    def __init__(
        self,
        words: NDArray[np.uint64],
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
        self._seed = secrets.randbits(_SEED_BITS)
        runs = -(-self._pages // _RUN_PAGES)
        zeros = bytes(_RUN_PAGES * PAGE_SIZE)
        self._zero_page, self._zero_run = (self._digest([part]) for part in (zeros[:PAGE_SIZE], zeros))
        # Digest of each page, and of each run's copy; stale runs had a page sent that was other than in that copy.
        self._kept: NDArray[np.uint64] = np.zeros((self._pages, 2), dtype=np.uint64)
        self._kept_runs: NDArray[np.uint64] = np.zeros((runs, 2), dtype=np.uint64)
        self._stale: NDArray[np.bool_] = np.zeros(runs, dtype=np.bool_)
        self._started = False

    def start(self) -> None:
        """Keep the digest of every page as it is now. Where it is started already, nothing changes."""
        if self._started:
            return
        self._kept[:] = self._zero_page
        self._kept_runs[:] = self._zero_run
        self._stale.fill(False)
        self._started = True
        self.collect()

    def collect(self) -> DirtyBitmap:
        """Pages that are not as they were sent last, or, where they were not, as this tracker saw them last.

        Read them after this returned, never before. Raises LocalProtocolError where the tracker is not started.
        """
        self._require_started()
        bitmap = DirtyBitmap(self._pages)
        runs = self._runs_to_read()
        tasks = [runs[first : first + _TASK_RUNS] for first in range(0, len(runs), _TASK_RUNS)]
        # Hashing a run and copying it both work without the interpreter's lock, so threads are enough.
        with ThreadPoolExecutor(self._workers) as pool:
            for gfns in pool.map(self._look, tasks):
                bitmap.set_gfns(gfns)
        return bitmap

    def sent(self, gfns: NDArray[np.int64] | range, content: memoryview | None) -> None:
        """Pages `gfns` were sent with this `content`, in memory that nobody writes to; None where all of them are zero.

        From here on they are reported as soon as they differ from it. Raises LocalProtocolError, changing nothing, where
        the tracker is not started or there is not one page of content for each gfn.
        """
        self._require_started()
        if content is None:
            digests = np.broadcast_to(self._zero_page, (len(gfns), 2))
        elif content.nbytes == len(gfns) * PAGE_SIZE:
            digests = self._digest(_pages_of(content))
        else:
            raise LocalProtocolError(f"{len(gfns)} pages are not {content.nbytes} bytes")
        numbers = np.arange(gfns.start, gfns.stop) if isinstance(gfns, range) else gfns
        others = (self._kept[numbers] != digests).any(axis=1)
        self._kept[numbers] = digests
        self._stale[numbers[others] // _RUN_PAGES] = True

    def stop(self) -> None:
        """Stop tracking. Calling it again changes nothing."""
        self._started = False

    # Part by part (`SteppedTracker`)

    @property
    def step_pages(self) -> int:
        """512 MiB: some 30 ms for one thread. A multiple of a run."""
        return _STEP_RUNS * _RUN_PAGES

    def collect_part(self, start: int, stop: int) -> NDArray[np.int64]:
        """As `collect`, of the pages `start` to `stop` - 1, whole runs but for the last one of all."""
        self._require_started()
        runs = self._runs_to_read()
        first, end = np.searchsorted(runs, (start // _RUN_PAGES, -(-stop // _RUN_PAGES)))
        tasks = [runs[task : min(task + _TASK_RUNS, end)] for task in range(first, end, _TASK_RUNS)]
        with ThreadPoolExecutor(self._workers) as pool:
            return np.concatenate([np.zeros(0, dtype=np.int64), *pool.map(self._look, tasks)])

    def _require_started(self) -> None:
        if not self._started:
            raise LocalProtocolError("the content tracker is not started: call start first")

    def _runs_to_read(self) -> NDArray[np.int64]:
        """Numbers of the runs that may be other than what is kept of them."""
        if self._data is None:
            return np.arange(len(self._kept_runs))
        # A hole that was none before has become zero.
        wanted = self._stale | (self._kept_runs != self._zero_run).any(axis=1)
        for start, stop in self._data():
            if start < stop:
                wanted[start // _RUN_PAGES : (stop - 1) // _RUN_PAGES + 1] = True
        return np.flatnonzero(wanted)

    def _look(self, runs: NDArray[np.int64]) -> NDArray[np.int64]:
        """gfns of these runs that changed, sorted."""
        actual = self._digest([self._run(run) for run in runs.tolist()])
        differ = self._stale[runs] | (actual != self._kept_runs[runs]).any(axis=1)
        if not differ.any():
            return np.zeros(0, dtype=np.int64)
        copy = np.empty(_RUN_PAGES * PAGE_SIZE, dtype=np.uint8)
        pages = _pages_of(copy.data)
        return np.concatenate([self._look_closer(run, copy, pages) for run in runs[differ].tolist()])

    def _look_closer(
        self, run: int, copy: NDArray[np.uint8], pages: Sequence[memoryview]
    ) -> NDArray[np.int64]:
        """gfns of this run that changed, sorted; `pages` are those of `copy`, where the run is copied to."""
        first = run * _RUN_PAGES
        ram = np.frombuffer(self._run(run), dtype=np.uint8)
        np.copyto(copy[: ram.size], ram)
        kept = self._kept[first : first + _RUN_PAGES]
        actual = self._digest(pages[: len(kept)])
        changed: NDArray[np.int64] = np.flatnonzero((actual != kept).any(axis=1))
        kept[:] = actual
        self._kept_runs[run] = self._digest([copy[: ram.size].data])
        self._stale[run] = False
        changed += first
        return changed

    def _run(self, run: int) -> memoryview:
        return self._octets[run * _RUN_PAGES * PAGE_SIZE : (run + 1) * _RUN_PAGES * PAGE_SIZE]

    def _digest(self, parts: Sequence[memoryview | bytes]) -> NDArray[np.uint64]:
        """Digests of these parts, uint64 of shape (n, 2)."""
        digests = b"".join(map(xxh3_128_digest, parts, repeat(self._seed)))
        return np.frombuffer(digests, dtype=np.uint64).reshape(-1, 2)


def _pages_of(octets: memoryview) -> list[memoryview]:
    return [octets[start : start + PAGE_SIZE] for start in range(0, octets.nbytes, PAGE_SIZE)]
