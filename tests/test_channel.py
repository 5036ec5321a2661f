"""Both ends of one channel over real TCP and real slots, with a stand-in for the SVSM behind each slot."""

from __future__ import annotations

from collections import deque
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from pagexfer.engine.channel import DestinationChannel, SourceChannel
from pagexfer.engine.plan import Chunk
from pagexfer.engine.progress import ChannelTally
from pagexfer.errors import ChannelBroken, MalformedData, RefusalCode, SvsmLost, SvsmRefused
from pagexfer.wire.bundle import BundleKind
from pagexfer.wire.framing import (
    FRAME_HEADER_BYTES,
    ConnectionHello,
    FrameHeader,
    FrameType,
    Purpose,
    parse_barrier_untrusted,
    parse_connection_hello_untrusted,
)
from pagexfer.wire.slot import BufferState, Command, SlotStatus

from .fake_svsm import GEOMETRY, FakeSvsm, Reply
from .loopback import connections

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from pagexfer.engine.streams import Connection
    from pagexfer.wire.slot import CommandRegisters

_SESSION = bytes(range(16))


@dataclass
class _Ends:
    """A channel: the source's engine end and SVSM, the destination's."""

    source: SourceChannel
    source_svsm: FakeSvsm
    source_tally: ChannelTally
    sender: Connection
    destination: DestinationChannel
    destination_svsm: FakeSvsm
    destination_tally: ChannelTally
    receiver: Connection


@asynccontextmanager
async def _ends() -> AsyncIterator[_Ends]:
    async with connections() as (sender, receiver):
        source_svsm, destination_svsm = FakeSvsm(), FakeSvsm()
        source_tally, destination_tally = ChannelTally(5), ChannelTally(5)
        yield _Ends(
            SourceChannel(5, source_svsm.slot(), sender, source_tally),
            source_svsm,
            source_tally,
            sender,
            DestinationChannel(destination_svsm.slot(), receiver, destination_tally),
            destination_svsm,
            destination_tally,
            receiver,
        )
        for svsm in (source_svsm, destination_svsm):
            for index in range(GEOMETRY.buffers):
                assert svsm.memory.buffer_state(index) is BufferState.FREE


async def test_a_channel_opens_with_its_hello_and_its_proof() -> None:
    async with _ends() as ends:
        ends.source_svsm.reply = lambda _registers, _package: Reply(b"proof")
        await ends.source.open(_SESSION)
        hello = parse_connection_hello_untrusted(await ends.receiver.receive_frame(FrameType.HELLO))
        assert hello == ConnectionHello(Purpose.CHANNEL, 5, _SESSION)
        assert await ends.receiver.receive_frame(FrameType.BUNDLE) == b"proof"
        assert ends.source_svsm.seen[0][0].command == Command.SETUP


async def test_a_session_of_another_length_is_not_named() -> None:
    async with _ends() as ends:
        with pytest.raises(MalformedData, match="session of 3 bytes"):
            await ends.source.open(b"abc")
        assert ends.source_svsm.seen == []


