"""The mailbox slot, version 3: one register page and K data buffers in memory that host and SVSM share.

The register page has one cache line for each direction of each register, so that no line has two writers. The host
fills the command line and raises its sequence word last; the SVSM answers in the status line with the same sequence
word last. The data register says for every buffer whose it is. A buffer is provided by one side and consumed by the
other; which is which depends on the command, so source and destination use the same slot with swapped roles.

Both sides read registers by copying a whole line first (`read_command`, `read_status`): what the other side may still
change is never looked at twice.
"""

from __future__ import annotations

import enum
import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from ..errors import LocalProtocolError, MalformedData, RefusalCode

if TYPE_CHECKING:
    from typing_extensions import Buffer

SLOT_MAGIC: Final = int.from_bytes(b"PGXSLOT3", "little")
SLOT_VERSION: Final = 3
REGISTER_PAGE_BYTES: Final = 4096
CONTROL_SLOT: Final = (
    0xFFFF  # id of the slot that carries session commands; channel slots have their channel's number
)
NO_BUFFER: Final = 0xFFFF

MIN_BUFFERS: Final = 2
MAX_BUFFERS: Final = 8
MIN_BUFFER_SHIFT: Final = 16
MAX_BUFFER_SHIFT: Final = 22

# Bytes at the head of every buffer that the SVSM neither reads nor writes: the host puts its framing there, so that a
# frame and its package leave in one piece without a copy. One cache line keeps the package aligned.
HEADROOM_BYTES: Final = 64


class Command(enum.IntEnum):
    """What the host asks for; named after the phases of the KVM migration RFC. Wire numbers: never reused, 0 invalid."""

    PREPARE = 1  # control: produce or answer a hello
    SETUP = 2  # control: take the peer's evidence; channel: produce or check the channel's opening bundle
    EPOCH = 3  # control: take what was written since the last epoch; counts per region come back
    EXPORT = 4  # channel: seal pending pages of a gfn range
    IMPORT = 5  # channel: open one bundle
    BLACKOUT = 6  # control: park the vCPUs
    STATE = 7  # channel 0: seal one vCPU's state, or a part of the hypervisor's device state
    TOKEN = 8  # channel 0: seal a token
    FINISH = 9  # control: the move is complete; wipe keys
    ABORT = 10  # control: give up; the source's vCPUs go on
    HINT = 11  # control: part of the hypervisor's dirty log
    CONFIRM = 12  # control: take the destination's key confirmation
    AUDIT = 13  # control: hash part of RAM against what was sent
    REPLACE = 14  # channel (source), control (destination): a new connection takes a lost one's place


class SlotStatus(enum.IntEnum):
    """How a command ended."""

    OK = 1
    INCOMPLETE = 2  # call again to go on
    REFUSED = 3


class SessionStatus(enum.IntEnum):
    """The status register: where the session stands, source and destination states in one numbering."""

    IDLE = 1
    PREPARED = 2
    KEYED = 3
    PRECOPY = 4
    PARKED = 5
    STARTED = 6
    FINISHED = 7
    ABORTED = 8
    IMPORTING = 9
    VERIFIED = 10
    RUNNING = 11
    FAILED = 12
    PROVED = (
        13  # between PREPARED and KEYED: the evidence is exchanged, the destination's confirmation is due
    )


class BufferState(enum.IntEnum):
    """State of a data buffer."""

    FREE = 1
    FILLING = 2
    READY = 3
    DRAINING = 4


class Field(NamedTuple):
    """One field of a line: its name, its code as `struct` has it, what it says. `slot_header` writes them out for C."""

    name: str
    code: str
    says: str


# Identity line, offset 0, written once by the SVSM
IDENTITY_FIELDS: Final = (
    Field("magic", "Q", '"PGXSLOT3"'),
    Field("version", "H", ""),
    Field("slot_id", "H", "number of the channel, or the control slot"),
    Field("buffers", "H", ""),
    Field("buffer_shift", "H", "log2 of buffer bytes"),
    Field("headroom_bytes", "H", ""),
    Field("reserved", "46s", "zero"),
)
# Command line, offset 64, written by the host
COMMAND_FIELDS: Final = (
    Field("sequence", "I", "raised by one for each command, written last"),
    Field("command", "H", ""),
    Field("buffer", "H", "0xFFFF for none"),
    Field("argument", "Q", ""),
    Field("argument2", "Q", ""),
    Field("length", "I", "of the package in the buffer"),
    Field("reserved", "36s", "zero"),
)
# Status line, offset 128, written by the SVSM
STATUS_FIELDS: Final = (
    Field("sequence", "I", "of the command that is answered, written last"),
    Field("status", "H", ""),
    Field("error", "H", "0 for none"),
    Field("session", "H", "the status register"),
    Field("buffer", "H", "0xFFFF for none"),
    Field("length", "I", "of the package in the buffer"),
    Field("result", "Q", ""),
    Field("result2", "Q", ""),
    Field("reserved", "32s", "zero"),
)
IDENTITY_OFFSET: Final = 0
COMMAND_OFFSET: Final = 64
STATUS_OFFSET: Final = 128


