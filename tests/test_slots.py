"""The host's side of a slot over real slot memory, with a stand-in for the SVSM behind it."""

from __future__ import annotations

import pytest
import trio

from pagexfer.engine.slots import Slot
from pagexfer.errors import LocalProtocolError, RefusalCode, SvsmLost, SvsmRefused
from pagexfer.wire.slot import HEADROOM_BYTES, NO_BUFFER, BufferState, Command, SlotStatus

from .fake_svsm import GEOMETRY, FakeSvsm, Reply

_BUFFERS = range(GEOMETRY.buffers)


def _all_free(svsm: FakeSvsm) -> bool:
    return all(svsm.memory.buffer_state(index) is BufferState.FREE for index in _BUFFERS)


async def test_a_command_carries_its_arguments_and_its_answer_comes_back() -> None:
    svsm = FakeSvsm(lambda _registers, _package: Reply(result=5, result2=6, status=SlotStatus.INCOMPLETE))
    answer = await svsm.slot().command(Command.EXPORT, 1 << 40, 77)
    assert (answer.result, answer.result2, answer.status) == (5, 6, SlotStatus.INCOMPLETE)
    registers, _ = svsm.seen[0]
    assert (registers.command, registers.argument, registers.argument2) == (Command.EXPORT, 1 << 40, 77)
    assert registers.buffer == NO_BUFFER


async def test_every_command_has_the_next_number() -> None:
    svsm = FakeSvsm()
    slot = svsm.slot()
    for _ in range(3):
        await slot.command(Command.EPOCH)
    first = svsm.seen[0][0].sequence
    assert [registers.sequence for registers, _ in svsm.seen] == [first, first + 1, first + 2]


async def test_another_engine_goes_on_with_the_next_number() -> None:
    svsm = FakeSvsm()
    for _ in range(2):
        await svsm.slot().command(Command.EPOCH)
    assert [registers.sequence for registers, _ in svsm.seen] == [1, 2]


@pytest.mark.parametrize("error", [-1, 1, 1 << 31])
async def test_an_answer_to_another_command_is_refused(error: int) -> None:
    slot = FakeSvsm(lambda _registers, _package: Reply(sequence_error=error)).slot()
    with pytest.raises(SvsmLost, match="another command than EPOCH"):
        await slot.command(Command.EPOCH)


async def test_an_svsm_that_does_not_answer_is_noticed() -> None:
    async def ring() -> None:
        return

    with pytest.raises(SvsmLost):
        await Slot(FakeSvsm().memory, ring).command(Command.EPOCH)


@pytest.mark.parametrize("code", list(RefusalCode))
async def test_a_refusal_has_its_code(code: RefusalCode) -> None:
    slot = FakeSvsm(lambda _registers, _package: Reply(status=SlotStatus.REFUSED, error=code)).slot()
    with pytest.raises(SvsmRefused) as caught:
        await slot.command(Command.TOKEN)
    assert (caught.value.code, caught.value.command) == (code, "TOKEN")


async def test_a_refusal_without_a_code_is_no_refusal() -> None:
    slot = FakeSvsm(lambda _registers, _package: Reply(status=SlotStatus.REFUSED)).slot()
    with pytest.raises(SvsmLost, match="without a code"):
        await slot.command(Command.TOKEN)


async def test_an_exchange_moves_packages_both_ways_and_leaves_all_buffers_free() -> None:
    svsm = FakeSvsm(lambda _registers, package: Reply(package[::-1], result=9))
    slot = svsm.slot()
    for turn in range(2 * GEOMETRY.buffers + 1):
        answer, data = await slot.exchange(Command.SETUP, turn, b"abc%d" % turn)
        assert (answer.result, data) == (9, b"%dcba" % turn)
        assert _all_free(svsm)
    assert svsm.seen[-1][1] == b"abc4"


async def test_an_exchange_may_have_no_package_on_either_side() -> None:
    svsm = FakeSvsm()
    assert (await svsm.slot().exchange(Command.FINISH))[1] == b""
    assert svsm.seen == [(svsm.seen[0][0], b"")]


async def test_a_refused_exchange_leaves_all_buffers_free() -> None:
    svsm = FakeSvsm(lambda _registers, _package: Reply(status=SlotStatus.REFUSED, error=RefusalCode.STATE))
    with pytest.raises(SvsmRefused):
        await svsm.slot().exchange(Command.SETUP, package=b"evidence")
    assert _all_free(svsm)


async def test_a_package_larger_than_a_buffer_never_reaches_the_svsm() -> None:
    svsm = FakeSvsm()
    slot = svsm.slot()
    await slot.exchange(Command.SETUP, package=bytes(GEOMETRY.package_bytes))
    with pytest.raises(LocalProtocolError, match="does not fit"):
        await slot.exchange(Command.SETUP, package=bytes(GEOMETRY.package_bytes + 1))
    assert len(svsm.seen) == 1
    assert _all_free(svsm)


async def test_exchanges_of_several_tasks_do_not_mix() -> None:
    svsm = FakeSvsm(lambda registers, package: Reply(package, result=registers.argument))

    async def ring() -> None:
        await trio.lowlevel.checkpoint()  # a remote SVSM answers later
        svsm.answer()

    slot = Slot(svsm.memory, ring)
    answers: dict[int, tuple[int, bytes]] = {}

    async def exchange(task: int) -> None:
        answer, data = await slot.exchange(Command.PREPARE, task, b"task %d" % task)
        answers[task] = (answer.result, data)

    async with trio.open_nursery() as nursery:
        for task in range(10):
            nursery.start_soon(exchange, task)
    assert answers == {task: (task, b"task %d" % task) for task in range(10)}


async def test_buffers_are_the_only_queue() -> None:
    svsm = FakeSvsm()
    slot = svsm.slot()
    taken = [slot.begin_fill() for _ in _BUFFERS]
    assert sorted(taken) == list(_BUFFERS)
    with pytest.raises(LocalProtocolError, match="no free buffer"):
        slot.begin_fill()
    slot.withdraw(taken[0])
    assert slot.begin_fill() == taken[0]


async def test_a_filled_buffer_is_handed_over_and_comes_back() -> None:
    svsm = FakeSvsm()
    slot = svsm.slot()
    index = slot.begin_fill()
    slot.package(index)[:6] = b"sealed"
    await slot.submit(index, 6, Command.IMPORT, 4)
    assert svsm.seen[0][1] == b"sealed"
    assert (svsm.seen[0][0].command, svsm.seen[0][0].argument) == (Command.IMPORT, 4)
    assert _all_free(svsm)


async def test_a_frame_stands_right_before_its_package() -> None:
    svsm = FakeSvsm(lambda _registers, _package: Reply(b"sealed bytes"))
    slot = svsm.slot()
    answer = await slot.command(Command.EXPORT)
    slot.begin_drain(answer)
    assert bytes(slot.frame(answer, b"HEADER")) == b"HEADERsealed bytes"
    longest = bytes(range(HEADROOM_BYTES))
    assert bytes(slot.frame(answer, longest)) == longest + b"sealed bytes"
    slot.release(answer)
    assert _all_free(svsm)
