"""The SVSM behind its slots: a move by commands alone, each command out of place, and a host that writes anything."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagexfer.errors import (
    AttestationError,
    CompressionRefused,
    GateError,
    GeometryError,
    GuestError,
    IntegrityError,
    JournalError,
    KeyExhausted,
    KeyPoisoned,
    LocalProtocolError,
    MalformedData,
    NotReady,
    PageStateError,
    PagexferError,
    PolicyRefused,
    ReflectionError,
    RefusalCode,
    ReplayError,
    UsageError,
)
from pagexfer.svsm.service import refusal_code
from pagexfer.wire.bundle import BundleKind
from pagexfer.wire.slot import (
    COMMAND_OFFSET,
    HEADROOM_BYTES,
    HOST_DATA_OFFSET,
    NO_BUFFER,
    STATUS_OFFSET,
    SVSM_DATA_OFFSET,
    BufferState,
    Command,
    SlotStatus,
)
from pagexfer.wire.slot import SessionStatus as State

from .host_slot import HostSlot, HostSlots
from .rule_breaking import open_pair, sealed_by_source
from .small_guests import PAGES, VCPUS, Move, a_move

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def move() -> Iterator[Move]:
    yield from a_move()


def ok(
    slot: HostSlot, command: Command, argument: int = 0, argument2: int = 0, package: bytes | None = None
) -> bytes:
    answer, data = slot.call(command, argument, argument2, package)
    assert answer.status is SlotStatus.OK, (command, answer)
    assert answer.error is None
    assert slot.free_buffers() == 2
    return data


def refused(slot: HostSlot, command: int, argument: int = 0, package: bytes | None = None) -> RefusalCode:
    """The coarse code of a refusal that says nothing else."""
    answer, data = slot.call(command, argument, 0, package)
    assert answer.status is SlotStatus.REFUSED
    assert (data, answer.length, answer.result, answer.result2, answer.buffer) == (b"", 0, 0, 0, NO_BUFFER)
    assert slot.free_buffers() == 2
    assert answer.error is not None
    return answer.error


def test_whole_move_by_commands(move: Move) -> None:
    slots = HostSlots.of(move.pair)
    control, channels, far_control, far_channels = slots
    hello = ok(control, Command.PREPARE, 2)
    reply = ok(far_control, Command.PREPARE, 5, package=hello)
    proof = ok(control, Command.SETUP, package=reply)
    answer, established = far_control.call(Command.SETUP, 5, package=proof)
    assert (answer.result, len(established)) == (2, 64)
    assert ok(control, Command.CONFIRM, package=established) == b""
    for near, far in zip(channels, far_channels, strict=True):
        ok(far, Command.SETUP, package=ok(near, Command.SETUP))
    ok(far_channels[0], Command.IMPORT, package=ok(channels[0], Command.TOKEN, BundleKind.LEDGER))
    one_epoch(slots, PAGES)
    move.guest.write(3, 8)
    assert control.call(Command.BLACKOUT)[0][6:] == (VCPUS, VCPUS)
    one_epoch(slots, 1)
    for vcpu in range(VCPUS):
        ok(far_channels[0], Command.IMPORT, package=ok(channels[0], Command.STATE, vcpu))
    for token, reply_kind in (
        (BundleKind.MANIFEST, BundleKind.READY),
        (BundleKind.START_TOKEN, BundleKind.RUNNING),
    ):
        ok(far_channels[0], Command.IMPORT, package=ok(channels[0], Command.TOKEN, token))
        ok(channels[0], Command.IMPORT, package=ok(far_channels[0], Command.TOKEN, reply_kind))
    ok(control, Command.FINISH)
    ok(far_control, Command.FINISH)
    assert move.arrived()


def one_epoch(slots: HostSlots, expected_pages: int) -> None:
    answer, counts = slots.source_control.call(Command.EPOCH)
    assert answer.result == expected_pages == int(np.frombuffer(counts, dtype="<u4").sum())
    exported, number = 0, 0
    while exported < expected_pages:
        answer, bundle = slots.source_channels[number % 2].call(Command.EXPORT, 0, PAGES)
        exported += answer.result
        assert answer.status is (SlotStatus.INCOMPLETE if exported < expected_pages else SlotStatus.OK)
        ok(slots.destination_channels[number % 2], Command.IMPORT, package=bundle)
        number += 1
    token = ok(slots.source_channels[0], Command.TOKEN, BundleKind.EPOCH_TOKEN)
    ok(slots.destination_channels[0], Command.IMPORT, package=token)


def test_blackout_is_incomplete_while_a_vcpu_runs(move: Move) -> None:
    slots = HostSlots.of(move.pair)
    move.pair.until_precopy()
    move.guest.gate.slow.add(0)
    answer, _ = slots.source_control.call(Command.BLACKOUT)
    assert (answer.status, answer.result, answer.session) == (SlotStatus.INCOMPLETE, 1, State.PRECOPY)
    move.guest.gate.slow.clear()
    answer, _ = slots.source_control.call(Command.BLACKOUT)
    assert (answer.status, answer.result, answer.session) == (SlotStatus.OK, 2, State.PARKED)


# How far a session is, and what each command is refused with then

STAGES = (
    "idle",
    "prepared",
    "proved",
    "keyed",
    "precopy",
    "parked",
    "verified",
    "started",
    "finished",
    "aborted",
)


def bring_to(move: Move, stage: str) -> None:
    pair = move.pair
    steps: dict[str, list[Callable[[], object]]] = {
        "idle": [],
        "prepared": [lambda: pair.source.prepare(2)],
        "proved": [lambda: pair.source.establish(pair.destination.answer(1, pair.source.prepare(2)))],
        "keyed": [pair.handshake],
        "precopy": [pair.until_precopy],
        "parked": [pair.until_manifest],
        "verified": [pair.until_manifest, pair.manifest],
        "started": [pair.until_manifest, pair.manifest, pair.ready, pair.start],
        "finished": [pair.migrate],
        "aborted": [pair.until_precopy, pair.source.abort, pair.destination.fail],
    }
    for step in steps[stage]:
        step()


_S, _N, _C = RefusalCode.STATE, RefusalCode.NOT_READY, RefusalCode.COMMAND
_BEFORE = {"idle": _S, "prepared": _S, "proved": _S, "keyed": _S}
_AFTER = {"started": _S, "finished": _S, "aborted": _S}
# For each slot, command and argument: the stages in which it is refused so that nothing changes, and the code.
SOURCE_REFUSALS: dict[tuple[str, Command, int], dict[str, RefusalCode]] = {
    ("control", Command.PREPARE, 2): {stage: _S for stage in STAGES if stage != "idle"},
    ("control", Command.PREPARE, 0): dict.fromkeys(STAGES, _S),
    ("control", Command.PREPARE, 1 << 16): dict.fromkeys(STAGES, _S),
    ("control", Command.EPOCH, 0): {"idle": _S, "prepared": _S, "proved": _S, "verified": _S} | _AFTER,
    ("control", Command.AUDIT, 0): dict.fromkeys(STAGES, _S),  # a session without an audit
    ("control", Command.BLACKOUT, 0): _BEFORE | {"parked": _S, "verified": _S} | _AFTER,
    ("control", Command.FINISH, 0): {stage: _S for stage in STAGES if stage != "finished"},
    ("control", Command.ABORT, 0): {"started": _S, "finished": _S},
    ("control", Command.SETUP, 0): dict.fromkeys(STAGES, _C),
    ("control", Command.CONFIRM, 0): dict.fromkeys(STAGES, _C),
    ("control", Command.HINT, 0): dict.fromkeys(STAGES, _C),
    ("control", Command.EXPORT, 0): dict.fromkeys(STAGES, _C),
    ("channel", Command.SETUP, 0): {stage: _S for stage in STAGES if stage != "keyed"},
    ("channel", Command.EXPORT, 0): _BEFORE | {"verified": _S} | _AFTER,
    ("channel", Command.EXPORT, 1 << 63): dict.fromkeys(STAGES, _S),
    ("channel", Command.STATE, 0): dict.fromkeys(STAGES, _S),
    ("channel", Command.STATE, 1 << 63): dict.fromkeys(STAGES, _S),
    ("channel", Command.TOKEN, BundleKind.LEDGER): {stage: _S for stage in STAGES if stage != "keyed"},
    ("channel", Command.TOKEN, BundleKind.EPOCH_TOKEN): _BEFORE | {"verified": _S} | _AFTER,
    ("channel", Command.TOKEN, BundleKind.MANIFEST): _BEFORE | {"precopy": _S, "verified": _S} | _AFTER,
    ("channel", Command.TOKEN, BundleKind.START_TOKEN): (
        _BEFORE | {"precopy": _S, "parked": _N, "verified": _N} | _AFTER
    ),
    ("channel", Command.TOKEN, BundleKind.READY): dict.fromkeys(STAGES, _C),
    ("channel", Command.IMPORT, 0): dict.fromkeys(STAGES, _C),
    ("channel", Command.ABORT, 0): dict.fromkeys(STAGES, _C),
}
_KINDS = [BundleKind.READY, BundleKind.RUNNING, BundleKind.ABORT_TOKEN, BundleKind.START_TOKEN]
DESTINATION_REFUSALS: dict[tuple[str, Command, int], dict[str, RefusalCode]] = {
    ("control", Command.PREPARE, 0): dict.fromkeys(STAGES, _C),
    ("control", Command.SETUP, 0): dict.fromkeys(STAGES, _C),
    ("control", Command.FINISH, 0): {s: _S for s in STAGES if s not in ("started", "finished")},
    ("control", Command.ABORT, 0): {"started": _S, "finished": _S},
    ("control", Command.EPOCH, 0): dict.fromkeys(STAGES, _C),
    ("channel", Command.SETUP, 0): dict.fromkeys(STAGES, _C),
    ("channel", Command.IMPORT, 0): dict.fromkeys(STAGES, _C),
    ("channel", Command.EXPORT, 0): dict.fromkeys(STAGES, _C),
    ("channel", Command.TOKEN, 0): dict.fromkeys(STAGES, _C),
    ("channel", Command.TOKEN, 1 << 63): dict.fromkeys(STAGES, _C),
    ("channel", Command.TOKEN, BundleKind.READY): {s: _S for s in STAGES if s != "verified"},
    ("channel", Command.TOKEN, BundleKind.RUNNING): {
        s: _S for s in STAGES if s not in ("started", "finished")
    },
    ("channel", Command.TOKEN, BundleKind.ABORT_TOKEN): {s: _S for s in STAGES if s != "verified"},
    ("channel", Command.TOKEN, BundleKind.START_TOKEN): dict.fromkeys(STAGES, _S),
}


def snapshot(move: Move) -> tuple[object, ...]:
    """Whatever a refused command must not change."""
    source, destination = move.pair.source, move.pair.destination
    return (
        source.state,
        destination.state,
        [
            (stream.counter, stream._cipher is None)
            for stream in (source._streams._sealers if source._streams else [])
        ],
        [
            (stream.counter, stream._cipher is None)
            for stream in (destination._streams._openers if destination._streams else [])
        ],
        (
            source._epoch.number,
            source._epoch.totals,
            source._pending.pages.gfns().tolist(),
            len(source._hand_over._vcpu_states),
        ),
        (destination._epoch, destination._epoch_bundles, destination._seen.count()),
        (destination._streams.answers.counter if destination._streams else None),
        (move.guest.gate.running, move.guest.gate.parked(), move.gate.running),
        (move.memory.words.tobytes(), move.memory.states.tobytes()),
    )


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("side", ["source", "destination"])
def test_each_command_out_of_place_gets_its_code_and_changes_nothing(
    move: Move, side: str, stage: str
) -> None:
    bring_to(move, stage)
    slots = HostSlots.of(move.pair)
    source = side == "source"
    control = slots.source_control if source else slots.destination_control
    channel = slots.source_channels[0] if source else slots.destination_channels[0]
    before = snapshot(move)
    for (name, command, argument), codes in (SOURCE_REFUSALS if source else DESTINATION_REFUSALS).items():
        if stage not in codes:
            continue
        slot = control if name == "control" else channel
        assert refused(slot, command, argument) is codes[stage], (command, argument)
        assert snapshot(move) == before, (command, argument)


@pytest.mark.parametrize("command", [0, max(Command) + 1, 255, 0xFFFF])
def test_unknown_command(move: Move, command: int) -> None:
    for slot in HostSlots.of(move.pair).each():
        assert refused(slot, command) is RefusalCode.COMMAND


def test_only_channel_0_has_tokens_states_and_answers(move: Move) -> None:
    slots = HostSlots.of(move.pair)
    for slot, command in [
        (slots.source_channels[1], Command.TOKEN),
        (slots.source_channels[1], Command.STATE),
        (slots.source_channels[1], Command.IMPORT),
        (slots.destination_channels[1], Command.TOKEN),
    ]:
        assert refused(slot, command, package=b"") is RefusalCode.COMMAND


def test_integrity_code_says_no_more_and_the_session_status_shows_the_end(move: Move) -> None:
    slots = HostSlots.of(move.pair)
    move.pair.until_precopy()
    answer, _ = slots.destination_channels[0].call(Command.IMPORT, package=bytes(100))
    assert (answer.error, answer.session) == (RefusalCode.INTEGRITY, State.FAILED)
    assert refused(slots.destination_channels[0], Command.IMPORT, package=bytes(100)) is RefusalCode.STATE


def test_bundle_out_of_place_is_an_integrity_failure_and_no_wrong_command(move: Move) -> None:
    """STATE says that nothing changed; a session that ended has to say INTEGRITY, also for a well-made bundle."""
    slots = HostSlots.of(move.pair)
    pair = open_pair(move)
    early = sealed_by_source(pair, BundleKind.START_TOKEN, b"")
    answer, _ = slots.destination_channels[0].call(Command.IMPORT, package=early.data)
    assert (answer.error, answer.session) == (RefusalCode.INTEGRITY, State.FAILED)


def test_answer_that_does_not_fit_the_buffer_uses_no_number(move: Move) -> None:
    """A vCPU state of the largest size does not fit the smallest buffers: a refusal, not a lost counter."""
    move.guest.gate.states[0] = bytes(1 << 16)
    slots = HostSlots.of(move.pair)
    move.pair.until_precopy()
    move.pair.park()
    before = move.pair.source._session_streams().sealer(0).counter
    assert refused(slots.source_channels[0], Command.STATE, 0) is RefusalCode.STATE
    assert move.pair.source._session_streams().sealer(0).counter == before
    move.pair.epoch()
    move.pair.vcpus()
    move.pair.manifest()
    assert move.pair.destination.state is State.VERIFIED


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NotReady("x"), RefusalCode.NOT_READY),
        (LocalProtocolError("x"), RefusalCode.STATE),
        (KeyPoisoned("x"), RefusalCode.STATE),
        (AttestationError("x"), RefusalCode.AUTHENTICATION),
        (PolicyRefused("x"), RefusalCode.POLICY),
        (GeometryError("x"), RefusalCode.GEOMETRY),
        (CompressionRefused("x"), RefusalCode.COMPRESSION),
        (KeyExhausted("x"), RefusalCode.EXHAUSTED),
        (MalformedData("x"), RefusalCode.INTEGRITY),
        (IntegrityError("x"), RefusalCode.INTEGRITY),
        (ReplayError("x"), RefusalCode.INTEGRITY),
        (ReflectionError("x"), RefusalCode.INTEGRITY),
        (GateError("x"), RefusalCode.GUEST),
        (PageStateError("x"), RefusalCode.GUEST),
        (JournalError("x"), RefusalCode.JOURNAL),
        (GuestError("x"), RefusalCode.GUEST),
        (UsageError("x"), RefusalCode.INTERNAL),
    ],
)
def test_code_of_each_error(error: PagexferError, code: RefusalCode) -> None:
    assert refusal_code(error) is code


# A host that writes anything

_U64 = st.one_of(
    st.integers(0, 3),
    st.sampled_from([63, 64, PAGES, 1 << 31, (1 << 32) - 1, 1 << 63, (1 << 64) - 1]),
    st.integers(0, (1 << 64) - 1),
)
_COMMAND = st.sampled_from([0, *(int(command) for command in Command), 12, 0xFFFF])
_PACKAGE = st.one_of(
    st.none(),
    st.binary(max_size=200),
    st.integers(0, 30),  # something that was sealed before, or its beginning with another header field
)
_POLITE = st.tuples(st.integers(0, 5), _COMMAND, _U64, _U64, _PACKAGE, st.integers(0, 80))
_RUDE = st.tuples(
    st.integers(0, 5),
    _COMMAND,
    st.sampled_from([NO_BUFFER, 0, 1, 2, 7, 0xFFFE]),
    _U64,
    _U64,
    st.one_of(st.sampled_from([0, 1, 79, 80, 128, 65472, 65473, (1 << 32) - 1]), st.integers(0, 1 << 17)),
    st.sampled_from([None, *BufferState, 0, 255]),  # what the host's data register says
)


@settings(max_examples=250, deadline=None)
@given(
    stage=st.sampled_from(STAGES),
    polite=st.lists(_POLITE, max_size=8),
    rude=st.lists(_RUDE, max_size=8),
)
def test_no_command_of_the_host_raises(
    stage: str,
    polite: list[tuple[int, int, int, int, bytes | int | None, int]],
    rude: list[tuple[int, int, int, int, int, int, int | None]],
) -> None:
    """First a host that keeps to the slot's rules, so that its commands get through, then one that does not."""
    move = Move(pages=70)
    bring_to(move, stage)
    slots = HostSlots.of(move.pair).each()
    for number, command, argument, argument2, content, offset in polite:
        if isinstance(content, int):
            content = altered(move, content, offset)
        slots[number].call(command, argument, argument2, content)
        assert slots[number].free_buffers() == 2
        nobody_runs_who_may_not(move)
    for number, command, buffer, argument, argument2, length, state in rude:
        slot = slots[number]
        for offset in (HOST_DATA_OFFSET, HOST_DATA_OFFSET + 4) if state is not None else ():
            turn = struct.unpack_from("<I", slot.raw, offset)[0] >> 8
            struct.pack_into("<I", slot.raw, offset, (turn + 1 & 0xFFFFFF) << 8 | (state or 0))
        slot.ring(command, buffer, argument, argument2, length)
        nobody_runs_who_may_not(move)
    move.close()


