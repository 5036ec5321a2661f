"""What a larger guest costs, and what follows for 1 TiB: python -m bench scale [--json FILE] [--plot FILE.png]

An idle guest of incompressible RAM moves between two processes over loopback, at every size in turn. Straight lines
through the medians, fitted so that relative errors count, give a fixed cost and one per GiB; "off the line" is how far a
size is from that. Plain TCP over as many connections runs right before or after each migration; "of TCP" is the median of
the ratios of such neighbours. Both processes are on this machine and hold the whole guest, which cannot be left sparse:
sizes of which two do not fit into available memory are left out, and named.

The projection for 1 TiB over 100 Gbit/s follows from the lines, under the assumptions that stand below it; "off the line"
is how far the worst size is from the line that a row follows from. From one that misses a size by a quarter none does.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from .channels import LOCAL, side_by_side
from .measure import Spread, rotated
from .options import CannotRun, channel_number, finish, parse, parser, progress, rams, size
from .sealed import Move, Moved
from .table import Table
from .units import GIB, MIB

if TYPE_CHECKING:
    from collections.abc import Callable

    from .pair import Side

RAM: Final = tuple(256 * MIB << doubled for doubled in range(7))
QUICK_RAM: Final = RAM[:3]
CHANNELS: Final = 4
# Both processes have the guest; the rest is for interpreters, socket buffers and whoever else is there.
MEMORY_PER_RAM: Final = 2.2

PROJECTED_GIB: Final = 1024
LINK_BYTES_PER_S: Final = 100e9 / 8
# A line that is further from a size that was measured says nothing of one that was not.
MOST_OFF: Final = 0.25
ASSUMPTIONS: Final = (
    "Assumptions: the guest is idle and no page is zero; the lines hold far beyond the largest guest measured; a "
    "network card costs the CPU what loopback does; the measured cores are the target's. The first row has the usual "
    "carriers of the channels; the second takes for granted that the work spreads evenly over that many cores."
)


_Run = tuple["Side", Moved, "Side"]


@dataclass(frozen=True, slots=True)
class Figure:
    """One size. CPU seconds are of the source and the destination."""

    ram_bytes: int
    seconds: Spread
    of_tcp: Spread
    source_cpu_s: Spread
    destination_cpu_s: Spread
    downtime_ms: Spread
    sent_of_ram: float

    @property
    def gib(self) -> float:
        return self.ram_bytes / GIB


@dataclass(frozen=True, slots=True)
class Line:
    """A cost of `fixed`, and `per_gib` for each GiB; no size is further than `off`, relatively, from it."""

    fixed: float
    per_gib: float
    off: float

    @classmethod
    def through(cls, gib: list[float], costs: list[float]) -> Line:
        """The line with the least squares of relative errors. Two points or more."""
        per_gib, fixed = np.polyfit(gib, costs, 1, w=1 / np.maximum(costs, 1e-9))
        line = cls(float(fixed), float(per_gib), 0.0)
        return cls(line.fixed, line.per_gib, max(map(line.off_by, gib, costs), key=abs))

    def at(self, gib: float) -> float:
        return self.fixed + self.per_gib * gib

    def off_by(self, gib: float, cost: float) -> float:
        """How far `cost` is above the line, as a part of it."""
        return cost / self.at(gib) - 1


@dataclass(frozen=True, slots=True)
class Lines:
    """What is taken to grow with the guest."""

    seconds: Line
    source_cpu_s: Line
    destination_cpu_s: Line
    downtime_ms: Line


def measure(sizes_bytes: list[int], channels: int, repeats: int, seed: int) -> list[Figure]:
    """Every size in turn, `repeats` times."""
    runs: dict[int, list[_Run]] = {ram_bytes: [] for ram_bytes in sizes_bytes}
    for round_ in range(repeats):
        for ram_bytes in rotated(runs, round_):
            progress(f"scale: round {round_ + 1} of {repeats}, {_named(ram_bytes)}")
            (plain, _), done = side_by_side({LOCAL: Move(ram_bytes, channels, seed=seed)}, round_)
            runs[ram_bytes].append((plain, *done[LOCAL]))
    return [_figure(ram_bytes, seen) for ram_bytes, seen in runs.items()]


def _figure(ram_bytes: int, runs: list[_Run]) -> Figure:
    return Figure(
        ram_bytes,
        Spread.of([moved.moving_s for _, moved, _ in runs]),
        Spread.of([plain.seconds / moved.moving_s for plain, moved, _ in runs]),
        Spread.of([moved.side.cpu_seconds for _, moved, _ in runs]),
        Spread.of([destination.cpu_seconds for _, _, destination in runs]),
        Spread.of([moved.downtime_s * 1000 for _, moved, _ in runs]),
        max(moved.sent_bytes for _, moved, _ in runs) / ram_bytes,
    )


def fit(figures: list[Figure]) -> Lines:
    """A line for each cost."""

    def line(cost: Callable[[Figure], Spread]) -> Line:
        return Line.through([f.gib for f in figures], [cost(f).median for f in figures])

    return Lines(
        line(lambda f: f.seconds),
        line(lambda f: f.source_cpu_s),
        line(lambda f: f.destination_cpu_s),
        line(lambda f: f.downtime_ms),
    )


def fitting(wanted: list[int], available_bytes: int) -> tuple[list[int], list[int]]:
    """The sizes for which there is memory, and those for which there is not."""
    fits = [ram_bytes for ram_bytes in wanted if ram_bytes * MEMORY_PER_RAM <= available_bytes]
    return fits, [ram_bytes for ram_bytes in wanted if ram_bytes not in fits]


def available_memory() -> int:
    """Bytes that the kernel could give to new processes without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise CannotRun("/proc/meminfo does not say what memory is available")


