"""How fast a simulated vCPU writes: a token bucket in bytes. Pure: the time comes in as an argument."""

from __future__ import annotations

from typing import Final

from ...wire.constants import PAGE_SIZE

# Pages written between two looks at the global flag: about a quarter of a millisecond of work.
MAX_BATCH_PAGES: Final = 64

# How much of a sleep that took too long may be caught up. It bounds the burst, too.
_DEPTH_SECONDS: Final = 0.02

# A batch is worth this much of the rate, so that a slow guest writes evenly and a fast one seldom sleeps.
_BATCH_SECONDS: Final = 0.001


def burst_bytes(rate: float) -> float:
    """The most that one vCPU of `rate` bytes a second writes beyond its rate."""
    return max(float(PAGE_SIZE), rate * _DEPTH_SECONDS)


class Pace:
    """Tokens of one vCPU that may write `rate` bytes a second (0: none), from time `now` (seconds) on."""

    def __init__(self, rate: float, now: float) -> None:
        self._rate = rate
        self._batch_pages = min(max(int(rate * _BATCH_SECONDS) // PAGE_SIZE, 1), MAX_BATCH_PAGES)
        self._tokens = 0.0
        self._last = now

    def pages_allowed(self, now: float) -> int:
        """Pages that may be written at once: nothing as long as a whole batch is not earned."""
        self._tokens = min(self._tokens + (now - self._last) * self._rate, burst_bytes(self._rate))
        self._last = now
        pages = min(int(self._tokens) // PAGE_SIZE, MAX_BATCH_PAGES)
        return pages if pages >= self._batch_pages else 0

    def spend(self, pages: int) -> None:
        """Take the tokens of `pages` that were written."""
        self._tokens -= pages * PAGE_SIZE

    def delay(self) -> float:
        """Seconds from the last `pages_allowed` until a batch is earned; infinite at rate 0."""
        if not self._rate:
            return float("inf")
        missing = self._batch_pages * PAGE_SIZE - self._tokens
        return max(0.0, missing / self._rate)
