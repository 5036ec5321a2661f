"""Replacing lost connections of a source's channels while epochs are sent (R9).

A connection that breaks is noticed by whoever uses it, or by a task that waits for its end; one whose key reached its limit
counts as broken. The channel then connects anew, and the two SVSMs settle what arrived; pages that did not go with the
next epoch. Only all channels, or the control connection, take the migration with them.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, NamedTuple

import trio

from ..errors import ChannelBroken, ChannelClosed, RefusalCode, SvsmRefused
from ..wire.bundle import BundleKind

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from .channel import SourceChannel
    from .streams import Connection

# A network that is gone for longer is an outage, not a lost connection.
REPLACEMENT_TIMEOUT_S: Final = 10.0
_FIRST_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 1.0


class Damage(NamedTuple):
    """What did not arrive: pages, which go with the next epoch, and whether the epoch's token must be sealed again."""

    pages: int
    token: bool


@contextmanager
def used_up_key_as_broken() -> Iterator[None]:
    """A channel whose key reached its limit is like one whose connection broke: a new connection has a new key."""
    try:
        yield
    except SvsmRefused as refused:
        if refused.code is not RefusalCode.EXHAUSTED:
            raise
        raise ChannelBroken("the key of the connection reached its limit") from refused


class Repair:
    """Watches `channels` and gives those that break a new connection from `connect`, for the session's name `session`."""

    def __init__(
        self,
        channels: Sequence[SourceChannel],
        connect: Callable[[], Awaitable[Connection]],
        session: bytes,
        stall_timeout_s: float,
    ) -> None:
        self._channels = channels
        self._connect = connect
        self._session = session
        self._patience_s = min(REPLACEMENT_TIMEOUT_S, stall_timeout_s)
        self._watching = trio.CancelScope()
        self._stopped = trio.Event()
        self._ended = trio.Event()
        self._renewed = trio.Event()

    async def watch(self) -> None:
        """Wait for the ends of connections until `stop`. While it runs nobody may receive on them."""
        try:
            async with trio.open_nursery() as nursery:
                self._watching = nursery.cancel_scope
                for channel in self._channels:
                    nursery.start_soon(self._watch, channel)
        finally:
            self._stopped.set()

    async def stop(self) -> None:
        """End `watch`, which has begun; returns once it has."""
        self._watching.cancel()
        await self._stopped.wait()

    async def wait_ended(self) -> None:
        """Until one of the connections has ended."""
        while not self.ended():
            await self._ended.wait()
            self._ended = trio.Event()

    def ended(self) -> list[SourceChannel]:
        """Channels whose connection has ended."""
        return [channel for channel in self._channels if channel.connection.ended]

    async def replace(self, channel: SourceChannel) -> Damage:
        """Give a channel a new connection, and the destination what came over no connection.

        Raises ChannelBroken where none can be had within the replacement timeout.
        """
        pages, token, pause = 0, False, _FIRST_PAUSE_S
        with trio.move_on_after(self._patience_s):
            while True:
                channel.connection.close()
                try:
                    lost = await channel.replace(await self._connect(), self._session)
                    pages, token = pages + lost.pages, token or lost.token
                    self._renewed.set()
                    self._renewed = trio.Event()
                    if lost.ledger:
                        await channel.token(BundleKind.LEDGER)
                    return Damage(pages, token)
                except (ChannelBroken, ChannelClosed):
                    await trio.sleep(pause)
                    pause = min(2 * pause, _LONGEST_PAUSE_S)
        raise ChannelBroken(
            f"the connection of channel {channel.channel} was lost, and no other could be made within "
            f"{self._patience_s:g} s"
        )

    async def _watch(self, channel: SourceChannel) -> None:
        while True:
            connection = channel.connection
            await connection.wait_end()
            self._ended.set()
            while channel.connection is connection:
                await self._renewed.wait()
