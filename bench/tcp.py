"""Plain TCP, the limit of every migration: bytes over N connections between two trio processes, and nothing else.

All buffers are there, and were written, before the time is taken. The sender has one for all connections, since it has
nothing to tell apart; the receiver one for each, as whoever uses what comes has to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import trio

from .pair import DIRECT, Route, Side, Watch, run_pair

if TYPE_CHECKING:
    from collections.abc import Callable

# About half of one of the engine's bundles. With all of one it takes the same CPU.
BUFFER_BYTES: Final = 1 << 20
# Nobody on the way looks at it, so it need not be random.
_CONTENT: Final = bytes(range(256)) * (BUFFER_BYTES // 256)


@dataclass(frozen=True, slots=True)
class Plain:
    """How many bytes go over how many connections."""

    total_bytes: int
    streams: int


def run_plain(job: Plain, route: Route = DIRECT) -> tuple[Side, Side]:
    """Send the bytes between two fresh processes; what the sender and the receiver spent."""
    return run_pair(receive, send, job, route)


def receive(job: Plain, host: str, on_listening: Callable[[int], None]) -> Side:
    """Take everything, in a process of its own."""

    async def main() -> Side:
        listeners = await trio.open_tcp_listeners(0, host=host)
        on_listening(listeners[0].socket.getsockname()[1])
        streams = [await listeners[0].accept() for _ in range(job.streams)]
        buffers = [bytearray(_CONTENT) for _ in streams]
        watch = Watch()
        async with trio.open_nursery() as nursery:
            for stream, buffer in zip(streams, buffers, strict=True):
                nursery.start_soon(drain, stream, buffer)
        return watch.side(0)

    async def drain(stream: trio.SocketStream, buffer: bytearray) -> None:
        while await stream.socket.recv_into(buffer):
            pass
        await stream.send_all(b"!")

    return trio.run(main)


def send(job: Plain, host: str, port: int) -> Side:
    """Send everything, in a process of its own."""

    async def main() -> Side:
        streams = [await trio.open_tcp_stream(host, port) for _ in range(job.streams)]
        buffer = memoryview(bytearray(_CONTENT))
        watch = Watch()
        async with trio.open_nursery() as nursery:
            for stream in streams:
                nursery.start_soon(pour, stream, buffer, job.total_bytes // job.streams)
        return watch.side(0)

    async def pour(stream: trio.SocketStream, buffer: memoryview, size: int) -> None:
        for start in range(0, size, BUFFER_BYTES):
            await stream.send_all(buffer[: size - start])
        await stream.send_eof()
        await stream.receive_some(1)

    return trio.run(main)
