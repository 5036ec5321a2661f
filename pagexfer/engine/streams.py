"""The one seam to the network: opens sockets, moves bytes, and turns trio's and the kernel's errors into ours.

No other file of the engine touches a socket. `ChannelClosed` is what we did ourselves, `ChannelBroken` what the peer or
the network did; every wait on a peer has a timeout.
"""

from __future__ import annotations

import errno
import os
import resource
import select
import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import trio

from ..errors import ChannelBroken, ChannelClosed, MalformedData, UsageError
from ..wire.framing import FRAME_HEADER_BYTES, FrameHeader, FrameType, parse_frame_header_untrusted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .threads import Interrupt

CONNECT_TIMEOUT_S: Final = 10.0
# How long a peer may be silent in the middle of something: as long as a TCP connection survives a short outage, and
# short enough that a parked guest is not kept waiting by a dead peer for minutes.
STALL_TIMEOUT_S: Final = 30.0
# A part of a bundle: the rest arrives while the first part is copied out of the kernel.
_WAKE_BYTES: Final = 1 << 18
# A sender waits until less than a bundle has not left the kernel. The kernel alone would wake it when a third of the buffer
# is free, and take a bundle in four parts.
_UNSENT_BYTES: Final = 1 << 21
# Linux, asm-generic/socket.h; Python's socket module does not name it. An unsigned long: bytes a second, all ones no limit.
_SO_MAX_PACING_RATE: Final = 47
_NO_PACE: Final = 2**64 - 1
# Where struct tcp_info of linux/tcp.h has the shortest round trip, in microseconds.
_MIN_RTT: Final = slice(148, 152)
_NO_NAME: Final = "this is no host name"


