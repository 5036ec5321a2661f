"""Steps from words of bits to numbers of bits, for the bitmap: pure functions over uint64 arrays.

Bit b % 64 of word b // 64 is bit b. The host is little-endian (x86-64), so that the bytes of a word array hold
the bits in the same order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

WORD_BITS: Final = 64
ALL_ONES: Final = (1 << WORD_BITS) - 1

# Words per step of a pass over a whole bitmap: 128 KiB, so that a step and the temporaries made from it (an
# eighth of it for counts and flags) stay in the second-level cache, and the Python around a step (microseconds)
# is small beside it.
BLOCK_WORDS: Final = 1 << 14

# A row is 64 words, 4096 pages: one look at a row saves the looks at each of its words, and most rows have no mark. Where
# more than one in DENSE has one, going over all words costs less than going to each of these rows.
ROW_SHIFT: Final = 6
ROW_WORDS: Final = 1 << ROW_SHIFT
DENSE: Final = 4
# Rows per step of a pass that goes to some of them, or only reads: 512 KiB.
SCAN_ROWS: Final = 1 << 10

BIT_OF: Final[NDArray[np.uint64]] = np.left_shift(np.uint64(1), np.arange(WORD_BITS, dtype=np.uint64))
BIT_OF.setflags(write=False)

_ALL: Final = np.uint64(ALL_ONES)
_NONE: Final[NDArray[np.int64]] = np.zeros(0, dtype=np.int64)


def edges(start: int, stop: int) -> tuple[int, int, int, int]:
    """First and last word of the bits start <= b < stop (not empty), and the part of the range in each."""
    last = (stop - 1) // WORD_BITS
    head = ALL_ONES << start % WORD_BITS & ALL_ONES
    tail = ALL_ONES >> -stop % WORD_BITS
    if start // WORD_BITS == last:
        head = tail = head & tail
    return start // WORD_BITS, last, head, tail


def blocks(array: NDArray[np.generic], step: int = BLOCK_WORDS) -> Iterator[slice]:
    """Consecutive slices of at most `step` that cover `array`."""
    for start in range(0, len(array), step):
        yield slice(start, min(start + step, len(array)))


def spread(octets: NDArray[np.uint8], start: int, stop: int) -> NDArray[np.bool_]:
    """One bool per bit of start <= b < stop; `octets` are the bytes of the words."""
    octet = start >> 3
    bits = np.unpackbits(octets[octet : (stop + 7) >> 3], bitorder="little")
    return bits[start - octet * 8 : stop - octet * 8].view(np.bool_)


def marked_rows(table: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Numbers of the rows that are not all zero, sorted."""
    found = [
        np.flatnonzero(np.bitwise_or.reduce(table[block], axis=1)) + block.start
        for block in blocks(table, SCAN_ROWS)
    ]
    return np.concatenate(found)


def dirty_words(table: NDArray[np.uint64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Numbers of the words that are not zero, sorted, of the rows `rows` (sorted)."""
    # numpy finds the true ones of a bool array much faster than the nonzero ones of a uint64 array.
    found = [_NONE]
    for block in blocks(rows, SCAN_ROWS):
        part = rows[block]
        if int(part[-1]) - int(part[0]) + 1 == len(part):  # no gap: no copy either
            numbers = np.flatnonzero(table[int(part[0]) : int(part[-1]) + 1] != 0)
            numbers += int(part[0]) << ROW_SHIFT
        else:
            places = np.flatnonzero(table[part] != 0)
            numbers = part[places >> ROW_SHIFT]
            numbers <<= ROW_SHIFT
            places &= ROW_WORDS - 1
            numbers |= places
        found.append(numbers)
    return found[1] if len(found) == 2 else np.concatenate(found)


def expand(words: NDArray[np.uint64], numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Numbers of the set bits, sorted, of words that stand at `numbers` (sorted, not empty)."""
    found: NDArray[np.int64] = np.flatnonzero(
        np.unpackbits(words.view(np.uint8), bitorder="little").view(np.bool_)
    )
    if int(numbers[-1]) - int(numbers[0]) + 1 == len(numbers):  # no gap, as in a bitmap that is full
        found += numbers[0] * WORD_BITS
        return found
    bits: NDArray[np.int64] = numbers[found >> 6]
    bits <<= 6
    found &= 63
    bits |= found
    return bits


def fill_runs(words: NDArray[np.uint64], starts: NDArray[np.int64], stops: NDArray[np.int64]) -> None:
    """Set the bits start <= b < stop of every run; none is empty. Costs by runs and by the words they fill."""
    first, last = starts // WORD_BITS, (stops - 1) // WORD_BITS
    head = _ALL << (starts % WORD_BITS).view(np.uint64)
    tail = _ALL >> (-stops % WORD_BITS).view(np.uint64)
    tail[first == last] &= head[first == last]
    head[first == last] &= tail[first == last]
    np.bitwise_or.at(words, first, head)
    np.bitwise_or.at(words, last, tail)
    between = np.maximum(last - first - 1, 0)
    # Long runs are few, and a slice is filled without the numbers of its words.
    for run in np.flatnonzero(between >= BLOCK_WORDS).tolist():
        words[first[run] + 1 : last[run]] = _ALL
    between[between >= BLOCK_WORDS] = 0
    ends = np.cumsum(between)
    words[np.repeat(first + 1 - ends + between, between) + np.arange(ends[-1])] = _ALL


def run_edges(
    words: NDArray[np.uint64], numbers: NDArray[np.int64]
) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Of the nonzero words at `numbers` (sorted, not empty): bits that begin a run, and bits that end one."""
    here = words[numbers]
    below = words[numbers - 1]
    if numbers[0] == 0:
        below[0] = 0
    above = words.take(numbers + 1, mode="clip")
    if numbers[-1] == len(words) - 1:
        above[-1] = 0
    # A bit begins a run where its lower neighbour is clear, and ends one where its upper neighbour is.
    below >>= np.uint64(63)
    below |= here << np.uint64(1)
    above <<= np.uint64(63)
    above |= here >> np.uint64(1)
    return here & ~below, here & ~above
