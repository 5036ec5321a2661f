"""What the runs of `hosts` come to: figures by number of channels, their table and their plot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from .measure import Spread
from .table import Table

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

GIB: Final = 1 << 30
# Rates that are so near to the best are as good: the fewest channels that reach one of them are what to take.
_AS_GOOD: Final = 0.95

COLUMNS: Final = (
    "channels",
    "",
    "GB/s",
    "of TCP",
    "min",
    "max",
    "CPU s/GiB",
    "both",
    "downtime ms",
    "epochs",
    "sent / RAM",
    "sent again",
    "converged",
)


@dataclass(frozen=True, slots=True)
class Plain:
    """A run of plain TCP: seconds, CPU seconds of source and destination, segments that the source had to send again."""

    seconds: float
    cpu_seconds: tuple[float, float]
    sent_again: int


@dataclass(frozen=True, slots=True)
class Sealed:
    """A move, the same way. One that does not converge is given up after `seconds`."""

    seconds: float
    cpu_seconds: tuple[float, float]
    sent_again: int
    converged: bool
    downtime_ms: float
    epochs: int
    sent_bytes: int
    dirty_pages_per_s: float


@dataclass(frozen=True, slots=True)
class Pair:
    """Plain TCP, and the move that came right after it, of as many bytes over as many connections."""

    round: int
    channels: int
    ram_bytes: int
    round_trip_ms: float
    plain: Plain
    sealed: Sealed

    @property
    def of_tcp(self) -> float:
        return self.plain.seconds / self.sealed.seconds


@dataclass(frozen=True, slots=True)
class Figure:
    """All pairs with one number of channels. Rates and ratios are of the moves that converged, None without any."""

    channels: int
    runs: int
    converged: int
    plain_gb_per_s: Spread
    plain_cpu_s_per_gib: tuple[Spread, Spread]
    plain_sent_again: Spread
    gb_per_s: Spread | None
    of_tcp: Spread | None
    cpu_s_per_gib: tuple[Spread, Spread]
    downtime_ms: Spread | None
    epochs: Spread
    sent_of_ram: Spread
    sent_again: Spread


def figures(pairs: list[Pair]) -> list[Figure]:
    """By number of channels, the fewest first."""
    return [
        _figure([pair for pair in pairs if pair.channels == channels])
        for channels in sorted({pair.channels for pair in pairs})
    ]


def _figure(pairs: list[Pair]) -> Figure:
    done = [pair for pair in pairs if pair.sealed.converged]

    def of_done(value: Callable[[Pair], float]) -> Spread | None:
        return Spread.of([value(pair) for pair in done]) if done else None

    return Figure(
        pairs[0].channels,
        len(pairs),
        len(done),
        Spread.of([pair.ram_bytes / 1e9 / pair.plain.seconds for pair in pairs]),
        _cpu(pairs, lambda pair: pair.plain.cpu_seconds),
        Spread.of([pair.plain.sent_again for pair in pairs]),
        of_done(lambda pair: pair.ram_bytes / 1e9 / pair.sealed.seconds),
        of_done(lambda pair: pair.of_tcp),
        _cpu(pairs, lambda pair: pair.sealed.cpu_seconds),
        of_done(lambda pair: pair.sealed.downtime_ms),
        Spread.of([pair.sealed.epochs for pair in pairs]),
        Spread.of([pair.sealed.sent_bytes / pair.ram_bytes for pair in pairs]),
        Spread.of([pair.sealed.sent_again for pair in pairs]),
    )


def _cpu(pairs: list[Pair], of: Callable[[Pair], tuple[float, float]]) -> tuple[Spread, Spread]:
    source, destination = (
        Spread.of([of(pair)[side] / pair.ram_bytes * GIB for pair in pairs]) for side in (0, 1)
    )
    return source, destination


def table(title: str, found: list[Figure]) -> Table:
    """Two rows for each number of channels; the note says which number to take."""
    rows: list[tuple[str, ...]] = []
    for figure in found:
        name = str(figure.channels)
        plain = figure.plain_gb_per_s, figure.plain_cpu_s_per_gib, figure.plain_sent_again
        rows += [(name, "plain TCP", *_plain_cells(*plain)), (name, "sealed", *_sealed_cells(figure))]
    return Table.of(title, COLUMNS, rows, advice(found))


def advice(found: list[Figure]) -> str:
    """How many channels are enough."""
    rates = {f.channels: f.gb_per_s.median for f in found if f.gb_per_s is not None}
    if not rates:
        return "No move converged: the guest writes faster than any number of these channels carries."
    best = max(rates, key=lambda channels: rates[channels])
    enough = min(channels for channels, rate in rates.items() if rate >= _AS_GOOD * rates[best])
    return (
        f"RAM moved fastest over {_channels(best)}; the fewest that come within {1 - _AS_GOOD:.0%} of that: {enough}. "
        '"of TCP" is a median of pairs, with min and max.'
    )


def _channels(number: int) -> str:
    return "1 channel" if number == 1 else f"{number} channels"


def _plain_cells(rate: Spread, cpu: tuple[Spread, Spread], again: Spread) -> tuple[str, ...]:
    return (
        _rate(rate),
        "1.00",
        "",
        "",
        *_cpu_cells(cpu),
        "",
        "",
        "",
        f"{again.median:.0f}",
        "",
    )


def _sealed_cells(figure: Figure) -> tuple[str, ...]:
    rate, ratio, downtime = figure.gb_per_s, figure.of_tcp, figure.downtime_ms
    ratios = ("-",) * 3 if ratio is None else (ratio.median, ratio.minimum, ratio.maximum)
    return (
        "-" if rate is None else _rate(rate),
        *(part if isinstance(part, str) else f"{part:.2f}" for part in ratios),
        *_cpu_cells(figure.cpu_s_per_gib),
        "-" if downtime is None else f"{downtime.median:.1f}",
        f"{figure.epochs.median:.0f}",
        f"{figure.sent_of_ram.median:.2f}",
        f"{figure.sent_again.median:.0f}",
        f"{figure.converged} of {figure.runs}",
    )


def _rate(rate: Spread) -> str:
    return f"{rate.median:#.3g}"  # networks differ by a thousand


def _cpu_cells(cpu: tuple[Spread, Spread]) -> tuple[str, str]:
    source, destination = cpu
    return f"{source.median:.2f} + {destination.median:.2f}", f"{source.median + destination.median:.2f}"


def draw(found: list[Figure], path: Path) -> None:
    """Throughput and its ratio to plain TCP over the number of channels."""
    from .plots import new_figure, save

    drawn, (rates, ratios) = new_figure(2)
    rates.plot(
        [str(f.channels) for f in found],
        [f.plain_gb_per_s.median for f in found],
        "o--",
        color="0.5",
        label="plain TCP",
    )
    sealed = [(f.channels, f.gb_per_s.median) for f in found if f.gb_per_s is not None]
    rates.plot([str(channels) for channels, _ in sealed], [rate for _, rate in sealed], "o-", label="sealed")
    spreads = [(f.channels, f.of_tcp) for f in found if f.of_tcp is not None]
    ratios.errorbar(
        [str(channels) for channels, _ in spreads],
        [ratio.median for _, ratio in spreads],
        yerr=[
            [ratio.median - ratio.minimum for _, ratio in spreads],
            [ratio.maximum - ratio.median for _, ratio in spreads],
        ],
        fmt="o-",
        capsize=3,
        label="median, with min and max",
    )
    rates.set(xlabel="channels", ylabel="GB of RAM per second", ylim=(0, None), title="Throughput")
    ratios.set(xlabel="channels", ylabel="sealed / plain TCP", ylim=(0, None), title="Ratio to plain TCP")
    save(drawn, path)
