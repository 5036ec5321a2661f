"""From pending pages to the entries and payload of one bundle.

A run of consecutive pages without a zero page is sealed straight from guest RAM. Everything else is gathered into one
staging area first, which is reused for every bundle so that it stays in the cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from ..dirty import PageCopies, as_run
from ..dirty.content import BLOCK_PAGES
from ..wire.bundle import DATA, DROP, ENTRY_BYTES, HEADER_BYTES, ZERO, pack_entries
from ..wire.constants import MAX_BUNDLE_DATA_PAGES, MAX_BUNDLE_ENTRIES, PAGE_SIZE, TAG_BYTES
from ..wire.page_state import SHARED, VALIDATED

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .memory import GuestMemory

# As many whole blocks, of 32 pages each, over which a comparing tracker makes one digest, as fit a slot's buffer of 2 MiB:
# what is spent once for each bundle counts most.
BUNDLE_PAGES: Final = 480
# Above so many channels the buffers of all, which each has of its own, leave no room in a cache.
MANY_CHANNELS: Final = 16
MANY_CHANNELS_BUNDLE_PAGES: Final = 256
# What a bundle with the most pages with content has beside its payload.
_OVERHEAD_BYTES: Final = HEADER_BYTES + ENTRY_BYTES * MAX_BUNDLE_DATA_PAGES + TAG_BYTES

_HAS_CONTENT: Final = np.uint32(VALIDATED | SHARED)
_ALL_DATA: Final = np.full(MAX_BUNDLE_DATA_PAGES, DATA)


def usual_bundle_pages(channels: int) -> int:
    """Pages with content in a bundle, where nobody chose a number."""
    return MANY_CHANNELS_BUNDLE_PAGES if channels > MANY_CHANNELS else BUNDLE_PAGES


def most_data_pages(buffer_bytes: int) -> int:
    """Pages with content in a bundle that fits a buffer: whole blocks, where there is room for one."""
    fitting = (buffer_bytes - _OVERHEAD_BYTES) // PAGE_SIZE
    return fitting - fitting % BLOCK_PAGES if fitting > BLOCK_PAGES else fitting


def most_entries(buffer_bytes: int) -> int:
    """Pages without content in a bundle that fits a buffer."""
    return min(MAX_BUNDLE_ENTRIES, (buffer_bytes - HEADER_BYTES - TAG_BYTES) // ENTRY_BYTES)


class Package(NamedTuple):
    """What goes into one PAGES bundle.

    Where the packager stages, the first of `copies` are all these pages as they were read: those not `in_use` are zero, and
    need not be there where none is in use.
    """

    gfns: NDArray[np.int64]
    entries: bytes
    payload: memoryview
    operations: NDArray[np.uint8]
    zero_pages: int
    copies: PageCopies
    in_use: NDArray[np.bool_]


class Exported(NamedTuple):
    """One sealed bundle: its length (0 where nothing was pending), its pages, and whether more may be pending."""

    length: int
    pages: int
    zero_pages: int
    more: bool


class Packager:
    """Turns gfns into packages of one guest's memory.

    With `stage`, every payload is a private copy, so that what is digested and what is sealed are the same bytes although
    the guest writes meanwhile.
    """

    def __init__(self, memory: GuestMemory, *, stage: bool = False) -> None:
        self._memory = memory
        self._stage = stage
        self._copies = PageCopies(MAX_BUNDLE_DATA_PAGES)
        self._gathered = self._copies.words
        self._compacted = np.empty_like(self._gathered)

    def package(self, gfns: NDArray[np.int64], max_data_pages: int) -> Package:
        """Package `gfns` (ascending, 1 to 4096), or as many of them from the start as have `max_data_pages` DATA pages.

        More than 512 only where they are all zero. RAM may be written meanwhile; what a page is packaged as was read once,
        and a later write is the dirty tracker's.
        """
        if len(gfns) > MAX_BUNDLE_DATA_PAGES:
            zero = self._zero_in_front(gfns)
            if zero > MAX_BUNDLE_DATA_PAGES:
                return self._without_content(gfns[:zero])
            gfns = gfns[:MAX_BUNDLE_DATA_PAGES]
        run = as_run(gfns)
        holes = self._memory.in_holes(run)
        if holes is not None and holes.all():
            return self._without_content(gfns)
        words, states = self._view(run, holes)
        has_content = (states & _HAS_CONTENT) != 0
        # Most pages in use differ from zero in their first word, or in their last: only the others are read whole.
        in_use = words[:, 0] != 0
        # Counted, as numpy's own all() costs four times as much for so few.
        if np.count_nonzero(in_use) < len(gfns):
            in_use |= words[:, -1] != 0
        if len(gfns) <= max_data_pages and np.count_nonzero(in_use & has_content) == len(gfns):
            return self._package(gfns, _ALL_DATA[: len(gfns)], states, words, in_use)
        operations = _classify(words, in_use, has_content)
        is_data = operations == DATA
        data_pages = int(np.count_nonzero(is_data))
        if data_pages > max_data_pages:
            end = int(np.searchsorted(np.cumsum(is_data), max_data_pages, side="right"))
            gfns, words, states = gfns[:end], words[:end], states[:end]
            operations, is_data, data_pages = operations[:end], is_data[:end], max_data_pages
        if data_pages != len(gfns):
            words = np.take(
                words, np.flatnonzero(is_data), axis=0, out=self._compacted[:data_pages], mode="clip"
            )
        return self._package(gfns, operations, states, words, operations != ZERO)

    def _zero_in_front(self, gfns: NDArray[np.int64]) -> int:
        """How many of `gfns` from the start are zero, in whole steps of 512."""
        for start in range(0, len(gfns), MAX_BUNDLE_DATA_PAGES):
            run = as_run(gfns[start : start + MAX_BUNDLE_DATA_PAGES])
            holes = self._memory.in_holes(run)
            if holes is None:
                if not self._is_zero(run):
                    return start
            elif not holes.all():
                return start
        return len(gfns)

    def _is_zero(self, gfns: NDArray[np.int64] | range) -> bool:
        if isinstance(gfns, range):
            words = self._memory.words[gfns.start : gfns.stop]
        else:
            words = np.take(self._memory.words, gfns, axis=0, out=self._gathered[: len(gfns)], mode="clip")
        # The first word of every page, which shows most pages in use, is a cache line of each: as slow as a quarter of all.
        return not words[0, 0] and not words[-1, 0] and not np.bitwise_or.reduce(words.reshape(-1))

    def _without_content(self, gfns: NDArray[np.int64]) -> Package:
        """A package of pages that are zero."""
        states = self._memory.states[gfns]
        operations = np.where((states & _HAS_CONTENT) != 0, np.uint8(ZERO), np.uint8(DROP))
        return self._package(gfns, operations, states, self._gathered[:0], np.zeros(len(gfns), np.bool_))

    def _view(
        self, gfns: NDArray[np.int64] | range, holes: NDArray[np.bool_] | None
    ) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
        if holes is not None:  # reading one would have the kernel provide memory for it
            numbers = np.arange(gfns.start, gfns.stop) if isinstance(gfns, range) else gfns
            words = self._gathered[: len(numbers)]
            words[holes] = 0
            words[~holes] = self._memory.words[numbers[~holes]]
            return words, self._memory.states[numbers]
        if isinstance(gfns, range):
            run = slice(gfns.start, gfns.stop)
            words, states = self._memory.words[run], self._memory.states[run].copy()
            if self._stage:
                staged = self._gathered[: len(gfns)]
                staged[:] = words
                return staged, states
            return words, states
        # mode="clip" because "raise" would make numpy gather into a buffer of its own first
        words = np.take(self._memory.words, gfns, axis=0, out=self._gathered[: len(gfns)], mode="clip")
        return words, self._memory.states[gfns]

    def _package(
        self,
        gfns: NDArray[np.int64],
        operations: NDArray[np.uint8],
        states: NDArray[np.uint32],
        words: NDArray[np.uint64],
        in_use: NDArray[np.bool_],
    ) -> Package:
        return Package(
            gfns,
            pack_entries(gfns, operations, states),
            words.reshape(-1).view(np.uint8).data,
            operations,
            int(np.count_nonzero(operations == ZERO)),
            self._copies,
            in_use,
        )


class PackagerPool:
    """As many packagers as threads seal at a time; one used last is still in the cache. Called by one thread at a time."""

    def __init__(self, memory: GuestMemory, *, stage: bool) -> None:
        self._memory = memory
        self._stage = stage
        self._idle: list[Packager] = []

    def take(self) -> Packager:
        """One for the caller alone."""
        return self._idle.pop() if self._idle else Packager(self._memory, stage=self._stage)

    def give_back(self, packager: Packager) -> None:
        """The caller is done with it."""
        self._idle.append(packager)


def _classify(
    words: NDArray[np.uint64], in_use: NDArray[np.bool_], has_content: NDArray[np.bool_]
) -> NDArray[np.uint8]:
    operations = np.full(len(words), DATA, dtype=np.uint8)
    candidates = np.flatnonzero(~in_use)
    if candidates.size:
        suspects = words if candidates.size == len(words) else words[candidates]
        operations[candidates[np.bitwise_or.reduce(suspects, axis=1) == 0]] = ZERO
    operations[~has_content] = DROP
    return operations
