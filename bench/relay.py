"""A relay between source and destination that limits every flow by itself, as clouds, tunnels and long paths do.

It takes each connection, makes one of its own to the destination and has the kernel pace that one (SO_MAX_PACING_RATE),
which needs no root. Both ends under test stay as they are. It runs in threads of the bench's own process, which has nothing
else to do meanwhile; the bytes go from socket to pipe to socket within the kernel.
"""

from __future__ import annotations

import os
import socket
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

from .pair import LOOPBACK

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_SO_MAX_PACING_RATE: Final = 47  # asm-generic/socket.h; Python's socket has no name for it
_BACKLOG: Final = 128
# What a pipe holds unless it is told otherwise.
_STEP_BYTES: Final = 1 << 16
# What a socket here may hold; the kernel doubles it for its own bookkeeping. Left alone, the receiving one takes megabytes
# in advance, a tenth of a second of a slow flow. So both together hold some 0.4 MB, which is enough for a flow over
# loopback. What waits in the source's own socket is the source's affair.
_QUEUE_BYTES: Final = 1 << 18


@contextmanager
def paced_relay(
    port: int, flow_bytes_per_s: int, on_carried: Callable[[int], object] = lambda _bytes: None
) -> Iterator[int]:
    """A relay to `port` of this machine; yields its own port. All connections end with the context.

    `on_carried` gets, in a thread of the relay, the number of bytes of each step towards that port, once they are on it.
    """
    sockets: list[socket.socket] = []
    threads: list[threading.Thread] = []
    with socket.socket() as listener:
        # Before it listens: the connections that come have the limit from it.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _QUEUE_BYTES)
        listener.bind((LOOPBACK, 0))
        listener.listen(_BACKLOG)
        accepting = threading.Thread(
            target=_accept, args=(listener, port, flow_bytes_per_s, on_carried, sockets, threads), daemon=True
        )
        accepting.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
            accepting.join()
            for sock in sockets:
                with suppress(OSError):  # it may have ended by itself
                    sock.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join()
            for sock in sockets:
                sock.close()


def _accept(
    listener: socket.socket,
    port: int,
    flow_bytes_per_s: int,
    on_carried: Callable[[int], object],
    sockets: list[socket.socket],
    threads: list[threading.Thread],
) -> None:
    while True:
        try:
            near, _ = listener.accept()
        except OSError:
            return
        far = socket.create_connection((LOOPBACK, port))
        far.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, flow_bytes_per_s)
        for buffer in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            far.setsockopt(socket.SOL_SOCKET, buffer, _QUEUE_BYTES)
        for sock in (near, far):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sockets += (near, far)
        for source, target, tell in ((near, far, on_carried), (far, near, _nobody)):
            threads.append(threading.Thread(target=_forward, args=(source, target, tell), daemon=True))
            threads[-1].start()


def _nobody(_bytes: int) -> None:
    """Answers are not counted."""


def _forward(source: socket.socket, target: socket.socket, tell: Callable[[int], object]) -> None:
    """Carry bytes one way until that way ends; where it breaks, both connections do."""
    reader, writer = os.pipe()
    try:
        while waiting := os.splice(source.fileno(), writer, _STEP_BYTES):
            while waiting:
                moved = os.splice(reader, target.fileno(), waiting)
                tell(moved)
                waiting -= moved
        target.shutdown(socket.SHUT_WR)
    except OSError:
        for sock in (source, target):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
    finally:
        os.close(reader)
        os.close(writer)
