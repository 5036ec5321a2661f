"""Two eventfds between two processes: the least that waking an SVSM of its own and hearing its answer can take.

python -m bench.doorbell BELL ANSWER    the other process: answers every ring, until it is killed
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_START_TIMEOUT_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class RoundTrips:
    """Microseconds from a ring to the answer, of which half and 99 of 100 took at most so much."""

    calls: int
    p50_us: float
    p99_us: float

    @classmethod
    def of(cls, seconds: NDArray[np.float64]) -> RoundTrips:
        half, most = np.percentile(seconds * 1e6, [50, 99])
        return cls(len(seconds), float(half), float(most))


def ping_pong(calls: int) -> RoundTrips:
    """Ring a process of its own, which sleeps on its doorbell, and sleep until it answers."""
    bell, answer = os.eventfd(0, os.EFD_CLOEXEC), os.eventfd(0, os.EFD_CLOEXEC)
    command = [sys.executable, "-m", "bench.doorbell", str(bell), str(answer)]
    try:
        with subprocess.Popen(command, pass_fds=(bell, answer)) as process:
            try:
                return _measure(bell, answer, calls)
            finally:
                process.kill()
    finally:
        os.close(bell)
        os.close(answer)


def _measure(bell: int, answer: int, calls: int) -> RoundTrips:
    os.eventfd_write(bell, 1)
    if not select.select([answer], [], [], _START_TIMEOUT_S)[0]:
        raise TimeoutError("the process behind the doorbell does not answer")
    os.eventfd_read(answer)
    taken = np.empty(calls)
    for call in range(calls):
        began = perf_counter()
        os.eventfd_write(bell, 1)
        os.eventfd_read(answer)
        taken[call] = perf_counter() - began
    return RoundTrips.of(taken)


def _answer(bell: int, answer: int) -> None:
    while True:
        os.eventfd_read(bell)
        os.eventfd_write(answer, 1)


if __name__ == "__main__":
    _answer(int(sys.argv[1]), int(sys.argv[2]))