async def test_every_chunk_is_exported_until_nothing_of_it_is_pending() -> None:
    bundles = {100: [b"first", b"second"], 300: [], 400: [b"third"]}

    def export(registers: CommandRegisters, _package: bytes) -> Reply:
        left = bundles[registers.argument]
        package = left.pop(0) if left else b""
        pages = 10 if package else 0
        return Reply(package, pages, pages // 5, SlotStatus.INCOMPLETE if left else SlotStatus.OK)

    async with _ends() as ends:
        ends.source_svsm.reply = export
        ends.destination_svsm.reply = lambda _registers, _package: Reply(
            result=BundleKind.PAGES, result2=10 << 32 | 2
        )
        chunks = deque([Chunk(100, 50), Chunk(300, 1), Chunk(400, 7)])
        await ends.source.export(chunks)
        await ends.source.barrier(9)
        assert not chunks
        assert [(registers.argument, registers.argument2) for registers, _ in ends.source_svsm.seen] == [
            (100, 50),
            (100, 50),
            (300, 1),
            (400, 7),
        ]
        for _ in range(3):
            header = await ends.receiver.receive_header()
            assert await ends.destination.import_bundle(header) == (BundleKind.PAGES, b"")
        assert [package for _, package in ends.destination_svsm.seen] == [b"first", b"second", b"third"]
        assert parse_barrier_untrusted(await ends.receiver.receive_frame(FrameType.BARRIER)) == 9
        sent = 3 * FRAME_HEADER_BYTES + len(b"firstsecondthird")
        tally = ends.source_tally
        assert (tally.bundles, tally.normal, tally.duplicate, tally.transferred) == (3, 24, 6, sent)
        assert (ends.destination_tally.normal, ends.destination_tally.duplicate) == (24, 6)


async def test_tokens_and_states_ask_for_what_they_are() -> None:
    async with _ends() as ends:
        ends.source_svsm.reply = lambda _registers, _package: Reply(b"sealed")
        await ends.source.vcpu_state(3)
        await ends.source.token(BundleKind.MANIFEST)
        assert [(registers.command, registers.argument) for registers, _ in ends.source_svsm.seen] == [
            (Command.STATE, 3),
            (Command.TOKEN, BundleKind.MANIFEST),
        ]
        ends.destination_svsm.reply = lambda _registers, _package: Reply(result=BundleKind.MANIFEST)
        for _ in range(2):
            header = await ends.receiver.receive_header()
            assert await ends.destination.import_bundle(header) == (BundleKind.MANIFEST, b"")
        assert ends.destination_tally.bundles == 0  # pages alone are counted


async def test_an_answer_comes_back_and_is_opened() -> None:
    async with _ends() as ends:
        ends.destination_svsm.reply = lambda _registers, _package: Reply(b"sealed answer")
        ends.source_svsm.reply = lambda _registers, _package: Reply(result=BundleKind.READY)
        await ends.destination.answer(BundleKind.READY)
        assert await ends.source.receive_answer() is BundleKind.READY
        assert ends.source_svsm.seen[0][1] == b"sealed answer"
        assert ends.source_svsm.seen[0][0].command == Command.IMPORT


async def test_a_bundle_of_no_kind_is_nonsense_of_the_svsm() -> None:
    async with _ends() as ends:
        ends.source_svsm.reply = lambda _registers, _package: Reply(b"sealed")
        await ends.source.token(BundleKind.MANIFEST)
        ends.destination_svsm.reply = lambda _registers, _package: Reply(result=99)
        with pytest.raises(SvsmLost, match="99"):
            await ends.destination.import_bundle(await ends.receiver.receive_header())


async def test_a_refused_bundle_is_the_svsms_word() -> None:
    async with _ends() as ends:
        ends.destination_svsm.reply = lambda _registers, _package: Reply(
            status=SlotStatus.REFUSED, error=RefusalCode.INTEGRITY
        )
        await ends.sender.send_frame(FrameType.BUNDLE, b"forged")
        with pytest.raises(SvsmRefused) as caught:
            await ends.destination.import_bundle(await ends.receiver.receive_header())
        assert caught.value.code is RefusalCode.INTEGRITY
        assert ends.destination_tally.bundles == 0


@pytest.mark.parametrize(
    "header",
    [
        FrameHeader(FrameType.CONTROL, 5),
        FrameHeader(FrameType.HELLO, 32),
        FrameHeader(FrameType.BUNDLE, GEOMETRY.package_bytes + 1),
    ],
)
async def test_what_is_no_bundle_for_this_slot_never_reaches_the_svsm(header: FrameHeader) -> None:
    async with _ends() as ends:
        with pytest.raises(MalformedData):
            await ends.destination.import_bundle(header)
        assert ends.destination_svsm.seen == []


async def test_a_bundle_that_stops_half_way_never_reaches_the_svsm() -> None:
    async with _ends() as ends:
        await ends.sender.send(FrameHeader(FrameType.BUNDLE, 100).pack() + bytes(50))
        ends.sender.close()
        with pytest.raises(ChannelBroken):
            await ends.destination.import_bundle(await ends.receiver.receive_header())
        assert ends.destination_svsm.seen == []
