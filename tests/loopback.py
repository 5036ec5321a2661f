"""Real TCP connections on the loopback interface, ours at one end and whatever a test needs at the other."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import trio

from pagexfer.engine.streams import Connection, Listener, connect, listen

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

HOST: Final = "127.0.0.1"
STALL_S: Final = 5.0


@asynccontextmanager
async def connections(stall_timeout_s: float = STALL_S) -> AsyncIterator[tuple[Connection, Connection]]:
    """Two ends of one connection: who connected, who accepted."""
    listener = await listen(HOST, 0, stall_timeout_s)
    try:
        ours = await connect(HOST, listener.port, stall_timeout_s)
        theirs = await accept_one(listener)
    finally:
        listener.close()
    try:
        yield ours, theirs
    finally:
        ours.close()
        theirs.close()


@asynccontextmanager
async def connection_and_peer(
    stall_timeout_s: float = STALL_S,
) -> AsyncIterator[tuple[Connection, trio.SocketStream]]:
    """Our end of a connection and a plain stream as the peer's."""
    listener = await listen(HOST, 0, stall_timeout_s)
    try:
        peer = await trio.open_tcp_stream(HOST, listener.port)
        ours = await accept_one(listener)
    finally:
        listener.close()
    try:
        async with peer:
            yield ours, peer
    finally:
        ours.close()


async def accept_one(listener: Listener) -> Connection:
    """The next connection that arrives."""
    send, receive = trio.open_memory_channel[Connection](1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(listener.accept_into, send)
        connection = await receive.receive()
        nursery.cancel_scope.cancel()
    return connection
