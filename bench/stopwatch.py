"""CPU time of single calls, taken inside the process under test: which part of its CPU seconds goes where.

A call's time is what its thread spent in it, less the timed calls within it and less what taking the time costs, which is
measured first. Only calls that happen a few times a bundle are timed, so that the timing stays below a per cent.
"""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass
from time import thread_time
from typing import TYPE_CHECKING, Final, ParamSpec, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_TRIALS: Final = 20_000


@dataclass(frozen=True, slots=True)
class Timed:
    """All calls of one kind."""

    calls: int
    cpu_seconds: float


class _Level(threading.local):
    """Of the timed call that is under way in a thread: what timed calls within it took, and how many there were."""

    seconds = 0.0
    calls = 0


class Stopwatch:
    """Times the functions that `timed` makes, by kind."""

    def __init__(self) -> None:
        self._level = _Level()
        self._calls: dict[str, int] = {}
        self._seconds: dict[str, float] = {}
        # A call of a timed function costs `_whole` more than one of the function itself, of which the clock sees `_seen`.
        self._whole, self._seen = 0.0, 0.0
        self._whole, self._seen = self._cost()
        self.lap()

    @property
    def overhead_seconds(self) -> float:
        """What the timing itself took since the last lap, as far as no kind has it."""
        return sum(self._calls.values()) * self._whole

    def lap(self) -> dict[str, Timed]:
        """What was timed since the last lap; from here on anew."""
        taken = {
            kind: Timed(calls, max(self._seconds[kind] - calls * self._seen, 0.0))
            for kind, calls in self._calls.items()
        }
        self._calls, self._seconds = {}, {}
        return taken

    def add(self, kind: str, seconds: float) -> None:
        """Time that was taken elsewhere, as one call."""
        self._calls[kind] = self._calls.get(kind, 0) + 1
        self._seconds[kind] = self._seconds.get(kind, 0.0) + seconds

    def timed(self, kind: str, function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        """`function`, with its time on the account of `kind`."""
        level = self._level

        @functools.wraps(function)
        def call(*arguments: Arguments.args, **keywords: Arguments.kwargs) -> Result:
            outer_seconds, outer_calls = level.seconds, level.calls
            level.seconds, level.calls = 0.0, 0
            began = thread_time()
            try:
                return function(*arguments, **keywords)
            finally:
                took = thread_time() - began
                # What the clock did not see of calls within was seen by this one.
                unseen = level.calls * (self._whole - self._seen)
                self.add(kind, took - level.seconds - unseen)
                level.seconds, level.calls = outer_seconds + took, outer_calls + 1

        return call

    def _cost(self) -> tuple[float, float]:
        def nothing() -> None:
            return

        timed = self.timed("", nothing)
        began = thread_time()
        for _ in range(_TRIALS):
            nothing()
        bare = thread_time() - began
        began = thread_time()
        for _ in range(_TRIALS):
            timed()
        return (thread_time() - began - bare) / _TRIALS, self._seconds[""] / _TRIALS
