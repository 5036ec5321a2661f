"""Loops in threads of their own: work is done where it belongs, errors and cancels cross, and no thread is left."""

from __future__ import annotations

import threading
from functools import partial

import pytest
import trio

from pagexfer.engine.shards import MAX_SHARDS, open_shards
from pagexfer.errors import ChannelBroken, UsageError
from pagexfer.migration import MigrationReport, receive_guest, send_guest

from .machines import ATTESTOR, HOST, PATIENCE_S, Machines, Side, goes_on, is_parked, receive


async def whereabouts() -> int:
    await trio.lowlevel.checkpoint()
    return threading.get_ident()


async def test_channels_go_round_the_loops() -> None:
    async with open_shards(3) as shards:
        threads = [await shards.run(channel, whereabouts) for channel in range(7)]
    assert threads[0] == threading.get_ident()
    assert len(set(threads[:3])) == 3
    assert threads == [*threads[:3], *threads[:3], threads[0]]


async def test_one_shard_is_this_loop() -> None:
    async with open_shards(1) as shards:
        assert {await shards.run(channel, whereabouts) for channel in range(3)} == {threading.get_ident()}


async def test_an_error_comes_back() -> None:
    async def fail() -> None:
        raise ChannelBroken("the connection is gone")

    async with open_shards(2) as shards:
        with pytest.raises(ChannelBroken, match="the connection is gone"):
            await shards.run(1, fail)
        assert await shards.run(1, whereabouts) != threading.get_ident()


async def test_a_cancel_is_one_there_and_waits_until_the_work_has_let_go() -> None:
    let_go = []

    async def hold(begun: threading.Event) -> None:
        begun.set()
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.lowlevel.checkpoint()
            let_go.append(threading.get_ident())

    begun = threading.Event()
    async with open_shards(2) as shards, trio.open_nursery() as nursery:
        nursery.start_soon(shards.run, 1, partial(hold, begun))
        assert await trio.to_thread.run_sync(begun.wait, PATIENCE_S)
        nursery.cancel_scope.cancel()
    assert len(let_go) == 1
    assert let_go[0] != threading.get_ident()


async def test_a_cancel_before_the_work_began() -> None:
    async with open_shards(2) as shards:
        with trio.CancelScope() as scope:
            scope.cancel()
            await shards.run(1, trio.sleep_forever)
        assert scope.cancelled_caught


async def loop() -> trio.lowlevel.TrioToken:
    await trio.lowlevel.checkpoint()
    return trio.lowlevel.current_trio_token()


async def test_the_loops_end_with_the_block() -> None:
    with trio.CancelScope() as scope:
        async with open_shards(4) as shards:
            loops = [await shards.run(channel, loop) for channel in range(1, 4)]
            scope.cancel()
            await trio.lowlevel.checkpoint()
    assert scope.cancelled_caught
    for ended in loops:
        with pytest.raises(trio.RunFinishedError):
            ended.run_sync_soon(scope.cancel)


async def test_a_cancel_while_they_start_ends_them() -> None:
    with trio.fail_after(PATIENCE_S), trio.CancelScope() as scope:
        scope.cancel()
        async with open_shards(4):
            await trio.sleep_forever()
    assert scope.cancelled_caught


@pytest.mark.parametrize("isolated", [False, True])
async def test_a_guest_arrives(isolated: bool) -> None:
    with Machines() as machines:
        await machines.start()
        destination = Side()
        with trio.fail_after(PATIENCE_S):
            async with trio.open_nursery() as sides:
                port = await sides.start(receive, machines.destination, destination, 10.0, None, isolated, 3)
                source = await machines.send(port, 10.0, isolated=isolated, shards=2)
                if not isinstance(source.end, MigrationReport):
                    sides.cancel_scope.cancel()
        assert isinstance(source.end, MigrationReport), source.end
        assert isinstance(destination.end, MigrationReport), destination.end
        assert all(channel.pages for channel in source.end.info.channels)
        assert is_parked(machines.source)
        assert await goes_on(machines.destination)


@pytest.mark.parametrize("shards", [0, MAX_SHARDS + 1])
async def test_their_number_is_checked(shards: int) -> None:
    with Machines() as machines:
        for call in (
            partial(receive_guest, machines.destination, HOST, 0, ATTESTOR, shards=shards),
            partial(send_guest, machines.source, HOST, 1, ATTESTOR, shards=shards),
        ):
            with pytest.raises(UsageError, match=f"1 to {MAX_SHARDS} shards, not {shards}"):
                await call()
