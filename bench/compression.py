"""Whether zstd pays on a slow link, against QEMU's own: python -m bench compression [--json FILE] [--quick]

Every round migrates the same halted guest between stock QEMUs in each way in turn, over four flows that a relay paces
(SO_MAX_PACING_RATE) so that together they carry as much as the link:
  multifd           QEMU's own, neither encrypted nor checked
  multifd zstd      the same with multifd-compression=zstd
  multifd zstd TLS  the same with tls-creds-psk and AES-128-GCM
  pagexfer          sealed
  pagexfer zstd     sealed, and compressed before
all of zstd at the same level, all with a thread for each channel and with the destination's RAM preallocated.

Contents: text (words of a fixed vocabulary, the common ones often), half (every other page of it random), incompressible
(random), zero. Total time is from the order until the guest runs at the destination, by the word of the QEMU there; "of
plain" and "of multifd zstd" are the rate against pagexfer's without compression and multifd's with it, medians of the
ratios of the same round: above 1 is faster. What was sent is counted at the relay. CPU seconds are user and system time of
the QEMUs, and with pagexfer of its two processes as well, per GiB of RAM.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from pagexfer.errors import UsageError
from pagexfer.svsm.compression import DEFAULT_LEVEL, MAX_LEVEL, need_zstd
from pagexfer.wire.constants import PAGE_SIZE

from .measure import Spread, rotated
from .options import CannotRun, finish, numbers, parse, parser, positive, progress, ram
from .pair import Route
from .qemu_machine import (
    compare_ram,
    destination_machine,
    halted_options,
    need_qemu,
    qemu_version,
    source_machine,
)
from .qemu_moves import by_multifd, by_pagexfer
from .relay import paced_relay
from .table import Table
from .units import GIB, MB, MIB

if TYPE_CHECKING:
    from pathlib import Path

    from .qemu_machine import Machine
    from .qemu_moves import Taken

FLOWS: Final = 4
LINKS_MB: Final = (100, 400)
QUICK_LINKS_MB: Final = (100,)
CONTENTS: Final = ("text", "half", "incompressible", "zero")
QUICK_CONTENTS: Final = ("text", "half")
PLAIN, ZSTD = "pagexfer", "pagexfer zstd"
QEMU_ZSTD, QEMU_ZSTD_TLS = "multifd zstd", "multifd zstd TLS"
WAYS: Final = ("multifd", QEMU_ZSTD, QEMU_ZSTD_TLS, PLAIN, ZSTD)

_WORDS: Final = 20_000
_ZIPF: Final = 1.2
# Repeated until RAM is full: no level that is offered here looks back so far.
_FILL_BYTES: Final = 1 << 24

_Case = tuple[int, str, str]


@dataclass(frozen=True, slots=True)
class Figure:
    """One row: a way of moving one content over a link. Pairs are source and destination."""

    link_mb_per_s: int
    content: str
    way: str
    seconds: Spread
    sent_of_ram: Spread
    rate_of_plain: Spread
    rate_of_multifd_zstd: Spread
    cpu_s_per_gib: tuple[Spread, Spread]
    both_cpu_s_per_gib: Spread


class _Moved(NamedTuple):
    """What one migration took, and the bytes that went towards the destination."""

    taken: Taken
    sent_bytes: int


def text(rng: np.random.Generator, length: int) -> bytes:
    """Words with spaces between, which zstd shrinks about as it does source code and prose."""
    letters = rng.integers(97, 123, (_WORDS, 12), dtype=np.uint8)
    lengths = rng.integers(2, 13, _WORDS)
    words = [row[:end].tobytes() for row, end in zip(letters, lengths, strict=True)]
    chosen = rng.zipf(_ZIPF, length // 3) % _WORDS
    made = b" ".join([words[index] for index in chosen.tolist()])
    return made[:length].ljust(length)


def fill(ram: Path, ram_bytes: int, content: str, seed: int) -> None:
    """Make the file that is to be a machine's RAM."""
    rng = np.random.default_rng(seed)
    with ram.open("wb") as file:
        if content == "zero":
            file.truncate(ram_bytes)
            return
        part = rng.bytes(_FILL_BYTES) if content == "incompressible" else text(rng, _FILL_BYTES)
        if content == "half":
            pages = np.frombuffer(part, dtype=np.uint8).reshape(-1, PAGE_SIZE).copy()
            pages[1::2] = rng.integers(0, 256, pages[1::2].shape, dtype=np.uint8)
            part = pages.tobytes()
        for begin in range(0, ram_bytes, _FILL_BYTES):
            file.write(part[: ram_bytes - begin])


def measure(
    content: str, links_mb: list[int], ram_bytes: int, level: int, repeats: int, seed: int
) -> list[Figure]:
    """All ways over all links in turn, `repeats` times."""
    taken: dict[_Case, list[_Moved]] = {(link, content, way): [] for link in links_mb for way in WAYS}
    fill_ram = partial(fill, ram_bytes=ram_bytes, content=content, seed=seed)
    with source_machine(ram_bytes, halted_options, fill_ram) as (folder, shape, source):
        for number in range(repeats):
            for link in links_mb:
                for way in rotated(WAYS, number):
                    progress(f"compression: {content}, round {number + 1} of {repeats}, {link} MB/s, {way}")
                    with destination_machine(folder, shape) as destination:
                        taken[link, content, way].append(_move(way, link, level, source, destination))
                        compare_ram(source, destination, way)
    return [_figure(case, ram_bytes, taken) for case in taken]