class Connection:
    """A TCP connection that carries frames. One task sends and one receives at a time.

    It works on a plain non-blocking socket: the kernel is asked first, and only where it has no room or no data does the
    task wait. That saves a turn of the event loop for every call that can be served at once. While it is lent to a thread
    without an event loop, that one waits in the kernel.
    """

    def __init__(self, sock: socket.socket, stall_timeout: float = STALL_TIMEOUT_S) -> None:
        self._socket = sock
        self._woken_at = 1
        self._turn_due = True
        self.ended = False  # whether peer, network or this side ended it, as far as anybody noticed
        self._pace = _NO_PACE
        self._thread: Interrupt | None = None
        self.stall_timeout = stall_timeout
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)
        self.peer = _peer_name(sock)

    @contextmanager
    def lent_to(self, interrupt: Interrupt) -> Iterator[None]:
        """For the time of the block, whoever sends or receives is a thread without an event loop."""
        self._thread = interrupt
        try:
            yield
        finally:
            self._thread = None

    async def send(self, data: memoryview | bytes) -> None:
        """Send all of `data`, and let other tasks run. Raises ChannelBroken or ChannelClosed."""
        try:
            rest = self._send_some(memoryview(data))
            if not rest:
                await self._take_turn()
            while rest:
                if not await self._wait(select.POLLOUT, self.stall_timeout):
                    raise self._ended(f"{self.peer} takes no data for {self.stall_timeout:g} s")
                rest = self._send_some(rest)
        except (OSError, trio.ClosedResourceError) as error:
            raise self._broken(error) from None

    async def receive_into(self, view: memoryview, timeout: float | None = None) -> None:
        """Receive exactly `len(view)` bytes, waiting `timeout` seconds (by default the stall timeout) for each part.

        Raises ChannelBroken where the peer ends before or is silent for so long, or ChannelClosed.
        """
        timeout = self.stall_timeout if timeout is None else timeout
        try:
            rest = self._receive_some(view)
            while rest:
                self._turn_due = False
                self._wake_at(min(len(rest), _WAKE_BYTES))
                if not await self._wait(select.POLLIN, timeout):
                    raise self._ended(f"{self.peer} sends nothing for {timeout:g} s")
                rest = self._receive_some(rest)
        except (OSError, trio.ClosedResourceError) as error:
            raise self._broken(error) from None

    async def send_frame(self, frame_type: FrameType, payload: bytes) -> None:
        """Send one small frame."""
        await self.send(FrameHeader(frame_type, len(payload)).pack() + payload)

    async def receive_header(self, idle_timeout: float | None = None) -> FrameHeader:
        """Receive the header of the next frame, for which the peer may take `idle_timeout` seconds.

        Raises MalformedData where it is none.
        """
        # A turn of the event loop for every frame that was received without waiting: a peer that always has data must not
        # keep all other tasks, and a cancel, waiting. Before the first byte, so that a cancel leaves no half-read frame.
        if self._turn_due:
            await self._take_turn()
        self._turn_due = True
        header = bytearray(FRAME_HEADER_BYTES)
        await self.receive_into(memoryview(header), idle_timeout)
        return parse_frame_header_untrusted(bytes(header))

    async def receive_payload(self, header: FrameHeader) -> bytes:
        """Receive the payload of a frame by value."""
        payload = bytearray(header.payload_bytes)
        await self.receive_into(memoryview(payload))
        return bytes(payload)

    async def receive_frame(self, frame_type: FrameType) -> bytes:
        """Receive one frame of this type by value. Raises MalformedData for any other."""
        header = await self.receive_header()
        if header.type is not frame_type:
            raise MalformedData(f"{header.type.name} frame where {frame_type.name} is due")
        return await self.receive_payload(header)

    async def wait_end(self) -> None:
        """Until the connection ends, or the peer sends something; for one on which the peer has nothing to say."""
        try:
            if self._socket.fileno() >= 0:
                await trio.lowlevel.wait_readable(self._socket)
        except (OSError, trio.ClosedResourceError):
            await trio.lowlevel.checkpoint()
        self.ended = True

    def round_trip_s(self) -> float:
        """Seconds to the peer and back at best, as the kernel has measured them; 0 where it cannot say any more."""
        try:
            info = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _MIN_RTT.stop)
        except OSError:
            return 0.0
        return int.from_bytes(info[_MIN_RTT], "little") / 1e6

    def pace(self, bytes_per_second: int | None) -> None:
        """Have the kernel send no faster than this from now on; None is no limit. Raises ChannelBroken or ChannelClosed."""
        pace = _NO_PACE if bytes_per_second is None else bytes_per_second
        if pace == self._pace:
            return
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, pace.to_bytes(8, "little"))
        except OSError as error:
            raise self._broken(error) from None
        self._pace = pace

    def close(self) -> None:
        """Close at once; a task that waits on the connection sees ChannelClosed."""
        self.ended = True
        if self._socket.fileno() >= 0:
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()

    async def _take_turn(self) -> None:
        """Let other tasks run, and a cancel come through."""
        if self._thread is None:
            await trio.lowlevel.checkpoint()
        else:
            self._thread.check()

    async def _wait(self, event: int, timeout_s: float) -> bool:
        """Until the socket has `event` (POLLIN or POLLOUT), or False after `timeout_s`."""
        if self._thread is not None:
            return self._thread.wait(self._socket.fileno(), event, timeout_s)
        with trio.move_on_after(timeout_s) as patience:
            if event == select.POLLIN:
                await trio.lowlevel.wait_readable(self._socket)
            else:
                await trio.lowlevel.wait_writable(self._socket)
        return not patience.cancelled_caught

    def _send_some(self, view: memoryview) -> memoryview:
        """Send what the kernel takes now; returns the rest."""
        try:
            return view[self._socket.send(view) :]
        except BlockingIOError:
            return view

    def _receive_some(self, view: memoryview) -> memoryview:
        """Receive what the kernel has now; returns the part of `view` that is still empty."""
        try:
            received = self._socket.recv_into(view) if view else 0
        except BlockingIOError:
            return view
        if view and not received:
            raise self._ended(f"{self.peer} closed the connection")
        return view[received:]

    def _wake_at(self, received_bytes: int) -> None:
        """Have the kernel call the socket readable only once so much is there: one wake-up for a bundle, not ten."""
        if received_bytes != self._woken_at:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, received_bytes)
            self._woken_at = received_bytes

    def _ended(self, why: str) -> ChannelBroken:
        self.ended = True
        return ChannelBroken(why)

    def _broken(self, error: OSError | trio.ClosedResourceError) -> ChannelBroken | ChannelClosed:
        self.ended = True
        if isinstance(error, trio.ClosedResourceError) or error.errno == errno.EBADF:
            return ChannelClosed("this side closed the connection")
        return ChannelBroken(f"connection to {self.peer}: {error.strerror or error}")


