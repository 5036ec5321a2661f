"""From a long failing schedule to a short one: delta debugging (Zeller, Hildebrandt 2002), then smaller numbers."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from .schedule import Tracking

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .schedule import Schedule, Step


def shrink(schedule: Schedule, fails: Callable[[Schedule], bool]) -> Schedule:
    """A schedule that still `fails` and from which no single step can be left out; `schedule` itself fails."""
    schedule = _fewer_steps(schedule, fails)
    for simpler in _simpler(schedule):
        candidate = simpler(schedule)
        if candidate != schedule and fails(candidate):
            schedule = candidate
    return _fewer_steps(schedule, fails)


def _fewer_steps(schedule: Schedule, fails: Callable[[Schedule], bool]) -> Schedule:
    steps = schedule.steps
    size = max(1, len(steps) // 2)
    while True:
        start, left_out = 0, False
        while start < len(steps):
            candidate = steps[:start] + steps[start + size :]
            if fails(replace(schedule, steps=candidate)):
                steps, left_out = candidate, True
            else:
                start += size
        if size == 1 and not left_out:
            return replace(schedule, steps=steps)
        size = max(1, size // 2)


def _simpler(schedule: Schedule) -> Iterator[Callable[[Schedule], Schedule]]:
    """Smaller guests first, then every number of every step as zero."""
    for pages in (1, 2, 4, 8):
        yield partial(_with_pages, pages=pages)
    yield lambda s: replace(s, vcpus=1)
    yield lambda s: replace(s, channels=1)
    yield lambda s: replace(s, tracking=Tracking.SVSM)
    yield lambda s: replace(s, steps=tuple(replace(step, x=0, y=0, z=0) for step in s.steps))
    for index in range(len(schedule.steps)):
        for zeroed in (_without_x, _without_y, _without_z):
            yield partial(_with_step, index=index, change=zeroed)


def _with_step(schedule: Schedule, index: int, change: Callable[[Step], Step]) -> Schedule:
    steps = list(schedule.steps)
    steps[index] = change(steps[index])
    return replace(schedule, steps=tuple(steps))


def _without_x(step: Step) -> Step:
    return replace(step, x=0)


def _without_y(step: Step) -> Step:
    return replace(step, y=0)


def _without_z(step: Step) -> Step:
    return replace(step, z=0)


def _with_pages(schedule: Schedule, pages: int) -> Schedule:
    return replace(schedule, pages=min(pages, schedule.pages))
