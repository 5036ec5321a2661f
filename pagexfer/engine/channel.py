"""One channel of a migration: a TCP connection, its slot, and what its worker task does with both.

The worker's way is always the same: the SVSM seals into a free buffer of the slot, the buffer goes to the socket while it
is in the cache, the buffer is free again. There is no other queue, so a slow connection holds its own worker back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import MalformedData
from ..wire.bundle import BundleKind
from ..wire.constants import SESSION_ID_BYTES
from ..wire.framing import ConnectionHello, FrameHeader, FrameType, Purpose, pack_barrier
from ..wire.slot import NO_BUFFER, Command, SlotStatus

if TYPE_CHECKING:
    from collections import deque

    from ..wire.slot import StatusRegisters
    from .plan import Chunk
    from .progress import ChannelTally
    from .slots import Slot
    from .streams import Connection


class SourceChannel:
    """The sending end of one channel."""

    def __init__(self, channel: int, slot: Slot, connection: Connection, tally: ChannelTally) -> None:
        self.channel = channel
        self.connection = connection
        self._slot = slot
        self._tally = tally

    async def open(self, session: bytes) -> None:
        """Say which channel of which session this connection is, and prove it."""
        if len(session) != SESSION_ID_BYTES:
            raise MalformedData(f"the destination named a session of {len(session)} bytes")
        hello = ConnectionHello(Purpose.CHANNEL, self.channel, session)
        await self.connection.send_frame(FrameType.HELLO, hello.pack())
        await self._send(await self._slot.command(Command.SETUP))

    async def export(self, chunks: deque[Chunk]) -> None:
        """Take chunks until none is left, and send what is pending in each."""
        while chunks:
            chunk = chunks.popleft()
            status = SlotStatus.INCOMPLETE
            while status is SlotStatus.INCOMPLETE:
                answer = await self._slot.command(Command.EXPORT, chunk.start, chunk.pages)
                status = answer.status
                if answer.buffer != NO_BUFFER:
                    sent = await self._send(answer)
                    self._tally.add(answer.result, answer.result2, sent)

    async def barrier(self, epoch: int) -> None:
        """Say that every bundle of the epoch on this channel stands before this frame."""
        await self.connection.send_frame(FrameType.BARRIER, pack_barrier(epoch))

    async def token(self, kind: BundleKind) -> None:
        """Have a token sealed and send it."""
        await self._send(await self._slot.command(Command.TOKEN, kind))

    async def vcpu_state(self, vcpu: int) -> None:
        """Have a vCPU's state sealed and send it."""
        await self._send(await self._slot.command(Command.STATE, vcpu))

    async def receive_answer(self) -> BundleKind:
        """Receive the destination's next answer and have it opened. Raises SvsmRefused where it is forged."""
        header = await self.connection.receive_header()
        answer = await _import_frame(self.connection, self._slot, header)
        return BundleKind(answer.result)

    async def _send(self, answer: StatusRegisters) -> int:
        return await _send_bundle(self.connection, self._slot, answer)


class DestinationChannel:
    """The receiving end of one channel."""

    def __init__(self, slot: Slot, connection: Connection, tally: ChannelTally) -> None:
        self.connection = connection
        self._slot = slot
        self._tally = tally

    async def import_bundle(self, header: FrameHeader) -> BundleKind:
        """Receive one bundle straight into the slot and have it imported; returns what it was."""
        answer = await _import_frame(self.connection, self._slot, header)
        kind = BundleKind(answer.result)
        if kind is BundleKind.PAGES:
            self._tally.add(answer.result2 >> 32, answer.result2 & 0xFFFFFFFF, header.payload_bytes)
        return kind

    async def answer(self, kind: BundleKind) -> None:
        """Have an answer sealed and send it back."""
        await _send_bundle(self.connection, self._slot, await self._slot.command(Command.TOKEN, kind))


async def _import_frame(connection: Connection, slot: Slot, header: FrameHeader) -> StatusRegisters:
    index = slot.begin_fill()
    package = slot.package(index)
    try:
        if header.type is not FrameType.BUNDLE or header.payload_bytes > len(package):
            raise MalformedData("a bundle is due that fits the slot's buffers")
        await connection.receive_into(package[: header.payload_bytes])
    except BaseException:
        slot.withdraw(index)
        raise
    return await slot.submit(index, header.payload_bytes, Command.IMPORT)


async def _send_bundle(connection: Connection, slot: Slot, answer: StatusRegisters) -> int:
    slot.begin_drain(answer)
    frame = slot.frame(answer, FrameHeader(FrameType.BUNDLE, answer.length).pack())
    await connection.send(frame)
    slot.release(answer)
    return len(frame)
