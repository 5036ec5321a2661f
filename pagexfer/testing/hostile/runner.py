"""Running schedules: one, thousands, and the shortest one that still fails."""

from __future__ import annotations

import mmap
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from .attacks import attack
from .honest import give_up, migrate
from .ledger import CipherLedger
from .schedule import Act, as_python, make_schedule
from .shrink import shrink
from .violation import Violation
from .world import ARENA_BYTES, World

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .schedule import Schedule


@dataclass
class Report:
    """Counts over all schedules of a run.

    `tally` has the steps that found something to act on under their act's name, "commands", "refused CODE",
    "source STATE" and "destination STATE" for each time a side came there, "migrations completed", "audits completed", and
    "pages that an audit caught".
    """

    schedules: int = 0
    tally: Counter[str] = field(default_factory=Counter)
    seals: int = 0


class HostileHost:
    """Runs schedules one after the other, with one ledger of keys and nonces over all of them."""

    def __init__(self) -> None:
        self._ledger = CipherLedger()
        self._arena = mmap.mmap(-1, ARENA_BYTES)
        self.report = Report()

    def run(self, schedule: Schedule) -> None:
        """Raises Violation where the contract does not hold at any step."""
        with self._ledger.installed(self._arena):
            world = World(schedule, self._ledger, self._arena)
            try:
                _run(world)
            finally:
                self.report.schedules += 1
                self.report.tally += world.tally
                self.report.seals = self._ledger.seals_counted
                self._ledger.forget_owners()
                world.close()

    def run_seeds(self, seeds: Iterable[int]) -> Report:
        """Run the schedule of each seed. Raises Violation with the seed and the shortest schedule that still fails."""
        for seed in seeds:
            schedule = make_schedule(seed)
            try:
                self.run(schedule)
            except Violation as violation:
                shortest = shrink(schedule, partial(fails_alike, violation=violation))
                what = f"{violation.what}; seed {seed}, shortest schedule:\n{as_python(shortest)}"
                raise Violation(violation.rule, what) from violation
        return self.report


def fails_alike(schedule: Schedule, violation: Violation) -> bool:
    """Whether a schedule, run by itself, breaks the same property."""
    try:
        HostileHost().run(schedule)
    except Violation as other:
        return (other.rule, other.what) == (violation.rule, violation.what)
    return False


def _run(world: World) -> None:
    script = migrate(world)
    next(script)
    for step in world.schedule.steps:
        match step.act:
            case Act.HONEST:
                script.send(step.x)
                acted = True
            case Act.WRITE:
                acted = world.guest.write(step.x, step.y, step.z)
            case Act.PAGE_STATE:
                acted = world.guest.change_state(step.x, step.y, step.z)
            case Act.GIVE_UP:
                for _ in give_up(world):
                    pass
                acted = world.begin_anew()
                if acted:
                    script = migrate(world)
                    next(script)
            case _:
                world.waiting.append(step)
                acted = False
        world.tally[step.act.value] += acted
        world.step_ended()
        for attempt in list(world.waiting):
            # What has nothing to attack yet waits for it.
            if attack(world, attempt):
                world.tally[attempt.act.value] += 1
                world.waiting.remove(attempt)
    world.let_go()
