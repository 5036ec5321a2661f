"""The dirty bitmap: one bit per guest page, and every question that a migration asks of it.

Both sides use it; it does no I/O and imports only errors. Bit g % 64 of word g // 64 is gfn g, which is the
layout of KVM_GET_DIRTY_LOG on x86-64, so that a raw log is united without conversion. A guest of 1 TiB has
2^28 pages, hence 32 MiB of words: what is called once per bundle touches only the words between its first and
its last gfn, and operations on the whole go to the rows of 64 words that may have a mark, or over all words at
memory speed where many do.

Which rows may have one is written down beside the words. A row that is not among them is zero; one that is may be
zero too, since nothing is looked at when marks are cleared: `region_counts`, once an epoch, puts that right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Self

import numpy as np

from ..errors import LocalProtocolError
from .bits import (
    ALL_ONES,
    BIT_OF,
    DENSE,
    ROW_SHIFT,
    ROW_WORDS,
    SCAN_ROWS,
    WORD_BITS,
    blocks,
    dirty_words,
    edges,
    expand,
    fill_runs,
    marked_rows,
    run_edges,
    spread,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

__all__ = ["WORD_BITS", "DirtyBitmap", "as_run"]

# Up to this many pages it is cheaper to spread a span of the bitmap to one byte per page than to look for its
# dirty words first; a chunk of this size is answered in one step.
_SPREAD_PAGES: Final = 4096

_ROW_PAGES_SHIFT: Final = ROW_SHIFT + 6
# Rows that `first` looks at to begin with, behind those pages.
_FIRST_ROWS: Final = 8


class DirtyBitmap:
    """A set of gfns of a guest with `pages` pages. Bits at and above `pages` are always zero.

    Two bitmaps are equal where pages and marks are. Not safe for use by several threads at once.
    """

    # Rows that may have marks; a `_shared` bitmap's words are in other hands, which may mark any page at any time.
    __slots__ = ("_octets", "_pages", "_rows", "_shared", "_table", "_view", "_words")

    def __init__(self, pages: int) -> None:
        """No page marked. Raises LocalProtocolError where `pages` is not positive."""
        if pages <= 0:
            raise LocalProtocolError(f"a bitmap needs at least one page, not {pages}")
        self._pages = pages
        self._renew()

    @classmethod
    def full(cls, pages: int) -> Self:
        """Every page marked. Raises LocalProtocolError where `pages` is not positive."""
        bitmap = cls(pages)
        bitmap._set(0, pages)
        return bitmap

    @classmethod
    def from_words(cls, words: NDArray[np.uint64] | bytes | bytearray | memoryview, pages: int) -> Self:
        """A bitmap with the marks of a raw log, which is copied. Raises as `union_words` does."""
        bitmap = cls(pages)
        bitmap.union_words(words)
        return bitmap

    @property
    def pages(self) -> int:
        """Number of pages of the guest, marked or not."""
        return self._pages

    @property
    def words(self) -> NDArray[np.uint64]:
        """The words themselves, uint64 of shape (ceil(pages / 64),). After `take` they are another array."""
        self._rows.fill(True)
        self._shared = True  # whoever has them may write to them
        return self._words

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DirtyBitmap):
            return NotImplemented
        return self._pages == other._pages and bool(np.array_equal(self._words, other._words))

    __hash__ = None  # type: ignore[assignment]  # its content changes

    # Single pages and ranges. A contiguous run of gfns, the common case, becomes a range; who knows it gives one.

    def set_gfns(self, gfns: NDArray[np.int64] | range) -> None:
        """Mark `gfns` (any order, repeats allowed). Raises LocalProtocolError where one is out of range."""
        if isinstance(gfns, range):
            self.set_range(gfns.start, gfns.stop)
            return
        if not gfns.size:
            return
        first, last, contiguous = self._extent(gfns)
        if contiguous:
            self._set(first, last + 1)
        else:
            np.bitwise_or.at(self._words, gfns >> 6, BIT_OF[gfns & 63])
            self._rows[gfns >> _ROW_PAGES_SHIFT] = True

    def clear_gfns(self, gfns: NDArray[np.int64] | range) -> None:
        """Unmark `gfns` (any order, repeats allowed). Raises LocalProtocolError where one is out of range."""
        if isinstance(gfns, range):
            self.clear_range(gfns.start, gfns.stop)
            return
        if not gfns.size:
            return
        first, last, contiguous = self._extent(gfns)
        if contiguous:
            self._clear(first, last + 1)
        else:
            np.bitwise_and.at(self._words, gfns >> 6, ~BIT_OF[gfns & 63])

    def test(self, gfns: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of `gfns` are marked, in their order. Raises LocalProtocolError where one is out of range."""
        if not gfns.size:
            return np.zeros(0, dtype=np.bool_)
        first, last, contiguous = self._extent(gfns)
        if contiguous:
            return spread(self._octets, first, last + 1)
        marked: NDArray[np.bool_] = (self._words[gfns >> 6] & BIT_OF[gfns & 63]) != 0
        return marked

    def any_of(self, gfns: NDArray[np.int64] | range) -> bool:
        """Whether one of `gfns` is marked. Raises LocalProtocolError where one is out of range."""
        if not isinstance(gfns, range):
            return bool(self.test(gfns).any())
        self._check_range(gfns.start, gfns.stop)
        return self._bits(gfns.start, gfns.stop) != 0

    def set_range(self, start: int, stop: int) -> None:
        """Mark start <= gfn < stop. Raises LocalProtocolError where that is not a range of this guest."""
        self._check_range(start, stop)
        if start < stop:
            self._set(start, stop)

    def clear_range(self, start: int, stop: int) -> None:
        """Unmark start <= gfn < stop. Raises LocalProtocolError where that is not a range of this guest."""
        self._check_range(start, stop)
        if start < stop:
            self._clear(start, stop)

    def set_runs(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        """Mark runs as `runs` gives them, in any order. Raises LocalProtocolError, changing nothing, for a bad one."""
        if not starts.size:
            return
        stops = starts + lengths
        if starts.min() < 0 or lengths.min() <= 0 or stops.max() > self._pages:
            raise LocalProtocolError(f"one of these runs is none of a guest of {self._pages} pages")
        fill_runs(self._words, starts, stops)
        edges_of_runs = np.zeros(len(self._rows) + 1, dtype=np.int64)
        np.add.at(edges_of_runs, starts >> _ROW_PAGES_SHIFT, 1)
        np.subtract.at(edges_of_runs, (stops - 1 >> _ROW_PAGES_SHIFT) + 1, 1)
        self._rows |= np.cumsum(edges_of_runs[:-1]) > 0

    # Whole bitmaps

    def union(self, other: DirtyBitmap) -> None:
        """Mark what `other` marks. Raises LocalProtocolError where it has another number of pages."""
        if other._pages != self._pages:
            raise LocalProtocolError(f"a bitmap of {other._pages} pages does not fit one of {self._pages}")
        rows = other._marked_rows()
        if self._is_dense(rows):
            np.bitwise_or(self._words, other._words, out=self._words)
        else:
            self._table[rows] |= other._table[rows]
        self._rows[rows] = True

    def union_part(self, first_gfn: int, log: bytes) -> None:
        """Mark what a part of a raw log marks, from `first_gfn` (a multiple of 64) on. Raises as `union_words` does."""
        first_byte = first_gfn // 8
        if first_gfn % WORD_BITS or len(log) % 8 or not 0 <= first_byte <= self._octets.size - len(log):
            raise LocalProtocolError("a part of a dirty log that does not fit RAM")
        self._union(first_gfn // WORD_BITS, np.frombuffer(log, dtype=np.uint64))

    def union_words(self, words: NDArray[np.uint64] | bytes | bytearray | memoryview) -> None:
        """Mark what a raw log marks: little-endian words in contiguous memory, as many as `self.words`.

        The log is private memory: checked first, then united (R10). Raises LocalProtocolError, changing nothing,
        where it has another size or marks gfns that are none.
        """
        raw = np.frombuffer(words, dtype=np.uint8)
        if raw.size != self._octets.size:
            raise LocalProtocolError(
                f"{self._pages} pages have a log of {self._octets.size} bytes, not {raw.size}"
            )
        self._union(0, raw.view(np.uint64))

    def _union(self, first_word: int, log: NDArray[np.uint64]) -> None:
        target = self._words[first_word : first_word + len(log)]
        used_bits = (self._pages - 1) % WORD_BITS + 1
        if log.size and first_word + len(log) == len(self._words) and int(log[-1]) >> used_bits:
            raise LocalProtocolError(f"the log marks a page behind the last of {self._pages}")
        for block in blocks(log):
            part = log[block]
            numbers = np.flatnonzero(part != 0)
            if len(numbers) * DENSE > len(part):
                np.bitwise_or(target[block], part, out=target[block])
            else:
                target[block][numbers] |= part[numbers]
            self._rows[numbers + (first_word + block.start) >> ROW_SHIFT] = True

    def take(self) -> Self:
        """What is marked now, as a bitmap of its own; nothing stays marked here.

        The words change hands and zeroed ones take their place, so nothing is copied.
        """
        taken = self._like(self._table, self._rows, shared=self._shared)
        self._renew()
        return taken

    def copy(self) -> Self:
        """A bitmap of its own with the same marks."""
        return self._like(self._table.copy(), self._rows.copy(), shared=False)

    def clear(self) -> None:
        """Unmark every page."""
        rows = self._marked_rows()
        if self._is_dense(rows):
            self._table.fill(0)
        else:
            self._table[rows] = 0
        self._rows.fill(self._shared)

    def count(self) -> int:
        """How many pages are marked."""
        rows = np.flatnonzero(self._rows)
        if self._is_dense(rows):
            return _count(self._words)
        return sum(_count(self._table[rows[block]].reshape(-1)) for block in blocks(rows, SCAN_ROWS))

    def any(self) -> bool:
        """Whether a page is marked; looks no further than the first step that finds one."""
        rows = np.flatnonzero(self._rows)
        return any(bool(self._table[rows[block]].any()) for block in blocks(rows, SCAN_ROWS))

    # Where the marks are

    def gfns(self, start: int = 0, stop: int | None = None) -> NDArray[np.int64]:
        """Marked gfns of start <= gfn < stop (default: all), sorted.

        Costs one look at each word and then by the marks. Raises LocalProtocolError for a bad range.
        """
        stop = self._pages if stop is None else stop
        self._check_range(start, stop)
        numbers = dirty_words(self._table, self._rows_between(start, stop))
        gfns = np.empty(sum(_count(self._words[numbers[block]]) for block in blocks(numbers)), dtype=np.int64)
        filled = 0
        for block in blocks(numbers):
            found = expand(self._words[numbers[block]], numbers[block])
            gfns[filled : filled + len(found)] = found
            filled += len(found)
        return gfns[np.searchsorted(gfns, start) : np.searchsorted(gfns, stop)]

    def first(self, start: int, stop: int, limit: int) -> NDArray[np.int64]:
        """The first at most `limit` marked gfns of start <= gfn < stop, sorted.

        Costs by the pages from `start` to the last gfn it returns, and little more. Raises LocalProtocolError
        for a bad range or a negative limit.
        """
        self._check_range(start, stop)
        if limit < 0:
            raise LocalProtocolError(f"cannot give the first {limit} marked pages")
        near = stop if stop - start <= _SPREAD_PAGES else (start + _SPREAD_PAGES) // WORD_BITS * WORD_BITS
        run = self._first_run(start, near)
        if len(run) >= limit:
            return np.arange(run.start, run.start + limit, dtype=np.int64)
        gfns = np.flatnonzero(spread(self._octets, start, near))[:limit]
        gfns += start
        if near == stop or len(gfns) == limit:
            return gfns
        return np.concatenate([gfns, self._first_far(near, stop, limit - len(gfns))])

    def _first_run(self, start: int, stop: int) -> range:
        """The first run of marked gfns of start <= gfn < stop, empty where none is marked."""
        bits = self._bits(start, stop)
        if not bits:
            return range(stop, stop)
        lowest = (bits & -bits).bit_length() - 1
        gap = ~(bits >> lowest)
        return range(start + lowest, start + lowest + (gap & -gap).bit_length() - 1)

    def _first_far(self, start: int, stop: int, limit: int) -> NDArray[np.int64]:
        """As `first`, from a `start` at a word on: steps grow, so that many rows without a mark cost few of them."""
        rows = self._rows_between(start, stop)
        done, step = 0, _FIRST_ROWS
        found = [np.zeros(0, dtype=np.int64)]
        while done < len(rows) and limit:
            numbers = dirty_words(self._table, rows[done : done + step])
            if not done:
                numbers = numbers[np.searchsorted(numbers, start // WORD_BITS) :]
            done += step
            step = min(step * 8, SCAN_ROWS)
            if not numbers.size:
                continue
            sums = np.cumsum(np.bitwise_count(self._words[numbers]), dtype=np.int64)
            numbers = numbers[: int(np.searchsorted(sums, limit)) + 1]
            found.append(expand(self._words[numbers], numbers)[:limit])
            limit -= len(found[-1])
        gfns = np.concatenate(found)
        return gfns[: np.searchsorted(gfns, stop)]

    def runs(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Maximal runs of consecutive marked gfns, sorted: first gfn of each, and length of each in pages."""
        numbers = dirty_words(self._table, self._marked_rows())
        starts = [np.zeros(0, dtype=np.int64)]
        ends = [np.zeros(0, dtype=np.int64)]
        for block in blocks(numbers):
            begin, end = run_edges(self._words, numbers[block])
            starts.append(expand(begin, numbers[block]))
            ends.append(expand(end, numbers[block]))
        first, lengths = np.concatenate(starts), np.concatenate(ends)
        lengths -= first
        lengths += 1
        return first, lengths

    def region_counts(self, region_pages: int) -> NDArray[np.uint32]:
        """Marked pages of each region of `region_pages`: uint32 of shape (ceil(pages / region_pages),).

        Raises LocalProtocolError where `region_pages` is not a power of two of at least 64.
        """
        if region_pages < WORD_BITS or region_pages & (region_pages - 1):
            raise LocalProtocolError(f"a region has a power of two of at least 64 pages, not {region_pages}")
        words = region_pages // WORD_BITS
        rows = self._marked_rows()
        if self._is_dense(rows) and not self._shared:
            rows = marked_rows(self._table)
        if self._is_dense(rows):
            counts = np.bitwise_count(self._words)
            return np.add.reduceat(counts, np.arange(0, len(counts), words), dtype=np.uint32)
        if not self._shared:
            self._rows.fill(False)
            self._rows[rows] = True
        in_row = max(ROW_WORDS // words, 1)
        rows_of_region = max(words // ROW_WORDS, 1)
        counts = np.bitwise_count(self._table[rows]).reshape(len(rows), in_row, ROW_WORDS // in_row)
        sums = np.zeros((-(-len(self._rows) // rows_of_region), in_row), dtype=np.uint32)
        np.add.at(sums, rows // rows_of_region, counts.sum(axis=2, dtype=np.uint32))
        return sums.reshape(-1)[: -(-len(self._words) // words)]

    def chunks(self, chunk_pages: int) -> Iterator[tuple[int, int]]:
        """(start, stop) of every chunk that has a marked page, in order; a chunk begins at a multiple of its size.

        Raises LocalProtocolError where `chunk_pages` is not a positive multiple of 64.
        """
        if chunk_pages <= 0 or chunk_pages % WORD_BITS:
            raise LocalProtocolError(f"a chunk has a positive multiple of 64 pages, not {chunk_pages}")
        firsts = np.arange(0, len(self._words), chunk_pages // WORD_BITS)
        marked = np.flatnonzero(np.bitwise_or.reduceat(self._words, firsts))
        starts: list[int] = (marked * chunk_pages).tolist()
        return ((start, min(start + chunk_pages, self._pages)) for start in starts)

    def split(self, parts: int) -> list[tuple[int, int]]:
        """`parts` consecutive (start, stop) that cover all pages, with nearly equal numbers of marked ones.

        Cuts are at multiples of 64 pages, each fewer than 64 marked pages behind where it should be; a part may
        be empty. Raises LocalProtocolError where `parts` is not positive.
        """
        if parts <= 0:
            raise LocalProtocolError(f"a bitmap is split into at least one part, not {parts}")
        sums = np.cumsum(self.region_counts(_SPREAD_PAGES), dtype=np.int64)
        edges_of_parts = [0]
        for part in range(1, parts):
            goal = int(sums[-1]) * part // parts
            if not goal:
                edges_of_parts.append(0)
                continue
            region = int(np.searchsorted(sums, goal))
            word = region * _SPREAD_PAGES // WORD_BITS
            counts = np.bitwise_count(self._words[word : word + _SPREAD_PAGES // WORD_BITS])
            before = int(sums[region - 1]) if region else 0
            word += int(np.searchsorted(np.cumsum(counts, dtype=np.int64), goal - before)) + 1
            edges_of_parts.append(min(word * WORD_BITS, self._pages))
        return list(zip(edges_of_parts, [*edges_of_parts[1:], self._pages], strict=True))

    # Private

    def _renew(self) -> None:
        """Fresh words. From zeros, not zeros_like: they come zeroed from the system and cost nothing until written."""
        rows = -(-self._pages >> _ROW_PAGES_SHIFT)
        self._adopt(
            np.zeros((rows, ROW_WORDS), dtype=np.uint64), np.zeros(rows, dtype=np.bool_), shared=False
        )

    def _adopt(self, table: NDArray[np.uint64], rows: NDArray[np.bool_], *, shared: bool) -> None:
        self._table = table
        self._rows = rows
        self._shared = shared
        self._words = table.reshape(-1)[: -(-self._pages // WORD_BITS)]
        self._octets = self._words.view(np.uint8)
        # Single words as Python's integers: a tenth of the cost of numpy's scalars.
        self._view = self._words.data

    def _like(self, table: NDArray[np.uint64], rows: NDArray[np.bool_], *, shared: bool) -> Self:
        bitmap = object.__new__(type(self))
        bitmap._pages = self._pages
        bitmap._adopt(table, rows, shared=shared)
        return bitmap

    def _marked_rows(self) -> NDArray[np.int64]:
        """Rows that may have a mark, sorted; where any may, those that have one now."""
        return marked_rows(self._table) if self._shared else np.flatnonzero(self._rows)

    def _rows_between(self, start: int, stop: int) -> NDArray[np.int64]:
        """Rows that may have a mark of start <= gfn < stop, sorted."""
        first = start >> _ROW_PAGES_SHIFT
        return np.flatnonzero(self._rows[first : -(-stop >> _ROW_PAGES_SHIFT)]) + first

    def _is_dense(self, rows: NDArray[np.int64]) -> bool:
        return len(rows) * DENSE > len(self._rows)

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self._pages:
            raise LocalProtocolError(
                f"gfns {start} to {stop} are not a range of a guest of {self._pages} pages"
            )

    def _bits(self, start: int, stop: int) -> int:
        """The bits of start <= gfn < stop as one number, `start` the lowest; for a bundle's range, not for a guest's."""
        octets = self._octets[start >> 3 : (stop + 7) >> 3].tobytes()
        return (int.from_bytes(octets, "little") & (1 << stop - (start & ~7)) - 1) >> (start & 7)

    def _extent(self, gfns: NDArray[np.int64]) -> tuple[int, int, bool]:
        """Lowest and highest of `gfns`, and whether they are exactly these and all between, in order."""
        first, last = int(gfns[0]), int(gfns[-1])
        ascending = np.count_nonzero(gfns[1:] > gfns[:-1]) == gfns.size - 1
        if not ascending:
            first, last = int(gfns.min()), int(gfns.max())
        if first < 0 or last >= self._pages:
            raise LocalProtocolError(f"gfns from {first} to {last} do not fit a guest of {self._pages} pages")
        return first, last, ascending and last - first + 1 == gfns.size

    def _set(self, start: int, stop: int) -> None:
        first, last, head, tail = edges(start, stop)
        self._rows[first >> ROW_SHIFT : (last >> ROW_SHIFT) + 1] = True
        self._view[first] |= head
        self._words[first + 1 : last] = ALL_ONES
        self._view[last] |= tail

    def _clear(self, start: int, stop: int) -> None:
        first, last, head, tail = edges(start, stop)
        self._view[first] &= ALL_ONES ^ head
        self._words[first + 1 : last] = 0
        self._view[last] &= ALL_ONES ^ tail


def as_run(gfns: NDArray[np.int64]) -> NDArray[np.int64] | range:
    """Strictly ascending `gfns` (not empty) as a range where they are a run of consecutive ones, else as they are."""
    first, last = int(gfns[0]), int(gfns[-1])
    return range(first, last + 1) if last - first + 1 == len(gfns) else gfns


def _count(words: NDArray[np.uint64]) -> int:
    return sum(int(np.bitwise_count(words[block]).sum(dtype=np.uint32)) for block in blocks(words))
