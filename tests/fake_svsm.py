"""A stand-in for the SVSM behind a real slot: it follows the mailbox's rules and does what a test tells it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from pagexfer.engine.slots import Slot
from pagexfer.wire.slot import (
    NO_BUFFER,
    SVSM_DATA_OFFSET,
    CommandRegisters,
    SessionStatus,
    SlotGeometry,
    SlotMemory,
    SlotStatus,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from pagexfer.errors import RefusalCode

GEOMETRY: Final = SlotGeometry(slot_id=3, buffers=2, buffer_bytes=1 << 16)


@dataclass(frozen=True, slots=True)
class Reply:
    """What to answer: a package to put into a buffer, or a status alone."""

    package: bytes = b""
    result: int = 0
    result2: int = 0
    status: SlotStatus = SlotStatus.OK
    error: RefusalCode | None = None
    sequence_error: int = 0


@dataclass
class FakeSvsm:
    """Answers each command with what `replies` makes of it; `seen` has every command and its package."""

    reply: Callable[[CommandRegisters, bytes], Reply] = lambda _registers, _package: Reply()
    memory: SlotMemory = field(
        default_factory=lambda: SlotMemory.format(bytearray(GEOMETRY.slot_bytes), GEOMETRY)
    )
    seen: list[tuple[CommandRegisters, bytes]] = field(default_factory=list)

    def slot(self) -> Slot:
        async def ring() -> None:
            self.answer()

        return Slot(self.memory, ring)

    def answer(self) -> None:
        registers = self.memory.read_command_untrusted()
        package = b""
        if registers.buffer != NO_BUFFER:
            self.memory.begin_drain(registers.buffer, SVSM_DATA_OFFSET)
            package = bytes(self.memory.packages[registers.buffer][: registers.length])
            self.memory.release(registers.buffer, SVSM_DATA_OFFSET)
        self.seen.append((registers, package))
        reply = self.reply(registers, package)
        buffer = NO_BUFFER
        if reply.package:
            buffer = self._fill(reply.package)
        self.memory.write_status(
            (registers.sequence + reply.sequence_error) & 0xFFFFFFFF,
            reply.status,
            reply.error,
            SessionStatus.PRECOPY,
            buffer,
            len(reply.package),
            reply.result,
            reply.result2,
        )

    def _fill(self, package: bytes) -> int:
        index = self.memory.free_buffer()
        assert index is not None
        self.memory.begin_fill(index, SVSM_DATA_OFFSET)
        self.memory.packages[index][: len(package)] = package
        self.memory.publish(index, SVSM_DATA_OFFSET)
        return index
