"""The host's side of a slot without trio: writes the registers, has the SVSM look at them, reads the answer."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Final

from ..errors import LocalProtocolError
from ..wire.slot import (
    HOST_DATA_OFFSET,
    NO_BUFFER,
    BufferState,
    SlotGeometry,
    SlotMemory,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..svsm.service import SlotService
    from ..wire.slot import StatusRegisters

BUFFERS: Final = 2
_SEQUENCE_MASK: Final = (1 << 32) - 1


class HostSlot:
    """One slot with its service; `call` is one command of a host that keeps the rules, `ring` of one that does not.

    `serve` makes the service over the formatted slot, `raw` is the memory to lay it out in (fresh memory by default).
    """

    def __init__(
        self,
        slot_id: int,
        serve: Callable[[SlotMemory], SlotService],
        buffer_bytes: int = 1 << 16,
        raw: memoryview | None = None,
    ) -> None:
        geometry = SlotGeometry(slot_id, BUFFERS, buffer_bytes)
        self.raw = memoryview(mmap.mmap(-1, geometry.slot_bytes)) if raw is None else raw
        self.memory = SlotMemory.format(self.raw, geometry)
        self.service = serve(self.memory)
        self._sequence = 0

    def call(
        self, command: int, argument: int = 0, argument2: int = 0, package: bytes | None = None
    ) -> tuple[StatusRegisters, bytes]:
        """The answer, and the package that came with it.

        Raises LocalProtocolError where no buffer is free for the host's package.
        """
        index, length = NO_BUFFER, 0
        if package is not None:
            index, length = self.give(package), len(package)
        answer = self.ring(command, index, argument, argument2, length)
        return answer, self.take(answer)

    def give(self, package: bytes) -> int:
        """Put a package into a free buffer, now READY; returns its index. Raises LocalProtocolError where none is free."""
        index = self.memory.free_buffer()
        if index is None:
            raise LocalProtocolError("no free buffer for the host's package")
        self.memory.begin_fill(index, HOST_DATA_OFFSET)
        self.memory.packages[index][: len(package)] = package
        self.memory.publish(index, HOST_DATA_OFFSET)
        return index

    def take(self, answer: StatusRegisters) -> bytes:
        """The package of an answer, whose buffer is FREE again.

        Raises LocalProtocolError where the host itself has spoilt the buffer's words.
        """
        if answer.buffer == NO_BUFFER:
            return b""
        self.memory.begin_drain(answer.buffer, HOST_DATA_OFFSET)
        data = bytes(self.memory.packages[answer.buffer][: answer.length])
        self.memory.release(answer.buffer, HOST_DATA_OFFSET)
        return data

    def ring(self, command: int, buffer: int, argument: int, argument2: int, length: int) -> StatusRegisters:
        """Any registers at all; the answer's sequence is that of the command, or the SVSM did not answer it."""
        self._sequence = (self._sequence + 1) & _SEQUENCE_MASK
        self.memory.write_command(self._sequence, command, buffer, argument, argument2, length)
        self.service.service()
        answer = self.memory.read_status_untrusted()
        # A command line that cannot be read is answered as number 0.
        assert answer.sequence in (self._sequence, 0)
        return answer

    def free_buffers(self) -> int:
        """How many buffers are FREE."""
        return sum(self.memory.buffer_state(index) is BufferState.FREE for index in range(BUFFERS))