def sizes_table(figures: list[Figure], lines: Lines, channels: int, left_out: list[int]) -> Table:
    columns = (
        "RAM",
        "seconds",
        "min",
        "max",
        "off the line",
        "GB/s",
        "of TCP",
        "CPU s/GiB source",
        "destination",
        "downtime ms",
    )
    rows = [
        (
            _named(f.ram_bytes),
            *f.seconds.cells(2),
            f"{lines.seconds.off_by(f.gib, f.seconds.median):+.0%}",
            f"{f.ram_bytes / 1e9 / f.seconds.median:.2f}",
            f"{f.of_tcp.median:.2f}",
            f"{f.source_cpu_s.median / f.gib:.2f}",
            f"{f.destination_cpu_s.median / f.gib:.2f}",
            f"{f.downtime_ms.median:.1f}",
        )
        for f in figures
    ]
    note = (
        f"Left out for lack of memory: {', '.join(map(_named, left_out))}. Source and destination are on this machine, and "
        f"each holds the whole guest: {MEMORY_PER_RAM:g} times its RAM, which cannot be compressed, has to fit."
        if left_out
        else ""
    )
    return Table.of(f"By size of the guest, {channels} channels, incompressible", columns, rows, note)


def lines_table(lines: Lines) -> Table:
    named = {
        "seconds": lines.seconds,
        "CPU seconds, source": lines.source_cpu_s,
        "CPU seconds, destination": lines.destination_cpu_s,
        "downtime ms": lines.downtime_ms,
    }
    rows = [
        (name, f"{line.fixed:.3f}", f"{line.per_gib:.3f}", f"{line.off:+.0%}") for name, line in named.items()
    ]
    return Table.of("As straight lines", ("", "fixed", "per GiB", "furthest off"), rows)


