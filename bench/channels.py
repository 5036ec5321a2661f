"""A sealed migration against plain TCP, over 1 to 64 channels: python -m bench channels [--json FILE] [--plot FILE.png]

Every migration is of an idle guest between two processes over loopback. In each round a case is a plain read of RAM by one
core, then in turn plain TCP over as many connections with 1 MiB buffers, and the migration by each kind of engine; whoever
was first in one round is last in the next. "of TCP" is the median of the ratios of such neighbours. Each migration runs
with the engine in the guest's process (local) and in one of its own (isolated). CPU seconds are per GiB of RAM, source and
destination, of all processes of a side but vCPUs, from the first page to the end. Memory is what they had at most beyond
guest RAM, interpreters among it.

By default the number of channels decides two things besides: what carries them ("carrier": threads, or one event loop a
side; where two are named, source and destination), by how many CPUs there are, and how many pages a bundle has at most.
--channel-threads and --bundle hold them fixed.

Four tables: by number of channels, by what is in RAM (zero pages are one part of RAM, the rest cannot be compressed), by
pages in a bundle, and by what carries the channels of a side. Zero pages are not sent, so with them TCP is no limit: what
is, is the plain read.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from pagexfer import migration
from pagexfer.engine.threads import most_threads
from pagexfer.isolation.sides import BUFFER_BYTES
from pagexfer.svsm.export import most_data_pages, usual_bundle_pages
from pagexfer.wire.constants import MAX_BUNDLE_DATA_PAGES

from .measure import Case, Spread, rotated
from .options import channel_numbers, finish, parse, parser, positive, progress, ram
from .sealed import Move, Moved, run_move
from .table import Table
from .tcp import Plain, run_plain
from .units import GIB

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from .pair import Side

CHANNELS: Final = (1, 2, 4, 8, 16, 32, 64)
QUICK_CHANNELS: Final = (1, 4, 64)
CONTENTS: Final = {"incompressible": 0.0, "half zero": 0.5, "mostly zero": 0.95}
QUICK_CONTENTS: Final = {name: CONTENTS[name] for name in ("incompressible", "mostly zero")}
BUNDLES: Final = (16, 32, 64, 128, 256, 512)
QUICK_BUNDLES: Final = (16, 256)
# What carries a side's channels.
LOOP, THREADS = "loop", "threads"
CHANNEL_THREADS: Final = {"default": None, "on": True, "off": False}
# Where a table varies something else than channels.
USUAL_CHANNELS: Final = 4
CARRIED: Final = (USUAL_CHANNELS, 64)
QUICK_CARRIED: Final = (USUAL_CHANNELS,)

LOCAL: Final = "local"
ISOLATED: Final = "isolated"

COLUMNS: Final = (
    "engine",
    "carrier",
    "bundle",
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
    f"{MAX_BUNDLE_DATA_PAGES} is what the format allows, and means as many whole blocks of 32 as fit a slot's buffer of "
    f"2 MiB: {most_data_pages(BUFFER_BYTES)}."
)


@dataclass(frozen=True, slots=True)
class Ran:
    """How one kind of engine did. Rates are GB of RAM per second; pairs are source and destination.

    `of_read` is against a plain read right before.
    """

    carrier: str
    bundle_pages: int
    gb_per_s: Spread
    of_tcp: Spread
    of_read: Spread
    cpu_s_per_gib: tuple[Spread, Spread]
    cpu_of_both: Spread
    downtime_ms: Spread
    extra_mib: tuple[Spread, Spread]


@dataclass(frozen=True, slots=True)
class Figure:
    """One case: plain TCP, and the migration by each kind of engine beside it."""

    read_gb_per_s: Spread
    plain_gb_per_s: Spread
    plain_cpu_s_per_gib: tuple[Spread, Spread]
    plain_cpu_of_both: Spread
    engines: dict[str, Ran]


Pair = tuple["Side", "Side"]
Done = tuple["Moved", "Side"]
_Round = tuple[float, Pair, dict[str, Done]]


def engines(move: Move) -> dict[str, Move]:
    """The same migration by each kind of engine."""
    return {LOCAL: move, ISOLATED: replace(move, isolated=True)}


def carriers(move: Move) -> str:
    """What carries its channels at the source and at the destination, where they differ."""
    if move.channel_threads is not None:
        return THREADS if move.channel_threads else LOOP
    # The rule is the product's own; nothing that a migration reports says what it chose.
    few = (migration._MOST_SOURCE_ON_FEW, migration._MOST_DESTINATION_ON_FEW)
    if move.isolated:
        few = (migration._MOST_ISOLATED_ON_FEW,) * 2
    cpus = len(os.sched_getaffinity(0))
    chosen = [THREADS if move.channels <= most_threads(cpus, most) else LOOP for most in few]
    return " + ".join(dict.fromkeys(chosen))


def by_carrier(move: Move) -> dict[str, Move]:
    """The same migration by each kind of engine, with its channels carried by a loop, by threads and as is the default."""
    moves: dict[str, Move] = {}
    for engine, usual in engines(replace(move, channel_threads=None)).items():
        for threads in (None, False, True):
            chosen = replace(usual, channel_threads=threads)
            is_default = carriers(chosen) == carriers(usual)
            moves[f"{engine}, {carriers(chosen)}{' (default)' if is_default else ''}"] = chosen
    return moves


def bundle_pages(move: Move) -> int:
    """Pages with content that its bundles have at most."""
    return min(move.bundle_pages or usual_bundle_pages(move.channels), most_data_pages(BUFFER_BYTES))


def side_by_side(moves: Mapping[str, Move], round_: int) -> tuple[Pair, dict[str, Done]]:
    """Plain TCP, and in turn with it migrations over as many channels. For guests that are idle, which all converge."""
    usual = next(iter(moves.values()))
    done: dict[str, Done] = {}
    for name in rotated([None, *moves], round_):
        if name is None:
            plain = run_plain(Plain(usual.ram_bytes, usual.channels))
        else:
            moved, destination = run_move(moves[name])
            assert destination is not None
            done[name] = moved, destination
    return plain, done


def measure(cases: Mapping[str, Mapping[str, Move]], repeats: int) -> dict[str, Figure]:
    """Every case in turn, `repeats` times: a read of RAM, and then plain TCP and the migration by each kind of engine."""
    rounds: dict[str, list[_Round]] = {name: [] for name in cases}
    usual = {name: next(iter(moves.values())) for name, moves in cases.items()}
    words = np.ones(max(move.ram_bytes for move in usual.values()) // 8, dtype=np.uint64)
    read = Case(lambda: np.add.reduce(words))
    for number in range(repeats):
        for name in rotated(cases, number):
            progress(f"channels: round {number + 1} of {repeats}, {name}")
            rounds[name].append((words.nbytes / 1e9 / read.seconds(), *side_by_side(cases[name], number)))
    return {name: _figure(cases[name], rounds[name]) for name in cases}


def _figure(moves: Mapping[str, Move], rounds: list[_Round]) -> Figure:
    ram_bytes = next(iter(moves.values())).ram_bytes
    gib = ram_bytes / GIB
    plain = [pair for _, pair, _ in rounds]
    return Figure(
        Spread.of([read for read, _, _ in rounds]),
        Spread.of([ram_bytes / 1e9 / sender.seconds for sender, _ in plain]),
        _both_sides([(sender.cpu_seconds / gib, receiver.cpu_seconds / gib) for sender, receiver in plain]),
        Spread.of([(sender.cpu_seconds + receiver.cpu_seconds) / gib for sender, receiver in plain]),
        {
            name: _ran(move, [(read, pair, done[name]) for read, pair, done in rounds])
            for name, move in moves.items()
        },
    )


def _ran(move: Move, rounds: list[tuple[float, Pair, Done]]) -> Ran:
    gib, gb = move.ram_bytes / GIB, move.ram_bytes / 1e9
    done = [moved for _, _, (moved, _) in rounds]
    sides = [(moved.side, destination) for _, _, (moved, destination) in rounds]
    return Ran(
        carriers(move),
        bundle_pages(move),
        Spread.of([gb / moved.moving_s for moved in done]),
        Spread.of([sender.seconds / moved.moving_s for _, (sender, _), (moved, _) in rounds]),
        Spread.of([gb / moved.moving_s / read for read, _, (moved, _) in rounds]),
        _both_sides([(source.cpu_seconds / gib, target.cpu_seconds / gib) for source, target in sides]),
        Spread.of([(source.cpu_seconds + target.cpu_seconds) / gib for source, target in sides]),
        Spread.of([moved.downtime_s * 1000 for moved in done]),
        _both_sides([(source.peak_extra_mib, target.peak_extra_mib) for source, target in sides]),
    )


def _both_sides(pairs: list[tuple[float, float]]) -> tuple[Spread, Spread]:
    return Spread.of([source for source, _ in pairs]), Spread.of([target for _, target in pairs])


def table(title: str, first: str, figures: dict[str, Figure], note: str = "") -> Table:
    """The figures as a table, plain TCP first in every case; `first` names the column of cases."""
    rows: list[tuple[str, ...]] = []
    for name, figure in figures.items():
        plain, cpu = figure.plain_gb_per_s, figure.plain_cpu_s_per_gib
        ends = "1.00", "", "", _both(cpu, 2), f"{figure.plain_cpu_of_both.median:.2f}", "", ""
        rows.append((name, "plain TCP", "", "", f"{plain.median:.2f}", *ends))
        rows += [(name, engine, *_cells(ran)) for engine, ran in figure.engines.items()]
    return Table.of(title, (first, *COLUMNS), rows, note)


def _cells(ran: Ran) -> tuple[str, ...]:
    return (
        ran.carrier,
        f"{ran.bundle_pages}",
        f"{ran.gb_per_s.median:.2f}",
        *ran.of_tcp.cells(2),
        _both(ran.cpu_s_per_gib, 2),
        f"{ran.cpu_of_both.median:.2f}",
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
            f"Over {USUAL_CHANNELS} channels local engines have {local.of_tcp.median:.2f} of TCP with "
            f"{local.cpu_of_both.median:.2f} CPU s/GiB, isolated ones {isolated.of_tcp.median:.2f}; the targets are "
            "0.65 with at most 1, and 0.5."
        )
    if few is not None and many is not None:
        more = [_more_cpu(engine, few, many) for engine in (LOCAL, ISOLATED)]
        said.append(
            f"64 channels take, against {USUAL_CHANNELS} in the same round, {' and '.join(more)} CPU per GiB; the target "
            "is at most +15%."
        )
    return " ".join(said)


def _more_cpu(engine: str, few: Figure, many: Figure) -> str:
    rounds = [figure.engines[engine].cpu_of_both.values for figure in (few, many)]
    more = Spread.of([high / low - 1 for low, high in zip(*rounds, strict=True)])
    return f"{engine} {more.median:+.0%} ({more.minimum:+.0%} to {more.maximum:+.0%})"


def content_note(figures: dict[str, Figure]) -> str:
    """What limits a guest with many zero pages, against the reads of the same rounds."""
    read = Spread.of([figure.read_gb_per_s.median for figure in figures.values()]).median
    said = [f"{name} {figure.engines[LOCAL].of_read.median:.2f}" for name, figure in figures.items()]
    return (
        f"One core reads {read:.1f} GB/s of RAM, the limit for zero pages. Of the read right before: {', '.join(said)}; "
        "the target for mostly zero RAM is 0.5."
    )


def draw(by_channels: dict[str, Figure], path: Path) -> None:
    """Rates and CPU over the number of channels."""
    from .plots import new_figure, save

    figure, (rates, cpu) = new_figure(2)
    names, found = list(by_channels), list(by_channels.values())
    for axes, plain in (
        (rates, [f.plain_gb_per_s.median for f in found]),
        (cpu, [f.plain_cpu_of_both.median for f in found]),
    ):
        axes.plot(names, plain, "o--", color="0.5", label="plain TCP")
    for engine in found[0].engines:
        rates.plot(names, [f.engines[engine].gb_per_s.median for f in found], "o-", label=f"sealed, {engine}")
        cpu.plot(
            names, [f.engines[engine].cpu_of_both.median for f in found], "o-", label=f"sealed, {engine}"
        )
    rates.set(xlabel="channels", ylabel="GB of RAM per second", ylim=(0, None), title="Throughput")
    cpu.set(xlabel="channels", ylabel="CPU seconds per GiB, both ends", ylim=(0, None), title="CPU")
    save(figure, path)


def _bundle(text: str) -> int:
    pages = positive(text)
    if pages > MAX_BUNDLE_DATA_PAGES:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of pages in a bundle from 1 to {MAX_BUNDLE_DATA_PAGES}"
        )
    return pages


def _bundles(text: str) -> list[int]:
    return [_bundle(part) for part in text.split(",")]


def main(argv: list[str] | None = None) -> None:
    made = parser("channels", __doc__, repeats=5, quick_repeats=2, plots=True)
    made.add_argument("--ram", type=ram, help="of the guest (default: 1GiB, quick 512MiB)")
    made.add_argument(
        "--channels",
        type=channel_numbers,
        metavar="N,N",
        help="numbers of channels (default: 1 to 64, quick 1,4,64)",
    )
    made.add_argument(
        "--bundles",
        type=_bundles,
        metavar="N,N",
        help="pages in a bundle of the table by them (default: 16 to 512, quick 16,256)",
    )
    made.add_argument(
        "--bundle", type=_bundle, metavar="N", help="of all other tables (default: by number of channels)"
    )
    made.add_argument(
        "--channel-threads",
        choices=CHANNEL_THREADS,
        default="default",
        help="whether each channel has a thread, but in the table by carriers (default: by number of channels and of CPUs)",
    )
    options = parse(made, argv)
    usual = Move(
        options.ram or (GIB // 2 if options.quick else GIB),
        USUAL_CHANNELS,
        bundle_pages=options.bundle,
        seed=options.seed,
        channel_threads=CHANNEL_THREADS[options.channel_threads],
    )
    channels = options.channels or (QUICK_CHANNELS if options.quick else CHANNELS)
    bundles = options.bundles or (QUICK_BUNDLES if options.quick else BUNDLES)
    cases = {
        "channels": {str(n): engines(replace(usual, channels=n)) for n in channels},
        "content": {
            name: {LOCAL: replace(usual, free=free)}
            for name, free in (QUICK_CONTENTS if options.quick else CONTENTS).items()
        },
        "bundle_pages": {str(n): {LOCAL: replace(usual, bundle_pages=n)} for n in bundles},
        "carriers": {
            str(n): by_carrier(replace(usual, channels=n))
            for n in (QUICK_CARRIED if options.quick else CARRIED)
        },
    }
    figures = {kind: measure(varied, options.repeats) for kind, varied in cases.items()}
    of = f"{usual.ram_bytes >> 20} MiB"
    finish(
        options,
        {
            "ram_bytes": usual.ram_bytes,
            **{
                kind: {name: asdict(figure) for name, figure in found.items()}
                for kind, found in figures.items()
            },
        },
        [
            table(
                f"By channels, {of}, incompressible",
                "channels",
                figures["channels"],
                channels_note(figures["channels"]),
            ),
            table(
                f"By content, {of}, {USUAL_CHANNELS} channels",
                "RAM",
                figures["content"],
                content_note(figures["content"]),
            ),
            table(
                f"By pages in a bundle, {of}, {USUAL_CHANNELS} channels",
                "pages",
                figures["bundle_pages"],
                BUNDLES_NOTE,
            ),
            table(f"By what carries the channels, {of}, incompressible", "channels", figures["carriers"]),
        ],
        lambda path: draw(figures["channels"], path),
    )


if __name__ == "__main__":
    main()
