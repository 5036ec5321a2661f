"""The host's side of a mailbox slot: give a command, ring the doorbell, read the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from ..errors import LocalProtocolError, MalformedData, SvsmLost, SvsmRefused
from ..wire.slot import (
    HEADROOM_BYTES,
    HOST_DATA_OFFSET,
    NO_BUFFER,
    Command,
    SlotStatus,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ..wire.slot import SessionStatus, SlotMemory, StatusRegisters


class Slot:
    """One slot as the engine uses it. One task at a time gives it commands, but for `exchange`.

    `ring` wakes the SVSM and returns once it rang back: for a local slot a direct call, otherwise a pair of doorbells.
    """

    def __init__(self, memory: SlotMemory, ring: Callable[[], Awaitable[None]]) -> None:
        self._memory = memory
        self._ring = ring
        self._sequence = memory.command_sequence  # which is not 0 where another engine had this slot before
        self._exchanging = trio.Lock()
        self.session: SessionStatus | None = None  # as the last answer said

    async def command(
        self,
        command: Command,
        argument: int = 0,
        argument2: int = 0,
        *,
        buffer: int = NO_BUFFER,
        length: int = 0,
    ) -> StatusRegisters:
        """Give a command and return the answer.

        Raises SvsmRefused with the coarse code of a refusal, and SvsmLost where the answer is none.
        """
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        self._memory.write_command(self._sequence, command, buffer, argument, argument2, length)
        await self._ring()
        try:
            answer = self._memory.read_status_untrusted()
        except MalformedData as error:
            raise SvsmLost(f"the SVSM's answer to {command.name} makes no sense: {error}") from None
        if answer.sequence != self._sequence:
            raise SvsmLost(f"the SVSM answered another command than {command.name}")
        self.session = answer.session
        if answer.status is SlotStatus.REFUSED:
            if answer.error is None:
                raise SvsmLost(f"the SVSM refused {command.name} without a code")
            raise SvsmRefused(answer.error, command.name)
        return answer

    async def exchange(
        self, command: Command, argument: int = 0, package: bytes = b""
    ) -> tuple[StatusRegisters, bytes]:
        """A command that takes and returns a small package by value; several tasks may do so at a time."""
        async with self._exchanging:
            return await self._exchange(command, argument, package)

    async def _exchange(
        self, command: Command, argument: int, package: bytes
    ) -> tuple[StatusRegisters, bytes]:
        if package:
            index = self.begin_fill()
            if len(package) > len(self.package(index)):
                self.withdraw(index)
                raise LocalProtocolError(f"a package of {len(package)} bytes does not fit the slot's buffers")
            self.package(index)[: len(package)] = package
            answer = await self.submit(index, len(package), command, argument)
        else:
            answer = await self.command(command, argument)
        return answer, self.take(answer)

    # A buffer that the host fills

    def begin_fill(self) -> int:
        """Take a free buffer to fill; returns its index."""
        index = self._memory.free_buffer()
        if index is None:
            raise LocalProtocolError("no free buffer in the slot")
        self._memory.begin_fill(index, HOST_DATA_OFFSET)
        return index

    def package(self, index: int) -> memoryview:
        """The part of a buffer that holds a package."""
        return self._memory.packages[index]

    def withdraw(self, index: int) -> None:
        """Give a buffer back that was not filled after all."""
        self._memory.withdraw(index, HOST_DATA_OFFSET)

    async def submit(self, index: int, length: int, command: Command, argument: int = 0) -> StatusRegisters:
        """Hand a filled buffer over with a command; the SVSM gives it back before it answers."""
        self._memory.publish(index, HOST_DATA_OFFSET)
        return await self.command(command, argument, buffer=index, length=length)

    # A buffer that the SVSM filled

    def begin_drain(self, answer: StatusRegisters) -> None:
        """Take over the buffer that an answer points to."""
        self._memory.begin_drain(answer.buffer, HOST_DATA_OFFSET)

    def take(self, answer: StatusRegisters) -> bytes:
        """A copy of the package of an answer, empty where it has none; its buffer is free again."""
        if answer.buffer == NO_BUFFER:
            return b""
        self.begin_drain(answer)
        data = bytes(self.package(answer.buffer)[: answer.length])
        self.release(answer)
        return data

    def frame(self, answer: StatusRegisters, header: bytes) -> memoryview:
        """The package of an answer with `header` (at most 64 bytes) put right before it, without a copy."""
        frame = self._memory.frames[answer.buffer]
        start = HEADROOM_BYTES - len(header)
        frame[start:HEADROOM_BYTES] = header
        return frame[start : HEADROOM_BYTES + answer.length]

    def release(self, answer: StatusRegisters) -> None:
        """Give the drained buffer of an answer back."""
        self._memory.release(answer.buffer, HOST_DATA_OFFSET)