def _codes(fields: tuple[Field, ...]) -> str:
    return "<" + "".join(field.code for field in fields)


_IDENTITY: Final = struct.Struct(_codes(IDENTITY_FIELDS))
_COMMAND: Final = struct.Struct(_codes(COMMAND_FIELDS))
_STATUS: Final = struct.Struct(_codes(STATUS_FIELDS))
# What is written before the sequence word: all but that word and what stays zero.
_COMMAND_BODY: Final = struct.Struct(_codes(COMMAND_FIELDS[1:-1]))
_STATUS_BODY: Final = struct.Struct(_codes(STATUS_FIELDS[1:-1]))
# Data register, host's line at offset 192, SVSM's line at offset 256: for each buffer one u32,
#   bits 0-7 state, bits 8-31 turn
_WORD_BYTES: Final = 4
HOST_DATA_OFFSET: Final = 192
SVSM_DATA_OFFSET: Final = 256
_HOST_DATA: Final = HOST_DATA_OFFSET // _WORD_BYTES
_SVSM_DATA: Final = SVSM_DATA_OFFSET // _WORD_BYTES
_COMMAND_SEQUENCE: Final = COMMAND_OFFSET // _WORD_BYTES
_STATUS_SEQUENCE: Final = STATUS_OFFSET // _WORD_BYTES
_TURN_MASK: Final = (1 << 24) - 1

_LINE_BYTES: Final = 64
assert _IDENTITY.size == _COMMAND.size == _STATUS.size == _LINE_BYTES
assert _COMMAND_BODY.size == 28 - _WORD_BYTES
assert _STATUS_BODY.size == 32 - _WORD_BYTES
assert MAX_BUFFERS * _WORD_BYTES <= _LINE_BYTES


class CommandRegisters(NamedTuple):
    """The command line, copied."""

    sequence: int
    command: int
    buffer: int
    argument: int
    argument2: int
    length: int


class StatusRegisters(NamedTuple):
    """The status line, copied."""

    sequence: int
    status: SlotStatus
    error: RefusalCode | None
    session: SessionStatus
    buffer: int
    length: int
    result: int
    result2: int


class SlotGeometry(NamedTuple):
    """What a slot says of itself, enough to find everything in it."""

    slot_id: int
    buffers: int
    buffer_bytes: int

    @property
    def slot_bytes(self) -> int:
        """Bytes of shared memory that the slot takes."""
        return REGISTER_PAGE_BYTES + self.buffers * self.buffer_bytes

    @property
    def package_bytes(self) -> int:
        """The largest package that fits in a buffer."""
        return self.buffer_bytes - HEADROOM_BYTES


def parse_identity_untrusted(page: Buffer) -> SlotGeometry:
    """Discover a slot from its register page. Raises MalformedData where it is none of this version."""
    view = memoryview(page).cast("B")
    if len(view) < REGISTER_PAGE_BYTES:
        raise MalformedData("slot memory is shorter than its register page")
    magic, version, slot_id, buffers, shift, headroom, reserved = _IDENTITY.unpack(
        bytes(view[: _IDENTITY.size])
    )
    if magic != SLOT_MAGIC:
        raise MalformedData("not a slot: wrong magic")
    if version != SLOT_VERSION or headroom != HEADROOM_BYTES:
        raise MalformedData(f"slot of version {version}, expected {SLOT_VERSION}")
    if not (MIN_BUFFERS <= buffers <= MAX_BUFFERS and MIN_BUFFER_SHIFT <= shift <= MAX_BUFFER_SHIFT):
        raise MalformedData("slot with buffers out of range")
    if any(reserved):
        raise MalformedData("slot with reserved bytes set")
    return SlotGeometry(slot_id, buffers, 1 << shift)


