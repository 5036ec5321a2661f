"""The dirty bitmap against the machine's memory: python -m bench.dirty [--json FILE] [--quick]

Each operation runs in turn with a plain copy (np.copyto) of as many bytes as the bitmap's words and the operation's
result have together; "x copy" is how many times longer than that copy it takes. `first` is one call as export makes
it for a bundle, on a chunk of 4096 pages, and its copy is one of that chunk's words; there the time itself counts.
`take` hands its words over and lets the system zero new ones, a cost that later writes bear; its time is mostly
that of giving the memory of the last taken bitmap back.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from pagexfer.dirty import DirtyBitmap

from .measure import Case, Spread, alternate, write_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

GUESTS_GIB: Final = (16, 256, 1024)
DENSITIES: Final = (0.00001, 0.01, 1.0)
PAGES_PER_GIB: Final = 1 << 18
CHUNK_PAGES: Final = 4096
BUNDLE_PAGES: Final = 128
FIRST_CALLS: Final = 1000


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
        pages = guest_gib * PAGES_PER_GIB
        self.bitmap = DirtyBitmap.full(pages) if density == 1 else DirtyBitmap(pages)
        if density < 1:
            self.bitmap.set_gfns(rng.integers(0, pages, round(pages * density)))
        self._other = self.bitmap.copy()
        self._taken_from = self.bitmap
        self._starts = (rng.integers(0, pages // CHUNK_PAGES, FIRST_CALLS) * CHUNK_PAGES).tolist()
        self._next_start = 0

    def operations(self) -> dict[str, tuple[Case, int]]:
        """Each operation, and the bytes of the words it goes over and of its result."""
        whole = self.bitmap.words.nbytes
        marked, runs = self.bitmap.count(), len(self.bitmap.runs()[0])
        return {
            "count": (Case(self.bitmap.count), whole),
            "union": (Case(lambda: self.bitmap.union(self._other)), whole),
            "take": (Case(lambda: self._taken_from.take(), self._refill), whole),
            "gfns": (Case(self.bitmap.gfns), whole + marked * 8),
            "runs": (Case(self.bitmap.runs), whole + runs * 16),
            "first": (Case(self._first, calls=FIRST_CALLS), CHUNK_PAGES // 8),
        }

    def _refill(self) -> None:
        self._taken_from = self.bitmap.copy()

    def _first(self) -> NDArray[np.int64]:
        start = self._starts[self._next_start]
        self._next_start = (self._next_start + 1) % FIRST_CALLS
        return self.bitmap.first(start, start + CHUNK_PAGES, BUNDLE_PAGES)


def figures(guests_gib: tuple[int, ...], repeats: int, seed: int) -> Iterator[Figure]:
    """Measure every operation on every guest."""
    for guest_gib in guests_gib:
        for density in DENSITIES:
            for operation, (case, size) in Subject(guest_gib, density, seed).operations().items():
                source, target = np.ones(size, dtype=np.uint8), np.zeros(size, dtype=np.uint8)
                copy = Case(lambda to=target, of=source: np.copyto(to, of), calls=case.calls)  # type: ignore[misc]
                spreads = alternate({"operation": case, "copy": copy}, repeats)
                yield Figure(guest_gib, density, operation, size, spreads["operation"], spreads["copy"])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Measure the dirty bitmap against a plain copy of the same bytes."
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE as well")
    parser.add_argument("--quick", action="store_true", help="the smallest guest only, three repeats")
    parser.add_argument("--seed", type=int, default=1, help="which pages are marked (default: %(default)s)")
    arguments = parser.parse_args(argv)
    repeats = 3 if arguments.quick else 7
    print(f"{'guest':>9} {'marked':>8} {'operation':<9} {'median':>11} {'min':>11} {'max':>11} {'x copy':>8}")
    rows = []
    for figure in figures(GUESTS_GIB[:1] if arguments.quick else GUESTS_GIB, repeats, arguments.seed):
        times = figure.seconds.scaled(1e6)
        print(
            f"{figure.guest_gib:>5} GiB {figure.density:>8.3%} {figure.operation:<9} {times.median:>8.1f} us "
            f"{times.minimum:>8.1f} us {times.maximum:>8.1f} us {figure.times_copy:>8.2f}"
        )
        rows.append({**asdict(figure), "times_copy": figure.times_copy})
    if arguments.json is not None:
        write_json(
            arguments.json, {"bench": "dirty", "seed": arguments.seed, "repeats": repeats, "figures": rows}
        )


if __name__ == "__main__":
    main()
