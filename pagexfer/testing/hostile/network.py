"""The attacker on the network: what waits for its delivery, and all that was ever seen.

Each takes the step's integers modulo what is there, and returns whether there was anything to attack.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from ...wire.bundle import HEADER_BYTES, BundleKind, Direction, parse_entries_untrusted
from ...wire.constants import FINAL_EPOCH, TAG_BYTES
from ...wire.slot import Command
from ...wire.slot import SessionStatus as State
from .alter import altered
from .schedule import Act, pick
from .world import CONTROL

if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Callable, Mapping

    from ..pair import Message
    from .attacks import Attack
    from .schedule import Step
    from .world import World

_ALTERABLE: Final = (
    BundleKind.PAGES,
    BundleKind.PAGES,
    BundleKind.VCPU_STATE,
    BundleKind.DEVICE_STATE,
    BundleKind.EPOCH_TOKEN,
    BundleKind.MANIFEST,
    BundleKind.START_TOKEN,
)
_REPLACEABLE: Final = (State.KEYED, State.PRECOPY, State.PARKED)

# The network: what waits for its delivery


def _queue(world: World, step: Step) -> deque[Message] | None:
    full = [queue for queue in world.queues.values() if queue]
    return full[step.x % len(full)] if full else None


def _drop(world: World, step: Step) -> bool:
    queue = _queue(world, step)
    if queue is None:
        return False
    queue.popleft()
    return True


def _duplicate(world: World, step: Step) -> bool:
    queue = _queue(world, step)
    if queue is None:
        return False
    queue.appendleft(queue[0])
    return True


def _delay(world: World, step: Step) -> bool:
    """The next message arrives after all that wait behind it on any channel."""
    queue = _queue(world, step)
    if queue is None or sum(map(len, world.queues.values())) < 2:
        return False
    late = queue.popleft()
    for other in list(world.queues.values()):
        while other:
            message = other.popleft()
            world.deliver(message, world.receiver(message))
    world.deliver(late, world.receiver(late))
    return True


def _reorder(world: World, step: Step) -> bool:
    queue = _queue(world, step)
    if queue is None or len(queue) < 2:
        return False
    other = 1 + step.y % (len(queue) - 1)
    queue[0], queue[other] = queue[other], queue[0]
    return True


def _change(world: World, step: Step, how: Callable[[bytes], bytes]) -> bool:
    """The next message of a queue becomes another; where nothing waits, a changed old one is delivered."""
    queue = _queue(world, step)
    if queue is not None:
        queue[0] = replace(queue[0], data=how(queue[0].data))
    elif world.seen:
        old = pick(world.seen, step.x)
        world.deliver(replace(old, data=how(old.data)), world.receiver(old))
    return bool(queue or world.seen)


def _flip(world: World, step: Step) -> bool:
    def flip(data: bytes) -> bytes:
        offset = step.y % len(data) if step.z & 8 else step.y % min(len(data), 80)
        return data[:offset] + bytes([data[offset] ^ 1 << step.z % 8]) + data[offset + 1 :]

    return _change(world, step, flip)


def _truncate(world: World, step: Step) -> bool:
    return _change(world, step, lambda data: data[: step.y % len(data)])


def _splice(world: World, step: Step) -> bool:
    """The beginning of one message and the end of another."""
    if len(world.seen) < 2:
        return False
    other = pick(world.seen, step.y).data

    def splice(data: bytes) -> bytes:
        cut = (HEADER_BYTES, len(data) - TAG_BYTES, HEADER_BYTES + 8)[step.z % 3]
        return data[:cut] + other[cut if step.z % 3 == 0 else len(other) - (len(data) - cut) :]

    return _change(world, step, splice)


def _cross_channel(world: World, step: Step) -> bool:
    queue = _queue(world, step)
    if queue is None or world.schedule.channels < 2:
        return False
    message = queue.popleft()
    channel = (message.channel + 1 + step.y % (world.schedule.channels - 1)) % world.schedule.channels
    world.deliver(message.crossed(channel), world.receiver(message))
    return True


def _withhold(world: World, step: Step) -> bool:
    if world.schedule.channels < 2:
        return False
    world.withheld.add(1 + step.x % (world.schedule.channels - 1))
    return True


def _alter(world: World, step: Step) -> bool:
    kind = pick(_ALTERABLE, step.z // 8)
    # What was flipped or spliced before has no key any more.
    heads = (queue for queue in world.queues.values() if queue and queue[0] in world.seen)
    queue = next((queue for queue in heads if queue[0].header.kind is kind), None)
    if queue is None:
        return False
    changed = altered(world.ledger, queue[0], _came(world, queue[0]), step)
    if changed is None:
        return False
    queue[0] = changed
    world.referee.altered.add(changed.data)
    return True


def _came(world: World, message: Message) -> set[int]:
    """Gfns that were sealed in the epoch of `message` before it."""
    gfns: set[int] = set()
    for other in world.seen:
        if other == message:
            break
        header = other.header
        if (header.session, header.epoch) == (message.header.session, message.header.epoch):
            entries = other.data[HEADER_BYTES : header.aad_bytes]
            if header.kind is BundleKind.PAGES:
                gfns |= set(parse_entries_untrusted(entries, header, world.schedule.pages).gfns.tolist())
    return gfns


# The network: what was seen before


def _replay(world: World, step: Step) -> bool:
    if not world.seen:
        return False
    message = pick(world.seen, step.x)
    world.deliver(message, world.receiver(message))
    return True


def _replay_epoch(world: World, step: Step) -> bool:
    current = max((m.header.epoch for m in world.seen if m.header.epoch < FINAL_EPOCH), default=0)
    old = [m for m in world.seen if m.header.kind is BundleKind.PAGES and m.header.epoch < current]
    if not old:
        return False
    message = pick(old, step.x)
    world.deliver(message, world.receiver(message))
    return True


def _cross_session(world: World, step: Step) -> bool:
    """A message of another session, by its own name or under this session's; or this session's into another destination."""
    if not world.seen:
        return False
    current = world.seen[-1].header.session
    others = [message for message in world.seen if message.header.session != current]
    if others:
        message = pick(others, step.x)
        if step.z % 2:
            header = message.header._replace(session=current)
            message = replace(message, data=header.pack() + message.data[HEADER_BYTES:])
        world.deliver(message, world.receiver(message))
    elif len(world.destinations) > 1:
        world.deliver(pick(world.seen, step.x), pick(world.destinations, step.y))
    return bool(others) or len(world.destinations) > 1


def _reflect(world: World, step: Step) -> bool:
    if not world.seen:
        return False
    message = pick(world.seen, step.x)
    forward = message.direction is Direction.FORWARD
    world.deliver(message, world.source if forward else world.destination)
    return True


def _stranger(world: World, step: Step) -> bool:
    """Somebody on the port gives the destination an opening bundle of his own."""
    message = pick(world.seen, step.x).data if world.seen else bytes(HEADER_BYTES + TAG_BYTES)
    if message and step.z % 3:
        offset = step.y % len(message)
        message = message[:offset] + bytes([message[offset] ^ 1]) + message[offset + 1 :]
    side = world.destination
    channel = step.y % world.schedule.channels
    reply = world.command(side, channel + 1, Command.SETUP, package=message)
    if reply.ok:
        side.opened.add(channel)
    return True


def _lose(world: World, step: Step) -> bool:
    """A channel's connection is lost with all that waits on it, and replaced; or that goes wrong half way."""
    if world.source.svsm.state not in _REPLACEABLE:  # as the status register says
        return False
    channel = step.x % world.schedule.channels
    opening = world.command(world.source, channel + 1, Command.REPLACE)
    if not opening.ok:
        return False
    world.queues[Direction.FORWARD, channel].clear()
    if step.y % 8 == 0:
        return True  # the opening is lost, too
    package = _spoilt(opening.data, step) if step.y % 8 == 1 else opening.data
    if world.command(world.destination, CONTROL, Command.REPLACE, channel, package=package).ok:
        word = world.command(world.destination, CONTROL, Command.REPLACE, channel)
        world.destination.opened.add(channel)
        if step.y % 8 != 2:  # else the word is lost
            package = _spoilt(word.data, step) if step.y % 8 == 3 else word.data
            world.command(world.source, channel + 1, Command.REPLACE, package=package)
    return True


def _spoilt(data: bytes, step: Step) -> bytes:
    offset = step.z % len(data) if data else 0
    return data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :] if data else data


NETWORK: Final[Mapping[Act, Attack]] = {
    Act.DROP: _drop,
    Act.DUPLICATE: _duplicate,
    Act.DELAY: _delay,
    Act.REORDER: _reorder,
    Act.FLIP: _flip,
    Act.TRUNCATE: _truncate,
    Act.SPLICE: _splice,
    Act.CROSS_CHANNEL: _cross_channel,
    Act.CROSS_SESSION: _cross_session,
    Act.REFLECT: _reflect,
    Act.REPLAY: _replay,
    Act.REPLAY_EPOCH: _replay_epoch,
    Act.WITHHOLD: _withhold,
    Act.ALTER: _alter,
    Act.STRANGER: _stranger,
    Act.LOSE: _lose,
}
