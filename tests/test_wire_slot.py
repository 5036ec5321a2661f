"""The mailbox slot: register lines against the vectors, and the buffers' states against a model of both sides."""

from __future__ import annotations

import mmap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pagexfer.errors import LocalProtocolError, MalformedData, RefusalCode
from pagexfer.wire.slot import (
    COMMAND_OFFSET,
    HEADROOM_BYTES,
    HOST_DATA_OFFSET,
    NO_BUFFER,
    REGISTER_PAGE_BYTES,
    STATUS_OFFSET,
    SVSM_DATA_OFFSET,
    BufferState,
    Command,
    CommandRegisters,
    SessionStatus,
    SlotGeometry,
    SlotMemory,
    SlotStatus,
    StatusRegisters,
    parse_identity_untrusted,
)

from .wire_vectors import Vector, data_of, is_refused, load, name_of, value_or_malformed

VECTORS = load("slot")
GEOMETRY = SlotGeometry(5, 2, 1 << 20)
BUFFERS = 3
TURNS = 1 << 24
LINES = {"host": HOST_DATA_OFFSET, "svsm": SVSM_DATA_OFFSET}

u16, u32, u64 = (st.integers(0, (1 << bits) - 1) for bits in (16, 32, 64))


def slot_with(page: bytes) -> SlotMemory:
    """The slot of the vectors, its register page as given."""
    memory = mmap.mmap(-1, GEOMETRY.slot_bytes)
    memory[: len(page)] = page
    return SlotMemory(memory)


@pytest.mark.parametrize("vector", VECTORS["identities"], ids=name_of)
def test_identity_of_vector(vector: Vector) -> None:
    page = data_of(vector)
    geometry = parse_identity_untrusted(page)
    assert geometry == tuple(vector["fields"])
    assert geometry.slot_bytes == REGISTER_PAGE_BYTES + geometry.buffers * geometry.buffer_bytes
    formatted = mmap.mmap(-1, geometry.slot_bytes)
    slot = SlotMemory.format(formatted, geometry)
    assert formatted[:64] == page[:64]
    assert slot.geometry == geometry
    assert [len(frame) for frame in slot.frames] == [geometry.buffer_bytes] * geometry.buffers
    assert [len(package) for package in slot.packages] == [geometry.package_bytes] * geometry.buffers
    for length in (0, 17, 63, 64, REGISTER_PAGE_BYTES - 1):
        is_refused(parse_identity_untrusted, page[:length])


@pytest.mark.parametrize("vector", VECTORS["refused_identities"], ids=name_of)
def test_refused_identity(vector: Vector) -> None:
    is_refused(parse_identity_untrusted, data_of(vector))


