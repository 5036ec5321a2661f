"""The seam to the network on real TCP: whole transfers, and one clear error for everything that ends them."""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from pagexfer.engine.streams import Connection, Listener, connect, listen
from pagexfer.errors import ChannelBroken, ChannelClosed, MalformedData, UsageError
from pagexfer.wire.framing import FRAME_HEADER_BYTES, FrameHeader, FrameType, pack_barrier

from .loopback import HOST, accept_one, connection_and_peer, connections

if TYPE_CHECKING:
    from collections.abc import Callable

_SHORT_S = 0.05
_MANY = 32 << 20  # more than both kernels' buffers hold


async def test_more_than_the_kernel_takes_at_once_arrives_whole() -> None:
    data = os.urandom(_MANY)
    received = bytearray(_MANY)
    async with connections() as (ours, theirs), trio.open_nursery() as nursery:
        nursery.start_soon(ours.send, memoryview(data))
        await theirs.receive_into(memoryview(received))
    assert received == data


async def test_a_frame_in_single_bytes_is_a_frame() -> None:
    frame = FrameHeader(FrameType.BARRIER, 4).pack() + pack_barrier(7)
    async with connection_and_peer() as (ours, peer), trio.open_nursery() as nursery:

        async def trickle() -> None:
            for byte in frame:
                await peer.send_all(bytes([byte]))
                await trio.testing.wait_all_tasks_blocked()

        nursery.start_soon(trickle)
        assert await ours.receive_frame(FrameType.BARRIER) == pack_barrier(7)


async def test_frames_keep_their_order_and_their_bounds() -> None:
    async with connections() as (ours, theirs):
        for epoch in range(3):
            await ours.send_frame(FrameType.BARRIER, pack_barrier(epoch))
        await ours.send_frame(FrameType.CONTROL, b"")
        for epoch in range(3):
            assert await theirs.receive_frame(FrameType.BARRIER) == pack_barrier(epoch)
        assert await theirs.receive_header() == FrameHeader(FrameType.CONTROL, 0)


async def test_another_frame_than_the_due_one_is_malformed() -> None:
    async with connections() as (ours, theirs):
        await ours.send_frame(FrameType.CONTROL, b"")
        with pytest.raises(MalformedData, match="CONTROL frame where BARRIER is due"):
            await theirs.receive_frame(FrameType.BARRIER)


@pytest.mark.parametrize("sent", [0, 3, FRAME_HEADER_BYTES, FRAME_HEADER_BYTES + 2])
async def test_a_peer_that_ends_in_the_middle_of_a_frame(sent: int) -> None:
    frame = FrameHeader(FrameType.BARRIER, 4).pack() + pack_barrier(7)
    async with connection_and_peer() as (ours, peer):
        await peer.send_all(frame[:sent])
        await peer.send_eof()
        with pytest.raises(ChannelBroken, match=r"^127\.0\.0\.1:\d+ closed the connection$"):
            await ours.receive_frame(FrameType.BARRIER)


async def test_a_half_closed_connection_still_carries_the_other_way() -> None:
    async with connection_and_peer() as (ours, peer):
        await peer.send_eof()
        with pytest.raises(ChannelBroken, match="closed the connection"):
            await ours.receive_header()
        await ours.send(b"still here")
        assert await peer.receive_some(100) == b"still here"


async def test_a_reset_is_one_line() -> None:
    async with connection_and_peer() as (ours, peer):
        peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.socket.close()
        with pytest.raises(
            ChannelBroken, match=r"^connection to 127\.0\.0\.1:\d+: Connection reset by peer$"
        ):
            await ours.receive_header()


async def test_a_peer_that_sends_nothing_is_given_up() -> None:
    async with connection_and_peer(_SHORT_S) as (ours, peer):
        await peer.send_all(b"abc")
        with pytest.raises(ChannelBroken, match=r"^127\.0\.0\.1:\d+ sends nothing for 0\.05 s$"):
            await ours.receive_header()


async def test_a_peer_that_takes_nothing_is_given_up() -> None:
    async with connection_and_peer(_SHORT_S) as (ours, _peer):
        with pytest.raises(ChannelBroken, match=r"^127\.0\.0\.1:\d+ takes no data for 0\.05 s$"):
            await ours.send(bytes(_MANY))


async def test_an_idle_peer_may_take_longer_than_a_stalled_one() -> None:
    async with connection_and_peer(_SHORT_S) as (ours, peer), trio.open_nursery() as nursery:

        async def late() -> None:
            await trio.sleep(4 * _SHORT_S)
            await peer.send_all(FrameHeader(FrameType.CONTROL, 0).pack())

        nursery.start_soon(late)
        assert (await ours.receive_header(60.0)).type is FrameType.CONTROL


@pytest.mark.parametrize("waits_for", ["data", "room"])
async def test_our_own_close_wakes_who_waits(waits_for: str) -> None:
    async with connection_and_peer() as (ours, _peer), trio.open_nursery() as nursery:

        async def wait() -> None:
            with pytest.raises(ChannelClosed):
                await (ours.receive_header() if waits_for == "data" else ours.send(bytes(_MANY)))

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        ours.close()
        ours.close()