class SlotMemory:
    """Registers and buffers of one slot, for both sides; a side uses the calls of its side only.

    `memory` is at least `geometry.slot_bytes` writable bytes.
    """

    def __init__(self, memory: Buffer) -> None:
        view = memoryview(memory).cast("B")
        self.geometry = parse_identity_untrusted(view)
        if len(view) < self.geometry.slot_bytes:
            raise MalformedData(
                f"slot memory of {len(view)} bytes, its registers say {self.geometry.slot_bytes}"
            )
        self._registers = view[:REGISTER_PAGE_BYTES]
        self._command_line = self._registers[COMMAND_OFFSET : COMMAND_OFFSET + _LINE_BYTES]
        self._status_line = self._registers[STATUS_OFFSET : STATUS_OFFSET + _LINE_BYTES]
        # Words that both sides look at are stored and loaded as one, not byte by byte. The host is little-endian.
        self._words = self._registers.cast("I")
        size = self.geometry.buffer_bytes
        # Whole buffers with headroom for the host, packages alone for the SVSM.
        self.frames = tuple(
            view[REGISTER_PAGE_BYTES + index * size : REGISTER_PAGE_BYTES + (index + 1) * size]
            for index in range(self.geometry.buffers)
        )
        self.packages = tuple(frame[HEADROOM_BYTES:] for frame in self.frames)

    @classmethod
    def format(cls, memory: Buffer, geometry: SlotGeometry) -> SlotMemory:
        """Lay out a slot in `memory`: identity written, registers zero, all buffers FREE. The SVSM does this once."""
        view = memoryview(memory).cast("B")
        shift = geometry.buffer_bytes.bit_length() - 1
        if geometry.buffer_bytes != 1 << shift:
            raise LocalProtocolError(f"slot buffers of {geometry.buffer_bytes} bytes: give a power of two")
        view[:REGISTER_PAGE_BYTES] = bytes(REGISTER_PAGE_BYTES)
        _IDENTITY.pack_into(
            view,
            IDENTITY_OFFSET,
            SLOT_MAGIC,
            SLOT_VERSION,
            geometry.slot_id,
            geometry.buffers,
            shift,
            HEADROOM_BYTES,
            b"",
        )
        slot = cls(view)
        for line in (HOST_DATA_OFFSET, SVSM_DATA_OFFSET):
            for index in range(geometry.buffers):
                slot._write_word(index, line, 0, BufferState.FREE)
        return slot

    # The host's side

    def write_command(
        self, sequence: int, command: int, buffer: int, argument: int, argument2: int, length: int
    ) -> None:
        """Publish a command, the fields of CommandRegisters: all of them, then the sequence word."""
        _COMMAND_BODY.pack_into(self._command_line, _WORD_BYTES, command, buffer, argument, argument2, length)
        self._words[_COMMAND_SEQUENCE] = sequence

    def read_status_untrusted(self) -> StatusRegisters:
        """The SVSM's answer, copied once. Raises MalformedData where a field is unknown or points outside of the slot."""
        sequence, status, error, session, buffer, length, result, result2, reserved = _STATUS.unpack(
            self._status_line.tobytes()
        )
        if reserved != _NO_STATUS_RESERVED:
            raise MalformedData("slot answer with reserved bytes set")
        if status not in _STATUSES or session not in _SESSIONS or error not in _ERRORS:
            raise MalformedData(
                f"slot answer with an unknown status {status}, session {session} or error {error}"
            )
        if buffer != NO_BUFFER and self._is_outside(buffer, length):
            raise MalformedData("slot answer that points outside of its buffers")
        return StatusRegisters(
            sequence, _STATUSES[status], _ERRORS[error], _SESSIONS[session], buffer, length, result, result2
        )

    # The SVSM's side

    def read_command_untrusted(self) -> CommandRegisters:
        """The host's command, copied once. Raises MalformedData where it points outside of the slot."""
        sequence, command, buffer, argument, argument2, length, reserved = _COMMAND.unpack(
            self._command_line.tobytes()
        )
        if reserved != _NO_COMMAND_RESERVED:
            raise MalformedData("command with reserved bytes set")
        if buffer != NO_BUFFER and self._is_outside(buffer, length):
            raise MalformedData("command that points outside of the slot's buffers")
        return CommandRegisters(sequence, command, buffer, argument, argument2, length)

    def write_status(
        self,
        sequence: int,
        status: SlotStatus,
        error: RefusalCode | None,
        session: SessionStatus,
        buffer: int,
        length: int,
        result: int,
        result2: int,
    ) -> None:
        """Publish an answer, the fields of StatusRegisters: all of them, then the sequence word."""
        _STATUS_BODY.pack_into(
            self._status_line, _WORD_BYTES, status, error or 0, session, buffer, length, result, result2
        )
        self._words[_STATUS_SEQUENCE] = sequence

    # Both sides: whether there is something to read

    @property
    def command_sequence(self) -> int:
        """Number of the command that stands in the registers; 0 before the first."""
        return self._words[_COMMAND_SEQUENCE]

    @property
    def status_sequence(self) -> int:
        """Number of the command that was answered last; 0 before the first."""
        return self._words[_STATUS_SEQUENCE]

    @property
    def is_answered(self) -> bool:
        """Whether the command that stands in the registers was answered."""
        return self._words[_STATUS_SEQUENCE] == self._words[_COMMAND_SEQUENCE]

    def _is_outside(self, buffer: int, length: int) -> bool:
        return buffer >= len(self.packages) or length > self.geometry.package_bytes

    # Both sides: the data register

    def buffer_state(self, index: int) -> BufferState:
        """Whose a buffer is, from both sides' words: the word of the newer turn counts, in one turn the later state."""
        return self._current(index)[1]

    def free_buffer(self) -> int | None:
        """Index of a FREE buffer, or None."""
        for index in range(self.geometry.buffers):
            if self._current(index)[1] is BufferState.FREE:
                return index
        return None

    def begin_fill(self, index: int, line: int) -> None:
        """Provider: FREE to FILLING, a new turn."""
        turn = self._expect(index, BufferState.FREE)
        self._write_word(index, line, (turn + 1) & _TURN_MASK, BufferState.FILLING)

    def publish(self, index: int, line: int) -> None:
        """Provider: FILLING to READY."""
        self._write_word(index, line, self._expect(index, BufferState.FILLING), BufferState.READY)

    def withdraw(self, index: int, line: int) -> None:
        """Provider: FILLING to FREE, there was nothing to publish."""
        self._write_word(index, line, self._expect(index, BufferState.FILLING), BufferState.FREE)

    def begin_drain(self, index: int, line: int) -> None:
        """Consumer: READY to DRAINING."""
        self._write_word(index, line, self._expect(index, BufferState.READY), BufferState.DRAINING)

    def release(self, index: int, line: int) -> None:
        """Consumer: DRAINING to FREE."""
        self._write_word(index, line, self._expect(index, BufferState.DRAINING), BufferState.FREE)

    def _expect(self, index: int, state: BufferState) -> int:
        turn, current = self._current(index)
        if current != state:
            raise LocalProtocolError(f"buffer {index} is {current.name}, not {state.name}")
        return turn

    def _current(self, index: int) -> tuple[int, BufferState]:
        host, svsm = self._words[_HOST_DATA + index], self._words[_SVSM_DATA + index]
        host_turn, svsm_turn = host >> 8, svsm >> 8
        if host_turn == svsm_turn:
            # READY (3) by the provider, then DRAINING (4) or FREE (1) by the consumer: FREE ends a turn.
            host_state, svsm_state = host & 0xFF, svsm & 0xFF
            ended = host_state == _FREE or svsm_state == _FREE
            state = _FREE if ended else max(host_state, svsm_state)
            return host_turn, _BUFFER_STATES.get(state, BufferState.FILLING)
        newer = host if (host_turn - svsm_turn) & _TURN_MASK < 1 << 23 else svsm
        return newer >> 8, _BUFFER_STATES.get(newer & 0xFF, BufferState.FILLING)

    def _write_word(self, index: int, line: int, turn: int, state: BufferState) -> None:
        self._words[line // _WORD_BYTES + index] = turn << 8 | state


_BUFFER_STATES: Final = {int(state): state for state in BufferState}
_FREE: Final = int(BufferState.FREE)
_STATUSES: Final = {int(status): status for status in SlotStatus}
_SESSIONS: Final = {int(status): status for status in SessionStatus}
_ERRORS: Final[dict[int, RefusalCode | None]] = {0: None, **{int(code): code for code in RefusalCode}}
# Compared as a whole, which is quicker than looking at each byte.
_NO_COMMAND_RESERVED: Final = bytes(36)
_NO_STATUS_RESERVED: Final = bytes(32)
