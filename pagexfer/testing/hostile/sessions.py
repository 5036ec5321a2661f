"""The attacker who starts and stops machines: more sessions than one, more destinations than one, crashes.

Each takes the step's integers modulo what is there, and returns whether there was anything to attack.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ...wire.slot import Command
from .schedule import Act, pick
from .world import CONTROL

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .attacks import Attack
    from .schedule import Step
    from .world import Side, World


def _second_destination(world: World, step: Step) -> bool:
    """Another destination hears all that the first one heard; a source that still waits may get its reply."""
    side = world.new_destination() if world.letters else None
    if side is None:
        return False
    evidence = list(world.letters)
    reply = world.command(side, CONTROL, Command.PREPARE, 1, package=pick(evidence[-3:], step.y))
    if reply.ok and step.z % 2:
        evidence.append(world.command(world.source, CONTROL, Command.SETUP, package=reply.data).data)
    _replay_into(world, side, evidence)
    return True


def _rerun_session(world: World, step: Step) -> bool:
    """Everything that was ever said, once more, into a destination that knows nothing yet."""
    side = world.new_destination() if world.letters else None
    if side is None:
        return False
    world.command(side, CONTROL, Command.PREPARE, 1, package=pick(world.letters, step.x))
    _replay_into(world, side, world.letters)
    return True


def _replay_into(world: World, side: Side, evidence: Sequence[bytes]) -> None:
    for letter in evidence:
        if letter:
            world.command(side, CONTROL, Command.SETUP, 1, package=letter)
    for message in list(world.seen):
        world.deliver(message, side)


def _rerun_source(world: World, step: Step) -> bool:
    """A second session of the same guest at the source, in whatever state the first one is."""
    side = world.new_source()
    if side is None:
        return False
    world.command(side, CONTROL, Command.PREPARE, world.schedule.channels)
    if step.x % 3:
        world.command(side, CONTROL, Command.BLACKOUT)
        world.command(side, CONTROL, Command.ABORT)
    return True


def _crash_source(world: World, _step: Step) -> bool:
    alive = world.source.alive
    world.crash(world.source)
    return alive


def _crash_destination(world: World, _step: Step) -> bool:
    alive = world.destination.alive
    world.crash(world.destination)
    return alive


SESSIONS: Final[Mapping[Act, Attack]] = {
    Act.SECOND_DESTINATION: _second_destination,
    Act.RERUN_SESSION: _rerun_session,
    Act.RERUN_SOURCE: _rerun_source,
    Act.CRASH_SOURCE: _crash_source,
    Act.CRASH_DESTINATION: _crash_destination,
}
