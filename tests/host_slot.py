"""The host's side of a slot without trio: writes the registers, has the SVSM look at them, reads the answer."""

from __future__ import annotations

import mmap
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from pagexfer.svsm.commands import destination_channel, destination_control, source_channel, source_control
from pagexfer.wire.slot import (
    CONTROL_SLOT,
    HOST_DATA_OFFSET,
    NO_BUFFER,
    CommandRegisters,
    SlotGeometry,
    SlotMemory,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from pagexfer.svsm.service import SlotService
    from pagexfer.testing import SvsmPair
    from pagexfer.wire.slot import StatusRegisters


class HostSlot:
    """One slot with its service; `call` is one command of a host that keeps the rules, `ring` of one that does not."""

    def __init__(
        self, slot_id: int, serve: Callable[[SlotMemory], SlotService], buffer_bytes: int = 1 << 16
    ) -> None:
        geometry = SlotGeometry(slot_id, 2, buffer_bytes)
        self.raw = memoryview(mmap.mmap(-1, geometry.slot_bytes))
        self.memory = SlotMemory.format(self.raw, geometry)
        self.service = serve(self.memory)
        self._sequence = 0

    def call(
        self, command: int, argument: int = 0, argument2: int = 0, package: bytes | None = None
    ) -> tuple[StatusRegisters, bytes]:
        """The answer, and the package that came with it."""
        index, length = NO_BUFFER, 0
        if package is not None:
            free = self.memory.free_buffer()
            assert free is not None
            index, length = free, len(package)
            self.memory.begin_fill(index, HOST_DATA_OFFSET)
            self.memory.packages[index][:length] = package
            self.memory.publish(index, HOST_DATA_OFFSET)
        answer = self.ring(command, index, argument, argument2, length)
        assert answer.sequence == self._sequence
        if answer.buffer == NO_BUFFER:
            return answer, b""
        self.memory.begin_drain(answer.buffer, HOST_DATA_OFFSET)
        data = bytes(self.memory.packages[answer.buffer][: answer.length])
        self.memory.release(answer.buffer, HOST_DATA_OFFSET)
        return answer, data

    def ring(self, command: int, buffer: int, argument: int, argument2: int, length: int) -> StatusRegisters:
        """Any registers at all."""
        self._sequence += 1
        self.memory.write_command(
            CommandRegisters(self._sequence, command, buffer, argument, argument2, length)
        )
        self.service.service()
        return self.memory.read_status_untrusted()

    def free_buffers(self) -> int:
        return sum(self.memory.buffer_state(index).name == "FREE" for index in range(2))


class HostSlots(NamedTuple):
    """All slots of a pair with two channels."""

    source_control: HostSlot
    source_channels: tuple[HostSlot, HostSlot]
    destination_control: HostSlot
    destination_channels: tuple[HostSlot, HostSlot]

    @classmethod
    def of(cls, pair: SvsmPair) -> HostSlots:
        source, destination = pair.source, pair.destination
        return cls(
            HostSlot(CONTROL_SLOT, partial(source_control, svsm=source)),
            (
                HostSlot(0, partial(source_channel, svsm=source, channel=0)),
                HostSlot(1, partial(source_channel, svsm=source, channel=1)),
            ),
            HostSlot(CONTROL_SLOT, partial(destination_control, svsm=destination)),
            (
                HostSlot(0, partial(destination_channel, svsm=destination, channel=0)),
                HostSlot(1, partial(destination_channel, svsm=destination, channel=1)),
            ),
        )

    def each(self) -> list[HostSlot]:
        return [
            self.source_control,
            *self.source_channels,
            self.destination_control,
            *self.destination_channels,
        ]
