"""The source engine's side of steering: what was measured, what is decided, and what holds meanwhile.

One `Course` belongs to one migration. It reads the operator's parameters each time it decides, tells the decision's pure
functions (`convergence`) what was measured, and does what they say: throttle, pause, or end.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import trio

from ..errors import ChannelClosed, Outcome, TransferAborted
from ..wire.constants import PAGE_SIZE
from .convergence import Costs, Decision, EpochSample, Pressure, Verdict, decide, hold, press
from .failure import hypervisor_call
from .hypervisor import ThrottlingHypervisor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .channel import SourceChannel
    from .hypervisor import Hypervisor
    from .progress import Progress
    from .steering import MigrationParameters, Steering

# A pause sends an epoch so often: the destination sees that the source lives, and what is left to send stays little.
PAUSE_EPOCH_S: Final = 1.0
# What a paced channel may still have to send when its last bundle is taken by the kernel.
_BACKLOG_BYTES: Final = 1 << 21


class Course:
    """Decisions of one migration. `stall_timeout_s` is the patience with the destination."""

    def __init__(
        self,
        steering: Steering,
        hypervisor: Hypervisor,
        progress: Progress,
        stall_timeout_s: float,
        *,
        compressed: bool,
    ) -> None:
        self._compressed = compressed
        self._steering = steering
        self._throttling = hypervisor if isinstance(hypervisor, ThrottlingHypervisor) else None
        self._progress = progress
        self._stall_timeout_s = stall_timeout_s
        self._samples: list[EpochSample] = []
        self._pressure = Pressure(0, steering.parameters.downtime_limit_s)
        self._pausing = False
        self._shrunk = 1.0
        self._data_pages = 0
        self._throttle = 0
        self._precopy = trio.CancelScope()
        self._precopy_began = math.inf
        self._steps: list[tuple[float, str]] = []  # of black-out: when each began

    # What was measured

    def finished(self, pending_pages: int, began_s: float, sent_bytes: int) -> None:
        """An epoch ended just now."""
        if self._samples:
            self._progress.dirty_pages_rate = pending_pages / max(began_s - self._samples[-1].began_s, 1e-6)
        seconds = trio.current_time() - began_s
        data_pages = self._progress.data_pages - self._data_pages
        self._data_pages += data_pages
        if self._compressed and data_pages:
            self._shrunk = min(sent_bytes / (data_pages * PAGE_SIZE), 1.0)
        self._samples.append(
            EpochSample(pending_pages, began_s, sent_bytes, seconds, self._pressure, self._shrunk)
        )

    # What is decided

    @contextmanager
    def precopy(self) -> Iterator[None]:
        """Around pre-copy. Raises TransferAborted where it lasts longer than the operator allows."""
        self._precopy_began = trio.current_time()
        self._set_deadline()
        with self._precopy:
            yield
        if self._precopy.cancelled_caught:
            timeout_s = self._steering.parameters.timeout_s or 0.0
            raise TransferAborted(
                Outcome.ENDED, "timeout", f"pre-copy did not end within the timeout of {timeout_s:g} s"
            )

    async def decide(self, pending_pages: int, costs: Costs) -> Decision:
        """Whether to transfer what is pending, or to switch over. Raises TransferAborted where neither helps.

        Comes back late where the operator wants a pause, and then with one epoch more.
        """
        parameters, can_throttle = self._steering.parameters, self._throttling is not None
        self._pressure = hold(self._samples, parameters, can_throttle=can_throttle)
        verdict = self._judge(pending_pages, parameters, costs)
        # Only a guest that needs one epoch more is pressed, and nothing is concluded from epochs between which it had a
        # pause to write in.
        if verdict.decision is not Decision.SWITCHOVER and not self._pausing:
            self._pressure = press(self._samples, pending_pages, parameters, can_throttle=can_throttle)
            verdict = self._judge(pending_pages, parameters, costs)
        await self._set_throttle(self._pressure.throttle)
        known = math.isfinite(verdict.expected_downtime_s)
        self._progress.expected_downtime_s = verdict.expected_downtime_s if known else None
        self._progress.downtime_limit_s = self._pressure.downtime_limit_s
        if verdict.decision is Decision.GIVE_UP:
            raise TransferAborted(Outcome.ENDED, "not-converging", verdict.reason)
        converged = self._pausing or verdict.decision is Decision.SWITCHOVER
        if converged and parameters.pause_before_switchover:
            await self._pause()
            return Decision.TRANSFER
        self._pausing = False
        self._progress.wait(waiting=False)
        self._steering.waits(paused=False)
        return verdict.decision

    def _judge(self, pending_pages: int, parameters: MigrationParameters, costs: Costs) -> Verdict:
        return decide(
            self._samples,
            pending_pages,
            trio.current_time(),
            self._pressure,
            parameters,
            costs,
            can_throttle=self._throttling is not None,
        )

    @contextmanager
    def blackout(self) -> Iterator[None]:
        """Around black-out. Raises TransferAborted where it lasts longer than limit and stall timeout together.

        Timeouts of single waits are not enough: a peer that takes a byte now and then would keep the guest parked. Whose
        fault it is says the step that took longest: this side's hypervisor may be slow, or the destination.
        """
        self.step("parking the vCPUs")
        longest_s = self._pressure.downtime_limit_s + self._stall_timeout_s
        with trio.move_on_after(longest_s) as scope:
            yield
        if scope.cancelled_caught:
            raise TransferAborted(
                Outcome.ENDED,
                "timeout",
                f"black-out did not end within {longest_s:g} s: {self._longest_step()}",
            )

    def step(self, what: str) -> None:
        """In black-out, `what` begins now."""
        self._steps.append((trio.current_time(), what))

    def _longest_step(self) -> str:
        ends = [*(began for began, _ in self._steps[1:]), trio.current_time()]
        lengths = [(end - began, what) for (began, what), end in zip(self._steps, ends, strict=True)]
        seconds, what = max(lengths)
        return f"{what} took {seconds:.1f} s"

    # What holds meanwhile

    async def follow(self, channels: Sequence[SourceChannel]) -> None:
        """Have what the operator changes take effect on `channels` and deadlines, for ever."""
        while True:
            self.pace(channels)
            self._set_deadline()
            await self._steering.wait_changed()

    def pace(self, channels: Sequence[SourceChannel]) -> None:
        """Give every channel its share of the bandwidth."""
        limit = self._steering.parameters.max_bandwidth_bytes
        for channel in channels:
            try:
                channel.connection.pace(None if limit is None else max(limit // len(channels), 1))
            except ChannelClosed:
                continue  # it ends, and says so elsewhere

    def close_timeout_s(self, channels: Sequence[SourceChannel]) -> float:
        """How long the destination may take to close an epoch: what the kernel still has takes its time at our pace."""
        limit = self._steering.parameters.max_bandwidth_bytes
        backlog_s = 0.0 if limit is None else len(channels) * _BACKLOG_BYTES / limit
        return self._stall_timeout_s + backlog_s

    async def lift_throttle(self) -> None:
        """Let the vCPUs run at full speed again."""
        await self._set_throttle(0)

    async def _set_throttle(self, percentage: int) -> None:
        if self._throttling is None or percentage == self._throttle:
            return
        self._throttle = max(
            self._throttle, percentage
        )  # a call that fails may have slowed it down all the same
        with hypervisor_call("throttle the guest"):
            await self._throttling.throttle(percentage)
        self._throttle = percentage
        self._progress.throttle(percentage, trio.current_time())

    async def _pause(self) -> None:
        self._pausing = True
        # However long the operator takes, the guest is not slowed down for it.
        self._pressure = replace(self._pressure, throttle=0)
        await self.lift_throttle()
        self._progress.wait(waiting=True)
        # However long it takes says nothing about convergence.
        del self._samples[:-1]
        await self._steering.pause(min(PAUSE_EPOCH_S, self._stall_timeout_s))

    def _set_deadline(self) -> None:
        timeout_s = self._steering.parameters.timeout_s
        self._precopy.deadline = math.inf if timeout_s is None else self._precopy_began + timeout_s
