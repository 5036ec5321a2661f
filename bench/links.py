"""Where many channels are needed: every TCP flow is limited: python -m bench links [--json FILE] [--plot FILE.png]

A flow is limited by its window, by one core, by one path, or by the cloud's rule for a single flow. Here a relay paces each
connection to the same rate (SO_MAX_PACING_RATE), while a guest writes. For each write rate, from the lowest on, all numbers
of channels have their turns in every round; one that failed to converge at a rate in any round does not go on to the next.
A migration that does not converge is given up: the time is then the time until that. Time to switchover is from the first
page on, up to black-out; "of capacity" is the write rate against what all channels carry together, and "link used" what
arrived a second against the same: that is the limit of every row. What a guest is told to write and what it comes to differ
where it shares its core: "dirtied" are the different pages it wrote during the last epoch. There is neither a round trip
nor a loss beyond loopback's.

As root it also makes two network namespaces with one link between them, shared by all flows, each of which has a class of
its own (HTB): there more channels help until the link is full. Where that cannot be made, the reason is said.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Final

from pagexfer.wire.constants import PAGE_SIZE

from .measure import Spread, rotated
from .namespace import PORTS, RECEIVER_ADDRESS, shaped_link
from .options import CannotRun, channel_numbers, finish, numbers, parse, parser, progress, ram, seconds
from .pair import Route
from .relay import paced_relay
from .sealed import Move, Moved, run_move
from .table import Table
from .units import MB, MIB

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from matplotlib.axes import Axes

CHANNELS: Final = (1, 2, 4, 8)
QUICK_CHANNELS: Final = (1, 4)
FLOWS_MB: Final = (40, 100)
QUICK_FLOWS_MB: Final = (40,)
# Write rates as parts of what one flow carries.
RATES: Final = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
QUICK_RATES: Final = (0.5, 1.5, 3.5)
# The shared link carries as much as so many flows.
LINK_FLOWS: Final = 2
DOWNTIME_LIMIT_S: Final = 0.3
QUICK_DOWNTIME_LIMIT_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class Link:
    """What carries the flows: each has `flow_mb_per_s`, and all together `link_mb_per_s`, or no common limit for 0."""

    flow_mb_per_s: int
    link_mb_per_s: int = 0

    @property
    def name(self) -> str:
        shared = f", {self.link_mb_per_s} MB/s for all together" if self.link_mb_per_s else ""
        return f"{self.flow_mb_per_s} MB/s a flow{shared}"

    def carries(self, channels: int) -> int:
        """MB/s of so many flows."""
        together = channels * self.flow_mb_per_s
        return min(together, self.link_mb_per_s or together)

    @contextmanager
    def route(self) -> Iterator[Route]:
        """The link, for one migration. Raises CannotRun where a shared one cannot be made."""
        if not self.link_mb_per_s:
            yield Route(lead=partial(paced_relay, flow_bytes_per_s=self.flow_mb_per_s * MB))
            return
        with shaped_link(self.link_mb_per_s * MB, self.flow_mb_per_s * MB) as (sender, receiver):
            yield Route(RECEIVER_ADDRESS, nullcontext, sender, receiver)


@dataclass(frozen=True, slots=True)
class Figure:
    """Migrations of a guest with one write rate over so many channels; `downtime_ms` of those that converged."""

    channels: int
    write_mb_per_s: int
    of_capacity: float
    dirtied_mb_per_s: Spread
    runs: int
    converged: int
    epochs: Spread
    seconds: Spread
    sent_of_ram: Spread
    link_used: Spread
    downtime_ms: Spread | None

    @property
    def always(self) -> bool:
        return self.converged == self.runs


def measure(link: Link, usual: Move, channels: list[int], rates_mb: list[int], repeats: int) -> list[Figure]:
    """Each write rate `repeats` times over all numbers of channels in turn, but those that failed at a lower one."""
    runs: dict[tuple[int, int], list[Moved]] = {}
    failed: set[int] = set()
    for rate in sorted(rates_mb):
        going = [number for number in channels if number not in failed]
        for round_ in range(repeats):
            for number in rotated(going, round_):
                progress(
                    f"links: {link.name}, {rate} MB/s written, round {round_ + 1} of {repeats}, {number} channels"
                )
                with link.route() as route:
                    moved, _ = run_move(replace(usual, channels=number, write_rate_bytes=rate * MB), route)
                runs.setdefault((number, rate), []).append(moved)
                if not moved.converged:
                    failed.add(number)
    return [_figure(link, usual.ram_bytes, *case, moves) for case, moves in sorted(runs.items())]


def _figure(link: Link, ram_bytes: int, channels: int, rate_mb: int, moves: list[Moved]) -> Figure:
    done = [moved for moved in moves if moved.converged]
    return Figure(
        channels,
        rate_mb,
        rate_mb / link.carries(channels),
        Spread.of([moved.dirty_pages_per_s * PAGE_SIZE / MB for moved in moves]),
        len(moves),
        len(done),
        Spread.of([moved.epochs for moved in moves]),
        Spread.of([moved.moving_s - moved.downtime_s for moved in moves]),
        Spread.of([moved.sent_bytes / ram_bytes for moved in moves]),
        Spread.of([moved.arrived_bytes / moved.moving_s / MB / link.carries(channels) for moved in moves]),
        Spread.of([moved.downtime_s * 1000 for moved in done]) if done else None,
    )


def table(link: Link, usual: Move, figures: list[Figure]) -> Table:
    """Every case; the note says up to which write rate each number of channels converged."""
    columns = (
        "channels",
        "written MB/s",
        "of capacity",
        "dirtied MB/s",
        "converged",
        "epochs",
        "switchover s",
        "min",
        "max",
        "sent / RAM",
        "link used",
        "downtime ms",
        "at most",
    )
    rows = [
        (
            f.channels,
            f.write_mb_per_s,
            f"{f.of_capacity:.2f}",
            f"{f.dirtied_mb_per_s.median:.0f}",
            f"{f.converged} of {f.runs}",
            f"{f.epochs.median:.0f}",
            *f.seconds.cells(2),
            f"{f.sent_of_ram.median:.2f}",
            f"{f.link_used.median:.2f}",
            "-" if f.downtime_ms is None else f"{f.downtime_ms.median:.0f}",
            "-" if f.downtime_ms is None else f"{f.downtime_ms.maximum:.0f}",
        )
        for f in figures
    ]
    title = (
        f"{link.name}, guest of {usual.ram_bytes // MIB} MiB, "
        f"downtime limit {usual.downtime_limit_s * 1000:.0f} ms"
    )
    return Table.of(title, columns, rows, reach_note(figures))


def reach_note(figures: list[Figure]) -> str:
    """Up to which write rate each number of channels converged in every round, and where it first failed in one."""
    said = []
    for channels in dict.fromkeys(f.channels for f in figures):
        of_these = [f for f in figures if f.channels == channels]
        failed = min((f.write_mb_per_s for f in of_these if not f.always), default=None)
        reached = [f.write_mb_per_s for f in of_these if failed is None or f.write_mb_per_s < failed]
        word = "1 channel" if channels == 1 else f"{channels} channels"
        upto = f"up to {max(reached)} MB/s" if reached else "at no rate"
        beyond = ", the highest that was tried" if failed is None else f", not at {failed} MB/s"
        said.append(f"{word} {upto}{beyond}")
    return f"Converged in every round: {'; '.join(said)}."


def draw(link: Link, figures: list[Figure], path: Path) -> None:
    """Time to switchover and downtime over the write rate, a line for each number of channels."""
    from .plots import new_figure, save

    figure, (times, downtimes) = new_figure(2)
    for channels in dict.fromkeys(f.channels for f in figures):
        of_these = [f for f in figures if f.channels == channels]
        done = [f for f in of_these if f.always]
        given_up = [f for f in of_these if not f.always]
        label = "1 channel" if channels == 1 else f"{channels} channels"
        (line,) = times.plot(
            [f.write_mb_per_s for f in done], [f.seconds.median for f in done], "o-", label=label
        )
        times.plot(
            [f.write_mb_per_s for f in given_up],
            [f.seconds.median for f in given_up],
            "x",
            color=line.get_color(),
            markersize=9,
        )
        downtimes.plot(
            [f.write_mb_per_s for f in done],
            [f.downtime_ms.median for f in done if f.downtime_ms is not None],
            "o-",
            label=label,
        )
        if channels == 1 and given_up:
            _mark(times, given_up[0].write_mb_per_s)
            _mark(downtimes, given_up[0].write_mb_per_s)
    times.set(ylabel="seconds to switchover (x: given up)", title=f"{link.name}: time")
    downtimes.set(ylabel="downtime, ms", title=f"{link.name}: downtime")
    rates = sorted({f.write_mb_per_s for f in figures})
    for axes in (times, downtimes):
        # Limits first: a single rate that is a power of ten has none of its own on a logarithmic axis.
        axes.set(xlabel="guest writes, MB/s", xlim=(rates[0] / 1.2, rates[-1] * 1.2))
        axes.set_xscale("log")
        axes.set_ylim(0, axes.get_ylim()[1])
        axes.set_xticks(rates, [str(rate) for rate in rates], rotation=45)
        axes.set_xticks([], minor=True)
    save(figure, path)


def _mark(axes: Axes, rate_mb: int) -> None:
    axes.axvline(
        rate_mb, color="0.4", linestyle=":", linewidth=1.2, label="from here 1 channel does not converge"
    )


def main(argv: list[str] | None = None) -> None:
    made = parser("links", __doc__, repeats=3, quick_repeats=1, plots=True)
    made.add_argument("--ram", type=ram, help="of the guest (default: 128MiB, quick 32MiB)")
    made.add_argument(
        "--channels",
        type=channel_numbers,
        metavar="N,N",
        help=f"numbers of channels, up to {PORTS} (default: 1 to 8, quick 1,4)",
    )
    made.add_argument(
        "--flows", type=numbers, metavar="MB,MB", help="MB/s of one flow (default: 40,100, quick 40)"
    )
    made.add_argument(
        "--rates",
        type=numbers,
        metavar="MB,MB",
        help="MB/s that the guest writes (default: a quarter of a flow to eight, quick half of one to 3.5)",
    )
    made.add_argument(
        "--downtime-limit",
        type=seconds,
        metavar="TIME",
        help=f"default: {DOWNTIME_LIMIT_S * 1000:.0f}ms, quick {QUICK_DOWNTIME_LIMIT_S * 1000:.0f}ms",
    )
    options = parse(made, argv)
    usual = Move(
        options.ram or (32 * MIB if options.quick else 128 * MIB),
        1,
        downtime_limit_s=options.downtime_limit
        or (QUICK_DOWNTIME_LIMIT_S if options.quick else DOWNTIME_LIMIT_S),
        seed=options.seed,
    )
    channels = options.channels or list(QUICK_CHANNELS if options.quick else CHANNELS)
    if max(channels) > PORTS:
        made.error(f"--channels: a link here has {PORTS} ports, not {max(channels)}")
    flows = options.flows or list(QUICK_FLOWS_MB if options.quick else FLOWS_MB)
    parts = QUICK_RATES if options.quick else RATES

    def measured(link: Link, numbers_of_channels: list[int]) -> list[Figure]:
        rates = options.rates or sorted({max(round(part * link.flow_mb_per_s), 1) for part in parts})
        return measure(link, usual, numbers_of_channels, rates, options.repeats)

    found = {link: measured(link, channels) for link in map(Link, flows)}
    first = next(iter(found))
    # A single flow does not come near what a shared link carries: it is as on the first.
    several = [number for number in channels if number > 1]
    skipped = "" if several else "one flow alone does not share it"
    if several:
        shared = Link(flows[0], LINK_FLOWS * flows[0])
        try:
            found[shared] = measured(shared, several)
        except CannotRun as reason:  # pacing asks for nothing, a shared link does
            skipped = str(reason)
            progress(f"links: no shared link: {reason}")
    tables = [table(link, usual, figures) for link, figures in found.items()]
    if skipped:
        tables[-1] = replace(tables[-1], note=f"{tables[-1].note} A shared link was not measured: {skipped}.")
    finish(
        options,
        {
            "links": [
                {"link": asdict(link), "figures": [asdict(f) for f in figures]}
                for link, figures in found.items()
            ],
            "shared_link_skipped": skipped,
        },
        tables,
        lambda path: draw(first, found[first], path),
    )


if __name__ == "__main__":
    main()
