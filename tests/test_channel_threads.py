"""Channels in threads without an event loop: work is done there, errors and cancels cross, and nothing waits for ever."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import threading
from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio

from pagexfer.engine import destination as destination_engine
from pagexfer.engine import source as source_engine
from pagexfer.engine.streams import Connection
from pagexfer.engine.threads import Interrupt, carrier, in_loop, in_thread, most_threads
from pagexfer.errors import ChannelBroken, ChannelClosed, SvsmLost
from pagexfer.migration import MigrationReport, receive_guest, send_guest
from pagexfer.svsm.destination import DestinationSvsm
from pagexfer.wire.framing import FrameHeader, FrameType, pack_barrier

from .engine_guests import SmallMachine
from .loopback import connection_and_peer, connections
from .machines import ATTESTOR, HOST, PATIENCE_S, Machines, Side, goes_on, is_parked, receive

if TYPE_CHECKING:
    from collections.abc import Generator

    from pagexfer.engine import threads

_SHORT_S = 0.05
_MANY = 32 << 20  # more than both kernels' buffers hold


async def whereabouts() -> int:
    return threading.get_ident()


async def test_work_is_done_in_another_thread_or_here() -> None:
    async with connections() as (ours, _):
        assert await in_thread(ours, whereabouts) != threading.get_ident()
        assert await in_loop(ours, whereabouts) == threading.get_ident()


@pytest.mark.parametrize(
    ("channels", "most", "chosen"),
    [(1, 1, in_thread), (2, 1, in_loop), (8, 8, in_thread), (9, 8, in_loop), (1, 0, in_loop)],
)
def test_threads_are_for_few_channels(channels: int, most: int, chosen: threads.Carrier) -> None:
    assert carrier(channels, most) is chosen


@pytest.mark.parametrize(("cpus", "most"), [(1, 4), (2, 4), (3, 16), (64, 16)])
def test_many_channels_have_threads_where_there_are_cpus_for_them(cpus: int, most: int) -> None:
    assert most_threads(cpus, on_few_cpus=4) == most


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
    frame = FrameHeader(FrameType.BARRIER, 4).pack() + pack_barrier(7)

    async def go_round(connection: Connection, peer: socket.socket) -> None:
        while True:
            await connection.receive_frame(FrameType.BARRIER)
            peer.sendall(frame)  # there before it is asked for

    with (
        socket.create_server((HOST, 0)) as listening,
        socket.create_connection(listening.getsockname()) as peer,
    ):
        peer.sendall(frame)
        connection = Connection(listening.accept()[0])
        with trio.fail_after(PATIENCE_S), trio.move_on_after(_SHORT_S) as scope:
            await in_thread(connection, partial(go_round, connection, peer))
        assert scope.cancelled_caught
        connection.close()


async def test_a_cancel_before_the_work_began_keeps_it_from_beginning() -> None:
    began: list[bool] = []

    async def begin() -> None:
        began.append(True)

    async with connections() as (ours, _):
        with trio.fail_after(PATIENCE_S), trio.CancelScope() as scope:
            scope.cancel()
            await in_thread(ours, begin)
        assert scope.cancelled_caught
    assert not began


async def test_what_was_done_before_a_cancel_was_heard_counts() -> None:
    at_it, let = threading.Event(), threading.Event()
    imported: list[str] = []

    async def import_token() -> str:
        at_it.set()
        assert let.wait(PATIENCE_S)  # as an SVSM that is at the command
        return "token"

    async with connections() as (ours, _):
        with trio.fail_after(PATIENCE_S), trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:

                async def cancel() -> None:
                    await trio.to_thread.run_sync(at_it.wait, PATIENCE_S)
                    scope.cancel()
                    let.set()

                nursery.start_soon(cancel)
                imported.append(await in_thread(ours, import_token))
                await trio.lowlevel.checkpoint()
                imported.append("the cancel was lost")
    assert imported == ["token"]


async def test_an_error_counts_more_than_a_cancel() -> None:
    at_it, let = threading.Event(), threading.Event()

    async def fail() -> None:
        at_it.set()
        assert let.wait(PATIENCE_S)
        raise SvsmLost("it is gone")

    async with connections() as (ours, _), trio.open_nursery() as nursery:
        scope = trio.CancelScope()

        async def cancel() -> None:
            await trio.to_thread.run_sync(at_it.wait, PATIENCE_S)
            scope.cancel()
            let.set()

        nursery.start_soon(cancel)
        with scope, pytest.raises(SvsmLost):
            await in_thread(ours, fail)


def test_ctrl_c_waits_for_the_thread() -> None:
    let_go: list[bool] = []
    main_thread = threading.get_ident()

    async def hold(connection: Connection) -> None:
        threading.Timer(_SHORT_S, signal.pthread_kill, (main_thread, signal.SIGINT)).start()
        try:
            await connection.receive_into(memoryview(bytearray(1)))
        finally:
            let_go.append(True)

    async def main() -> None:
        async with connections() as (ours, _):
            try:
                await in_thread(ours, partial(hold, ours))
            finally:
                assert let_go

    with pytest.raises((KeyboardInterrupt, BaseExceptionGroup)):
        trio.run(main)
    assert let_go


async def test_without_a_descriptor_the_loop_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async with connections() as (ours, theirs):
        monkeypatch.setattr(os, "eventfd", none_left)
        assert await in_thread(ours, whereabouts) == threading.get_ident()
        await _crosses(ours, theirs)


async def test_without_a_thread_the_loop_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    _have_no_threads(monkeypatch)
    async with connections() as (ours, theirs):
        before = len(os.listdir("/proc/self/fd"))
        assert await in_thread(ours, whereabouts) == threading.get_ident()
        assert len(os.listdir("/proc/self/fd")) == before
        await _crosses(ours, theirs)


def _have_no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(trio.lowlevel, "start_thread_soon", none_left)


async def _crosses(ours: Connection, theirs: Connection) -> None:
    """More than the kernels' buffers hold, so that both have to wait."""
    view = memoryview(bytearray(_MANY))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(in_thread, ours, partial(ours.send, bytes(_MANY)))
        await in_thread(theirs, partial(theirs.receive_into, view))