def _move(way: str, link_mb: int, level: int, source: Machine, destination: Machine) -> _Moved:
    carried: list[int] = []
    relay = partial(paced_relay, flow_bytes_per_s=link_mb * MB // FLOWS, on_carried=carried.append)
    wanted = level if "zstd" in way else None
    if way in (PLAIN, ZSTD):
        taken = by_pagexfer(
            source,
            destination,
            FLOWS,
            compression_level=wanted,
            channel_threads=True,  # as multifd has, with compression and without
            route=Route(lead=relay),
        )
    else:
        tls = way == QEMU_ZSTD_TLS
        taken = by_multifd(source, destination, FLOWS, tls=tls, zstd_level=wanted, route=Route(lead=relay))
    return _Moved(taken, sum(carried))


def _figure(case: _Case, ram_bytes: int, moved: dict[_Case, list[_Moved]]) -> Figure:
    link, content, way = case
    gib = ram_bytes / GIB
    found, plain, other = (
        [one.taken for one in moved[link, content, name]] for name in (way, PLAIN, QEMU_ZSTD)
    )
    return Figure(
        link,
        content,
        way,
        Spread.of([one.seconds for one in found]),
        Spread.of([one.sent_bytes / ram_bytes for one in moved[case]]),
        Spread.of([base.seconds / one.seconds for one, base in zip(found, plain, strict=True)]),
        Spread.of([base.seconds / one.seconds for one, base in zip(found, other, strict=True)]),
        (
            Spread.of([one.source_cpu_s / gib for one in found]),
            Spread.of([one.destination_cpu_s / gib for one in found]),
        ),
        Spread.of([one.cpu_s / gib for one in found]),
    )


def table(link_mb: int, figures: list[Figure], ram_bytes: int, level: int) -> Table:
    """Every content and way over one link."""
    columns = (
        "content, way",
        "total s",
        "min",
        "max",
        "sent / RAM",
        "of plain",
        "of multifd zstd",
        "CPU s/GiB",
        "both",
    )
    rows = [
        (
            f"{figure.content}, {figure.way}",
            *figure.seconds.cells(2),
            f"{figure.sent_of_ram.median:.3f}",
            f"{figure.rate_of_plain.median:.2f}",
            f"{figure.rate_of_multifd_zstd.median:.2f}",
            " + ".join(f"{spread.median:.2f}" for spread in figure.cpu_s_per_gib),
            f"{figure.both_cpu_s_per_gib.median:.2f}",
        )
        for figure in figures
        if figure.link_mb_per_s == link_mb
    ]
    title = (
        f"{FLOWS} flows of {link_mb // FLOWS} MB/s each, guest of {ram_bytes // MIB} MiB, zstd level {level}"
    )
    return Table.of(title, columns, rows, _note([f for f in figures if f.link_mb_per_s == link_mb]))


def _note(figures: list[Figure]) -> str:
    by_case = {(figure.content, figure.way): figure for figure in figures}
    said = []
    for content in dict.fromkeys(figure.content for figure in figures):
        own, bare, sealed = (by_case[content, way] for way in (ZSTD, QEMU_ZSTD, QEMU_ZSTD_TLS))
        speed = own.rate_of_multifd_zstd.median
        said.append(
            f"{content}, {speed:.2f} and {speed / sealed.rate_of_multifd_zstd.median:.2f} times the speed for "
            f"{own.both_cpu_s_per_gib.median / bare.both_cpu_s_per_gib.median:.2f} and "
            f"{own.both_cpu_s_per_gib.median / sealed.both_cpu_s_per_gib.median:.2f} of the CPU"
        )
    return f"pagexfer zstd against multifd zstd, without and with TLS: {'; '.join(said)}."


def main(argv: list[str] | None = None) -> None:
    made = parser("compression", __doc__, repeats=3, quick_repeats=1)
    made.add_argument("--ram", type=ram, help="of the guest (default: 512MiB, quick 128MiB)")
    made.add_argument(
        "--links", type=numbers, metavar="MB,MB", help="MB/s of all flows (default: 100,400, quick 100)"
    )
    made.add_argument(
        "--content", choices=CONTENTS, action="append", help="default: all, quick text and half"
    )
    made.add_argument("--level", type=positive, default=DEFAULT_LEVEL, help="default: %(default)s")
    options = parse(made, argv)
    if options.level > MAX_LEVEL:
        made.error(f"a level is 1 to {MAX_LEVEL}, not {options.level}")
    need_qemu()
    try:
        need_zstd()
    except UsageError as reason:
        raise CannotRun(str(reason)) from None
    ram_bytes = options.ram or (128 * MIB if options.quick else 512 * MIB)
    links = options.links or list(QUICK_LINKS_MB if options.quick else LINKS_MB)
    contents = options.content or list(QUICK_CONTENTS if options.quick else CONTENTS)
    figures = [
        figure
        for content in contents
        for figure in measure(content, links, ram_bytes, options.level, options.repeats, options.seed)
    ]
    finish(
        options,
        {
            "qemu": qemu_version(),
            "level": options.level,
            "ram_bytes": ram_bytes,
            "figures": [asdict(figure) for figure in figures],
        },
        [table(link, figures, ram_bytes, options.level) for link in links],
    )


if __name__ == "__main__":
    main()
