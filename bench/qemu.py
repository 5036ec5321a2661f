"""pagexfer against QEMU's own multifd migration: python -m bench qemu [--json FILE] [--plot FILE.png] [--quick]

Every round migrates the same guest between stock QEMUs in each way in turn, over loopback:
  multifd         QEMU's own, neither encrypted nor checked
  multifd TLS     the same with tls-creds-psk and AES-128-GCM
  pagexfer        sealed, and compared with RAM in black-out (freshness digest-audit), as the command does
  ... threads     the same with a thread for each channel (--channel-threads), as multifd has
all of them with the destination's RAM preallocated, and all of them without.

Total time is from the order until the guest runs at the destination, by the word of the QEMU there. CPU seconds are user
and system time of the QEMUs, and with pagexfer of its two processes as well, per GiB of RAM. Downtime is as the source
reports it: QEMU's own ends when the source is done, pagexfer's with the destination's word that the guest runs. "of
TLS" and "x TLS" are medians of the ratios to multifd TLS in the same round, of the rate and of the CPU seconds.

The guest stands still: either it is halted, with RAM that cannot be compressed, or it is a Linux that booted and sleeps,
whose RAM is mostly zero.
"""

from __future__ import annotations

import argparse
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Final

from pagexfer.errors import GuestError

from .measure import Spread, rotated
from .options import CannotRun, finish, numbers, parse, parser, progress, size
from .qemu_machine import (
    PRIORITY,
    compare_ram,
    destination_machine,
    fill,
    halted_options,
    linux_options,
    need_qemu,
    qemu_version,
    source_machine,
    wait_booted,
)
from .qemu_moves import WAYS, Taken
from .table import Table
from .units import GIB

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from .qemu_machine import Machine, Shape

CHANNELS: Final = (1, 2, 4, 8)
QUICK_CHANNELS: Final = (1, 4)
INCOMPRESSIBLE, BOOTED = "incompressible", "booted"
CONTENTS: Final = (INCOMPRESSIBLE, BOOTED)
# With the destination's RAM provided before, and without.
PREALLOCATED: Final = (True, False)
TLS: Final = "multifd TLS"
TARGET_RATE: Final = 2.0
TARGET_CPU: Final = 0.6
# Of multifd: QEMU keeps the number in a byte.
MOST_CHANNELS: Final = 255

_Case = tuple[bool, int, str]


@dataclass(frozen=True, slots=True)
class Figure:
    """One row: a way over so many channels. Pairs are source and destination; ratios are to multifd with TLS."""

    content: str
    prealloc: bool
    channels: int
    way: str
    seconds: Spread
    gb_per_s: Spread
    downtime_ms: Spread
    cpu_s_per_gib: tuple[Spread, Spread]
    both_cpu_s_per_gib: Spread
    rate_of_tls: Spread
    cpu_of_tls: Spread


def measure(content: str, ram_bytes: int, channels: list[int], repeats: int, seed: int) -> list[Figure]:
    """All ways in turn, `repeats` times. Raises GuestError where this machine has not what `content` needs."""
    taken: dict[_Case, list[Taken]] = {case: [] for case in product(PREALLOCATED, channels, WAYS)}
    with _source(content, ram_bytes, seed) as (folder, shape, source):
        for number in range(repeats):
            for prealloc, count in product(PREALLOCATED, channels):
                for way in rotated(WAYS, number):
                    progress(f"qemu: {content}, round {number + 1} of {repeats}, {_named(way, count)}")
                    with destination_machine(folder, shape, prealloc=prealloc) as destination:
                        taken[prealloc, count, way].append(WAYS[way](source, destination, count))
                        if content == INCOMPRESSIBLE:
                            compare_ram(source, destination, way)
    return [_figure(content, ram_bytes, case, taken) for case in taken]


@contextmanager
def _source(content: str, ram_bytes: int, seed: int) -> Iterator[tuple[Path, Shape, Machine]]:
    if content == INCOMPRESSIBLE:
        with source_machine(
            ram_bytes, halted_options, partial(fill, ram_bytes=ram_bytes, seed=seed)
        ) as found:
            yield found
        return
    with source_machine(ram_bytes, linux_options) as found:
        wait_booted(found[2])
        yield found


def _figure(content: str, ram_bytes: int, case: _Case, taken: dict[_Case, list[Taken]]) -> Figure:
    prealloc, channels, way = case
    gib, size_gb = ram_bytes / GIB, ram_bytes / 1e9
    found, tls = taken[case], taken[prealloc, channels, TLS]
    return Figure(
        content,
        prealloc,
        channels,
        way,
        Spread.of([one.seconds for one in found]),
        Spread.of([size_gb / one.seconds for one in found]),
        Spread.of([one.downtime_s * 1000 for one in found]),
        (
            Spread.of([one.source_cpu_s / gib for one in found]),
            Spread.of([one.destination_cpu_s / gib for one in found]),
        ),
        Spread.of([one.cpu_s / gib for one in found]),
        Spread.of([other.seconds / one.seconds for one, other in zip(found, tls, strict=True)]),
        Spread.of([one.cpu_s / other.cpu_s for one, other in zip(found, tls, strict=True)]),
    )


def _named(way: str, channels: int) -> str:
    return f"{way}, {channels}"


