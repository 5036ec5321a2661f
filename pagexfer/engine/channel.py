"""One channel of a migration: a TCP connection, its slot, and what its worker task does with both.

The worker's way is always the same: the SVSM seals into a free buffer of the slot, the buffer goes to the socket while it
is in the cache, the buffer is free again. There is no other queue, so a slow connection holds its own worker back.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, NamedTuple

import trio

from ..errors import ChannelClosed, MalformedData, SvsmLost
from ..wire.bundle import HEADER_BYTES, PAGE_KINDS, BundleKind
from ..wire.constants import SESSION_ID_BYTES, TAG_BYTES
from ..wire.device_state import MAX_DEVICE_STATE_PART_BYTES, PART_HEADER_BYTES, DevicePart
from ..wire.framing import (
    ConnectionHello,
    FrameHeader,
    FrameType,
    Purpose,
    pack_barrier,
    parse_barrier_untrusted,
)
from ..wire.slot import NO_BUFFER, Command, SlotStatus

if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Iterator

    from ..wire.slot import StatusRegisters
    from .plan import Chunk
    from .progress import ChannelTally
    from .slots import Slot
    from .streams import Connection


# Of a buffer that holds the bundle of a part, what is left for the part.
_PART_OVERHEAD_BYTES: Final = HEADER_BYTES + PART_HEADER_BYTES + TAG_BYTES


class Lost(NamedTuple):
    """What did not arrive over a connection that was replaced: pages, and whether token or ledger were among it."""

    pages: int
    token: bool
    ledger: bool


class SourceChannel:
    """The sending end of one channel."""

    def __init__(self, channel: int, slot: Slot, connection: Connection, tally: ChannelTally) -> None:
        self.channel = channel
        self.connection = connection
        self._slot = slot
        self._tally = tally

    async def open(self, session: bytes) -> None:
        """Say which channel of which session this connection is, and prove it."""
        await self._introduce(self.connection, session, Command.SETUP)

    async def replace(self, connection: Connection, session: bytes) -> Lost:
        """Go on over a new connection; the SVSMs settle what arrived over the one before, of which nothing is used.

        Raises ChannelBroken, with the new connection closed, where it breaks, too.
        """
        try:
            await self._introduce(connection, session, Command.REPLACE)
            header = await connection.receive_header()
            answer = await _import_frame(connection, self._slot, header, Command.REPLACE)
        except BaseException:
            connection.close()
            raise
        self.connection = connection
        self._tally.replaced += 1
        return Lost(answer.result, bool(answer.result2 & 1), bool(answer.result2 & 2))

    async def export(self, chunks: deque[Chunk]) -> None:
        """Take chunks until none is left, and send what is pending in each; one that was not finished is put back."""
        while True:
            try:
                chunk = chunks.popleft()
            except IndexError:  # asked for and not looked at first: another channel's thread may be quicker
                return
            try:
                await self._export_chunk(chunk)
            except BaseException:
                chunks.appendleft(chunk)
                raise

    async def barrier(self, epoch: int) -> None:
        """Say that every bundle of the epoch on this channel stands before this frame."""
        await self.connection.send_frame(FrameType.BARRIER, pack_barrier(epoch))

    async def token(self, kind: BundleKind) -> None:
        """Have a token sealed and send it."""
        await self._send(await self._slot.command(Command.TOKEN, kind))

    async def vcpu_state(self, vcpu: int) -> None:
        """Have a vCPU's state sealed and send it."""
        await self._send(await self._slot.command(Command.STATE, vcpu))

    async def device_state(self, state: bytes) -> None:
        """Have the hypervisor's device state sealed and send it, in as many parts as it takes; none where it is empty."""
        whole, start = memoryview(state), 0
        while start < len(state):
            index = self._slot.begin_fill()
            package = self._slot.package(index)
            most = min(MAX_DEVICE_STATE_PART_BYTES, len(package) - _PART_OVERHEAD_BYTES)
            part = whole[start : start + most]
            length = PART_HEADER_BYTES + len(part)
            package[:PART_HEADER_BYTES] = DevicePart(len(state), start, len(part)).pack_header()
            package[PART_HEADER_BYTES:length] = part
            await self._send(await self._slot.submit(index, length, Command.STATE))
            start += len(part)

    async def receive_answer(self) -> BundleKind:
        """Receive the destination's next answer and have it opened. Raises SvsmRefused where it is forged."""
        header = await self.connection.receive_header()
        answer = await _import_frame(self.connection, self._slot, header)
        return _kind(answer)

    async def _introduce(self, connection: Connection, session: bytes, command: Command) -> None:
        if len(session) != SESSION_ID_BYTES:
            raise MalformedData(f"the destination named a session of {len(session)} bytes")
        hello = ConnectionHello(Purpose.CHANNEL, self.channel, session)
        await connection.send_frame(FrameType.HELLO, hello.pack())
        await _send_bundle(connection, self._slot, await self._slot.command(command))

    async def _export_chunk(self, chunk: Chunk) -> None:
        status = SlotStatus.INCOMPLETE
        while status is SlotStatus.INCOMPLETE:
            answer = await self._slot.command(Command.EXPORT, chunk.start, chunk.pages)
            status = answer.status
            if answer.buffer != NO_BUFFER:
                sent = await self._send(answer)
                self._tally.add(answer.result, answer.result2, sent)

    async def _send(self, answer: StatusRegisters) -> int:
        return await _send_bundle(self.connection, self._slot, answer)


