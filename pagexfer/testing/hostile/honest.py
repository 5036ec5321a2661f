"""The honest part of the host: one migration done right, one command a step, so that something can happen in between.

A script is a generator that is sent one integer a step; within an epoch it says which of the possible things comes next, as
channels race freely. What is refused ends the attempt: both sides are told to abort, and a fresh pair tries again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from typing import TYPE_CHECKING, Final

from ...wire.bundle import BundleKind, Direction
from ...wire.device_state import DevicePart
from ...wire.slot import Command, SlotStatus
from ...wire.slot import SessionStatus as State
from .schedule import Act, Tracking
from .world import CONTROL, FIRST

if TYPE_CHECKING:
    from .schedule import Step
    from .world import Side, World

Script = Generator[None, int, None]

_CHUNK_PAGES: Final = 8
_PRECOPY_EPOCHS: Final = 2
_PARK_PATIENCE: Final = 3
_DEVICE_STATE: Final = bytes(range(100))
_FIRST_PART_BYTES: Final = 40


class _Refused(Exception):
    """This attempt has come to its end."""


def migrate(world: World) -> Script:
    """Migrate the guest, with fresh sides as often as it takes; a step too many does nothing."""
    while True:
        try:
            yield from _migration(world)
            world.tally["migrations completed"] += 1
            break
        except _Refused:
            yield from give_up(world)
        if not world.begin_anew():
            break
    while True:
        yield


def give_up(world: World) -> Script:
    """Abort both sides, the destination by its word if it has one to give, which the source then hears."""
    reply = world.command(world.destination, FIRST, Command.TOKEN, BundleKind.ABORT_TOKEN)
    yield
    if reply.ok:
        world.send(Direction.BACKWARD, 0, reply.data)
        world.deliver(world.queues[Direction.BACKWARD, 0].pop(), world.source)
        yield
    world.command(world.destination, CONTROL, Command.ABORT)
    yield
    world.command(world.source, CONTROL, Command.ABORT)
    yield


def _migration(world: World) -> Script:
    yield from handshake(world)
    for channel in range(world.schedule.channels):
        opening = _ask(world, world.source, channel + 1, Command.SETUP)
        world.send(Direction.FORWARD, channel, opening)
        yield
        yield from _deliver_all(world, channel)
    yield from _token(world, BundleKind.LEDGER)
    for _ in range(_PRECOPY_EPOCHS):
        yield from _epoch(world)
    yield from _park(world)
    if world.schedule.tracking is Tracking.AUDIT:
        yield from _audit(world)
    if not (world.skipping and world.schedule.tracking is Tracking.COMPARISON):
        yield from _epoch(world)
    # The last part last: so a manifest may be asked for when nothing but that is missing.
    yield from _device_part(world, 0, _FIRST_PART_BYTES)
    for vcpu in range(world.schedule.vcpus):
        world.send(Direction.FORWARD, 0, _ask(world, world.source, FIRST, Command.STATE, vcpu))
        yield
    yield from _device_part(world, _FIRST_PART_BYTES, len(_DEVICE_STATE))
    yield from _deliver_all(world, 0)
    yield from _token(world, BundleKind.MANIFEST)
    yield from _token(world, BundleKind.READY)
    yield from _token(world, BundleKind.START_TOKEN)
    yield from _token(world, BundleKind.RUNNING)
    _ask(world, world.source, CONTROL, Command.FINISH)
    yield
    _ask(world, world.destination, CONTROL, Command.FINISH)
    yield


def handshake(world: World) -> Script:
    """All handshake messages, each seen by the host and open to tampering. The only place that knows their order."""
    hello = _ask(world, world.source, CONTROL, Command.PREPARE, world.schedule.channels)
    yield
    reply = _ask(world, world.destination, CONTROL, Command.PREPARE, 1, package=_carry(world, hello))
    yield
    proof = _ask(world, world.source, CONTROL, Command.SETUP, package=_carry(world, reply))
    yield
    end = _ask(world, world.destination, CONTROL, Command.SETUP, 1, package=_carry(world, proof))
    yield
    _ask(world, world.source, CONTROL, Command.CONFIRM, package=_carry(world, end))
    yield


def _carry(world: World, message: bytes) -> bytes:
    """What arrives of a handshake message."""
    world.letters.append(message)
    step = next((step for step in world.waiting if step.act is Act.HANDSHAKE), None)
    if step is None:
        return message
    world.waiting.remove(step)
    world.tally[step.act.value] += 1
    return _tampered(world.letters, step)


def _tampered(letters: list[bytes], step: Step) -> bytes:
    data = bytearray(letters[-1])
    match step.x % 4:
        case 0:
            data[step.y % len(data)] ^= 1 << step.z % 8
        case 1:
            del data[step.y % len(data) :]
        case 2:
            data[:] = letters[step.y % len(letters)]
        case _:
            data += bytes(1 + step.y % 40)
    return bytes(data)


def _epoch(world: World) -> Script:
    """One epoch: pages are sealed and arrive in any order that the steps say, then the token closes it."""
    # Whoever has RAM compared has no log to give.
    if not world.hiding and world.schedule.tracking is not Tracking.COMPARISON:
        hints = bytearray(8 * -(-world.schedule.pages // 64))
        for gfn in world.guest.log:
            hints[gfn // 8] |= 1 << gfn % 8
        _ask(world, world.source, CONTROL, Command.HINT, 0, package=bytes(hints))
    world.guest.log.clear()
    _begin_epoch(world)
    x = yield
    chunks = range(0, world.schedule.pages, _CHUNK_PAGES)
    work = deque(chunks)
    channels = world.schedule.channels
    was_held = False
    while True:
        ready = [
            channel
            for channel in range(channels)
            if channel not in world.withheld and world.queues[Direction.FORWARD, channel]
        ]
        if was_held and world.held is None:
            work.extend(chunks)  # what did not fit the bundle that took long is pending still
        was_held = world.held is not None
        channel = x // 8 % channels
        if not work and not ready and not was_held:
            break
        if (work and world.holds(world.source, channel + 1)) or not (work or ready):
            pass  # this host waits for an answer before it gives the next command, and does not end an epoch before it
        elif work and x % (len(ready) + 1) == 0:
            start = work.popleft()
            pages = min(_CHUNK_PAGES, world.schedule.pages - start)
            reply = world.command(world.source, channel + 1, Command.EXPORT, start, pages)
            if reply.data:
                world.send(Direction.FORWARD, channel, reply.data)
            if not reply.ok or reply.status is None:
                raise _Refused
            if reply.status.status is SlotStatus.INCOMPLETE:
                work.appendleft(start)
        else:
            _deliver(world, Direction.FORWARD, ready[x % len(ready)])
        x = yield
    yield from _token(world, BundleKind.EPOCH_TOKEN)


def _begin_epoch(world: World) -> None:
    """EPOCH until it is complete. A host of commands out of order asks for pages in between, and sends what it gets."""
    is_impatient = any(step.act is Act.COMMAND for step in world.schedule.steps)
    while True:
        reply = world.command(world.source, CONTROL, Command.EPOCH)
        if not reply.ok or reply.status is None:
            raise _Refused
        if reply.status.status is not SlotStatus.INCOMPLETE:
            return
        if is_impatient:
            early = world.command(world.source, FIRST, Command.EXPORT, 0, world.schedule.pages)
            if early.ok and early.data:
                world.send(Direction.FORWARD, 0, early.data)


def _park(world: World) -> Script:
    """Black-out; a vCPU that is slow gets some patience and then parks."""
    if world.source.svsm.state is State.PARKED:  # as the status register says: an attack came before
        return
    for attempt in range(_PARK_PATIENCE + 1):
        if attempt == _PARK_PATIENCE:
            world.guest.gate.slow.clear()
        reply = world.command(world.source, CONTROL, Command.BLACKOUT)
        yield
        if not reply.ok or reply.status is None:
            raise _Refused
        if reply.status.status is SlotStatus.OK:
            return


def _audit(world: World) -> Script:
    """All of RAM is hashed; what was found goes with the epoch that begins after it."""
    while not world.skipping:
        reply = world.command(world.source, CONTROL, Command.AUDIT)
        yield
        if not reply.ok or reply.status is None:
            raise _Refused
        if reply.status.status is SlotStatus.OK:
            return


def _device_part(world: World, start: int, stop: int) -> Script:
    """Hand in a part of the device state; it arrives with what is sealed after it."""
    part = DevicePart(len(_DEVICE_STATE), start, stop - start).pack_header() + _DEVICE_STATE[start:stop]
    world.send(Direction.FORWARD, 0, _ask(world, world.source, FIRST, Command.STATE, package=part))
    yield


def _token(world: World, kind: BundleKind) -> Script:
    """Have one side seal a token, and give it to the other."""
    forward = kind not in (BundleKind.READY, BundleKind.RUNNING, BundleKind.ABORT_TOKEN)
    direction = Direction.FORWARD if forward else Direction.BACKWARD
    side = world.source if forward else world.destination
    world.send(direction, 0, _ask(world, side, FIRST, Command.TOKEN, kind))
    yield
    while world.queues[direction, 0]:
        _deliver(world, direction, 0)
        yield


def _deliver_all(world: World, channel: int) -> Script:
    while world.queues[Direction.FORWARD, channel]:
        _deliver(world, Direction.FORWARD, channel)
        yield


def _deliver(world: World, direction: Direction, channel: int) -> None:
    message = world.queues[direction, channel].popleft()
    if not world.deliver(message, world.receiver(message)).ok:
        raise _Refused


def _ask(
    world: World, side: Side, slot: int, command: Command, argument: int = 0, *, package: bytes | None = None
) -> bytes:
    reply = world.command(side, slot, command, argument, package=package)
    if not reply.ok:
        raise _Refused
    return reply.data
