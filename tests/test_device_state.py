"""The hypervisor's device state on its way: sealed, whole, in order, and taken for nothing of the guest's."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from pagexfer.errors import (
    IntegrityError,
    LocalProtocolError,
    MalformedData,
    NotReady,
    Outcome,
    PagexferError,
    ReflectionError,
    RefusalCode,
    ReplayError,
    TransferAborted,
)
from pagexfer.migration import receive_guest, send_guest
from pagexfer.svsm.device_state import Carried
from pagexfer.testing.proxy import FaultProxy
from pagexfer.wire.bundle import HEADER_BYTES, BundleKind
from pagexfer.wire.constants import TAG_BYTES
from pagexfer.wire.device_state import (
    MAX_DEVICE_STATE_BYTES,
    MAX_DEVICE_STATE_PART_BYTES,
    PART_HEADER_BYTES,
    DevicePart,
)
from pagexfer.wire.slot import HOST_DATA_OFFSET, NO_BUFFER, Command, SlotStatus
from pagexfer.wire.slot import SessionStatus as State

from .engine_guests import SmallMachine
from .host_slot import HostSlots
from .loopback import HOST
from .rule_breaking import refused, sealed_by_source
from .small_guests import ATTESTOR, Move, a_move

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pagexfer.testing import Message, SvsmPair
    from pagexfer.testing.proxy import Frame

_MIB: Final = 1 << 20
_STATE: Final = bytes(range(250))


@pytest.fixture
def move() -> Iterator[Move]:
    yield from a_move()


def part(total: int, offset: int, data: bytes) -> bytes:
    return DevicePart(total, offset, len(data)).pack_header() + data


def parked(move: Move) -> SvsmPair:
    """All of RAM is there and the vCPUs stand: now states may go."""
    move.pair.until_precopy()
    move.pair.park()
    move.pair.epoch()
    return move.pair


# A whole one


@pytest.mark.parametrize("part_bytes", [250, 249, 100, 1])
def test_it_comes_out_as_it_went_in(move: Move, part_bytes: int) -> None:
    pair = parked(move)
    pair.device_state(_STATE, part_bytes)
    pair.vcpus()
    assert pair.given_out == _STATE
    pair.manifest()
    pair.ready()
    pair.start()
    assert move.arrived()


def test_it_may_come_after_the_vcpus_and_there_may_be_none(move: Move) -> None:
    pair = parked(move)
    pair.vcpus()
    pair.device_state(_STATE)
    pair.manifest()
    assert pair.given_out == _STATE
    empty = Move()
    empty.pair.migrate()
    assert (empty.pair.given_out, empty.gate.running) == (b"", True)
    empty.close()


def test_nothing_of_the_guest_has_it_but_the_channels_transcript_does(move: Move) -> None:
    pair = parked(move)
    pair.vcpus()
    before, ram = pair.destination._own_manifest(), move.memory.words.copy()
    pair.device_state(_STATE, 100)
    after = pair.destination._own_manifest()
    assert (move.memory.words == ram).all()
    assert (before.channels[0].bundles + 3, before.channels[1]) == (
        after.channels[0].bundles,
        after.channels[1],
    )
    assert before.channels[0].transcript != after.channels[0].transcript
    assert replace(before, channels=()) == replace(after, channels=())


@given(st.binary(min_size=1, max_size=60), st.lists(st.integers(1, 60), max_size=20))
def test_any_division_into_parts_is_complete_at_its_end_and_no_earlier(
    state: bytes, sizes: list[int]
) -> None:
    carried, offset = Carried(), 0
    assert carried.complete
    for size in [*sizes, len(state)]:
        data = state[offset : offset + size]
        if data:
            carried = carried.after_untrusted(part(len(state), offset, data))
            offset += len(data)
            assert carried.begun
            assert carried.complete is (offset == len(state))
    assert carried.complete


# A source whose host hands in something else

_NOT_NEXT: Final = {
    "begins again": part(250, 0, _STATE[:100]),
    "the same once more": part(250, 40, _STATE[40:100]),
    "leaves something out": part(250, 101, _STATE[101:]),
    "overlaps": part(250, 99, _STATE[99:]),
    "another total": part(251, 100, _STATE[100:]),
    "a smaller total": part(249, 100, _STATE[100:249]),
    "over the end": part(250, 100, _STATE[100:] + b"!"),
    "no bytes": part(250, 100, b""),
    "over 1 MiB": part(MAX_DEVICE_STATE_BYTES, 100, bytes(MAX_DEVICE_STATE_PART_BYTES + 1)),
    "over the cap": part(MAX_DEVICE_STATE_BYTES + 1, 100, b"more"),
    "no header": b"\0" * 7,
    "nothing": b"",
    "far away": part((1 << 32) - 1, (1 << 32) - 1, b"more"),
}


@pytest.mark.parametrize("payload", _NOT_NEXT.values(), ids=_NOT_NEXT)
def test_a_source_seals_the_next_part_only_and_goes_on(move: Move, payload: bytes) -> None:
    pair = parked(move)
    pair.send(pair.seal_device_part(part(250, 0, _STATE[:100])))
    sealed = pair.source._session_streams().sealer(0).counter
    with pytest.raises(MalformedData):
        pair.seal_device_part(payload)
    assert pair.source._session_streams().sealer(0).counter == sealed
    pair.send(pair.seal_device_part(part(250, 100, _STATE[100:])))
    pair.vcpus()
    pair.manifest()
    assert pair.given_out == _STATE
    with pytest.raises(LocalProtocolError):
        pair.seal_device_part(part(250, 0, _STATE))


def test_a_whole_one_has_no_further_part(move: Move) -> None:
    pair = parked(move)
    pair.device_state(_STATE)
    for payload in (part(250, 0, _STATE), part(250, 250, b"!"), part(251, 250, b"!")):
        with pytest.raises(MalformedData):
            pair.seal_device_part(payload)


def test_a_source_seals_none_before_the_park(move: Move) -> None:
    move.pair.until_precopy()
    with pytest.raises(LocalProtocolError):
        move.pair.device_state(_STATE)
    assert move.pair.source.state is State.PRECOPY


def test_a_source_seals_no_manifest_before_all_of_it(move: Move) -> None:
    pair = parked(move)
    pair.vcpus()
    pair.send(pair.seal_device_part(part(250, 0, _STATE[:249])))
    with pytest.raises(NotReady):
        pair.manifest()
    pair.send(pair.seal_device_part(part(250, 249, _STATE[249:])))
    pair.manifest()


def test_no_connection_is_replaced_once_it_was_begun(move: Move) -> None:
    pair = parked(move)
    pair.send(pair.seal_device_part(part(250, 0, _STATE[:100])))
    out = memoryview(bytearray(4096))
    with pytest.raises(LocalProtocolError, match="no connection is replaced"):
        pair.source.replace_channel(1, out)
    with pytest.raises(LocalProtocolError, match="no connection is replaced"):
        pair.destination.replace_channel(1, out)


# A source that is authentic and wrong


@pytest.mark.parametrize("payload", _NOT_NEXT.values(), ids=_NOT_NEXT)
def test_a_destination_takes_the_next_part_only(move: Move, payload: bytes) -> None:
    pair = parked(move)
    pair.send(pair.seal_device_part(part(250, 0, _STATE[:100])))
    refused(move, sealed_by_source(pair, BundleKind.DEVICE_STATE, payload, epoch=3), MalformedData)
    assert pair.given_out == _STATE[:100]


def test_a_destination_takes_no_manifest_before_all_of_it(move: Move) -> None:
    pair = parked(move)
    pair.vcpus()
    pair.send(pair.seal_device_part(part(250, 0, _STATE[:249])))
    agreeing = pair.destination._own_manifest().pack()
    refused(move, sealed_by_source(pair, BundleKind.MANIFEST, agreeing, epoch=3), IntegrityError)


def test_a_destination_takes_none_after_the_manifest(move: Move) -> None:
    pair = parked(move)
    pair.vcpus()
    pair.manifest()
    late = sealed_by_source(pair, BundleKind.DEVICE_STATE, part(250, 0, _STATE), epoch=0xFFFFFFFF)
    refused(move, late, IntegrityError)


def test_a_destination_takes_none_over_another_channel(move: Move) -> None:
    pair = parked(move)
    other = sealed_by_source(pair, BundleKind.DEVICE_STATE, part(250, 0, _STATE), channel=1, epoch=3)
    refused(move, other, IntegrityError)


# The network


@pytest.mark.parametrize(
    "offset", [*range(HEADER_BYTES + PART_HEADER_BYTES + 1), HEADER_BYTES + 100, -TAG_BYTES, -1]
)
def test_every_flipped_bit_is_found(move: Move, offset: int) -> None:
    pair = parked(move)
    message = pair.seal_device_part(part(250, 0, _STATE[:100]))
    refused(move, message.flipped(offset, 1 << offset % 8), PagexferError)
    assert pair.given_out == b""


@pytest.mark.parametrize("length", [0, 1, 63, 64, 79, 80, 88, -17, -16, -1])
def test_a_part_that_is_cut_off_is_found(move: Move, length: int) -> None:
    message = parked(move).seal_device_part(part(250, 0, _STATE))
    cut = replace(message, data=message.data[:length])
    refused(move, cut, PagexferError)
    assert move.pair.given_out == b""


def test_a_part_that_is_replayed_is_found(move: Move) -> None:
    first, _ = _two_parts(parked(move))
    move.pair.deliver(first)
    refused(move, first, ReplayError)


def test_a_dropped_or_late_part_is_found_by_the_next(move: Move) -> None:
    _, second = _two_parts(parked(move))
    refused(move, second, ReplayError)


def test_a_missing_last_part_is_found_by_what_comes_after_it(move: Move) -> None:
    first, _ = _two_parts(parked(move))
    move.pair.deliver(first)
    refused(move, move.pair.seal_vcpu(0), ReplayError)


def test_a_part_of_another_session_is_found(move: Move) -> None:
    other = Move()
    theirs = parked(other).seal_device_part(part(250, 0, _STATE))
    parked(move)
    refused(move, theirs, ReflectionError)
    other.close()


def _two_parts(pair: SvsmPair) -> list[Message]:
    halves = [part(250, 0, _STATE[:100]), part(250, 100, _STATE[100:])]
    return [pair.seal_device_part(half) for half in halves]


# Through the slots


def test_a_part_goes_in_and_comes_out_by_one_command_each(move: Move) -> None:
    pair = parked(move)
    slots = HostSlots.of(pair)
    near, far = slots.source_channels[0], slots.destination_channels[0]
    taken, sealed = near.call(Command.STATE, package=part(250, 0, _STATE))
    assert (taken.status, len(sealed)) == (SlotStatus.OK, HEADER_BYTES + PART_HEADER_BYTES + 250 + TAG_BYTES)
    given, data = far.call(Command.IMPORT, package=sealed)
    assert (given.status, given.result, given.result2) == (SlotStatus.OK, BundleKind.DEVICE_STATE, 0)
    assert data == _STATE
    assert near.free_buffers() == far.free_buffers() == 2


@pytest.mark.parametrize("payload", _NOT_NEXT.values(), ids=_NOT_NEXT)
def test_a_host_learns_that_its_part_is_not_the_next(move: Move, payload: bytes) -> None:
    slot = HostSlots.of(parked(move)).source_channels[0]
    slot.call(Command.STATE, package=part(250, 0, _STATE[:100]))
    if len(payload) > slot.memory.geometry.package_bytes:
        payload = part(250, 0, b"") + bytes(slot.memory.geometry.package_bytes - PART_HEADER_BYTES)
    answer, data = slot.call(Command.STATE, package=payload)
    assert (answer.status, answer.error, data) == (SlotStatus.REFUSED, RefusalCode.COMMAND, b"")
    assert slot.free_buffers() == 2
    answer, _ = slot.call(Command.STATE, package=part(250, 100, _STATE[100:]))
    assert answer.status is SlotStatus.OK


def test_a_part_waits_where_the_host_leaves_no_buffer_for_it(move: Move) -> None:
    pair = parked(move)
    sealed = pair.seal_device_part(part(250, 0, _STATE)).data
    slot = HostSlots.of(pair).destination_channels[0]
    index = slot.give(sealed)
    slot.memory.begin_fill(1 - index, HOST_DATA_OFFSET)
    answer = slot.ring(Command.IMPORT, index, 0, 0, len(sealed))
    assert (answer.error, answer.buffer) == (RefusalCode.STATE, NO_BUFFER)
    assert pair.destination.state is State.IMPORTING
    slot.memory.withdraw(1 - index, HOST_DATA_OFFSET)
    assert slot.call(Command.IMPORT, package=sealed)[1] == _STATE


def test_a_forged_part_gives_nothing_out(move: Move) -> None:
    pair = parked(move)
    forged = pair.seal_device_part(part(250, 0, _STATE)).flipped(-1).data
    slot = HostSlots.of(pair).destination_channels[0]
    answer, data = slot.call(Command.IMPORT, package=forged)
    assert (answer.error, answer.session, data) == (RefusalCode.INTEGRITY, State.FAILED, b"")
    assert slot.free_buffers() == 2
    assert not any(_STATE[:32] in bytes(package) for package in slot.memory.packages)


# Between two engines


async def _migrate(
    machine: SmallMachine, *, isolated: bool = False
) -> tuple[list[Frame], list[TransferAborted]]:
    """Move a small guest; returns every frame that crossed between the two sides, and how they failed."""
    crossed: list[Frame] = []
    failed: list[TransferAborted] = []

    def see(frame: Frame) -> bool:
        crossed.append(frame)
        return False

    async def receive(task_status: trio.TaskStatus[int]) -> None:
        try:
            await receive_guest(
                machine.destination, HOST, 0, ATTESTOR, isolated=isolated, on_listening=task_status.started
            )
        except TransferAborted as aborted:
            failed.append(aborted)

    with trio.fail_after(30):
        async with trio.open_nursery() as network:
            async with trio.open_nursery() as sides:
                port = await sides.start(receive)
                proxy_port = await network.start(FaultProxy(HOST, port, see).serve)
                try:
                    await send_guest(
                        machine.source, HOST, proxy_port, ATTESTOR, channels=2, isolated=isolated
                    )
                except TransferAborted as aborted:
                    failed.append(aborted)
            network.cancel_scope.cancel()
    return crossed, failed


@pytest.mark.parametrize("isolated", [False, True])
async def test_no_byte_of_it_crosses_in_clear(isolated: bool) -> None:
    marker = os.urandom(32)
    machine = SmallMachine()
    machine.source.hypervisor.device_state = marker * (3 * _MIB // len(marker)) + marker
    crossed, _ = await _migrate(machine, isolated=isolated)
    assert machine.moved()
    assert machine.destination.hypervisor.loaded == machine.source.hypervisor.device_state
    assert sum(len(frame.data) for frame in crossed) > 3 * _MIB
    assert not any(marker[:8] in frame.data for frame in crossed)


@pytest.mark.parametrize(
    ("size", "bundles"), [(0, 0), (1, 1), (_MIB - 1, 1), (_MIB, 1), (_MIB + 1, 2), (5_000_000, 5)]
)
async def test_it_costs_a_bundle_for_each_mib(size: int, bundles: int) -> None:
    machine = SmallMachine()
    machine.source.hypervisor.device_state = state = os.urandom(size)
    crossed, _ = await _migrate(machine)
    assert machine.moved()
    assert machine.destination.hypervisor.loaded == state
    assert machine.destination.hypervisor.calls == ["load", "resume"]
    kinds = [frame.kind for frame in crossed if frame.kind is not None]
    assert kinds.count(BundleKind.DEVICE_STATE) == bundles
    last_epoch = max(index for index, kind in enumerate(kinds) if kind is BundleKind.EPOCH_TOKEN)
    assert BundleKind.DEVICE_STATE not in kinds[:last_epoch]
    assert BundleKind.DEVICE_STATE not in kinds[kinds.index(BundleKind.VCPU_STATE) :]


async def test_one_over_the_cap_stays_with_its_guest() -> None:
    machine = SmallMachine()
    machine.source.hypervisor.device_state = bytes(MAX_DEVICE_STATE_BYTES + 1)
    _, failed = await _migrate(machine)
    assert [(each.outcome, each.reason) for each in failed] == [(Outcome.ENDED, "guest")] * 2
    assert f"device state of {MAX_DEVICE_STATE_BYTES + 1} bytes is over the cap" in str(failed[0])
    assert machine.stayed()


async def test_a_destination_keeps_no_more_than_the_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagexfer.engine.destination.MAX_DEVICE_STATE_BYTES", _MIB)
    machine = SmallMachine()
    machine.source.hypervisor.device_state = bytes(_MIB + 1)
    _, failed = await _migrate(machine)
    assert {each.reason for each in failed} == {"protocol"}
    assert machine.stayed()