def altered(move: Move, number: int, offset: int) -> bytes:
    """A message that was sent, whole (offset at the header's end or behind it) or with a bit of its header flipped."""
    if not move.pair.sent:
        return bytes(number)
    message = move.pair.sent[-1 - number % len(move.pair.sent)]
    data = (message.flipped(offset) if offset < 64 else message).data
    return data[: (1 << 16) - HEADROOM_BYTES]


def nobody_runs_who_may_not(move: Move) -> None:
    assert not (move.guest.gate.running and move.gate.running)
    if move.gate.running:
        assert move.arrived()


@settings(max_examples=60, deadline=None)
@given(
    line=st.binary(min_size=64, max_size=64),
    page=st.binary(min_size=256, max_size=256),
    number=st.integers(0, 5),
)
def test_no_content_of_the_register_page_raises(line: bytes, page: bytes, number: int) -> None:
    move = Move(pages=70)
    move.pair.until_precopy()
    slot = HostSlots.of(move.pair).each()[number]
    slot.raw[HOST_DATA_OFFSET - 64 : HOST_DATA_OFFSET + 192] = page
    slot.raw[COMMAND_OFFSET : COMMAND_OFFSET + 64] = line
    slot.service.service()
    assert struct.unpack_from("<H", slot.raw, STATUS_OFFSET + 4)[0] in [int(status) for status in SlotStatus]
    move.close()


