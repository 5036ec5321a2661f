"""A sealed migration against plain TCP, over 1 to 64 channels: python -m bench channels [--json FILE] [--plot FILE.png]

Every migration is of an idle guest between two processes over loopback. In each round plain TCP over as many connections
runs right before it, with the same bytes and 1 MiB buffers; "of TCP" is the median of the ratios of such neighbours. Each
migration runs with the engine in the guest's process (local) and in one of its own (isolated). CPU seconds are per GiB of
RAM, source and destination, of all processes of a side but vCPUs, from the first page to the end. Memory is what they had
at most beyond guest RAM, interpreters among it.

Four tables: by number of channels, by what is in RAM (zero pages are one part of RAM, the rest cannot be compressed), by
pages in a bundle, and by what carries the channels of a side: one event loop, or a thread for each. Zero
pages are not sent, so with them TCP is no limit: what is, is a plain read of RAM by one core.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from .measure import Case, Spread, alternate
from .options import channel_numbers, finish, numbers, parse, parser, progress, ram
from .sealed import Move, Moved, run_move
from .table import Table
from .tcp import Plain, run_plain

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from .pair import Side

GIB: Final = 1 << 30
CHANNELS: Final = (1, 2, 4, 8, 16, 32, 64)
QUICK_CHANNELS: Final = (1, 4, 64)
CONTENTS: Final = {"incompressible": 0.0, "half zero": 0.5, "mostly zero": 0.95}
BUNDLES: Final = (16, 32, 64, 128, 256, 512)
QUICK_BUNDLES: Final = (16, 256)
# What carries a side's channels, by how `Move` says it.
LOOP, THREADS = "event loop", "threads"
CARRIERS: Final = {LOOP: False, THREADS: True}
# Where a table varies something else than channels.
USUAL_CHANNELS: Final = 4
CARRIED: Final = (USUAL_CHANNELS, 64)
QUICK_CARRIED: Final = (USUAL_CHANNELS,)

LOCAL: Final = "local"
ISOLATED: Final = "isolated"

COLUMNS: Final = (
    "engine",
    "GB/s",
    "of TCP",
    "min",
    "max",
    "CPU s/GiB",
    "both",
    "downtime ms",
    "memory MiB",
)
BUNDLES_NOTE: Final = (
    "512 is what the format allows, and means as many whole blocks of 32 as fit a slot's buffer of 2 MiB: 480, the default "
    "with up to 16 channels."
)


@dataclass(frozen=True, slots=True)
class Ran:
    """How one kind of engine did. Rates are GB of RAM per second; pairs are source and destination."""

    gb_per_s: Spread
    of_tcp: Spread
    cpu_s_per_gib: tuple[Spread, Spread]
    downtime_ms: Spread
    extra_mib: tuple[Spread, Spread]

    @property
    def cpu_of_both(self) -> float:
        return sum(spread.median for spread in self.cpu_s_per_gib)


@dataclass(frozen=True, slots=True)
class Figure:
    """One case: plain TCP, and the migration by each kind of engine beside it."""

    plain_gb_per_s: Spread
    plain_cpu_s_per_gib: tuple[Spread, Spread]
    engines: dict[str, Ran]

    @property
    def plain_cpu_of_both(self) -> float:
        return sum(spread.median for spread in self.plain_cpu_s_per_gib)


_Pair = tuple["Side", "Side"]
_Done = tuple["Moved", "Side"]
_Round = tuple[_Pair, dict[str, _Done]]


def engines(move: Move) -> dict[str, Move]:
    """The same migration by each kind of engine."""
    return {LOCAL: move, ISOLATED: replace(move, isolated=True)}


def measure(cases: Mapping[str, Mapping[str, Move]], repeats: int) -> dict[str, Figure]:
    """Every case in turn, `repeats` times: plain TCP, and right after it the migration by each kind of engine."""
    rounds: dict[str, list[_Round]] = {name: [] for name in cases}
    usual = {name: next(iter(moves.values())) for name, moves in cases.items()}
    for number in range(repeats):
        for name, moves in cases.items():
            progress(f"channels: round {number + 1} of {repeats}, {name}")
            plain = run_plain(Plain(usual[name].ram_bytes, usual[name].channels))
            rounds[name].append((plain, {engine: _moved(move) for engine, move in moves.items()}))
    return {name: _figure(usual[name].ram_bytes, rounds[name]) for name in cases}


def _moved(move: Move) -> _Done:
    moved, destination = run_move(move)
    assert destination is not None  # an idle guest converges
    return moved, destination


def _figure(ram_bytes: int, rounds: list[_Round]) -> Figure:
    gib = ram_bytes / GIB
    plain = [pair for pair, _ in rounds]
    return Figure(
        Spread.of([ram_bytes / 1e9 / sender.seconds for sender, _ in plain]),
        _both_sides([(sender.cpu_seconds / gib, receiver.cpu_seconds / gib) for sender, receiver in plain]),
        {engine: _ran(ram_bytes, plain, [done[engine] for _, done in rounds]) for engine in rounds[0][1]},
    )


def _ran(ram_bytes: int, plain: list[_Pair], done: list[_Done]) -> Ran:
    gib = ram_bytes / GIB
    sides = [(moved.side, destination) for moved, destination in done]
    return Ran(
        Spread.of([ram_bytes / 1e9 / moved.moving_s for moved, _ in done]),
        Spread.of(
            [sender.seconds / moved.moving_s for (sender, _), (moved, _) in zip(plain, done, strict=True)]
        ),
        _both_sides([(source.cpu_seconds / gib, target.cpu_seconds / gib) for source, target in sides]),
        Spread.of([moved.downtime_s * 1000 for moved, _ in done]),
        _both_sides([(source.peak_extra_mib, target.peak_extra_mib) for source, target in sides]),
    )


def _both_sides(pairs: list[tuple[float, float]]) -> tuple[Spread, Spread]:
    return Spread.of([source for source, _ in pairs]), Spread.of([target for _, target in pairs])


def table(title: str, first: str, figures: dict[str, Figure], note: str = "") -> Table:
    """The figures as a table, plain TCP first in every case; `first` names the column of cases."""
    rows: list[tuple[str, ...]] = []
    for name, figure in figures.items():
        plain, cpu = figure.plain_gb_per_s, figure.plain_cpu_s_per_gib
        ends = "1.00", "", "", _both(cpu, 2), f"{figure.plain_cpu_of_both:.2f}", "", ""
        rows.append((name, "plain TCP", f"{plain.median:.2f}", *ends))
        rows += [(name, engine, *_cells(ran)) for engine, ran in figure.engines.items()]
    return Table.of(title, (first, *COLUMNS), rows, note)


def _cells(ran: Ran) -> tuple[str, ...]:
    of_tcp = ran.of_tcp
    return (
        f"{ran.gb_per_s.median:.2f}",
        *(f"{part:.2f}" for part in (of_tcp.median, of_tcp.minimum, of_tcp.maximum)),
        _both(ran.cpu_s_per_gib, 2),
        f"{ran.cpu_of_both:.2f}",
        f"{ran.downtime_ms.median:.1f}",
        _both(ran.extra_mib, 0),
    )


def _both(spreads: tuple[Spread, Spread], digits: int) -> str:
    return " + ".join(f"{spread.median:.{digits}f}" for spread in spreads)


def channels_note(figures: dict[str, Figure]) -> str:
    """The targets of the usual number of channels, and what many channels cost, as far as they were measured."""
    said = ["The limit is plain TCP over as many connections."]
    few, many = figures.get(str(USUAL_CHANNELS)), figures.get("64")
    if few is not None:
        local, isolated = few.engines[LOCAL], few.engines[ISOLATED]
        said.append(
            f"Over {USUAL_CHANNELS} channels it is {local.of_tcp.median:.2f} of TCP with {local.cpu_of_both:.2f} CPU "
            f"s/GiB, isolated {isolated.of_tcp.median:.2f}; the targets are 0.65 with at most 1, and 0.5."
        )
    if few is not None and many is not None:
        more = many.engines[LOCAL].cpu_of_both / few.engines[LOCAL].cpu_of_both - 1
        said.append(f"64 channels take {more:+.0%} CPU per GiB against 4; the target is at most +15%.")
    return " ".join(said)


def content_note(figures: dict[str, Figure], read_gb_per_s: float) -> str:
    """What limits a guest with many zero pages, against the read of this run."""
    said = [
        f"{name} {figure.engines[LOCAL].gb_per_s.median / read_gb_per_s:.2f}"
        for name, figure in figures.items()
    ]
    return (
        f"One core reads {read_gb_per_s:.1f} GB/s of RAM, the limit for zero pages. Of that: {', '.join(said)}; the target "
        "for mostly zero RAM is 0.5."
    )


def read_rate(ram_bytes: int, repeats: int) -> Spread:
    """GB/s of a plain read, a sum, by one core."""
    words = np.ones(ram_bytes // 8, dtype=np.uint64)
    seconds = alternate({"read": Case(lambda: np.add.reduce(words))}, repeats)["read"]
    return seconds.rate(ram_bytes / 1e9)


def draw(by_channels: dict[str, Figure], path: Path) -> None:
    """Rates and CPU over the number of channels."""
    from .plots import new_figure, save

    figure, (rates, cpu) = new_figure(2)
    names, found = list(by_channels), list(by_channels.values())
    for axes, plain in (
        (rates, [f.plain_gb_per_s.median for f in found]),
        (cpu, [f.plain_cpu_of_both for f in found]),
    ):
        axes.plot(names, plain, "o--", color="0.5", label="plain TCP")
    for engine in found[0].engines:
        rates.plot(names, [f.engines[engine].gb_per_s.median for f in found], "o-", label=f"sealed, {engine}")
        cpu.plot(names, [f.engines[engine].cpu_of_both for f in found], "o-", label=f"sealed, {engine}")
    rates.set(xlabel="channels", ylabel="GB of RAM per second", ylim=(0, None), title="Throughput")
    cpu.set(xlabel="channels", ylabel="CPU seconds per GiB, both ends", ylim=(0, None), title="CPU")
    save(figure, path)


def main(argv: list[str] | None = None) -> None:
    made = parser("channels", __doc__, repeats=5, quick_repeats=2, plots=True)
    made.add_argument("--ram", type=ram, help="of the guest (default: 1GiB, quick 512MiB)")
    made.add_argument(
        "--channels", type=channel_numbers, metavar="N,N", help="numbers of channels (default: 1 to 64)"
    )
    made.add_argument("--bundles", type=numbers, metavar="N,N", help="pages in a bundle (default: 16 to 512)")
    options = parse(made, argv)
    usual = Move(options.ram or (GIB // 2 if options.quick else GIB), USUAL_CHANNELS, seed=options.seed)
    channels = options.channels or (QUICK_CHANNELS if options.quick else CHANNELS)
    bundles = options.bundles or (QUICK_BUNDLES if options.quick else BUNDLES)
    by_channels = measure({str(n): engines(replace(usual, channels=n)) for n in channels}, options.repeats)
    by_content = measure(
        {name: {LOCAL: replace(usual, free=free)} for name, free in CONTENTS.items()}, options.repeats
    )
    by_bundle = measure(
        {str(n): {LOCAL: replace(usual, bundle_pages=n)} for n in bundles},
        options.repeats,
    )
    by_carrier = measure(
        {
            str(n): {
                f"{engine}, {name}": replace(move, channel_threads=threads)
                for engine, move in engines(replace(usual, channels=n)).items()
                for name, threads in CARRIERS.items()
            }
            for n in (QUICK_CARRIED if options.quick else CARRIED)
        },
        options.repeats,
    )
    read = read_rate(usual.ram_bytes, options.repeats)
    figures = {
        "channels": by_channels,
        "content": by_content,
        "bundle_pages": by_bundle,
        "carriers": by_carrier,
    }
    of = f"{usual.ram_bytes >> 20} MiB"
    finish(
        options,
        {
            "ram_bytes": usual.ram_bytes,
            "read_gb_per_s": asdict(read),
            **{
                kind: {name: asdict(figure) for name, figure in found.items()}
                for kind, found in figures.items()
            },
        },
        [
            table(f"By channels, {of}, incompressible", "channels", by_channels, channels_note(by_channels)),
            table(
                f"By content, {of}, {USUAL_CHANNELS} channels",
                "RAM",
                by_content,
                content_note(by_content, read.median),
            ),
            table(f"By pages in a bundle, {of}, {USUAL_CHANNELS} channels", "pages", by_bundle, BUNDLES_NOTE),
            table(f"By what carries the channels, {of}, incompressible", "channels", by_carrier),
        ],
        lambda path: draw(by_channels, path),
    )


if __name__ == "__main__":
    main()
