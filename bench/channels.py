"""A sealed migration against plain TCP, over 1 to 64 channels: python -m bench channels [--json FILE] [--plot FILE.png]

Every migration is of an idle guest between two processes over loopback. In each round plain TCP over as many connections
runs right before it, with the same bytes and 1 MiB buffers; "of TCP" is the median of the ratios of such neighbours. CPU
seconds are per GiB of RAM, source and destination, of the whole process from the connection on. Memory is what a process
had at most beyond guest RAM, its interpreter among it.

Three tables: by number of channels, by what is in RAM (zero pages are one part of RAM, the rest cannot be compressed), and
by pages in a bundle.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Final

from .measure import Spread
from .options import finish, numbers, parse, parser, progress, size
from .sealed import Move, Moved, run_move
from .table import Table
from .tcp import Plain, run_plain

if TYPE_CHECKING:
    from pathlib import Path

    from .pair import Side

GIB: Final = 1 << 30
CHANNELS: Final = (1, 2, 4, 8, 16, 32, 64)
QUICK_CHANNELS: Final = (1, 4, 64)
CONTENTS: Final = {"incompressible": 0.0, "half zero": 0.5, "mostly zero": 0.95}
BUNDLES: Final = (16, 32, 64, 128, 256, 500)
QUICK_BUNDLES: Final = (16, 256)
# Where a table varies something else than channels.
USUAL_CHANNELS: Final = 4

_Round = tuple["Side", "Side", Moved, "Side"]


@dataclass(frozen=True, slots=True)
class Figure:
    """One row: a migration, and plain TCP beside it. Rates are GB of RAM per second; pairs are source and destination."""

    move: Move
    plain_gb_per_s: Spread
    gb_per_s: Spread
    of_tcp: Spread
    plain_cpu_s_per_gib: tuple[Spread, Spread]
    cpu_s_per_gib: tuple[Spread, Spread]
    downtime_ms: Spread
    extra_mib: tuple[Spread, Spread]

    @property
    def cpu_of_both(self) -> float:
        return sum(spread.median for spread in self.cpu_s_per_gib)


def measure(moves: dict[str, Move], repeats: int) -> dict[str, Figure]:
    """Every migration with plain TCP before it, in turn, `repeats` times."""
    rounds: dict[str, list[_Round]] = {name: [] for name in moves}
    for number in range(repeats):
        for name, move in moves.items():
            progress(f"channels: round {number + 1} of {repeats}, {name}")
            plain = run_plain(Plain(move.ram_bytes, move.channels))
            moved, destination = run_move(move)
            assert destination is not None  # an idle guest converges
            rounds[name].append((*plain, moved, destination))
    return {name: _figure(move, rounds[name]) for name, move in moves.items()}


def _figure(move: Move, rounds: list[_Round]) -> Figure:
    gib, size_gb = move.ram_bytes / GIB, move.ram_bytes / 1e9
    return Figure(
        move,
        Spread.of([size_gb / sender.seconds for sender, _, _, _ in rounds]),
        Spread.of([size_gb / moved.moving_s for _, _, moved, _ in rounds]),
        Spread.of([sender.seconds / moved.moving_s for sender, _, moved, _ in rounds]),
        (
            Spread.of([sender.cpu_seconds / gib for sender, _, _, _ in rounds]),
            Spread.of([receiver.cpu_seconds / gib for _, receiver, _, _ in rounds]),
        ),
        (
            Spread.of([moved.side.cpu_seconds / gib for _, _, moved, _ in rounds]),
            Spread.of([destination.cpu_seconds / gib for _, _, _, destination in rounds]),
        ),
        Spread.of([moved.downtime_s * 1000 for _, _, moved, _ in rounds]),
        (
            Spread.of([moved.side.peak_extra_mib for _, _, moved, _ in rounds]),
            Spread.of([destination.peak_extra_mib for _, _, _, destination in rounds]),
        ),
    )


def table(title: str, first: str, figures: dict[str, Figure], note: str = "") -> Table:
    """The figures as a table; `first` names the column of names."""
    columns = (
        first,
        "TCP GB/s",
        "GB/s",
        "of TCP",
        "min",
        "max",
        "CPU s/GiB TCP",
        "CPU s/GiB",
        "both",
        "downtime ms",
        "memory MiB",
    )
    rows = [
        (
            name,
            f"{figure.plain_gb_per_s.median:.2f}",
            f"{figure.gb_per_s.median:.2f}",
            f"{figure.of_tcp.median:.2f}",
            f"{figure.of_tcp.minimum:.2f}",
            f"{figure.of_tcp.maximum:.2f}",
            _both(figure.plain_cpu_s_per_gib, 2),
            _both(figure.cpu_s_per_gib, 2),
            f"{figure.cpu_of_both:.2f}",
            f"{figure.downtime_ms.median:.1f}",
            _both(figure.extra_mib, 0),
        )
        for name, figure in figures.items()
    ]
    return Table.of(title, columns, rows, note)


def _both(spreads: tuple[Spread, Spread], digits: int) -> str:
    return " + ".join(f"{spread.median:.{digits}f}" for spread in spreads)


def channels_note(figures: dict[str, Figure]) -> str:
    """What many channels cost, where both 4 and 64 were measured."""
    few, many = figures.get("4"), figures.get("64")
    if few is None or many is None:
        return ""
    more = many.cpu_of_both / few.cpu_of_both - 1
    return f"64 channels take {more:+.0%} CPU per GiB against 4; the target is at most +15%."


def draw(by_channels: dict[str, Figure], path: Path) -> None:
    """Rates and CPU over the number of channels."""
    from .plots import new_figure, save

    figure, (rates, cpu) = new_figure(2)
    names, found = list(by_channels), list(by_channels.values())
    rates.plot(names, [f.plain_gb_per_s.median for f in found], "o--", color="0.5", label="plain TCP")
    rates.plot(names, [f.gb_per_s.median for f in found], "o-", label="pagexfer, sealed")
    rates.set(xlabel="channels", ylabel="GB of RAM per second", ylim=(0, None), title="Throughput")
    cpu.plot(
        names,
        [sum(s.median for s in f.plain_cpu_s_per_gib) for f in found],
        "o--",
        color="0.5",
        label="plain TCP",
    )
    cpu.plot(names, [f.cpu_of_both for f in found], "o-", label="pagexfer, sealed")
    cpu.set(xlabel="channels", ylabel="CPU seconds per GiB, both ends", ylim=(0, None), title="CPU")
    save(figure, path)


def main(argv: list[str] | None = None) -> None:
    made = parser("channels", __doc__, repeats=5, quick_repeats=2, plots=True)
    made.add_argument("--ram", type=size, help="of the guest (default: 1GiB, quick 256MiB)")
    made.add_argument(
        "--channels", type=numbers, metavar="N,N", help="numbers of channels (default: 1 to 64)"
    )
    made.add_argument("--bundles", type=numbers, metavar="N,N", help="pages in a bundle (default: 16 to 500)")
    options = parse(made, argv)
    usual = Move(options.ram or (GIB // 4 if options.quick else GIB), USUAL_CHANNELS, seed=options.seed)
    channels = options.channels or (QUICK_CHANNELS if options.quick else CHANNELS)
    bundles = options.bundles or (QUICK_BUNDLES if options.quick else BUNDLES)
    by_channels = measure({str(n): replace(usual, channels=n) for n in channels}, options.repeats)
    by_content = measure(
        {name: replace(usual, free=free) for name, free in CONTENTS.items()}, options.repeats
    )
    by_bundle = measure({str(n): replace(usual, bundle_pages=n) for n in bundles}, options.repeats)
    figures = {"channels": by_channels, "content": by_content, "bundle_pages": by_bundle}
    of = f"{usual.ram_bytes >> 20} MiB"
    finish(
        options,
        {kind: {name: asdict(figure) for name, figure in found.items()} for kind, found in figures.items()},
        [
            table(f"By channels, {of}, incompressible", "channels", by_channels, channels_note(by_channels)),
            table(f"By content, {of}, {USUAL_CHANNELS} channels", "RAM", by_content),
            table(f"By pages in a bundle, {of}, {USUAL_CHANNELS} channels", "pages", by_bundle),
        ],
        lambda path: draw(by_channels, path),
    )


if __name__ == "__main__":
    main()
