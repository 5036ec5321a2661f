"""The SVSM behind a slot: reads a command, does it, answers with a coarse code.

One service stands behind each slot, with the commands that this slot may give. It is called when the doorbell rings. This
is the one place where the trusted side's errors become `RefusalCode`s; what was wrong in detail stays inside.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import numpy as np

from ..errors import (
    AttestationError,
    CompressionRefused,
    GateError,
    GeometryError,
    GuestError,
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
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager

    from ..wire.slot import CommandRegisters, SessionStatus, SlotMemory
    from .staging import StagingPool


class Session(Protocol):
    """What a service needs of the SVSM behind it, source or destination."""

    @property
    def state(self) -> SessionStatus:
        """The status register."""

    @property
    def staging(self) -> StagingPool:
        """Private memory for packages on their way."""

    local_fault: (
        str  # what of this side's own failed first, its guest or its journal: for this side's people alone
    )

    @property
    def lock(self) -> AbstractContextManager[object]:
        """Held while a command is carried out that may not run beside another."""


class BadCommand(LocalProtocolError):
    """A command that this slot does not have, or without what it needs."""


class Border:
    """Where packages cross between a slot's buffers and the trusted side's private memory (R10).

    The host may change a shared buffer at any moment, also between check and use, and AES-GCM reads its input and its own
    output more than once. So a package is copied in once before anything looks at it, and one that was sealed in private
    memory is copied out whole. The buffers of a slot that is not `shared` are this process's own: nobody can change them
    while the SVSM works, and they are used as they are.
    """

    def __init__(self, slot: SlotMemory, staging: StagingPool, *, shared: bool) -> None:
        self._slot = slot
        self._staging = staging if shared else None
        self._inbox: memoryview | None = None
        self._outbox: memoryview | None = None

    def take(self, index: int, length: int) -> memoryview:
        """The package of a READY buffer, in private memory; the buffer is DRAINING until `release`."""
        self._slot.begin_drain(index, SVSM_DATA_OFFSET)
        package = self._slot.packages[index][:length]
        if self._staging is None:
            return package
        self._inbox = self._staging.take(self._slot.geometry.package_bytes)
        _copy(package, self._inbox)
        return self._inbox[:length]

    def release(self, index: int) -> None:
        """Give a drained buffer back."""
        if self._staging is not None and self._inbox is not None:
            self._staging.give(self._inbox)
            self._inbox = None
        self._slot.release(index, SVSM_DATA_OFFSET)

    def begin(self) -> tuple[int, memoryview]:
        """A free buffer's index, now FILLING, and private memory for its package."""
        index = self._slot.free_buffer()
        if index is None:
            raise LocalProtocolError("no free buffer to answer in")
        self._slot.begin_fill(index, SVSM_DATA_OFFSET)
        if self._staging is None:
            return index, self._slot.packages[index]
        self._outbox = self._staging.take(self._slot.geometry.package_bytes)
        return index, self._outbox[: self._slot.geometry.package_bytes]

    def end(self, index: int, length: int) -> None:
        """Publish the package of `length` bytes, or give the buffer back where it is 0."""
        if self._staging is not None and self._outbox is not None:
            _copy(self._outbox[:length], self._slot.packages[index])
            self._staging.give(self._outbox)
            self._outbox = None
        if length:
            self._slot.publish(index, SVSM_DATA_OFFSET)
        else:
            self._slot.withdraw(index, SVSM_DATA_OFFSET)


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

    @property
    def has_package(self) -> bool:
        return self._package is not None

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


class Answer(NamedTuple):
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
        session: Session,
        commands: Mapping[Command, Callable[[Call], Answer]],
        *,
        shared: bool,
    ) -> None:
        self._slot = slot
        self._session = session
        # By their numbers, as these come from the host.
        self._commands = {int(command): perform for command, perform in commands.items()}
        self._border = Border(slot, session.staging, shared=shared)

    def service(self) -> int:
        """Do the command that stands in the registers, once; returns its sequence number, 0 where it cannot be read.

        Never raises what the host could have caused.
        """
        sequence = 0
        try:
            registers = self._read()
            sequence = registers.sequence
            answer, buffer = self._perform(registers)
        except PagexferError as error:
            code = refusal_code(error)
            if code in _LOCAL and not self._session.local_fault:
                self._session.local_fault = str(error)
            self._reply(sequence, Answer(status=SlotStatus.REFUSED), NO_BUFFER, code)
        else:
            self._reply(sequence, answer, buffer, None)
        return sequence

    def fault(self, sequence: int) -> None:
        """Answer a command that nobody will carry out any more, as the one who should have has met a defect."""
        self._reply(sequence, Answer(status=SlotStatus.REFUSED), NO_BUFFER, RefusalCode.INTERNAL)

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
            perform = self._commands.get(call.registers.command)
            if perform is None:
                raise BadCommand("unknown command for this slot")
            # A package that is sealed or opened keeps no other slot waiting: these take the lock themselves.
            if call.registers.command in _PARALLEL:
                answer = perform(call)
            else:
                with self._session.lock:
                    answer = perform(call)
        except BaseException:
            call.end(0)
            raise
        return answer, call.end(answer.length)

    def _reply(self, sequence: int, answer: Answer, buffer: int, error: RefusalCode | None) -> None:
        length, result, result2, status = answer
        self._slot.write_status(sequence, status, error, self._session.state, buffer, length, result, result2)


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
    (CompressionRefused, RefusalCode.COMPRESSION),
    (KeyExhausted, RefusalCode.EXHAUSTED),
    (KeyPoisoned, RefusalCode.STATE),
    (MalformedData, RefusalCode.INTEGRITY),
    (RemoteProtocolError, RefusalCode.INTEGRITY),
    (GateError, RefusalCode.GUEST),
    (PageStateError, RefusalCode.GUEST),
    (GuestError, RefusalCode.GUEST),
    (JournalError, RefusalCode.JOURNAL),
)
_LOCAL: Final = frozenset({RefusalCode.GUEST, RefusalCode.JOURNAL})
_PARALLEL: Final = frozenset({int(Command.EXPORT), int(Command.IMPORT)})


def _copy(source: memoryview, target: memoryview) -> None:
    """Copy to the start of `target`. By numpy, which lets other threads run meanwhile, as a slice assignment does not."""
    length = len(source)
    if length:
        np.copyto(np.frombuffer(target, np.uint8, length), np.frombuffer(source, np.uint8, length))
