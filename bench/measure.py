"""How all benches measure: alternating repeats, so that a disturbance or a change of clock hits every case alike."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, TypeVar

import cryptography
import numpy as np
import trio

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

Name = TypeVar("Name")


@dataclass(frozen=True, slots=True)
class Spread:
    """The `n` repeats of one case, in their order, and their median, lowest and highest; seconds unless said otherwise."""

    median: float
    minimum: float
    maximum: float
    n: int
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values), len(values), tuple(values))

    def scaled(self, factor: float) -> Spread:
        return Spread.of([value * factor for value in self.values])

    def rate(self, amount: float) -> Spread:
        """Of seconds: how much of `amount` is done in one. The longest time is the lowest rate."""
        return Spread.of([amount / value for value in self.values])

    def cells(self, digits: int) -> tuple[str, str, str]:
        """Median, lowest and highest for a table. A single value has a median, and says nothing of a spread."""
        lowest, highest = (
            ("-", "-") if self.n == 1 else (f"{self.minimum:.{digits}f}", f"{self.maximum:.{digits}f}")
        )
        return f"{self.median:.{digits}f}", lowest, highest


@dataclass(frozen=True, slots=True)
class Case:
    """What one repeat runs: `prepare`, not timed, then `calls` calls of `run`, of which the time per call counts."""

    run: Callable[[], object]
    prepare: Callable[[], object] | None = None
    calls: int = 1

    def seconds(self) -> float:
        if self.prepare is not None:
            self.prepare()
        start = perf_counter()
        for _ in range(self.calls):
            self.run()
        return (perf_counter() - start) / self.calls


def rotated(names: Iterable[Name], round_: int) -> list[Name]:
    """The order of one round: each begins with another, as whoever comes first may find the machine as nobody else does."""
    listed = list(names)
    first = round_ % len(listed) if listed else 0
    return listed[first:] + listed[:first]


def alternate(cases: Mapping[str, Case], repeats: int) -> dict[str, Spread]:
    """Seconds per call of each case over `repeats` rounds; a first round warms up and does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for round_ in range(repeats + 1):
        for name in rotated(cases, round_):
            taken = cases[name].seconds()
            if round_:
                seconds[name].append(taken)
    return {name: Spread.of(values) for name, values in seconds.items()}


def environment() -> dict[str, str | int]:
    """What a figure depends on besides the code: stands at the head of every result file."""
    return {
        "revision": _revision(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "cryptography": cryptography.__version__,
        "trio": trio.__version__,
        "kernel": platform.release(),
        "cpu": _cpu_model(),
        "cpus": os.cpu_count() or 0,
    }


def write_json(path: Path, result: Mapping[str, object]) -> None:
    """Write one bench's result with its environment. Ends the process with code 1 and one line where that fails."""
    try:
        path.write_text(json.dumps({"environment": environment(), **result}, indent=2) + "\n")
    except OSError as error:
        sys.exit(f"cannot write {path}: {error.strerror}")


def _revision() -> str:
    command = ["git", "rev-parse", "--verify", "--quiet", "HEAD"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git here
        return "unknown"
    return done.stdout.strip() or "unknown"


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()
