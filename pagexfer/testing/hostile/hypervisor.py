"""The attacker as the host of an SVSM: any command at any time, and lies about the guest.

Each takes the step's integers modulo what is there, and returns whether there was anything to attack.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from ...wire.bundle import BundleKind, Direction
from ...wire.slot import HOST_DATA_OFFSET, NO_BUFFER, BufferState, Command, SlotStatus
from ...wire.slot import SessionStatus as State
from .hold import Point
from .schedule import Act, pick
from .world import CONTROL, FIRST

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .attacks import Attack
    from .schedule import Step
    from .world import Side, World

_MAX_PACKAGE: Final = (1 << 16) - 64
_NUMBERS: Final = (0, 1, 2, 3, 4, 6, 8, 63, 64, 1 << 31, (1 << 32) - 1, 1 << 63, (1 << 64) - 1)
# Of a device state: total, offset or bytes, most of them such as a right part has.
_PLACES: Final = (0, 40, 60, 100, 100, 1, 1 << 28, (1 << 32) - 1)
# All that there are, and numbers that mean nothing.
COMMANDS: Final = (*Command, 0, max(Command) + 1, 255, (1 << 16) - 1)
_SOURCE_TOKENS: Final = (BundleKind.EPOCH_TOKEN, BundleKind.MANIFEST, BundleKind.START_TOKEN)
# What a host does while a bundle is being sealed; most often what needs the most to go wrong.
_ACROSS_THE_PARK: Final = (2, 3, 4)
_ANSWERS: Final = (BundleKind.READY, BundleKind.RUNNING)


def _command(world: World, step: Step) -> bool:
    """Any command to any SVSM, mostly with arguments that make sense; a bundle that comes back is sent on its way."""
    side = _any_side(world, step)
    if not side.alive:
        return False
    slot, command = step.y % len(side.slots), pick(COMMANDS, step.y // 8)
    packages: list[bytes | None] = [None, *world.letters, *(message.data for message in world.seen[-20:])]
    package = pick(packages, step.z // 7)
    argument, argument2 = pick(_NUMBERS, step.z), pick(_NUMBERS, step.x // 16)
    if step.z % 3 and slot:
        command = Command.EXPORT if step.z % 3 == 1 else Command.STATE
        argument, argument2 = step.z // 3 % 2, world.schedule.pages
        package = None
    reply = world.command(
        side, slot, command, argument, argument2, None if package is None else package[:_MAX_PACKAGE]
    )
    if reply.ok and reply.data and slot and side is world.source:
        world.send(Direction.FORWARD, slot - 1, reply.data)
    return True


def _registers(world: World, step: Step) -> bool:
    """A command line and buffer words of any content; the host may spoil its own slot for good."""
    side = _any_side(world, step)
    if not side.alive:
        return False
    slot = step.y % len(side.slots)
    if step.z % 2:
        raw = side.slots[slot].raw
        for offset in (HOST_DATA_OFFSET, HOST_DATA_OFFSET + 4):
            turn = struct.unpack_from("<I", raw, offset)[0] >> 8
            state = pick((*BufferState, 0, 255), step.z // 2)
            struct.pack_into("<I", raw, offset, (turn + 1 & 0xFFFFFF) << 8 | state)
    world.ring(
        side,
        slot,
        pick(COMMANDS, step.y // 8),
        pick((NO_BUFFER, 0, 1, 2, 7, 0xFFFE), step.z // 16),
        pick(_NUMBERS, step.x // 8),
        pick(_NUMBERS, step.x // 128),
        pick((0, 1, 79, 80, 128, _MAX_PACKAGE, _MAX_PACKAGE + 1, (1 << 32) - 1), step.z // 128),
    )
    return True


def _early_token(world: World, step: Step) -> bool:
    """Any token of either side, at once; an impatient host asks for it again after every step until it gets it."""
    forward = step.x % 3 < 2
    side = world.source if forward else world.destination
    kind = pick(_SOURCE_TOKENS if forward else _ANSWERS, step.y)
    reply = world.command(side, FIRST, Command.TOKEN, kind)
    if reply.ok:
        direction = Direction.FORWARD if forward else Direction.BACKWARD
        world.send(direction, 0, reply.data)
        if step.z % 2:
            message = world.queues[direction, 0].pop()
            world.deliver(message, world.receiver(message))
        return True
    if not side.alive or step.z % 4 == 0 or side.svsm.state in (State.ABORTED, State.FAILED):
        return True
    world.tally[step.act.value] += 1
    return False


def _device_part(world: World, step: Step) -> bool:
    """A part of a device state, seldom the one that is due; the host sends whatever it gets for it."""
    if world.source.svsm.state is not State.PARKED:  # as the status register says
        return False
    header = struct.pack("<II", pick(_PLACES, step.x), pick(_PLACES, step.y))
    part = (header + bytes(pick(_PLACES, step.z) % 128))[: 4 if step.z % 16 == 0 else None]
    reply = world.command(world.source, FIRST, Command.STATE, package=part)
    if reply.ok:
        world.send(Direction.FORWARD, 0, reply.data)
    return world.source.alive


def _hide_dirty(world: World, _step: Step) -> bool:
    world.hiding = True
    return True


def _false_hint(world: World, step: Step) -> bool:
    words = -(-world.schedule.pages // 64)
    log = ((step.y << 32 | step.z << 16 | step.x) % (1 << world.schedule.pages)).to_bytes(8 * words, "little")
    world.command(world.source, CONTROL, Command.HINT, 0, package=log)
    return world.source.alive


def _skip_comparison(world: World, _step: Step) -> bool:
    """The host goes on after the park as if RAM had been compared with what was sent (`honest`)."""
    world.skipping = True
    return True


def _slow_park(world: World, step: Step) -> bool:
    gate = world.guest.gate
    if not gate.any_moving:
        return False
    vcpu = step.x % gate.vcpus
    if gate.moving(vcpu):
        gate.slow.add(vcpu)
    return True


def _lie_parked(world: World, step: Step) -> bool:
    """The host goes on as if every vCPU stood still, and delivers whatever it gets."""
    if step.z % 2:
        _slow_park(world, step)
    world.command(world.source, CONTROL, Command.BLACKOUT)
    for vcpu in range(world.schedule.vcpus):
        _forward(world, Command.STATE, vcpu)
    for kind in (BundleKind.MANIFEST, BundleKind.START_TOKEN)[: 1 + step.y % 2]:
        _forward(world, Command.TOKEN, kind)
    return world.source.alive


def _hold(world: World, step: Step) -> bool:
    """An EXPORT stands still inside of the SVSM, and the host goes on, at times as if none were under way."""
    source = world.source
    if world.held is not None or source.svsm.state not in (State.PRECOPY, State.PARKED):
        return False
    beside = step.z // 16 % 6
    if beside in _ACROSS_THE_PARK and not any(
        message.header.kind is BundleKind.EPOCH_TOKEN for message in world.seen
    ):
        return False  # what was never sent is found by every audit
    if not world.hold(source, step.y % world.schedule.channels, pick(tuple(Point), step.x), 1 + step.z % 16):
        return False
    match beside:
        case number if number in _ACROSS_THE_PARK:
            world.guest.take_back()
            _park_and_audit(world)
        case 0:
            world.command(source, CONTROL, Command.ABORT)
            other = world.new_source()
            if other is not None:
                world.command(other, CONTROL, Command.PREPARE, world.schedule.channels)
        case 1:
            if not world.holds(source, FIRST):
                _forward(world, Command.TOKEN, BundleKind.EPOCH_TOKEN)
            world.command(source, CONTROL, Command.EPOCH)
    return True


def _park_and_audit(world: World) -> None:
    """Beside an export: what it has read may be old by then, and neither the host's log nor a second audit says so."""
    world.hiding = world.skipping = True
    world.guest.gate.slow.clear()
    for command in (Command.BLACKOUT, Command.AUDIT):
        reply = world.command(world.source, CONTROL, command)
        while reply.status is not None and reply.status.status is SlotStatus.INCOMPLETE:
            reply = world.command(world.source, CONTROL, command)


