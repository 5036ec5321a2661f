"""How all benches measure: alternating repeats, so that a disturbance or a change of clock hits every case alike."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, TypeVar

import cryptography
import numpy as np
import trio
from cryptography.hazmat.backends.openssl import backend

from .files import write_whole

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
    """What a figure depends on besides the code: stands at the head of every result file.

    To be read before anything is measured: a checkout may change meanwhile, and measuring is a load itself.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "revision": revision(Path(__file__).parents[1]),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "cryptography": cryptography.__version__,
        "openssl": backend.openssl_version_text(),
        "trio": trio.__version__,
        "kernel": platform.release(),
        "cpu": _cpu_model(),
        "cpus": os.cpu_count() or 0,
        "usable cpus": len(os.sched_getaffinity(0)),
        "ram": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB",
        "load before": " ".join(f"{load:.2f}" for load in os.getloadavg()),
    }


def write_json(path: Path, result: Mapping[str, object]) -> None:
    """Write a result file. Raises OSError where that fails, and leaves an older one as it was."""
    write_whole(path, f"{json.dumps(result, indent=2)}\n".encode())


def revision(checkout: Path) -> str:
    """The commit that is measured, with +dirty where the code of pagexfer or of the benches is not that of the commit."""
    commit = _git(checkout, "rev-parse", "--verify", "--quiet", "HEAD")
    changed = _git(checkout, "status", "--porcelain", "--", "pagexfer", "bench")
    return (commit or "unknown") + ("+dirty" if changed else "")


def _git(checkout: Path, *arguments: str) -> str:
    # Without the lock: others may be at work in this checkout.
    command = ["git", "--no-optional-locks", *arguments]
    try:
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git here
        return ""
    return done.stdout.strip()


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()
