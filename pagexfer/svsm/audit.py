"""What was sent, page by page, as keyed digests; and whether RAM is still that (R13, `digest-audit`).

Where only the hypervisor sees which pages are written, a hypervisor that hides a write would leave an old page at the
destination. So the SVSM remembers a digest of every page as it was sealed, and once the vCPUs are parked it hashes all of
RAM again, on all cores, and sends what differs.

Digests are GMAC tags under a key made here for one session. Neither key nor tag ever leaves the SVSM, which is why one
nonce serves all of them: it only adds the same block to each, and a comparison cancels that out. What remains is GHASH, a
polynomial in a secret field element. Whoever chooses two contents of 128 pages without knowing it, as a guest in league
with its host may, has them collide with probability at most 32769 / 2^128 < 2^-112; a host that sees which pages are sent
again learns nothing from it but that they differed. For 1 TiB (2^21 comparisons) the chance that the audit misses any
changed page at all is below 2^-91.

GHASH and not a cryptographic hash, because one call over many pages reads RAM once, at about the speed of a copy; sums of
AES blocks over a page, vectorised in numpy, reach a quarter of that, and a keyed BLAKE2 a tenth. For one page a call costs
more than its hashing, so tags are made page by page when pages are sealed, and composed to those of runs
(`ghash.RunComposer`) before black-out as well, which then pays for hashing and for runs with a page that is pending.
"""

from __future__ import annotations

import os
import secrets
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB

from ..dirty import DirtyBitmap, as_run
from ..wire.bundle import DATA, ZERO
from ..wire.constants import GCM_NONCE_BYTES, KEY_BYTES, PAGE_SIZE, WORDS_PER_PAGE
from ..wire.page_state import SHARED, VALIDATED
from .ghash import BLOCK_BYTES, RunComposer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from numpy.typing import NDArray

    from .memory import GuestMemory

# 512 KiB: a call over so much costs what its hashing costs, and a run that differs is few pages to look at one by one.
_RUN_LEVELS: Final = 7
RUN_PAGES: Final = 1 << _RUN_LEVELS
# What one thread takes at a time, 32 MiB: enough for composing to be fast, and a few milliseconds of work.
TASK_PAGES: Final = 1 << 13
_STEP_TASKS: Final = 4

_HAS_CONTENT: Final = np.uint32(VALIDATED | SHARED)
_NONCE: Final = bytes(GCM_NONCE_BYTES)


class Audited(NamedTuple):
    """One step of the audit: pages looked at, how many of them nobody had reported, and whether more are left."""

    pages: int
    found: int
    more: bool