def table(figures: list[Figure], title: str) -> Table:
    """Figures of one content, with or without preallocation."""
    columns = (
        "way, channels",
        "total s",
        "min",
        "max",
        "GB/s",
        "of TLS",
        "CPU s/GiB",
        "both",
        "x TLS",
        "downtime ms",
        "max",
    )
    rows = [
        (
            _named(figure.way, figure.channels),
            *figure.seconds.cells(2),
            f"{figure.gb_per_s.median:.2f}",
            f"{figure.rate_of_tls.median:.2f}",
            " + ".join(f"{spread.median:.2f}" for spread in figure.cpu_s_per_gib),
            f"{figure.both_cpu_s_per_gib.median:.2f}",
            f"{figure.cpu_of_tls.median:.2f}",
            f"{figure.downtime_ms.median:.0f}",
            f"{figure.downtime_ms.maximum:.0f}",
        )
        for figure in figures
    ]
    return Table.of(title, columns, rows, _note(figures))


def _note(figures: list[Figure]) -> str:
    """How far the targets are met, which are for RAM that cannot be compressed and is preallocated."""
    if not (figures[0].prealloc and figures[0].content == INCOMPRESSIBLE):
        return ""
    own = [figure for figure in figures if figure.way == "pagexfer"]
    slowest = min(figure.rate_of_tls.median for figure in own)
    dearest = max(figure.cpu_of_tls.median for figure in own)
    return (
        f"Over all numbers of channels pagexfer has at least {slowest:.2f} times the throughput of multifd TLS, and takes "
        f"at most {dearest:.2f} of its CPU; the targets are {TARGET_RATE:g} and {TARGET_CPU:g}."
    )


def tables(figures: list[Figure], ram_bytes: int, skipped: dict[str, str]) -> list[Table]:
    """One table for each content with preallocation, and one without; the last says what was not measured."""
    made = []
    for content, prealloc in product(CONTENTS, PREALLOCATED):
        some = [figure for figure in figures if (figure.content, figure.prealloc) == (content, prealloc)]
        how = "destination preallocated" if prealloc else "destination not preallocated"
        if some:
            made.append(table(some, f"{ram_bytes >> 20} MiB, {content}, {how}"))
    left_out = [f"Not measured: {content}: {reason}." for content, reason in skipped.items()]
    made[-1] = replace(made[-1], note=" ".join([made[-1].note, *left_out]).strip())
    return made


def draw(figures: list[Figure], path: Path) -> None:
    """Rates and CPU over the number of channels, of the first content, preallocated."""
    from .plots import new_figure, save

    first = [figure for figure in figures if figure.prealloc and figure.content == figures[0].content]
    drawn, (rates, cpu) = new_figure(2)
    for way in WAYS:
        own = [figure for figure in first if figure.way == way]
        names = [str(figure.channels) for figure in own]
        style = "o--" if way.startswith("multifd") else "o-"
        rates.plot(names, [figure.gb_per_s.median for figure in own], style, label=way)
        cpu.plot(names, [figure.both_cpu_s_per_gib.median for figure in own], style, label=way)
    rates.set(xlabel="channels", ylabel="GB of RAM per second", ylim=(0, None), title="Throughput")
    cpu.set(xlabel="channels", ylabel="CPU seconds per GiB, both ends", ylim=(0, None), title="CPU")
    save(drawn, path)


def _contents(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in CONTENTS:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(CONTENTS)}")
    return names


def _channels(text: str) -> list[int]:
    found = numbers(text)
    if max(found) > MOST_CHANNELS:
        raise argparse.ArgumentTypeError(
            f"{max(found)} channels are more than the {MOST_CHANNELS} of multifd"
        )
    return found


def _ram(text: str) -> int:
    ram_bytes = size(text)
    if ram_bytes % (1 << 20):
        raise argparse.ArgumentTypeError(f"{text!r} is not whole MiB")
    return ram_bytes


def run(options: argparse.Namespace) -> tuple[list[Figure], dict[str, str], int]:
    """Measure what is asked for; contents that this machine does not have are skipped, with the reason."""
    ram_bytes = options.ram or (GIB // 2 if options.quick else 2 * GIB)
    channels = options.channels or list(QUICK_CHANNELS if options.quick else CHANNELS)
    contents = options.content or ([INCOMPRESSIBLE] if options.quick else list(CONTENTS))
    figures: list[Figure] = []
    skipped: dict[str, str] = {}
    for content in contents:
        try:
            figures += measure(content, ram_bytes, channels, options.repeats, options.seed)
        except GuestError as error:
            skipped[content] = str(error)
            progress(f"qemu: {content} skipped: {error}")
    if not figures:
        raise CannotRun("; ".join(skipped.values()))
    return figures, skipped, ram_bytes


def main(argv: list[str] | None = None) -> None:
    made = parser("qemu", __doc__, repeats=5, quick_repeats=2, plots=True)
    made.add_argument("--ram", type=_ram, help="of the guest (default: 2GiB, quick 512MiB)")
    made.add_argument(
        "--channels",
        type=_channels,
        metavar="N,N",
        help="numbers of channels (default: 1,2,4,8, quick 1,4)",
    )
    made.add_argument(
        "--content", type=_contents, help="incompressible, booted or both (default: both, quick the first)"
    )
    options = parse(made, argv)
    need_qemu()
    figures, skipped, ram_bytes = run(options)
    finish(
        options,
        {
            "qemu": qemu_version(),
            "tls": f"tls-creds-psk, {PRIORITY}",
            "ram_bytes": ram_bytes,
            "contents_skipped": skipped,
            "figures": [asdict(figure) for figure in figures],
        },
        tables(figures, ram_bytes, skipped),
        lambda path: draw(figures, path),
    )


if __name__ == "__main__":
    main()