@pytest.mark.parametrize("bit", range(64 * 8))
def test_an_identity_has_one_encoding(bit: int) -> None:
    page = bytearray(data_of(VECTORS["identities"][0]))
    page[bit // 8] ^= 1 << bit % 8
    parsed = value_or_malformed(parse_identity_untrusted, bytes(page))
    if isinstance(parsed, SlotGeometry):
        assert parsed != parse_identity_untrusted(data_of(VECTORS["identities"][0]))


def test_format_clears_what_was_there() -> None:
    memory = mmap.mmap(-1, GEOMETRY.slot_bytes)
    memory[:REGISTER_PAGE_BYTES] = b"\xff" * REGISTER_PAGE_BYTES
    SlotMemory.format(memory, GEOMETRY)
    assert memory[:REGISTER_PAGE_BYTES] == data_of(VECTORS["formatted"])


def test_a_slot_needs_all_of_its_memory() -> None:
    page = data_of(VECTORS["formatted"])
    with pytest.raises(MalformedData, match="registers say"):
        SlotMemory(bytearray(page + bytes(GEOMETRY.slot_bytes - len(page) - 1)))
    with pytest.raises(LocalProtocolError, match="power of two"):
        SlotMemory.format(bytearray(1 << 20), SlotGeometry(0, 2, (1 << 16) + 64))


def test_a_package_stands_after_the_headroom() -> None:
    slot = slot_with(data_of(VECTORS["formatted"]))
    slot.packages[1][:4] = b"page"
    assert bytes(slot.frames[1][HEADROOM_BYTES : HEADROOM_BYTES + 4]) == b"page"
    assert not any(slot.frames[0])


# Registers


def test_two_commands_leave_the_pages_of_the_vectors() -> None:
    slot = slot_with(data_of(VECTORS["formatted"]))

    def host_imports() -> None:
        slot.begin_fill(0, HOST_DATA_OFFSET)
        slot.publish(0, HOST_DATA_OFFSET)
        slot.write_command(1, Command.IMPORT, 0, 0, 0, 100)

    def svsm_imports() -> None:
        slot.begin_drain(0, SVSM_DATA_OFFSET)
        slot.release(0, SVSM_DATA_OFFSET)
        session = SessionStatus.PRECOPY
        slot.write_status(1, SlotStatus.OK, None, session, NO_BUFFER, 0, 8, 0)

    def host_exports() -> None:
        slot.write_command(2, Command.EXPORT, NO_BUFFER, 512, 64, 0)

    def svsm_exports() -> None:
        slot.begin_fill(0, SVSM_DATA_OFFSET)
        slot.publish(0, SVSM_DATA_OFFSET)
        session = SessionStatus.PRECOPY
        slot.write_status(2, SlotStatus.INCOMPLETE, None, session, 0, 4192, 1, 0)

    def host_drains() -> None:
        slot.begin_drain(0, HOST_DATA_OFFSET)
        slot.release(0, HOST_DATA_OFFSET)

    steps = [lambda: None, host_imports, svsm_imports, host_exports, svsm_exports, host_drains]
    for step, vector in zip(steps, VECTORS["exchange"], strict=True):
        step()
        assert bytes(slot._registers) == data_of(vector), vector["name"]


@pytest.mark.parametrize("vector", VECTORS["commands"], ids=name_of)
def test_command_of_vector(vector: Vector) -> None:
    page = data_of(vector)
    registers = CommandRegisters(*vector["fields"])
    assert slot_with(page).read_command_untrusted() == registers
    slot = slot_with(page[:COMMAND_OFFSET])
    slot.write_command(*registers)
    assert bytes(slot._registers[: len(page)]) == page


@pytest.mark.parametrize("vector", VECTORS["refused_commands"], ids=name_of)
def test_refused_command(vector: Vector) -> None:
    is_refused(lambda page: slot_with(page).read_command_untrusted(), data_of(vector))


@pytest.mark.parametrize("vector", VECTORS["statuses"], ids=name_of)
def test_status_of_vector(vector: Vector) -> None:
    page = data_of(vector)
    sequence, status, error, session, *rest = vector["fields"]
    code = RefusalCode(error) if error else None
    registers = StatusRegisters(sequence, SlotStatus(status), code, SessionStatus(session), *rest)
    assert slot_with(page).read_status_untrusted() == registers
    slot = slot_with(page[:STATUS_OFFSET])
    slot.write_status(*registers)
    assert bytes(slot._registers[: len(page)]) == page


@pytest.mark.parametrize("vector", VECTORS["refused_statuses"], ids=name_of)
def test_refused_status(vector: Vector) -> None:
    is_refused(lambda page: slot_with(page).read_status_untrusted(), data_of(vector))


@given(u32, u16, st.sampled_from([0, 1, NO_BUFFER]), u64, u64, st.integers(0, GEOMETRY.package_bytes))
def test_command_round_trip(
    sequence: int, command: int, buffer: int, argument: int, argument2: int, length: int
) -> None:
    slot = slot_with(data_of(VECTORS["formatted"]))
    registers = CommandRegisters(sequence, command, buffer, argument, argument2, length)
    slot.write_command(*registers)
    assert slot.read_command_untrusted() == registers


@given(st.binary(min_size=128, max_size=128))
def test_any_lines_are_registers_or_malformed(lines: bytes) -> None:
    page = bytearray(data_of(VECTORS["formatted"]))
    page[COMMAND_OFFSET : COMMAND_OFFSET + 128] = lines
    slot = slot_with(bytes(page))
    value_or_malformed(lambda _: slot.read_command_untrusted(), b"")
    value_or_malformed(lambda _: slot.read_status_untrusted(), b"")


# Buffers


@pytest.mark.parametrize("vector", VECTORS["data_words"], ids=name_of)
def test_buffer_state_of_vector(vector: Vector) -> None:
    slot = slot_with(data_of(VECTORS["formatted"]))
    slot._registers[HOST_DATA_OFFSET + 4 : HOST_DATA_OFFSET + 8] = bytes.fromhex(vector["host"])
    slot._registers[SVSM_DATA_OFFSET + 4 : SVSM_DATA_OFFSET + 8] = bytes.fromhex(vector["svsm"])
    assert slot.buffer_state(0) is BufferState.FREE
    assert slot.buffer_state(1) is BufferState[vector["state"]]


@given(u32, u32)
def test_any_words_are_a_state(host: int, svsm: int) -> None:
    slot = slot_with(data_of(VECTORS["formatted"]))
    slot._registers[HOST_DATA_OFFSET : HOST_DATA_OFFSET + 4] = host.to_bytes(4, "little")
    slot._registers[SVSM_DATA_OFFSET : SVSM_DATA_OFFSET + 4] = svsm.to_bytes(4, "little")
    assert slot.buffer_state(0) in BufferState
    assert slot.free_buffer() == (0 if slot.buffer_state(0) is BufferState.FREE else 1)


class Buffers(RuleBasedStateMachine):
    """Host and SVSM take turns at the buffers of one slot, each through a view of its own; the model is one word each."""

    @initialize(turn=st.sampled_from([0, (1 << 23) - 2, TURNS - 2]))
    def format(self, turn: int) -> None:
        memory = bytearray(REGISTER_PAGE_BYTES + BUFFERS * (1 << 16))
        self.memory = memory
        self.host = SlotMemory.format(memory, SlotGeometry(0, BUFFERS, 1 << 16))
        self.svsm = SlotMemory(memory)
        self.turns = [turn] * BUFFERS
        self.states = [BufferState.FREE] * BUFFERS
        self.providers = ["host"] * BUFFERS
        for line in LINES.values():
            for index in range(BUFFERS):
                self.set_word(line, index, turn, BufferState.FREE)

    def set_word(self, line: int, index: int, turn: int, state: BufferState) -> None:
        self.memory[line + 4 * index : line + 4 * index + 4] = (turn << 8 | state).to_bytes(4, "little")

    def move(self, side: str, name: str, index: int, needed: BufferState, then: BufferState) -> None:
        """One call of one side, allowed where the model's state is `needed`; otherwise nothing may change."""
        before = bytes(self.memory)
        call = getattr(self.host if side == "host" else self.svsm, name)
        if self.states[index] is not needed:
            with pytest.raises(LocalProtocolError, match=f"buffer {index} is {self.states[index].name}"):
                call(index, LINES[side])
            assert bytes(self.memory) == before
            return
        call(index, LINES[side])
        if needed is BufferState.FREE:
            self.turns[index] = (self.turns[index] + 1) % TURNS
            self.providers[index] = side
        self.states[index] = then
        # exactly this side's word of this buffer was written
        expected = bytearray(before)
        at = LINES[side] + 4 * index
        expected[at : at + 4] = (self.turns[index] << 8 | then).to_bytes(4, "little")
        assert bytes(self.memory) == bytes(expected)

    def consumer(self, index: int) -> str:
        return "svsm" if self.providers[index] == "host" else "host"

    @rule(side=st.sampled_from(sorted(LINES)), index=st.integers(0, BUFFERS - 1))
    def begin_fill(self, side: str, index: int) -> None:
        self.move(side, "begin_fill", index, BufferState.FREE, BufferState.FILLING)

    @rule(index=st.integers(0, BUFFERS - 1))
    def publish(self, index: int) -> None:
        self.move(self.providers[index], "publish", index, BufferState.FILLING, BufferState.READY)

    @rule(index=st.integers(0, BUFFERS - 1))
    def withdraw(self, index: int) -> None:
        self.move(self.providers[index], "withdraw", index, BufferState.FILLING, BufferState.FREE)

    @rule(index=st.integers(0, BUFFERS - 1))
    def begin_drain(self, index: int) -> None:
        self.move(self.consumer(index), "begin_drain", index, BufferState.READY, BufferState.DRAINING)

    @rule(index=st.integers(0, BUFFERS - 1))
    def release(self, index: int) -> None:
        self.move(self.consumer(index), "release", index, BufferState.DRAINING, BufferState.FREE)

    @precondition(lambda self: BufferState.FREE in self.states)
    @rule(side=st.sampled_from(sorted(LINES)))
    def whole_turn(self, side: str) -> None:
        index = self.states.index(BufferState.FREE)
        self.begin_fill(side, index)
        self.publish(index)
        self.begin_drain(index)
        self.release(index)

    @invariant()
    def both_sides_see_the_model(self) -> None:
        free = BufferState.FREE
        for view in (self.host, self.svsm):
            assert [view.buffer_state(index) for index in range(BUFFERS)] == self.states
            assert view.free_buffer() == (self.states.index(free) if free in self.states else None)


TestBuffers = Buffers.TestCase
TestBuffers.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
