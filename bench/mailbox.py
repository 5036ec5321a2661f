"""What a mailbox costs between two processes: python -m bench mailbox [--json FILE] [--plot FILE.png] [--quick]

Five questions, each in repeats that alternate and begin with another of what is compared in every round:

- A doorbell round trip, beside two bare eventfds between two processes in the same run (`bench.mailbox_rings`).
- What is sealed for one ring: handshakes per GiB and GB/s with 2 KiB (the halves of a page in the prototype's first
  mailbox), 4 KiB (a page, its second), 64 and 256 pages, over 1 to 8 slots. The SVSM seals from RAM and copies out to the
  slot; the host takes the package and gives the buffer back without reading it. CPU is both processes'.
- Handlers as threads of one SVSM, or as a process each, over the same RAM, 256 pages for a ring.
- What idle handlers cost, in percent of one core.
- A whole migration with --isolated beside the same one with everything in one process.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import trio

from pagexfer.wire.slot import Command

from .mailbox_rings import EVENTFDS, round_trips
from .mailbox_svsm import svsm
from .measure import Spread, rotated
from .options import finish, numbers, parse, parser, progress, ram
from .sealed import Move, run_move
from .table import Table
from .units import GIB, MIB

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pagexfer.engine.slots import Slot

RINGS: Final = 10_000
UNITS: Final = {"2 KiB": 1 << 11, "4 KiB": 1 << 12, "64 pages": 1 << 18, "256 pages": 1 << 20}
LARGEST: Final = "256 pages"
SLOTS: Final = (1, 2, 4, 8)
QUICK_SLOTS: Final = (1, 4)
# A slot has two doorbells, and one message carries no more than 253 descriptors (SCM_MAX_FD), of which one is the memory.
MOST_SLOTS: Final = 126
# Small units are sealed until so many rings: they would take long, and their rate does not change.
MAX_RINGS: Final = 20_000
IDLE_SLOTS: Final = 16
IDLE_S: Final = 4.0
CHANNELS: Final = (1, 4)


@dataclass(frozen=True, slots=True)
class Sealed:
    """Rate and CPU of one unit over some slots."""

    handshakes_per_gib: int
    gb_per_s: Spread
    cpu_s_per_gib: Spread


def sealing(
    ram_fd: int, ram_bytes: int, units: dict[str, int], counts: Sequence[int], repeats: int
) -> dict[str, dict[int, Sealed]]:
    """Each unit over each number of slots, the handlers of which are threads of one SVSM."""
    rates: dict[tuple[str, int], list[tuple[float, float]]] = {(u, n): [] for u in units for n in counts}
    for number in range(repeats):
        progress(f"mailbox: sealing, round {number + 1} of {repeats}")
        for count in rotated(counts, number):
            with svsm(ram_fd, count) as slots:
                for name in rotated(units, number):
                    rate = trio.run(_seal_all, slots, [slots[0]], ram_bytes, units[name])
                    rates[name, count].append(rate)
    return {
        name: {count: _sealed(unit, rates[name, count]) for count in counts} for name, unit in units.items()
    }


def handlers(
    ram_fd: int, ram_bytes: int, counts: Sequence[int], repeats: int
) -> dict[str, dict[int, Sealed]]:
    """Threads of one SVSM against SVSMs of one slot each."""
    unit = UNITS[LARGEST]
    found: dict[str, dict[int, list[tuple[float, float]]]] = {"threads": {}, "processes": {}}
    for number in range(repeats):
        progress(f"mailbox: handlers, round {number + 1} of {repeats}")
        for count in rotated(counts, number):
            for kind, parts in rotated([("threads", [count]), ("processes", [1] * count)], number):
                with ExitStack() as stack:
                    groups = [stack.enter_context(svsm(ram_fd, part)) for part in parts]
                    slots = [slot for group in groups for slot in group]
                    firsts = [group[0] for group in groups]
                    rate = trio.run(_seal_all, slots, firsts, ram_bytes, unit)
                    found[kind].setdefault(count, []).append(rate)
    return {
        kind: {count: _sealed(unit, rates) for count, rates in by_count.items()}
        for kind, by_count in found.items()
    }


def _sealed(unit: int, rates: Sequence[tuple[float, float]]) -> Sealed:
    return Sealed(GIB // unit, Spread.of([rate for rate, _ in rates]), Spread.of([cpu for _, cpu in rates]))


async def _seal_all(
    slots: Sequence[Slot], firsts: Sequence[Slot], ram_bytes: int, unit: int
) -> tuple[float, float]:
    """GB/s and CPU seconds per GiB; `firsts` has one slot of each SVSM, which says what its process spent."""
    each = min(ram_bytes // len(slots), MAX_RINGS // len(slots) * unit) // unit * unit
    for slot in slots:  # the first package pays for memory that was never touched
        for start in (0, 0):
            await _seal(slot, start, unit, unit)
    spent = -await _cpu_seconds(firsts)
    began = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for index, slot in enumerate(slots):
            nursery.start_soon(_seal, slot, index * each, each, unit)
    seconds = time.perf_counter() - began
    spent += await _cpu_seconds(firsts)
    total = each * len(slots)
    return total / 1e9 / seconds, spent * GIB / total


async def _seal(slot: Slot, first: int, length: int, unit: int) -> None:
    for start in range(first, first + length, unit):
        answer = await slot.command(Command.EXPORT, start, unit)
        slot.begin_drain(answer)
        slot.release(answer)
        await trio.lowlevel.checkpoint()  # where an engine sends, and other channels' tasks have their turn


async def _cpu_seconds(firsts: Sequence[Slot]) -> float:
    return time.process_time() + sum([await _svsm_cpu_seconds(slot) for slot in firsts])


async def _svsm_cpu_seconds(slot: Slot) -> float:
    return (await slot.command(Command.FINISH)).result / 1e9


def idle_percent(ram_fd: int, slots: int, seconds: float) -> float:
    """Of one core, by the handlers of `slots` slots that nobody rings."""
    progress("mailbox: idle handlers")

    async def watch(first: Slot) -> float:
        spent = -await _svsm_cpu_seconds(first)
        await trio.sleep(seconds)
        return spent + await _svsm_cpu_seconds(first)

    with svsm(ram_fd, slots) as found:
        return trio.run(watch, found[0]) / seconds * 100


def migrations(
    ram_bytes: int, channels: Sequence[int], repeats: int, seed: int
) -> dict[int, tuple[Spread, Spread, Spread]]:
    """GB/s of local and of isolated migrations, and the ratios of neighbours."""
    rates: dict[int, list[tuple[float, float]]] = {count: [] for count in channels}
    for number in range(repeats):
        for count in rotated(channels, number):
            progress(f"mailbox: migrations, round {number + 1} of {repeats}, {count} channels")
            found: dict[bool, float] = {}
            for isolated in rotated((False, True), number):
                moved, _ = run_move(Move(ram_bytes, count, seed=seed, isolated=isolated))
                found[isolated] = ram_bytes / 1e9 / moved.moving_s
            rates[count].append((found[False], found[True]))
    return {
        count: (
            Spread.of([local for local, _ in rounds]),
            Spread.of([isolated for _, isolated in rounds]),
            Spread.of([isolated / local for local, isolated in rounds]),
        )
        for count, rounds in rates.items()
    }


def fill(ram_fd: int, ram_bytes: int, seed: int) -> None:
    """What is sealed: nothing in it is like anything else."""
    random = np.random.default_rng(seed)
    for start in range(0, ram_bytes, MIB):
        os.pwrite(ram_fd, random.bytes(min(MIB, ram_bytes - start)), start)


def draw(by_unit: dict[str, dict[int, Sealed]], path: Path) -> None:
    """Rates over slots, one line for each unit."""
    from .plots import new_figure, save

    figure, (rates, cpu) = new_figure(2)
    for name, by_count in by_unit.items():
        counts = list(by_count)
        rates.plot(counts, [by_count[count].gb_per_s.median for count in counts], "o-", label=name)
        cpu.plot(counts, [by_count[count].cpu_s_per_gib.median for count in counts], "o-", label=name)
    rates.set(
        xlabel="slots",
        ylabel="GB per second",
        yscale="log",
        title="Sealed through slots, by what a ring is for",
    )
    cpu.set(xlabel="slots", ylabel="CPU seconds per GiB, both processes", yscale="log", title="CPU")
    save(figure, path)


def _sealed_table(title: str, first: str, found: dict[str, dict[int, Sealed]], note: str = "") -> Table:
    counts = list(next(iter(found.values())))
    columns = (
        first,
        "handshakes/GiB",
        *(f"GB/s, {count}" for count in counts),
        *(f"CPU s/GiB, {count}" for count in counts),
    )
    rows = [
        (
            name,
            by_count[counts[0]].handshakes_per_gib,
            *(f"{by_count[count].gb_per_s.median:.3f}" for count in counts),
            *(f"{by_count[count].cpu_s_per_gib.median:.2f}" for count in counts),
        )
        for name, by_count in found.items()
    ]
    return Table.of(title, columns, rows, note)


def main(argv: list[str] | None = None) -> None:
    made = parser("mailbox", __doc__, repeats=5, quick_repeats=1, plots=True)
    made.add_argument(
        "--ram", type=ram, help="sealed through slots, and moved (default: 512MiB, quick 128MiB)"
    )
    made.add_argument(
        "--slots",
        type=numbers,
        metavar="N,N",
        help=f"numbers of slots, up to {MOST_SLOTS} (default: 1,2,4,8, quick 1,4)",
    )
    options = parse(made, argv)
    ram_bytes = options.ram or (GIB // 8 if options.quick else GIB // 2)
    counts = options.slots or (QUICK_SLOTS if options.quick else SLOTS)
    if max(counts) > MOST_SLOTS:
        made.error(f"--slots: {max(counts)} are more than {MOST_SLOTS}, for which there are doorbells")
    if ram_bytes < max(counts) * UNITS[LARGEST]:
        made.error(
            f"--ram: {max(counts)} slots seal {LARGEST} each, for which {ram_bytes >> 20} MiB are too few"
        )
    share = 5 if options.quick else 1
    ram_fd = os.memfd_create("ram")
    try:
        fill(ram_fd, ram_bytes, options.seed)
        rung = round_trips(ram_fd, RINGS // share, options.repeats)
        by_unit = sealing(ram_fd, ram_bytes, UNITS, counts, options.repeats)
        by_kind = handlers(ram_fd, ram_bytes, counts, options.repeats)
        idle = idle_percent(ram_fd, IDLE_SLOTS, IDLE_S / share)
    finally:
        os.close(ram_fd)
    moved = migrations(ram_bytes, CHANNELS, options.repeats, options.seed)
    finish(
        options,
        {
            "ram_bytes": ram_bytes,
            "round_trips": {name: asdict(trips) for name, trips in rung.items()},
            "sealing": {u: {n: asdict(s) for n, s in found.items()} for u, found in by_unit.items()},
            "handlers": {k: {n: asdict(s) for n, s in found.items()} for k, found in by_kind.items()},
            "idle_percent": {IDLE_SLOTS: idle},
            "migrations": {
                count: {"local": asdict(local), "isolated": asdict(isolated), "ratio": asdict(ratio)}
                for count, (local, isolated, ratio) in moved.items()
            },
        },
        [
            Table.of(
                "A ring and its answer between two processes",
                ("", "p50 us", "p99 us", "p50 x eventfds"),
                [
                    (
                        name,
                        f"{trips.p50_us:.1f}",
                        f"{trips.p99_us:.1f}",
                        f"{trips.p50_us / rung[EVENTFDS].p50_us:.2f}",
                    )
                    for name, trips in rung.items()
                ],
                "The target for the doorbells is at most twice the bare eventfds.",
            ),
            _sealed_table("Sealed through slots, by what a ring is for and by slots", "a ring", by_unit),
            _sealed_table("Handlers, 256 pages for a ring, by slots", "handlers are", by_kind),
            Table.of(
                "Idle handlers",
                ("handlers", "% of a core"),
                [(IDLE_SLOTS, f"{idle:.2f}")],
                "The target is below 1 %.",
            ),
            Table.of(
                f"A migration of {ram_bytes >> 20} MiB, engine in a process of its own or not",
                ("channels", "local GB/s", "isolated GB/s", "of local", "min", "max"),
                [
                    (
                        count,
                        f"{local.median:.2f}",
                        f"{isolated.median:.2f}",
                        *ratio.cells(2),
                    )
                    for count, (local, isolated, ratio) in moved.items()
                ],
                "The target is 0.7 of local.",
            ),
        ],
        lambda path: draw(by_unit, path),
    )


if __name__ == "__main__":
    main()