def projection_table(lines: Lines, figures: list[Figure], repeats: int) -> Table:
    """1 TiB over 100 Gbit/s, by what it could be limited by."""
    busiest = max((lines.source_cpu_s, lines.destination_cpu_s), key=lambda line: line.at(PROJECTED_GIB))
    link_s = PROJECTED_GIB * GIB * max(f.sent_of_ram for f in figures) / LINK_BYTES_PER_S
    cores = math.ceil(busiest.at(PROJECTED_GIB) / link_s)
    named = (
        ("seconds, as measured here", lines.seconds, f"{max(lines.seconds.at(PROJECTED_GIB), link_s):.0f}"),
        ("seconds, the link full", busiest, f"{link_s:.0f}"),
        ("cores a side for that", busiest, f"{cores}"),
        ("downtime ms", lines.downtime_ms, f"{lines.downtime_ms.at(PROJECTED_GIB):.0f}"),
    )
    rows = [
        # Through two sizes every line goes, which says nothing for it.
        (name, _if_it_follows(line, value), f"{line.off:+.0%}" if len(figures) > 2 else "-")
        for name, line, value in named
    ]
    rounds = "1 round" if repeats == 1 else f"{repeats} rounds"
    measured = (
        f"From {len(figures)} sizes up to {_named(figures[-1].ram_bytes)}, {rounds}: "
        f"{PROJECTED_GIB / figures[-1].gib:.0f} times the largest of them."
    )
    return Table.of(
        "Projected: 1 TiB over 100 Gbit/s", ("", "value", "off the line"), rows, f"{measured} {ASSUMPTIONS}"
    )


def _if_it_follows(line: Line, value: str) -> str:
    if abs(line.off) > MOST_OFF:
        return "no line"
    return value if line.per_gib > 0 else "did not grow"


def draw(figures: list[Figure], lines: Lines, path: Path) -> None:
    """Seconds and CPU seconds over the size, with their lines."""
    from .plots import new_figure, save

    figure, (times, cpu) = new_figure(2)
    gib = [f.gib for f in figures]
    ends = [0.0, gib[-1]]
    times.plot(gib, [f.seconds.median for f in figures], "o", label="measured")
    times.plot(
        ends,
        [lines.seconds.at(end) for end in ends],
        "--",
        color="0.5",
        label=f"{lines.seconds.per_gib:.2f} s per GiB",
    )
    for name, line, costs in (
        ("source", lines.source_cpu_s, [f.source_cpu_s.median for f in figures]),
        ("destination", lines.destination_cpu_s, [f.destination_cpu_s.median for f in figures]),
    ):
        (points,) = cpu.plot(gib, costs, "o", label=f"{name}, {line.per_gib:.2f} s per GiB")
        cpu.plot(ends, [line.at(end) for end in ends], "--", color=points.get_color())
    times.set(xlabel="GiB of RAM", ylabel="seconds", ylim=(0, None), title="Time")
    cpu.set(xlabel="GiB of RAM", ylabel="CPU seconds", ylim=(0, None), title="CPU")
    save(figure, path)


def _named(ram_bytes: int) -> str:
    return f"{ram_bytes // GIB} GiB" if ram_bytes % GIB == 0 else f"{ram_bytes // MIB} MiB"


def main(argv: list[str] | None = None) -> None:
    made = parser("scale", __doc__, repeats=3, quick_repeats=1, plots=True)
    made.add_argument(
        "--ram", type=rams, metavar="SIZE,SIZE", help="two or more (default: 256MiB to 16GiB, quick 1GiB)"
    )
    made.add_argument(
        "--channels", type=channel_number, metavar="N", default=CHANNELS, help="default: %(default)s"
    )
    made.add_argument("--memory", type=size, help="what may be used (default: what is available)")
    options = parse(made, argv)
    wanted = sorted(set(options.ram or (QUICK_RAM if options.quick else RAM)))
    if len(wanted) < 2:
        made.error("a line needs two sizes or more")
    available = available_memory()
    if options.memory is not None and options.memory > available:
        made.error(f"--memory {options.memory}: there are only {available >> 20} MiB")
    fits, left_out = fitting(wanted, options.memory or available)
    if len(fits) < 2:
        raise CannotRun(f"there is no memory for two copies of a guest of {_named(wanted[1])}")
    figures = measure(fits, options.channels, options.repeats, options.seed)
    lines = fit(figures)
    finish(
        options,
        {
            "sizes": [asdict(f) for f in figures],
            "left_out_bytes": left_out,
            "lines": asdict(lines),
        },
        [
            sizes_table(figures, lines, options.channels, left_out),
            lines_table(lines),
            projection_table(lines, figures, options.repeats),
        ],
        lambda path: draw(figures, lines, path),
    )


if __name__ == "__main__":
    main()