def _abort_source(world: World, _step: Step) -> bool:
    world.command(world.source, CONTROL, Command.ABORT)
    return world.source.alive


def _abort_destination(world: World, step: Step) -> bool:
    """Plainly, or with the abort token, which the source then gets or does not get."""
    side = world.destination
    if step.x % 2:
        world.command(side, CONTROL, Command.ABORT)
        return side.alive
    reply = world.command(side, FIRST, Command.TOKEN, BundleKind.ABORT_TOKEN)
    if reply.ok:
        world.send(Direction.BACKWARD, 0, reply.data)
    return side.alive


def _finish(world: World, step: Step) -> bool:
    side = _any_side(world, step)
    world.command(side, CONTROL, Command.FINISH)
    return side.alive


def _forward(world: World, command: Command, argument: int) -> None:
    reply = world.command(world.source, FIRST, command, argument)
    if reply.ok:
        world.send(Direction.FORWARD, 0, reply.data)
        world.deliver(world.queues[Direction.FORWARD, 0].pop(), world.destination)


def _any_side(world: World, step: Step) -> Side:
    return pick([*world.sources, *world.destinations], step.x)


HYPERVISOR: Final[Mapping[Act, Attack]] = {
    Act.COMMAND: _command,
    Act.REGISTERS: _registers,
    Act.EARLY_TOKEN: _early_token,
    Act.DEVICE_PART: _device_part,
    Act.HIDE_DIRTY: _hide_dirty,
    Act.FALSE_HINT: _false_hint,
    Act.SKIP_COMPARISON: _skip_comparison,
    Act.SLOW_PARK: _slow_park,
    Act.LIE_PARKED: _lie_parked,
    Act.ABORT_SOURCE: _abort_source,
    Act.ABORT_DESTINATION: _abort_destination,
    Act.FINISH: _finish,
    Act.HOLD: _hold,
}
