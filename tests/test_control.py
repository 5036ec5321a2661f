"""The control connection between two engines, over real TCP."""

from __future__ import annotations

import pytest
import trio

from pagexfer.engine.control import Control
from pagexfer.errors import ChannelBroken, MalformedData, Outcome, TransferAborted
from pagexfer.wire.control import ChannelsOpen, EpochClosed, Failed, Prepare
from pagexfer.wire.framing import FrameType, pack_barrier
from pagexfer.wire.handshake import Role

from .loopback import connections


async def test_messages_arrive_in_order_while_somebody_listens() -> None:
    async with connections() as (ours, theirs), trio.open_nursery() as nursery:
        sender, receiver = Control(ours, Role.SOURCE), Control(theirs, Role.DESTINATION)
        await sender.send(Prepare(b"hello"))
        assert await receiver.receive_first(Prepare) == Prepare(b"hello")
        nursery.start_soon(receiver.listen)
        for epoch in range(100):
            await sender.send(EpochClosed(epoch))
            assert await receiver.receive(EpochClosed, 5) == EpochClosed(epoch)
        nursery.cancel_scope.cancel()


async def test_a_message_of_another_kind_is_not_taken_for_the_due_one() -> None:
    async with connections() as (ours, theirs), trio.open_nursery() as nursery:
        sender, receiver = Control(ours, Role.SOURCE), Control(theirs, Role.DESTINATION)
        await sender.send(EpochClosed(1))
        with pytest.raises(MalformedData, match="control message epoch-closed where prepare is due"):
            await receiver.receive_first(Prepare)
        nursery.start_soon(receiver.listen)
        await sender.send(EpochClosed(1))
        with pytest.raises(MalformedData, match="control message epoch-closed where channels-open is due"):
            await receiver.receive(ChannelsOpen, 5)
        nursery.cancel_scope.cancel()


async def test_a_message_that_does_not_come_has_a_timeout() -> None:
    async with connections() as (ours, _theirs), trio.open_nursery() as nursery:
        control = Control(ours, Role.SOURCE)
        nursery.start_soon(control.listen)
        with pytest.raises(ChannelBroken, match=r"sent no epoch-closed within 0\.02 s$"):
            await control.receive(EpochClosed, 0.02)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("reason", "outcome"),
    [
        ("authentication", Outcome.REFUSED),
        ("policy", Outcome.REFUSED),
        ("connection", Outcome.ENDED),
        ("undecided", Outcome.ENDED),
    ],
)
async def test_the_peers_failure_is_ours(reason: str, outcome: Outcome) -> None:
    failed = Failed(reason, "why it ended")
    async with connections() as (ours, theirs):
        await Control(ours, Role.SOURCE).send(failed)
        with pytest.raises(TransferAborted, match=r"^the destination says: why it ended$") as caught:
            await Control(theirs, Role.DESTINATION).listen()
        assert (caught.value.outcome, caught.value.reason) == (outcome, reason)
        await Control(ours, Role.SOURCE).send(failed)
        with pytest.raises(TransferAborted, match=r"^the destination says: why it ended$"):
            await Control(theirs, Role.DESTINATION).receive_first(Prepare)


async def test_the_peers_end_is_seen_at_once() -> None:
    async with connections() as (ours, theirs):
        ours.close()
        with pytest.raises(ChannelBroken, match="closed the connection"):
            await Control(theirs, Role.DESTINATION).listen()


@pytest.mark.parametrize(
    ("frame_type", "payload"),
    [
        (FrameType.BARRIER, pack_barrier(1)),
        (FrameType.CONTROL, b"no msgpack"),
    ],
)
async def test_what_does_not_belong_there_ends_it(frame_type: FrameType, payload: bytes) -> None:
    async with connections() as (ours, theirs):
        await ours.send_frame(frame_type, payload)
        with pytest.raises(MalformedData):
            await Control(theirs, Role.DESTINATION).listen()


# Last words


async def test_last_words_tell_the_reason_behind_a_broken_connection() -> None:
    async with connections() as (ours, theirs):
        sender, receiver = Control(ours, Role.SOURCE), Control(theirs, Role.DESTINATION)
        await sender.send(EpochClosed(1))
        await sender.send(Failed("integrity", "forged"))
        words = await receiver.last_words()
        assert words is not None
        assert (words.reason, str(words)) == ("integrity", "the destination says: forged")


@pytest.mark.parametrize("end", ["closes", "garbage", "silence"])
async def test_without_last_words_there_is_none(end: str) -> None:
    async with connections(0.05) as (ours, theirs):
        if end == "closes":
            ours.close()
        elif end == "garbage":
            await ours.send(b"\xff" * 100)
        with trio.fail_after(1):
            assert await Control(theirs, Role.DESTINATION).last_words() is None
