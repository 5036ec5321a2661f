"""Two fresh processes, one that receives and one that sends, and what each spent.

Both are module-level functions that return what they measured. The receiver calls `on_listening` with its port; the sender
gets the address to which the route leads it.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

from .namespace import enter

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
    """What one process spent."""

    seconds: float
    cpu_seconds: float
    peak_extra_mib: float


class Watch:
    """What this process spends from here on."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._cpu = time.process_time()

    def side(self, guest_bytes: int) -> Side:
        """Seconds, CPU seconds, and the largest resident memory beyond guest RAM that this process ever had."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - guest_bytes / 2**20
        return Side(time.monotonic() - self._began, time.process_time() - self._cpu, peak)


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


class SideFailed(Exception):
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
    enter(namespace)
    pipe.send(receive(job, host, pipe.send))


def _send(
    pipe: Connection, send: Callable[[Job, str, int], object], job: Job, host: str, port: int, namespace: str
) -> None:
    enter(namespace)
    pipe.send(send(job, host, port))
