"""Dirty bitmaps against the machine's memory, and dirty trackers side by side: python -m bench dirty

    python -m bench dirty [--guests 16GiB,1TiB] [--ram 1GiB] [--repeats 5] [--json FILE] [--quick]

Each bitmap operation runs in turn with its limit: a plain copy (np.copyto) of as many bytes as the bitmap's words and the
operation's result have together; "x copy" is how many times longer than that copy it takes. `first` is one call as export
makes it for a bundle, on a chunk of 4096 pages, and its copy is one of that chunk's words; there the time itself counts.
`take` hands its words over and lets the system zero new ones, a cost that later writes bear. `epoch` is all that an epoch
does to bitmaps: unite what was written, count it by regions, plan chunks, take out each bundle's pages, and at the
destination see each page once, count them and forget them. Its time at 1 TiB with 0.001 % is held against a target; with
many pages it is all bundles, and left out.

The trackers' part is in bench.trackers.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from pagexfer.dirty import DirtyBitmap, as_run
from pagexfer.dirty.bitmap import WORD_BITS
from pagexfer.engine.plan import plan_chunks
from pagexfer.svsm.export import BUNDLE_PAGES
from pagexfer.wire.constants import PAGE_SIZE

from .measure import Case, Spread, alternate
from .options import finish, parse, parser, progress, ram, sizes
from .table import Table
from .trackers import tracker_table
from .units import GIB, MIB

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

GUESTS_GIB: Final = (16, 256, 1024, 4096)
QUICK_GUESTS_GIB: Final = (16, 1024)
DENSITIES: Final = (0.00001, 0.001, 0.1, 1.0)
PAGES_PER_GIB: Final = GIB // PAGE_SIZE
CHUNK_PAGES: Final = 4096
FIRST_CALLS: Final = 1000
CHANNELS: Final = 4
# As many regions as a slot's buffer of 2 MiB has room for.
REGIONS: Final = 1 << 19
# `gfns` and `runs` of more are left out: they take seconds, and nobody asks for so many at once.
MAX_GFNS: Final = 1 << 24
# From this density on, marks are made word by word, with a chance of a number of 256ths for each bit.
WORDWISE: Final = 0.01
MAX_EPOCH_PAGES: Final = 1 << 18
TARGET: Final = (1024, 0.00001, 30.0)  # GiB of the guest, part marked, milliseconds


@dataclass(frozen=True, slots=True)
class Figure:
    """One row: `operation` on a bitmap of which the part `density` is marked, and the copy it is held against."""

    guest_gib: int
    density: float
    operation: str
    copied_bytes: int
    seconds: Spread
    copy_seconds: Spread

    @property
    def times_copy(self) -> float:
        return self.seconds.median / self.copy_seconds.median


class Subject:
    """One bitmap and every operation on it."""

    def __init__(self, guest_gib: int, density: float, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self._pages = pages = guest_gib * PAGES_PER_GIB
        self.bitmap = _marked(pages, density, rng)
        self._other = self.bitmap.copy()
        # As a tracker leaves it, which wrote the words itself: nobody knows where marks are before all were looked at.
        self._log = self._other.words
        self._taken_from = self.bitmap
        self._pending, self._quiet, self._seen = (DirtyBitmap(pages) for _ in range(3))
        self._starts = (rng.integers(0, pages // CHUNK_PAGES, FIRST_CALLS) * CHUNK_PAGES).tolist()
        self._next_start = 0

    def operations(self) -> dict[str, tuple[Case, int]]:
        """Each operation, and the bytes of the words it goes over and of its result."""
        whole = -(-self._pages // WORD_BITS) * 8
        marked = self.bitmap.count()
        made = {
            "count": (Case(self.bitmap.count), whole),
            "union": (Case(lambda: self.bitmap.union(self._other)), whole),
            "take": (Case(lambda: self._taken_from.take(), self._refill), whole),
            "regions": (Case(lambda: self.bitmap.region_counts(self._region_pages())), whole + REGIONS * 4),
            "first": (Case(self._first, calls=FIRST_CALLS), CHUNK_PAGES // 8),
        }
        if marked <= MAX_GFNS:
            made["gfns"] = (Case(self.bitmap.gfns), whole + marked * 8)
            made["runs"] = (Case(self.bitmap.runs), whole + len(self.bitmap.runs()[0]) * 16)
        if marked <= MAX_EPOCH_PAGES:
            made["epoch"] = (Case(self._epoch), whole)
        return made

    def _region_pages(self) -> int:
        return max(64, self._pages // REGIONS)

    def _refill(self) -> None:
        self._taken_from = self.bitmap.copy()

    def _first(self) -> NDArray[np.int64]:
        start = self._starts[self._next_start]
        self._next_start = (self._next_start + 1) % FIRST_CALLS
        return self.bitmap.first(start, start + CHUNK_PAGES, BUNDLE_PAGES)

    def _epoch(self) -> None:
        pending, region_pages = self._pending, self._region_pages()
        pending.union(self._other)
        for _ in range(4):  # state changes, hints, what the audit found, what a lost channel took along: none
            pending.union(self._quiet.take())
        for chunk in plan_chunks(pending.region_counts(region_pages), region_pages, self._pages, CHANNELS):
            more = True
            while more:
                found = pending.first(chunk.start, chunk.start + chunk.pages, BUNDLE_PAGES)
                if found.size:
                    pages = as_run(found)
                    pending.clear_gfns(pages)
                    assert not self._seen.any_of(pages)
                    self._seen.set_gfns(pages)
                more = len(found) == BUNDLE_PAGES
        assert not pending.any()
        assert self._seen.count()
        self._seen.clear()


def _marked(pages: int, density: float, rng: np.random.Generator) -> DirtyBitmap:
    """A bitmap with marks at random; their number is the density's, or near it where they are many."""
    if density == 1:
        return DirtyBitmap.full(pages)
    bitmap = DirtyBitmap(pages)
    if density < WORDWISE:
        bitmap.set_gfns(rng.integers(0, pages, round(pages * density)))
        return bitmap
    # Each binary digit of the chance, the last one first, halves what there is and adds a half where it is one.
    words = np.zeros_like(bitmap.words)
    chance = round(density * 256)
    for digit in range(8):
        drawn = rng.integers(0, 1 << 64, len(words), dtype=np.uint64)
        np.bitwise_or(words, drawn, out=words) if chance >> digit & 1 else np.bitwise_and(
            words, drawn, out=words
        )
    bitmap.union_words(words)
    return bitmap


