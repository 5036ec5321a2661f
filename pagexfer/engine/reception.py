"""The destination's front door: every connection of a migration arrives at one port, and so may anybody else.

A connection is a stranger until the SVSM says otherwise. A stranger's garbage, silence or false proof ends that connection
and nothing else (R8's exception); each gets a bounded time and there are never more than a bounded number of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from ..errors import ChannelBroken, ChannelClosed, MalformedData, PagexferError, SvsmRefused
from ..wire.framing import FrameType, Purpose, parse_connection_hello_untrusted
from .failure import call_back
from .streams import Connection

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ..wire.framing import ConnectionHello
    from .streams import Listener

# A peer that is one of ours says so at once; the round trips of its handshake have timeouts of their own.
INTRODUCTION_TIMEOUT_S: Final = 10.0
MAX_STRANGERS: Final = 64


class Reception:
    """Accepts connections, reads their hello, and passes them on to `control` or `channel`.

    Those are called in a task for each connection; they own it once they return True, and it is closed otherwise. What they
    raise of ours is the stranger's fault and reported to `on_stranger` as one line. They say `heard` once what comes right
    after the hello has come.
    """

    def __init__(
        self,
        listener: Listener,
        control: Callable[[Connection], Awaitable[bool]],
        channel: Callable[[Connection, ConnectionHello], Awaitable[bool]],
        on_stranger: Callable[[str], None],
        timeout: float = INTRODUCTION_TIMEOUT_S,
    ) -> None:
        self._listener = listener
        self._control = control
        self._channel = channel
        self._on_stranger = on_stranger
        self._timeout = timeout
        self._places = trio.Semaphore(MAX_STRANGERS)
        # Those that have not even sent what whoever is one of ours sends at once, the oldest first.
        self._silent: dict[Connection, trio.CancelScope] = {}

    async def serve(self) -> None:
        """Receive for ever."""
        send, receive = trio.open_memory_channel[Connection](0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._listener.accept_into, send)
            async for connection in receive:
                if not self._places.value and self._silent:
                    # Whoever is one of ours speaks at once, and must not wait for those that never do.
                    self._silent.pop(next(iter(self._silent))).cancel()
                try:
                    await self._places.acquire()
                except trio.Cancelled:
                    connection.close()
                    raise
                nursery.start_soon(self._receive, connection)

    def heard(self, connection: Connection) -> None:
        """It has said what its peer has to answer: from here on others at the door do not cut it off."""
        self._silent.pop(connection, None)

    async def _receive(self, connection: Connection) -> None:
        kept = False
        try:
            kept = await self._introduce(connection)
        except PagexferError as error:
            call_back(self._on_stranger, f"dropped connection from {connection.peer}: {_fault(error)}")
        finally:
            self._places.release()
            if not kept:
                connection.close()

    async def _introduce(self, connection: Connection) -> bool:
        with trio.CancelScope() as silence:
            self._silent[connection] = silence
            try:
                with trio.move_on_after(self._timeout):
                    hello = parse_connection_hello_untrusted(await connection.receive_frame(FrameType.HELLO))
                    if hello.purpose is Purpose.CONTROL:
                        return await self._control(connection)
                    return await self._channel(connection, hello)
                raise ChannelBroken(f"it did not introduce itself within {self._timeout:g} s")
            finally:
                self.heard(connection)
        raise ChannelBroken("it was silent while others waited at the door")


def _fault(error: PagexferError) -> str:
    match error:
        case SvsmRefused():
            return "it did not prove that it belongs to this migration"
        case MalformedData() | ChannelBroken() | ChannelClosed():
            return str(error)
        case _:
            return f"{error}"