class PageDigests:
    """Digest of every page of `memory` as it was sent last: 16 bytes a page. `workers` threads hash (default: all cores).

    A page that was never recorded counts as zero.
    """

    def __init__(self, memory: GuestMemory, workers: int | None = None) -> None:
        self._memory = memory
        self._ram = memory.words.reshape(-1).view(np.uint8).data
        self._workers = workers or len(os.sched_getaffinity(0))
        key = secrets.token_bytes(KEY_BYTES)
        self._cipher = AESGCM(key)
        subkey = Cipher(AES(key), ECB()).encryptor().update(bytes(BLOCK_BYTES))
        self._composer = RunComposer(subkey, PAGE_SIZE // BLOCK_BYTES, _RUN_LEVELS)
        # Tags of zeros: what nonce and length alone make of a page and of a run.
        self._zero_page, self._zero_run = (
            self._tags([memoryview(bytes(PAGE_SIZE * pages))]) for pages in (1, RUN_PAGES)
        )
        # Whole runs; what is behind the last page stays zero, and is never looked at in RAM.
        runs = -(-memory.pages // RUN_PAGES)
        self._table: NDArray[np.uint64] = np.zeros((runs * RUN_PAGES, 2), np.uint64)
        # What the table composes to, run by run, except where a page was recorded since: zeros compose to zero.
        self._composed: NDArray[np.uint64] = np.zeros((runs, 2), np.uint64)
        self._stale = np.zeros(runs, dtype=np.bool_)

    @property
    def step_pages(self) -> int:
        """Pages that one call of `changed` should get: some tasks for each thread, so that none waits long for another."""
        return _STEP_TASKS * TASK_PAGES * self._workers

    def record(self, gfns: NDArray[np.int64], operations: NDArray[np.uint8], payload: memoryview) -> None:
        """Pages `gfns` were sealed with these operations; `payload` is the DATA pages, in memory that nobody writes to.

        A page that the guest gave up (DROP) has no content, and so no digest.
        """
        is_data = operations == DATA
        digests = np.zeros((len(gfns), 2), dtype=np.uint64)
        pages = [payload[start : start + PAGE_SIZE] for start in range(0, len(payload), PAGE_SIZE)]
        digests[is_data] = self._tags(pages) ^ self._zero_page
        kept = is_data | (operations == ZERO)
        self._table[gfns[kept]] = digests[kept]
        self._stale[gfns >> _RUN_LEVELS] = True
        run = as_run(gfns)
        if isinstance(run, range):
            # All of RAM comes this way in the first epoch: composed while it is in the cache, not at once in the end.
            self._compose(np.arange(-(-run.start // RUN_PAGES), run.stop // RUN_PAGES))

    def settle(self) -> None:
        """Compose the runs of which pages were recorded, so that this is not left for black-out."""
        self._compose(np.flatnonzero(self._stale))

    def trial(self, pages: int) -> None:
        """Hash the first `pages` pages as `changed` does, for its cost alone."""
        nothing = DirtyBitmap(self._memory.pages)
        self._on_all_cores(lambda first, stop: self._changed_runs(first, stop, nothing), 0, pages)

    def changed(self, start: int, stop: int, excused: DirtyBitmap) -> NDArray[np.int64]:
        """gfns from `start` (where a run begins) to `stop` - 1 whose content is not what was sent, sorted.

        Leaves out pages that `excused` marks, and pages that have no content by their state.
        """
        self._memory.find_holes()
        return self._on_all_cores(lambda first, end: self._changed(first, end, excused), start, stop)

    def _on_all_cores(
        self, work: Callable[[int, int], NDArray[np.int64]], start: int, stop: int
    ) -> NDArray[np.int64]:
        # The cipher and numpy work without the interpreter's lock, so threads are enough.
        with ThreadPoolExecutor(self._workers) as pool:
            parts = pool.map(
                lambda first: work(first, min(first + TASK_PAGES, stop)), range(start, stop, TASK_PAGES)
            )
            return np.concatenate([np.zeros(0, dtype=np.int64), *parts])

    def _changed(self, first: int, stop: int, excused: DirtyBitmap) -> NDArray[np.int64]:
        """As `changed`, in this thread."""
        found = [np.zeros(0, dtype=np.int64)]
        for run in self._changed_runs(first, stop, excused).tolist():
            gfns = np.arange(run, min(run + RUN_PAGES, self._memory.pages))
            gfns = gfns[~self._excused(gfns, excused)]
            actual = np.zeros((len(gfns), 2), dtype=np.uint64)
            held = self._held(gfns)
            actual[held] = self._tags([self._page(gfn) for gfn in gfns[held].tolist()]) ^ self._zero_page
            found.append(gfns[(actual != self._table[gfns]).any(axis=1)])
        return np.concatenate(found)

    def _changed_runs(self, first: int, stop: int, excused: DirtyBitmap) -> NDArray[np.int64]:
        """First gfn of every run in which a page differs that is not excused."""
        first_run, end_run = first // RUN_PAGES, -(-stop // RUN_PAGES)
        left_out = np.ones((end_run - first_run) * RUN_PAGES, dtype=np.bool_)
        left_out[: stop - first] = self._excused(np.arange(first, stop), excused)
        by_run = left_out.reshape(-1, RUN_PAGES)
        partly: NDArray[np.bool_] = np.logical_or.reduce(by_run, axis=1)
        expected = self._composed[first_run:end_run].copy()
        apart = np.flatnonzero(partly | self._stale[first_run:end_run])
        pages = self._pages_of(first_run + apart)
        # Pages that are left out are zero on both sides.
        pages[by_run[apart]] = 0
        expected[apart] = self._composer.compose(pages.reshape(-1, 2))
        # What lies in a hole is zero, and so is its digest: it is left out of what is hashed, not of what is expected.
        held = np.ones_like(by_run)
        held.reshape(-1)[: stop - first] = self._held(np.arange(first, stop))
        in_part: NDArray[np.bool_] = partly | ~held.all(axis=1)
        read = np.flatnonzero(held.any(axis=1))
        actual = np.zeros_like(expected)
        actual[read] = self._tags(self._runs(first, read, by_run | ~held, in_part)) ^ self._zero_run
        differ = (actual != expected).any(axis=1)
        return first + np.flatnonzero(differ) * RUN_PAGES

    def _compose(self, runs: NDArray[np.int64]) -> None:
        self._composed[runs] = self._composer.compose(self._pages_of(runs).reshape(-1, 2))
        self._stale[runs] = False

    def _pages_of(self, runs: NDArray[np.int64]) -> NDArray[np.uint64]:
        """A copy of the digests of all pages of `runs`, shape (n, 128, 2)."""
        return self._table.reshape(-1, RUN_PAGES, 2)[runs]

    def _runs(
        self, first: int, runs: NDArray[np.int64], left_out: NDArray[np.bool_], partly: NDArray[np.bool_]
    ) -> Iterator[memoryview]:
        """`runs`, counted from page `first` on: RAM itself, or a copy without what is left out of it."""
        scratch = np.empty((RUN_PAGES, WORDS_PER_PAGE), dtype=np.uint64)
        copied = scratch.reshape(-1).view(np.uint8).data
        for number in runs.tolist():
            run = first // RUN_PAGES + number
            if not partly[number]:
                yield self._ram[run * PAGE_SIZE * RUN_PAGES : (run + 1) * PAGE_SIZE * RUN_PAGES]
                continue
            words = self._memory.words[run * RUN_PAGES : (run + 1) * RUN_PAGES]
            taken = np.flatnonzero(~left_out[number, : len(words)])
            scratch.fill(0)
            scratch[taken] = words[taken]
            yield copied

    def _excused(self, gfns: NDArray[np.int64], excused: DirtyBitmap) -> NDArray[np.bool_]:
        without_content: NDArray[np.bool_] = (self._memory.states[gfns] & _HAS_CONTENT) == 0
        return without_content | excused.test(gfns)

    def _held(self, gfns: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of `gfns` have memory, and must be read."""
        holes = self._memory.in_holes(gfns)
        return np.ones(len(gfns), dtype=np.bool_) if holes is None else ~holes

    def _page(self, gfn: int) -> memoryview:
        return self._ram[gfn * PAGE_SIZE : (gfn + 1) * PAGE_SIZE]

    def _tags(self, parts: Iterable[memoryview]) -> NDArray[np.uint64]:
        """GMAC tags, uint64 of shape (n, 2). Each part is hashed before the next one is asked for."""
        tag = self._cipher.encrypt
        return np.frombuffer(b"".join([tag(_NONCE, b"", part) for part in parts]), np.uint64).reshape(-1, 2)
