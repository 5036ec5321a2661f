"""What a hostile host does, as data: a schedule is a short list of immutable steps that a seed makes.

A step is one act and a few integers, which are taken modulo whatever is there when the step is done. So every step means
something in every state, and a schedule with steps left out is still a schedule: that is what makes it shrink.
"""

from __future__ import annotations

import enum
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence

_T = TypeVar("_T")

_INTEGERS: Final = 1 << 16
# Of schedules, those in which an export takes long, where not all have one: an audit has the most to fear from it.
_HOLDS: Final = 0.5


class Act(enum.Enum):
    """What a step does. Values are the names in reports."""

    # What is no attack: the host does the next right thing, and the guest lives.
    HONEST = "honest"
    WRITE = "guest writes"
    PAGE_STATE = "guest changes a page state"
    # The network: messages on their way, and all that were ever seen.
    DROP = "drop"
    DUPLICATE = "duplicate"
    DELAY = "delay"
    REORDER = "reorder"
    FLIP = "flip"
    TRUNCATE = "truncate"
    SPLICE = "splice"
    CROSS_CHANNEL = "cross channel"
    CROSS_SESSION = "cross session"
    REFLECT = "reflect"
    REPLAY = "replay"
    REPLAY_EPOCH = "replay old epoch"
    WITHHOLD = "withhold a channel at the barrier"
    ALTER = (
        "alter under its key"  # the one thing that the attacker cannot do: an authentic source that is wrong
    )
    STRANGER = "stranger opens a channel"
    LOSE = "lose a connection and replace it"
    HANDSHAKE = "tamper with the handshake"
    # Commands to the SVSMs.
    COMMAND = "command out of order"
    REGISTERS = "registers at random"
    EARLY_TOKEN = "token too early"
    DEVICE_PART = "device state out of order"
    HIDE_DIRTY = "hide dirty bits"
    FALSE_HINT = "invent dirty bits"
    SKIP_COMPARISON = "skip the audit or the last epoch"
    SLOW_PARK = "vCPU slow to park"
    LIE_PARKED = "lie about parked vCPUs"
    ABORT_SOURCE = "abort the source"
    ABORT_DESTINATION = "abort the destination"
    FINISH = "finish too early"
    HOLD = "an export takes long"
    # Sessions and machines.
    GIVE_UP = "give up and begin anew"
    SECOND_DESTINATION = "two destinations"
    RERUN_SOURCE = "second session of one guest"
    RERUN_SESSION = "re-run a session into a new destination"
    CRASH_SOURCE = "crash of the source"
    CRASH_DESTINATION = "crash of the destination"


class Tracking(enum.Enum):
    """Who tells a source's SVSM which pages were written."""

    SVSM = "svsm"  # a tracker of its own
    HOST = "host"  # the host's dirty log alone: a page that it hides goes unnoticed
    AUDIT = "audit"  # the host's dirty log, and the SVSM's audit after the park
    COMPARISON = "comparison"  # a tracker that compares RAM with what was sent

    @property
    def compares(self) -> bool:
        """Whether RAM itself is compared with what was sent, once the vCPUs are parked (R13)."""
        return self in (Tracking.AUDIT, Tracking.COMPARISON)


GUEST_ACTS: Final = (Act.WRITE, Act.PAGE_STATE)
ATTACKS: Final = tuple(act for act in Act if act not in (Act.HONEST, *GUEST_ACTS))

# How likely an attack is, where it is not 1: what ends the whole schedule comes less often, so that most come far.
_WEIGHTS: Final = {
    Act.ALTER: 4.0,
    Act.REPLAY: 2.0,
    Act.COMMAND: 2.0,
    Act.EARLY_TOKEN: 2.0,
    Act.DEVICE_PART: 1.5,
    Act.LIE_PARKED: 2.0,
    Act.LOSE: 3.0,
    Act.ABORT_SOURCE: 0.5,
    Act.ABORT_DESTINATION: 0.7,
    Act.CRASH_SOURCE: 0.4,
    Act.CRASH_DESTINATION: 0.7,
}
# Whether there is one in a schedule is decided by itself.
_DRAWN: Final = tuple(attack for attack in ATTACKS if attack is not Act.HOLD)
_ATTACK_WEIGHTS: Final = [_WEIGHTS.get(attack, 1.0) for attack in _DRAWN]


@dataclass(frozen=True, slots=True)
class Step:
    """One step; what `x`, `y` and `z` mean is the act's business (`attacks`, `runner`)."""

    act: Act
    x: int = 0
    y: int = 0
    z: int = 0

    def __repr__(self) -> str:
        numbers = [self.x, self.y, self.z]
        while numbers and not numbers[-1]:
            numbers.pop()
        return f"Step(Act.{self.act.name}{''.join(f', {number}' for number in numbers)})"


@dataclass(frozen=True, slots=True)
class Schedule:
    """A guest of `pages` and `vcpus`, moved over `channels` channels, and everything that happens to it.

    With `tracking` by the host alone a hidden dirty page goes unnoticed, so no seed makes that.
    """

    steps: tuple[Step, ...]
    pages: int = 8
    vcpus: int = 1
    channels: int = 1
    tracking: Tracking = Tracking.SVSM


def pick(choices: Sequence[_T], number: int) -> _T:
    """The choice that a step's integer means."""
    return choices[number % len(choices)]


def make_schedule(seed: int) -> Schedule:
    """The schedule of a seed: a migration or two, done right but for a few attacks."""
    rng = random.Random(seed)
    pages = rng.choice((8, 8, 12, 16, 16, 24, 40, 64))
    honest = rng.randint(20, 90)
    steps = [Step(Act.HONEST, rng.randrange(_INTEGERS)) for _ in range(honest)]
    for _ in range(rng.randint(4, 14)):
        _insert(rng, steps, rng.choices(GUEST_ACTS, (4, 1))[0])
    for _ in range(rng.choices((0, 1, 2, 3, 5, 8), (1, 4, 4, 4, 3, 2))[0]):
        _insert(rng, steps, rng.choices(_DRAWN, _ATTACK_WEIGHTS)[0])
    tracking = rng.choices((Tracking.SVSM, Tracking.AUDIT, Tracking.COMPARISON), (2, 1, 1))[0]
    vcpus, channels = rng.randint(1, 2), rng.randint(1, 3)
    if rng.random() < _HOLDS or tracking is Tracking.AUDIT:
        _insert(rng, steps, Act.HOLD)
    return Schedule(tuple(steps), pages, vcpus, channels, tracking)


def _insert(rng: random.Random, steps: list[Step], act: Act) -> None:
    numbers = [rng.randrange(_INTEGERS) for _ in range(3)]
    steps.insert(rng.randrange(len(steps) + 1), Step(act, *numbers))


def as_python(schedule: Schedule) -> str:
    """The schedule as an expression; equal steps in a row as one with a factor."""
    parts: list[str] = []
    index = 0
    while index < len(schedule.steps):
        step = schedule.steps[index]
        end = index
        while end < len(schedule.steps) and schedule.steps[end] == step:
            end += 1
        count = end - index
        parts.append(f"    {step!r}," if count == 1 else f"    *[{step!r}] * {count},")
        index = end
    tail = "" if schedule.tracking is Tracking.SVSM else f", tracking=Tracking.{schedule.tracking.name}"
    return "\n".join(
        [
            "Schedule((",
            *parts,
            f"), pages={schedule.pages}, vcpus={schedule.vcpus}, channels={schedule.channels}{tail})",
        ]
    )