@pytest.mark.parametrize("use", [Connection.receive_header, lambda connection: connection.send(b"x")])
async def test_a_closed_connection_says_that_we_closed_it(use: Callable[[Connection], object]) -> None:
    async with connection_and_peer() as (ours, _peer):
        ours.close()
        with pytest.raises(ChannelClosed):
            await use(ours)  # type: ignore[misc]


async def test_a_peer_that_always_has_data_leaves_room_for_other_tasks() -> None:
    frames = 200
    async with connections() as (ours, theirs):
        for epoch in range(frames):
            await ours.send_frame(FrameType.BARRIER, pack_barrier(epoch))
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            for _ in range(frames):
                await theirs.receive_payload(await theirs.receive_header())
            nursery.cancel_scope.cancel()
    assert turns >= frames / 2


async def test_a_cancelled_wait_takes_no_byte() -> None:
    async with connection_and_peer() as (ours, peer):
        with trio.move_on_after(0.01):
            await ours.receive_header()
        await peer.send_all(FrameHeader(FrameType.CONTROL, 0).pack())
        assert (await ours.receive_header()).type is FrameType.CONTROL


# Connecting


async def test_nobody_listens() -> None:
    with socket.socket() as closed:
        closed.bind((HOST, 0))
        port = closed.getsockname()[1]
        with pytest.raises(ChannelBroken) as caught:
            await connect(HOST, port)
    assert str(caught.value).startswith(f"cannot connect to {HOST}:{port}: ")
    assert "Connection refused" in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("host", ["nobody.invalid", "", "a" * 70 + ".example", "two..dots", "not a host!"])
async def test_a_name_that_is_none(host: str) -> None:
    with pytest.raises(ChannelBroken, match=r"^cannot connect to .*: .+$"):
        await connect(host, 1)
    with pytest.raises(UsageError, match=r"^cannot listen at .*: .+$"):
        await listen(host, 0)


async def test_a_port_in_use() -> None:
    listener = await listen(HOST, 0)
    with pytest.raises(
        UsageError, match=rf"^cannot listen at {HOST}:{listener.port}: Address already in use$"
    ):
        await listen(HOST, listener.port)
    listener.close()


async def test_an_address_that_is_not_ours() -> None:
    with pytest.raises(UsageError, match="Cannot assign requested address"):
        await listen("192.0.2.1", 0)


# Accepting


class _FaultySocket:
    """A listening socket whose first accept calls fail as the kernel's may."""

    def __init__(self, real: trio.socket.SocketType, errors: list[int]) -> None:
        self._real = real
        self._errors = errors

    def getsockname(self) -> tuple[str, int]:
        address: tuple[str, int] = self._real.getsockname()
        return address

    async def accept(self) -> tuple[trio.socket.SocketType, object]:
        if self._errors:
            number = self._errors.pop(0)
            raise OSError(number, os.strerror(number))
        return await self._real.accept()


@pytest.mark.parametrize(
    "number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ECONNABORTED, errno.EINVAL]
)
async def test_accepting_goes_on_after_a_passing_error(number: int) -> None:
    sockets = await trio.open_tcp_listeners(0, host=HOST)
    faulty = _FaultySocket(sockets[0].socket, [number, number])
    listener = Listener([faulty])  # type: ignore[list-item]
    peer = await trio.open_tcp_stream(HOST, listener.port)
    async with peer, sockets[0]:
        with trio.fail_after(5):
            connection = await accept_one(listener)
        connection.close()
        assert await peer.receive_some(1) == b""


async def test_a_listener_that_broke_says_so() -> None:
    sockets = await trio.open_tcp_listeners(0, host=HOST)
    listener = Listener([_FaultySocket(sockets[0].socket, [errno.EBADF])])  # type: ignore[list-item]
    async with sockets[0]:
        with pytest.RaisesGroup(OSError, flatten_subgroups=True):
            await accept_one(listener)


async def test_a_newcomer_that_nobody_takes_is_closed_with_the_listener() -> None:
    listener = await listen(HOST, 0)
    send, _receive = trio.open_memory_channel[Connection](0)
    peer = await trio.open_tcp_stream(HOST, listener.port)
    async with peer:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listener.accept_into, send)
            await trio.testing.wait_all_tasks_blocked(0.01)
            nursery.cancel_scope.cancel()
        listener.close()
        with trio.fail_after(5):
            assert await peer.receive_some(1) == b""


async def test_the_kernel_tells_the_round_trip() -> None:
    async with connections() as (near, far):
        for _ in range(4):
            await near.send_frame(FrameType.BARRIER, b"1234")
            await far.receive_frame(FrameType.BARRIER)
        assert 0 < near.round_trip_s() < 1
        near.close()
        assert near.round_trip_s() == 0
