"""Two fresh processes, one that receives and one that sends, and what each spent.

Both are module-level functions that return what they measured. The receiver calls `on_listening` with its port; the sender
gets the address to which the route leads it.
"""

from __future__ import annotations

import multiprocessing
import resource
import signal
import sys
import time
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from .namespace import enter
from .options import BenchFailed, why

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from multiprocessing.connection import Connection

Job = TypeVar("Job")
Sent = TypeVar("Sent")
Received = TypeVar("Received")

# Loaded once, by the process from which all others are forked: most of a second less for each.
_PRELOADED: Final = ("bench.sealed", "bench.tcp")
LOOPBACK: Final = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Side:
    """What one side spent, in all of its processes."""

    seconds: float
    cpu_seconds: float
    peak_extra_mib: float
    page_faults: int = 0


class Watch:
    """What this process and its children spend from here on; those that are `spared` (a guest's vCPUs) are not counted.

    A child counts as it stood at the last `look`: whoever has children looks while they live.
    """

    def __init__(self, spared: frozenset[int] = frozenset()) -> None:
        self._spared = spared
        self._began = time.monotonic()
        self._cpu = time.process_time()
        self._faults = _page_faults()
        self._children: dict[int, tuple[float, float]] = {}
        self.look()
        self._at_first = self._children.copy()

    def look(self) -> None:
        """See what each child has spent so far."""
        for child in children() - self._spared:
            with suppress(OSError):  # gone meanwhile: what was seen last stands
                self._children[child] = time.clock_gettime(cpu_clock(child)), _peak_mib(child)

    def side(self, guest_bytes: int) -> Side:
        """Seconds, CPU seconds, and the largest resident memory beyond guest RAM that the processes ever had."""
        seconds, cpu = time.monotonic() - self._began, time.process_time() - self._cpu
        self.look()
        cpu += sum(
            now - self._at_first.get(child, (0.0, 0.0))[0] for child, (now, _) in self._children.items()
        )
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - guest_bytes / 2**20
        peak += sum(mib for _, mib in self._children.values())
        return Side(seconds, cpu, peak, _page_faults() - self._faults)


def children() -> frozenset[int]:
    """Process ids of this process's children."""
    return frozenset(
        int(child)
        for listed in Path("/proc/self/task").glob("*/children")
        for child in listed.read_text().split()
    )


def cpu_clock(process_id: int) -> int:
    """The clock of all CPU time of a process: MAKE_PROCESS_CPUCLOCK with CPUCLOCK_SCHED, linux/posix-timers.h."""
    return ~process_id << 3 | 2


def _peak_mib(process_id: int) -> float:
    """The largest memory that a process ever had, less what it shares with its parent: a mailbox, which counts there.

    Of shared memory there is no highest value, only how much there is now: a mailbox once touched stays.
    """
    lines = Path(f"/proc/{process_id}/status").read_text().splitlines()
    kib = {
        line.split()[0]: int(line.split()[1]) for line in lines if line.startswith(("VmHWM:", "RssShmem:"))
    }
    return (kib.get("VmHWM:", 0) - kib.get("RssShmem:", 0)) / 1024  # a process at its end has no memory


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@dataclass(frozen=True, slots=True)
class Route:
    """The way from sender to receiver: by default loopback, with nothing in between.

    The receiver listens at `host`; `lead` turns its port into the one to which the sender connects. A namespace is the name
    of a network namespace to work in, empty for this process's own.
    """

    host: str = LOOPBACK
    lead: Callable[[int], AbstractContextManager[int]] = nullcontext
    sender_namespace: str = ""
    receiver_namespace: str = ""


DIRECT: Final = Route()


class SideFailed(BenchFailed):
    """A process of a pair ended without a result; its own output says why."""


def run_pair(
    receive: Callable[[Job, str, Callable[[int], None]], Received],
    send: Callable[[Job, str, int], Sent],
    job: Job,
    route: Route = DIRECT,
) -> tuple[Sent, Received]:
    """Run both sides of `job` in processes of their own. Raises SideFailed where one ends without a result."""
    try:
        with (
            _child(_receive, receive, job, route.host, route.receiver_namespace) as receiver,
            route.lead(receiver.recv()) as port,
            _child(_send, send, job, route.host, port, route.sender_namespace) as sender,
        ):
            sent: Sent = sender.recv()
            received: Received = receiver.recv()
            return sent, received
    except EOFError:
        raise SideFailed("a process of the pair ended without a result") from None


@contextmanager
def _child(target: Callable[..., None], *arguments: object) -> Iterator[Connection]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", *_PRELOADED])
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *arguments))
    process.start()
    theirs.close()  # so that a child that dies ends the wait for its result
    try:
        yield ours
        process.join()
    finally:
        process.kill()
        process.join()


def _receive(
    pipe: Connection,
    receive: Callable[[Job, str, Callable[[int], None]], object],
    job: Job,
    host: str,
    namespace: str,
) -> None:
    _side(pipe, namespace, lambda: receive(job, host, pipe.send))


def _send(
    pipe: Connection, send: Callable[[Job, str, int], object], job: Job, host: str, port: int, namespace: str
) -> None:
    _side(pipe, namespace, lambda: send(job, host, port))


def _side(pipe: Connection, namespace: str, work: Callable[[], object]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it as well, and ends its children
    try:
        enter(namespace)
        pipe.send(work())
    except Exception as error:
        end = why(error)
        if end is None:
            raise
        # Before this process lets go of the pipe, whose end has it killed.
        print(end[1], file=sys.stderr, flush=True)
        sys.exit(end[0])