class Arrival(NamedTuple):
    """What a bundle was, and the part of the device state that it brought."""

    kind: BundleKind
    device_state: bytes


class EpochEnd(NamedTuple):
    """The source says that `epoch` has no more bundles on this channel."""

    epoch: int


class DestinationChannel:
    """The receiving end of one channel over one connection. `replaced` is set once another one has taken its place."""

    def __init__(self, slot: Slot, connection: Connection, tally: ChannelTally) -> None:
        self.connection = connection
        self.replaced = trio.Event()
        self.idle = trio.Event()  # no task uses connection or slot for this connection
        self.idle.set()
        self._working = trio.CancelScope()
        self._slot = slot
        self._tally = tally

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Around everything that a worker does for this connection, waits for other channels among it.

        Raises ChannelClosed where this connection was retired meanwhile.
        """
        self.idle = trio.Event()
        try:
            with self._working:
                yield
        finally:
            self.idle.set()
        if self._working.cancelled_caught:
            raise ChannelClosed("another connection takes the place of this one")

    async def retire(self) -> None:
        """End the connection, once its worker is done with it."""
        # Cancelled before it is closed: the worker may be a thread, which does not hear of the end.
        self._working.cancel()
        await self.idle.wait()
        self.connection.close()

    async def import_bundle(self, header: FrameHeader) -> Arrival:
        """Receive one bundle straight into the slot and have it imported; returns what it was."""
        answer = await _import_frame(self.connection, self._slot, header)
        kind = _kind(answer)
        if kind in PAGE_KINDS:
            self._tally.add(answer.result2 >> 32, answer.result2 & 0xFFFFFFFF, header.payload_bytes)
        return Arrival(kind, self._slot.take(answer))

    async def import_pages(self, idle_timeout_s: float) -> Arrival | EpochEnd:
        """Import bundles of pages until anything else came; returns what that was."""
        while True:
            header = await self.connection.receive_header(idle_timeout_s)
            if header.type is FrameType.BARRIER:
                return EpochEnd(parse_barrier_untrusted(await self.connection.receive_payload(header)))
            arrival = await self.import_bundle(header)
            if arrival.kind not in PAGE_KINDS:
                return arrival

    async def answer(self, kind: BundleKind) -> None:
        """Have an answer sealed and send it back."""
        await _send_bundle(self.connection, self._slot, await self._slot.command(Command.TOKEN, kind))


def _kind(answer: StatusRegisters) -> BundleKind:
    """What the SVSM says that a bundle was. Raises SvsmLost where that is no kind of bundle."""
    try:
        return BundleKind(answer.result)
    except ValueError:
        raise SvsmLost(f"the SVSM names a bundle of kind {answer.result}, which is none") from None


async def _import_frame(
    connection: Connection, slot: Slot, header: FrameHeader, command: Command = Command.IMPORT
) -> StatusRegisters:
    index = slot.begin_fill()
    package = slot.package(index)
    try:
        if header.type is not FrameType.BUNDLE:
            raise MalformedData(f"a {header.type.name} frame where a bundle is due")
        if header.payload_bytes > len(package):
            raise MalformedData(
                f"a bundle of {header.payload_bytes} bytes: the slot's buffers hold {len(package)}"
            )
        await connection.receive_into(package[: header.payload_bytes])
    except BaseException:
        slot.withdraw(index)
        raise
    return await slot.submit(index, header.payload_bytes, command)


async def _send_bundle(connection: Connection, slot: Slot, answer: StatusRegisters) -> int:
    slot.begin_drain(answer)
    frame = slot.frame(answer, FrameHeader(FrameType.BUNDLE, answer.length).pack())
    try:
        await connection.send(frame)
    finally:
        slot.release(answer)
    return len(frame)
