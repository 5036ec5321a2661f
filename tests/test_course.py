"""What an engine's course does with measured epochs: throttle, pause, and neither more than is needed."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from pagexfer import MigrationParameters, Status, Steering, TransferAborted
from pagexfer.engine.convergence import THROTTLE_INITIAL, Costs, Decision
from pagexfer.engine.course import Course
from pagexfer.engine.progress import Progress
from pagexfer.errors import GuestError
from pagexfer.wire.constants import PAGE_SIZE

from .engine_guests import TestHypervisor

_PAGES = 100_000
_LIMIT_S = 1.0
_RATE = 1 << 30
_MANY = 2 * int(_LIMIT_S * _RATE / PAGE_SIZE)
_FEW = 100


class _Throttled(TestHypervisor):
    def __init__(self) -> None:
        super().__init__()
        self.throttles: list[int] = []

    async def throttle(self, percentage: int) -> None:
        await trio.lowlevel.checkpoint()
        self.throttles.append(percentage)


class _Case:
    """A course, and epochs that it is told of."""

    def __init__(self, **parameters: bool) -> None:
        self.steering = Steering(
            MigrationParameters(downtime_limit_s=_LIMIT_S, auto_converge=True, **parameters)
        )
        self.hypervisor = _Throttled()
        self.progress = Progress(_PAGES * PAGE_SIZE, trio.current_time())
        self.course = Course(self.steering, self.hypervisor, self.progress, 5.0, compressed=False)

    async def epoch(self, pending_pages: int) -> Decision:
        """Decide over so many pages, then send them at `_RATE`."""
        decision = await self.course.decide(pending_pages, Costs())
        sent_bytes = pending_pages * PAGE_SIZE
        self.course.finished(pending_pages, trio.current_time() - sent_bytes / _RATE, sent_bytes)
        return decision


async def test_a_guest_that_can_be_parked_now_is_not_slowed_down() -> None:
    case = _Case()
    for _ in range(2):
        assert case.progress.expected_downtime_s is None or case.progress.expected_downtime_s > _LIMIT_S
        assert await case.epoch(_MANY) is Decision.TRANSFER
    # As many again: one step. Then so few that it could be parked, though they are all that it had.
    assert await case.epoch(_MANY) is Decision.TRANSFER
    assert case.hypervisor.throttles == [THROTTLE_INITIAL]
    for _ in range(4):
        assert await case.epoch(_FEW) is Decision.SWITCHOVER
    assert case.hypervisor.throttles == [THROTTLE_INITIAL]


async def test_a_pause_lifts_the_throttle_and_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagexfer.engine.course.PAUSE_EPOCH_S", 0.001)
    case = _Case(pause_before_switchover=True)
    for _ in range(3):
        await case.epoch(_MANY)
    assert case.hypervisor.throttles == [THROTTLE_INITIAL]
    await case.epoch(_FEW)
    assert case.hypervisor.throttles == [THROTTLE_INITIAL, 0]
    # At full speed it writes more than could be sent in time. It waits all the same, and is not slowed down.
    for _ in range(6):
        assert await case.epoch(_MANY) is Decision.TRANSFER
        assert case.steering.paused
        assert case.progress.status is Status.PRE_SWITCHOVER
    assert case.hypervisor.throttles == [THROTTLE_INITIAL, 0]
    case.steering.continue_switchover()
    # What was written in the pause says nothing. What is written from now on does.
    await case.epoch(_MANY)
    assert case.progress.status is Status.ACTIVE
    assert case.hypervisor.throttles == [THROTTLE_INITIAL, 0]
    await case.epoch(_MANY)
    assert case.hypervisor.throttles == [THROTTLE_INITIAL, 0, THROTTLE_INITIAL]
    assert await case.epoch(_FEW) is Decision.SWITCHOVER


async def test_a_throttle_that_failed_is_lifted() -> None:
    """It may have slowed the guest down before it failed."""
    case = _Case()
    throttle = case.hypervisor.throttle

    async def fail(percentage: int) -> None:
        await throttle(percentage)
        raise GuestError("the monitor said no")

    case.hypervisor.throttle = fail  # type: ignore[method-assign]
    for _ in range(2):
        await case.epoch(_MANY)
    with pytest.raises(GuestError):
        await case.epoch(_MANY)
    case.hypervisor.throttle = throttle  # type: ignore[method-assign]
    await case.course.lift_throttle()
    assert case.hypervisor.throttles == [THROTTLE_INITIAL, 0]
    await case.course.lift_throttle()
    assert case.hypervisor.throttles == [THROTTLE_INITIAL, 0]


def test_a_black_out_that_is_too_long_names_the_longest_step() -> None:
    """And not the one that it ended in: what held it up may have held up the event loop as well."""
    clock = trio.testing.MockClock(autojump_threshold=0)

    async def run() -> None:
        case = _Case()
        with case.course.blackout():
            case.course.step("stopping the guest")
            clock.jump(4)
            case.course.step("waiting for the destination")
            await trio.sleep_forever()

    with pytest.raises(TransferAborted) as aborted:
        trio.run(run, clock=clock)
    assert str(aborted.value) == "black-out did not end within 6 s: stopping the guest took 4.0 s"