async def test_a_migration_without_threads_for_its_channels_takes_the_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each try had a new connection, until the channel's key was used up."""
    _have_no_threads(monkeypatch)
    machine, reports = SmallMachine(), []

    async def receive_it(task_status: trio.TaskStatus[int]) -> None:
        listening = task_status.started
        reports.append(
            await receive_guest(
                machine.destination, HOST, 0, ATTESTOR, channel_threads=True, on_listening=listening
            )
        )

    async with trio.open_nursery() as nursery:
        port = await nursery.start(receive_it)
        reports.append(await send_guest(machine.source, HOST, port, ATTESTOR, channel_threads=True))
    assert machine.moved()
    assert [channel.replaced for channel in reports[0].info.channels] == [0, 0, 0, 0]


async def test_a_wait_of_weeks_and_a_socket_that_is_closed() -> None:
    async with connections() as (ours, theirs):
        with Interrupt() as interrupt:
            await theirs.send(b"x")
            with trio.fail_after(PATIENCE_S):
                await trio.lowlevel.wait_readable(ours._socket)
            assert interrupt.wait(ours._socket.fileno(), select.POLLIN, 1e9)
            with pytest.raises(ChannelClosed):
                interrupt.wait(-1, select.POLLIN, 1.0)


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


@pytest.mark.parametrize(
    ("channels", "at_source", "at_destination", "expected"),
    [
        (4, True, True, {"source", "destination"}),
        (4, True, False, {"source"}),
        (4, False, True, {"destination"}),
        (5, None, None, set()),
        (4, None, None, {"destination"}),
        (1, None, None, {"source", "destination"}),
        (1, False, None, {"destination"}),
    ],
)
async def test_a_guest_arrives_by_threads_where_they_are_wanted_or_usual(
    monkeypatch: pytest.MonkeyPatch,
    channels: int,
    at_source: bool | None,
    at_destination: bool | None,
    expected: set[str],
) -> None:
    by_threads: set[str] = set()

    def watched(channels: int, most_threads: int, *, side: str) -> threads.Carrier:
        chosen = carrier(channels, most_threads)
        if chosen is in_thread:
            by_threads.add(side)
        return chosen

    monkeypatch.setattr(source_engine, "carrier", partial(watched, side="source"))
    monkeypatch.setattr(destination_engine, "carrier", partial(watched, side="destination"))
    await _arrives(False, at_source, at_destination, channels)
    assert by_threads == expected


@pytest.mark.parametrize(("at_source", "at_destination"), [(None, None), (True, False), (False, True)])
async def test_a_guest_arrives_over_isolated_engines(
    at_source: bool | None, at_destination: bool | None
) -> None:
    await _arrives(True, at_source, at_destination, 4)


@pytest.mark.parametrize("isolated", [False, True])
async def test_a_cancel_after_the_start_token_arrived_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, isolated: bool
) -> None:
    start = DestinationSvsm._start
    at_it, cancelled = threading.Event(), threading.Event()

    def slow_start(svsm: DestinationSvsm, payload: bytes) -> None:
        start(svsm, payload)
        at_it.set()
        assert cancelled.wait(PATIENCE_S)

    monkeypatch.setattr(DestinationSvsm, "_start", slow_start)
    destination = Side()
    with Machines() as machines:
        await machines.start()
        with trio.fail_after(PATIENCE_S):
            async with trio.open_nursery() as sides:
                receiving = trio.CancelScope()

                async def cancel() -> None:
                    await trio.to_thread.run_sync(at_it.wait, PATIENCE_S)
                    receiving.cancel()
                    cancelled.set()

                async def receive_until_cancelled(task_status: trio.TaskStatus[int]) -> None:
                    with receiving:
                        await receive(
                            machines.destination, destination, 10.0, None, isolated, True, task_status
                        )

                port = await sides.start(receive_until_cancelled)
                sides.start_soon(cancel)
                source = await machines.send(port, 10.0, isolated=isolated, channel_threads=True)
        assert isinstance(source.end, MigrationReport), source.end
        assert is_parked(machines.source)
        assert await goes_on(machines.destination)


async def _arrives(
    isolated: bool, at_source: bool | None, at_destination: bool | None, channels: int
) -> None:
    with Machines() as machines:
        await machines.start()
        destination = Side()
        with trio.fail_after(PATIENCE_S):
            async with trio.open_nursery() as sides:
                port = await sides.start(
                    receive, machines.destination, destination, 10.0, None, isolated, at_destination
                )
                source = await machines.send(
                    port, 10.0, isolated=isolated, channels=channels, channel_threads=at_source
                )
                if not isinstance(source.end, MigrationReport):
                    sides.cancel_scope.cancel()
        assert isinstance(source.end, MigrationReport), source.end
        assert isinstance(destination.end, MigrationReport), destination.end
        assert sum(channel.pages for channel in source.end.info.channels) >= machines.source.memory.pages
        assert is_parked(machines.source)
        assert await goes_on(machines.destination)
