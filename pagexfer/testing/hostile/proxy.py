"""The hostile network between two engines, over real TCP: a seed says what happens to which frame of which connection.

A fault is bound to a frame's place (connection, direction, number) or kind and not to a moment, so the same seed does the
same to every migration, however its connections race. What the network saw it keeps, also from one migration to the next.
"""

from __future__ import annotations

import enum
import random
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Final

import trio

from ...wire.bundle import BundleKind, Direction
from ..proxy import Action, FaultProxy

if TYPE_CHECKING:
    from ..proxy import Frame, _Link

    Place = tuple[int | None, Direction, int]


class Trick(enum.Enum):
    """What a `testing.proxy.Action` is not: things that take more than one frame or connection."""

    REPLAY = "replay"  # an earlier frame of the same kind of connection arrives before it, of this migration or another
    CROSS = "cross"  # it arrives over another channel, before the next frame there
    STRANGER = "stranger"  # somebody connects to the destination and says what another connection once said


Fault = Action | Trick

FAULTS: Final[tuple[Fault, ...]] = (
    Action.CUT,
    Action.HALF_CLOSE,
    Action.TRUNCATE,
    Action.FLIP,
    Action.DELAY,
    Action.DROP,
    Action.DUPLICATE,
    Action.SWAP,
    *Trick,
)
_MAX_FAULTS: Final = 3
# Frames of a connection before its black-out is through, for a guest of a few bundles.
_FRAMES: Final = 12
_ANSWERS: Final = 5
_STRANGERS_FRAMES: Final = 3


class HostileProxy(FaultProxy):
    """Relays connections to `host`:`port` and harms the frames that `seed` chooses.

    `seen` are all frames of all migrations so far, to which this one's are added; `done` counts the faults that found their
    frame.
    """

    def __init__(self, host: str, port: int, seed: int, channels: int, seen: list[Frame]) -> None:
        super().__init__(host, port)
        self._address = (host, port)
        self._rng = random.Random(seed)
        self._seen = seen
        self._numbers: Counter[tuple[int | None, Direction]] = Counter()
        self._crossing: defaultdict[Direction, list[Frame]] = defaultdict(list)
        self._faults = self._plan(channels)
        self.done: Counter[Fault] = Counter()

    def _plan(self, channels: int) -> dict[Place | BundleKind, Fault]:
        rng = self._rng
        connections: list[int | None] = [None, 0, 0, *range(channels)]
        # Half of the time one fault more awaits a certain kind of bundle, so that the hand-over is not missed.
        faults: dict[Place | BundleKind, Fault] = {}
        if rng.random() < 0.5:
            faults[rng.choice(tuple(BundleKind))] = rng.choice(FAULTS)
        for _ in range(rng.randint(len(faults) == 0, _MAX_FAULTS - 1)):
            direction = rng.choice((Direction.FORWARD, Direction.FORWARD, Direction.BACKWARD))
            number = rng.randrange(_FRAMES if direction is Direction.FORWARD else _ANSWERS)
            faults[rng.choice(connections), direction, number] = rng.choice(FAULTS)
        return faults

    async def _pass(self, link: _Link, frame: Frame, target: trio.SocketStream) -> None:
        connection = (frame.channel, frame.direction)
        place = (*connection, self._numbers[connection])
        self._numbers[connection] += 1
        self._seen.append(frame)
        for crossed in [other for other in self._crossing[frame.direction] if other.channel != frame.channel]:
            self._crossing[frame.direction].remove(crossed)
            await target.send_all(crossed.data)
        fault = self._faults.get(place)
        if frame.kind is not None and frame.kind in self._faults:
            fault = self._faults.pop(frame.kind)
        if fault is not None:
            self.done[fault] += 1
        match fault:
            case None:
                await super()._pass(link, frame, target)
            case Action():
                await self._harm(fault, link, frame, target)
            case Trick.REPLAY:
                await target.send_all(self._earlier(frame).data)
                await super()._pass(link, frame, target)
            case Trick.CROSS:
                self._crossing[frame.direction].append(frame)
            case Trick.STRANGER:
                await self._introduce_stranger()
                await super()._pass(link, frame, target)

    def _earlier(self, frame: Frame) -> Frame:
        """Something that the same direction has carried before, often enough by another channel or migration."""
        return self._rng.choice([other for other in self._seen if other.direction is frame.direction])

    async def _introduce_stranger(self) -> None:
        """He begins as a connection does, and goes on with whatever he heard; then he hangs up."""
        heard = [other for other in self._seen if other.direction is Direction.FORWARD]
        if not heard:
            return
        firsts = [other for other in heard if other.end == len(other.data)]
        try:
            async with await trio.open_tcp_stream(*self._address) as stream:
                await stream.send_all(self._rng.choice(firsts).data)
                for _ in range(_STRANGERS_FRAMES):
                    await stream.send_all(self._rng.choice(heard).data)
        except (OSError, trio.BrokenResourceError):
            return