# A host that lost track of a slot


def _interrupted(slot: HostSlot, at: str) -> None:
    """A host that was killed in the middle of `at`."""
    if at == "fill":
        slot.memory.begin_fill(0, HOST_DATA_OFFSET)
    elif at == "command":
        slot.give(b"a package that no command came for")
    else:
        answer = slot.ring(Command.EXPORT, NO_BUFFER, 0, PAGES, 0)
        assert answer.buffer != NO_BUFFER
        if at == "drain":
            slot.memory.begin_drain(answer.buffer, HOST_DATA_OFFSET)


def _recover(slot: HostSlot) -> None:
    """What the protocol's page says that a host may do between two commands."""
    for index in range(2):
        offsets = HOST_DATA_OFFSET + 4 * index, SVSM_DATA_OFFSET + 4 * index
        host, svsm = (struct.unpack_from("<I", slot.raw, offset)[0] >> 8 for offset in offsets)
        if slot.memory.buffer_state(index) is not BufferState.FREE:
            turn = host if (host - svsm) % (1 << 24) < 1 << 23 else svsm
            struct.pack_into("<I", slot.raw, offsets[0], turn << 8 | BufferState.FREE)


@pytest.mark.parametrize("at", ["fill", "command", "answer", "drain"])
def test_a_host_that_lost_track_of_a_slot_frees_its_buffers_and_goes_on(move: Move, at: str) -> None:
    move.pair.handshake()
    move.pair.open_channels()
    move.pair.source.begin_epoch()
    slots = HostSlots.of(move.pair)
    slot = slots.source_channels[1]
    for _ in range(3):  # of both buffers, and of turns of either side
        _interrupted(slot, at)
        assert slot.free_buffers() == 1
        _recover(slot)
        assert slot.free_buffers() == 2
        assert refused(slot, Command.IMPORT, package=b"any") is RefusalCode.COMMAND
    # A bundle that was lost so was sealed: nothing but a new connection brings its pages back (R4, R9).
    left = 0
    while pages := slot.call(Command.EXPORT, 0, PAGES)[0].result:
        left += pages
    assert (left < PAGES) is (at in ("answer", "drain"))
