"""The SVSM behind a slot: reads a command, does it, answers with a coarse code.

One service stands behind each slot, with the commands that this slot may give. It is called when the doorbell rings. This
is the one place where the trusted side's errors become `RefusalCode`s; what was wrong in detail stays inside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ..errors import (
    AttestationError,
    GateError,
    GeometryError,
    JournalError,
    KeyExhausted,
    KeyPoisoned,
    LocalProtocolError,
    MalformedData,
    NotReady,
    PageStateError,
    PagexferError,
    PolicyRefused,
    RefusalCode,
    RemoteProtocolError,
)
from ..wire.slot import (
    NO_BUFFER,
    SVSM_DATA_OFFSET,
    Command,
    SlotStatus,
    StatusRegisters,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ..wire.slot import CommandRegisters, SlotMemory
    from .destination import DestinationSvsm
    from .source import SourceSvsm


class BadCommand(LocalProtocolError):
    """A command that this slot does not have, or without what it needs."""


class Border:
    """Where packages cross between a slot's buffers and the trusted side's private memory (R10).

    The host may change a shared buffer at any moment, also between check and use, and AES-GCM reads its input and its own
    output more than once. So a package is copied in once before anything looks at it, and one that was sealed in private
    memory is copied out whole. The buffers of a slot that is not `shared` are this thread's own: nobody can change them
    while the SVSM works, and they are used as they are.
    """

    def __init__(self, slot: SlotMemory, *, shared: bool) -> None:
        self._slot = slot
        size = slot.geometry.package_bytes
        self._inbox = memoryview(bytearray(size)) if shared else None
        self._outbox = memoryview(bytearray(size)) if shared else None

    def take(self, index: int, length: int) -> memoryview:
        """The package of a READY buffer, in private memory; the buffer is DRAINING until `release`."""
        self._slot.begin_drain(index, SVSM_DATA_OFFSET)
        package = self._slot.packages[index][:length]
        if self._inbox is None:
            return package
        self._inbox[:length] = package
        return self._inbox[:length]

    def release(self, index: int) -> None:
        """Give a drained buffer back."""
        self._slot.release(index, SVSM_DATA_OFFSET)

    def begin(self) -> tuple[int, memoryview]:
        """A free buffer's index, now FILLING, and private memory for its package."""
        index = self._slot.free_buffer()
        if index is None:
            raise LocalProtocolError("no free buffer to answer in")
        self._slot.begin_fill(index, SVSM_DATA_OFFSET)
        return index, self._slot.packages[index] if self._outbox is None else self._outbox

    def end(self, index: int, length: int) -> None:
        """Publish the package of `length` bytes, or give the buffer back where it is 0."""
        if not length:
            self._slot.withdraw(index, SVSM_DATA_OFFSET)
            return
        if self._outbox is not None:
            self._slot.packages[index][:length] = self._outbox[:length]
        self._slot.publish(index, SVSM_DATA_OFFSET)


class Call:
    """One command: its registers, its package if the host gave one, and room for a package to answer with."""

    def __init__(self, registers: CommandRegisters, package: memoryview | None, border: Border) -> None:
        self.registers = registers
        self._package = package
        self._border = border
        self._buffer: int | None = None

    @property
    def argument(self) -> int:
        return self.registers.argument

    def package(self) -> memoryview:
        """The package. Raises LocalProtocolError where the command came without."""
        if self._package is None:
            raise BadCommand("the command needs a package")
        return self._package

    def room(self) -> memoryview:
        """Where the answer's package goes; once a call. Raises LocalProtocolError where no buffer is free."""
        self._buffer, room = self._border.begin()
        return room

    def end(self, length: int) -> int:
        """Publish `length` bytes of the room; returns the buffer, or NO_BUFFER where there is nothing to publish."""
        if self._buffer is not None:
            self._border.end(self._buffer, length)
        return self._buffer if self._buffer is not None and length else NO_BUFFER


@dataclass(frozen=True, slots=True)
class Answer:
    """What goes into the status line; a `length` above zero means that the call's room holds a package."""

    length: int = 0
    result: int = 0
    result2: int = 0
    status: SlotStatus = SlotStatus.OK


class SlotService:
    """Serves one slot. `commands` says what each command does; `shared` whether the host can reach the slot's memory."""

    def __init__(
        self,
        slot: SlotMemory,
        session: SourceSvsm | DestinationSvsm,
        commands: Mapping[Command, Callable[[Call], Answer]],
        *,
        shared: bool,
    ) -> None:
        self._slot = slot
        self._session = session
        self._commands = commands
        self._border = Border(slot, shared=shared)

    def service(self) -> None:
        """Do the command that stands in the registers, once. Never raises what the host could have caused."""
        sequence = 0
        try:
            registers = self._read()
            sequence = registers.sequence
            answer, buffer = self._perform(registers)
        except PagexferError as error:
            self._reply(sequence, Answer(status=SlotStatus.REFUSED), NO_BUFFER, refusal_code(error))
        else:
            self._reply(sequence, answer, buffer, None)

    def _read(self) -> CommandRegisters:
        try:
            return self._slot.read_command_untrusted()
        except MalformedData as error:
            raise BadCommand(str(error)) from None

    def _perform(self, registers: CommandRegisters) -> tuple[Answer, int]:
        if registers.buffer == NO_BUFFER:
            return self._answer(Call(registers, None, self._border))
        package = self._border.take(registers.buffer, registers.length)
        try:
            return self._answer(Call(registers, package, self._border))
        finally:
            self._border.release(registers.buffer)

    def _answer(self, call: Call) -> tuple[Answer, int]:
        try:
            answer = self._handler(call.registers.command)(call)
        except BaseException:
            call.end(0)
            raise
        return answer, call.end(answer.length)

    def _handler(self, number: int) -> Callable[[Call], Answer]:
        command = _COMMANDS.get(number)
        handler = self._commands.get(command) if command is not None else None
        if handler is None:
            raise BadCommand("unknown command for this slot")
        return handler

    def _reply(self, sequence: int, answer: Answer, buffer: int, error: RefusalCode | None) -> None:
        self._slot.write_status(
            StatusRegisters(
                sequence,
                answer.status,
                error,
                self._session.state,
                buffer,
                answer.length,
                answer.result,
                answer.result2,
            )
        )


def refusal_code(error: PagexferError) -> RefusalCode:
    """The coarse code of an error, all that the host learns of it."""
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    return RefusalCode.INTERNAL


# The first match counts, so narrower kinds stand first.
_CODES: Final[tuple[tuple[type[PagexferError], RefusalCode], ...]] = (
    (BadCommand, RefusalCode.COMMAND),
    (NotReady, RefusalCode.NOT_READY),
    (LocalProtocolError, RefusalCode.STATE),
    (PolicyRefused, RefusalCode.POLICY),
    (AttestationError, RefusalCode.AUTHENTICATION),
    (GeometryError, RefusalCode.GEOMETRY),
    (KeyExhausted, RefusalCode.EXHAUSTED),
    (KeyPoisoned, RefusalCode.STATE),
    (MalformedData, RefusalCode.INTEGRITY),
    (RemoteProtocolError, RefusalCode.INTEGRITY),
    (GateError, RefusalCode.GUEST),
    (PageStateError, RefusalCode.GUEST),
    (JournalError, RefusalCode.JOURNAL),
)
_COMMANDS: Final = {int(command): command for command in Command}