def figures(guests_gib: list[int], repeats: int, seed: int) -> Iterator[Figure]:
    """Measure every operation on every guest."""
    for guest_gib in guests_gib:
        for density in DENSITIES:
            progress(f"bitmap of {guest_gib} GiB, {density:.3%} marked")
            for operation, (case, copied) in Subject(guest_gib, density, seed).operations().items():
                source, target = np.ones(copied, dtype=np.uint8), np.zeros(copied, dtype=np.uint8)
                copy = Case(lambda to=target, of=source: np.copyto(to, of), calls=case.calls)  # type: ignore[misc]
                spreads = alternate({"operation": case, "copy": copy}, repeats)
                yield Figure(guest_gib, density, operation, copied, spreads["operation"], spreads["copy"])


def bitmap_table(rows: list[Figure]) -> Table:
    """All operations, and whether the target is met where it was measured."""
    gib, density, limit_ms = TARGET
    epochs = [
        row.seconds.median * 1e3
        for row in rows
        if (row.guest_gib, row.density, row.operation) == (gib, density, "epoch")
    ]
    note = f"An epoch of {gib} GiB with {density:.3%} marked is to take under {limit_ms:g} ms"
    note += f": it took {epochs[0]:.1f} ms." if epochs else "; it was not measured."
    return Table.of(
        "Bitmap operations, each against a copy of as many bytes in turn",
        ("", "marked", "operation", "median us", "min", "max", "x copy"),
        [
            (
                f"{row.guest_gib} GiB",
                f"{row.density:.3%}",
                row.operation,
                *row.seconds.scaled(1e6).cells(1),
                f"{row.times_copy:.2f}",
            )
            for row in rows
        ],
        note,
    )


def _guests_gib(text: str) -> list[int]:
    found = sizes(text)
    if any(guest_bytes < GIB or guest_bytes % GIB for guest_bytes in found):
        raise argparse.ArgumentTypeError(f"{text!r} is not whole GiB")
    return [guest_bytes // GIB for guest_bytes in found]


def main(argv: list[str] | None = None) -> None:
    made = parser("dirty", __doc__, repeats=5)
    made.add_argument(
        "--guests",
        type=_guests_gib,
        metavar="SIZES",
        help="of the bitmaps (default: 16GiB,256GiB,1TiB,4TiB, quick 16GiB,1TiB)",
    )
    made.add_argument(
        "--ram", type=ram, metavar="SIZE", help="that the trackers look at (default: 1GiB, quick 128MiB)"
    )
    options = parse(made, argv)
    guests = options.guests or list(QUICK_GUESTS_GIB if options.quick else GUESTS_GIB)
    ram_bytes = options.ram or (128 * MIB if options.quick else GIB)
    rows = list(figures(guests, options.repeats, options.seed))
    trackers, table = tracker_table(ram_bytes, options.repeats, options.seed)
    bitmaps = [{**asdict(row), "times_copy": row.times_copy} for row in rows]
    finish(
        options,
        {"figures": bitmaps, "ram_bytes": ram_bytes, "trackers": trackers},
        [bitmap_table(rows), table],
    )


if __name__ == "__main__":
    main()