async def connect(host: str, port: int, stall_timeout: float = STALL_TIMEOUT_S) -> Connection:
    """Connect to a destination. Raises ChannelBroken where it does not answer or the name is unknown."""
    try:
        with trio.fail_after(CONNECT_TIMEOUT_S):
            stream = await trio.open_tcp_stream(host, port)
    except trio.TooSlowError:
        raise ChannelBroken(f"{_shown(host, port)} does not answer within {CONNECT_TIMEOUT_S:g} s") from None
    except OSError as error:
        raise ChannelBroken(f"cannot connect to {_shown(host, port)}: {_reason(error)}") from None
    except UnicodeError:
        raise ChannelBroken(f"cannot connect to {_shown(host, port)}: {_NO_NAME}") from None
    return Connection(_detached(stream.socket), stall_timeout)


class Listener:
    """One listening port, at which every connection of a migration arrives."""

    def __init__(self, sockets: list[trio.socket.SocketType], stall_timeout: float = STALL_TIMEOUT_S) -> None:
        self._sockets = sockets
        self._stall_timeout = stall_timeout
        self.lacks = ""  # what the system had none of for a newcomer, if there was such a time
        self.port: int = sockets[0].getsockname()[1]

    async def accept_into(self, connections: trio.MemorySendChannel[Connection]) -> None:
        """Put every new connection into `connections`, for ever. A full channel makes newcomers wait in the kernel."""
        async with trio.open_nursery() as nursery:
            for sock in self._sockets:
                nursery.start_soon(self._accept, sock, connections)

    def close(self) -> None:
        """Stop listening."""
        for sock in self._sockets:
            sock.close()

    async def _accept(
        self, sock: trio.socket.SocketType, connections: trio.MemorySendChannel[Connection]
    ) -> None:
        while True:
            try:
                accepted, _ = await sock.accept()
                connection = self._connection(accepted)
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    out_of_files = error.errno in (errno.EMFILE, errno.ENFILE)
                    self.lacks = "file descriptors (see 'ulimit -n')" if out_of_files else "memory"
                    await trio.sleep(0.1)  # what closes meanwhile makes room
                    continue
                if error.errno in (errno.ECONNABORTED, errno.ENOTCONN, errno.EINVAL):
                    continue  # the newcomer is gone already
                raise
            try:
                await connections.send(connection)
            except BaseException:
                connection.close()
                raise

    def _connection(self, accepted: trio.socket.SocketType) -> Connection:
        plain = _detached(accepted)
        try:
            return Connection(plain, self._stall_timeout)
        except BaseException:
            plain.close()
            raise


async def listen(host: str, port: int, stall_timeout: float = STALL_TIMEOUT_S) -> Listener:
    """Listen at `host`:`port`; port 0 lets the kernel choose. Raises UsageError where that address cannot be used."""
    try:
        listeners = await trio.open_tcp_listeners(port, host=host)
    except OSError as error:
        raise UsageError(f"cannot listen at {_shown(host, port)}: {_reason(error)}") from None
    except UnicodeError:
        raise UsageError(f"cannot listen at {_shown(host, port)}: {_NO_NAME}") from None
    return Listener([listener.socket for listener in listeners], stall_timeout)


def allow_most_descriptors() -> None:
    """Let this process have as many files as it may: a channel takes one or two. For programs, not libraries."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _detached(sock: trio.socket.SocketType) -> socket.socket:
    return socket.socket(fileno=sock.detach())


def _peer_name(sock: socket.socket) -> str:
    try:
        host, port = sock.getpeername()[:2]
    except OSError:
        return "the peer"
    return _shown(host, port)


def _shown(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _reason(error: OSError) -> str:
    if isinstance(error, socket.gaierror):
        return error.strerror or "unknown host"
    # trio hangs the reasons of all tried addresses below one error of its own, and names the address in each again
    cause = error.__cause__
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    number = cause.errno if isinstance(cause, OSError) else error.errno
    return str(error) if number is None else os.strerror(number)
