"""Channels in threads without an event loop: work is done there, errors and cancels cross, and nothing waits for ever."""

from __future__ import annotations

import os
import threading
from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio

from pagexfer.engine.threads import MAX_CHANNELS_WITH_THREADS, Interrupt, carrier, in_loop, in_thread
from pagexfer.errors import ChannelBroken, ChannelClosed
from pagexfer.migration import MigrationReport
from pagexfer.wire.framing import FrameType, pack_barrier

from .loopback import connection_and_peer, connections
from .machines import PATIENCE_S, Machines, Side, goes_on, is_parked, receive

if TYPE_CHECKING:
    from collections.abc import Generator

    from pagexfer.engine import threads
    from pagexfer.engine.channel import EpochEnd
    from pagexfer.engine.streams import Connection

_SHORT_S = 0.05
_MANY = 32 << 20  # more than both kernels' buffers hold


async def whereabouts() -> int:
    return threading.get_ident()


async def test_work_is_done_in_another_thread_or_here() -> None:
    async with connections() as (ours, _):
        assert await in_thread(ours, whereabouts) != threading.get_ident()
        assert await in_loop(ours, whereabouts) == threading.get_ident()


@pytest.mark.parametrize(
    ("channels", "wanted", "chosen"),
    [
        (1, None, in_thread),
        (MAX_CHANNELS_WITH_THREADS, None, in_thread),
        (MAX_CHANNELS_WITH_THREADS + 1, None, in_loop),
        (64, True, in_thread),
        (1, False, in_loop),
    ],
)
def test_threads_are_for_few_channels_unless_wanted(
    channels: int, wanted: bool | None, chosen: threads.Carrier
) -> None:
    assert carrier(channels, channel_threads=wanted) is chosen


async def test_data_crosses_between_two_threads() -> None:
    data, received = os.urandom(_MANY), bytearray(_MANY)
    async with connections() as (ours, theirs), trio.open_nursery() as nursery:
        nursery.start_soon(in_thread, ours, partial(ours.send, memoryview(data)))
        await in_thread(theirs, partial(theirs.receive_into, memoryview(received)))
        nursery.cancel_scope.deadline = trio.current_time() + PATIENCE_S
    assert received == data


async def test_a_connection_is_the_loops_again_afterwards() -> None:
    async with connections() as (ours, theirs):
        await in_thread(ours, partial(ours.send_frame, FrameType.BARRIER, pack_barrier(7)))
        assert await theirs.receive_frame(FrameType.BARRIER) == pack_barrier(7)
        await theirs.send_frame(FrameType.BARRIER, pack_barrier(8))
        assert await ours.receive_frame(FrameType.BARRIER) == pack_barrier(8)


async def test_a_peer_that_is_silent_takes_nothing_or_ends() -> None:
    async with connections() as (ours, theirs):
        ours.stall_timeout = _SHORT_S
        with pytest.raises(ChannelBroken, match="sends nothing"):
            await in_thread(ours, partial(ours.receive_into, memoryview(bytearray(1))))
        with pytest.raises(ChannelBroken, match="takes no data"):
            await in_thread(ours, partial(ours.send, bytes(_MANY)))
        assert ours.ended
        theirs.close()
    async with connection_and_peer() as (ours, peer):
        await peer.send_eof()
        with pytest.raises(ChannelBroken, match="closed the connection"):
            await in_thread(ours, partial(ours.receive_into, memoryview(bytearray(1))))


@pytest.mark.parametrize("sends", [False, True])
async def test_a_cancel_ends_a_wait_and_comes_once_the_work_has_let_go(sends: bool) -> None:
    ended: list[int] = []

    async def hold(connection: Connection) -> None:
        try:
            if sends:
                await connection.send(bytes(_MANY))
            else:
                await connection.receive_into(memoryview(bytearray(1)))
        finally:
            ended.append(threading.get_ident())

    async with connections() as (ours, _):
        with trio.fail_after(PATIENCE_S), trio.move_on_after(_SHORT_S) as scope:
            await in_thread(ours, partial(hold, ours))
        assert scope.cancelled_caught
        assert len(ended) == 1
        assert ended[0] != threading.get_ident()


async def test_a_cancel_ends_work_that_never_waits() -> None:
    async def chatter(source: Connection) -> None:
        while True:
            await source.send_frame(FrameType.BARRIER, pack_barrier(7))

    async def listen(destination: Connection) -> EpochEnd:
        while True:
            await destination.receive_frame(FrameType.BARRIER)

    async with connections() as (ours, theirs):
        with trio.fail_after(PATIENCE_S), trio.move_on_after(_SHORT_S) as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(in_thread, ours, partial(chatter, ours))
                nursery.start_soon(in_thread, theirs, partial(listen, theirs))
        assert scope.cancelled_caught


async def test_a_cancel_before_the_work_began() -> None:
    async with connections() as (ours, _):
        with trio.fail_after(PATIENCE_S), trio.CancelScope() as scope:
            scope.cancel()
            await in_thread(ours, partial(ours.receive_into, memoryview(bytearray(1))))
        assert scope.cancelled_caught


async def test_work_that_needs_a_loop_is_a_defect() -> None:
    async def needs_one() -> None:
        await Elsewhere()

    class Elsewhere:
        def __await__(self) -> Generator[None]:
            yield

    async with connections() as (ours, _):
        with pytest.raises(RuntimeError, match="event loop"):
            await in_thread(ours, needs_one)


def test_an_interrupt_stays_and_leaves_no_descriptor() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with Interrupt() as interrupt:
        interrupt.check()
        for _ in range(2):
            interrupt.set()
            with pytest.raises(ChannelClosed):
                interrupt.check()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize(("at_source", "at_destination"), [(True, True), (True, False), (False, True)])
async def test_a_guest_arrives(isolated: bool, at_source: bool, at_destination: bool) -> None:
    with Machines() as machines:
        await machines.start()
        destination = Side()
        with trio.fail_after(PATIENCE_S):
            async with trio.open_nursery() as sides:
                port = await sides.start(
                    receive, machines.destination, destination, 10.0, None, isolated, at_destination
                )
                source = await machines.send(port, 10.0, isolated=isolated, channel_threads=at_source)
                if not isinstance(source.end, MigrationReport):
                    sides.cancel_scope.cancel()
        assert isinstance(source.end, MigrationReport), source.end
        assert isinstance(destination.end, MigrationReport), destination.end
        assert all(channel.pages for channel in source.end.info.channels)
        assert is_parked(machines.source)
        assert await goes_on(machines.destination)
