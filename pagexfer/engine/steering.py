"""Steering of a running migration: what its operator may change, and end, while it runs.

Whoever starts a migration makes the `Steering`, passes it on, and changes it from any task of the same trio program. The
engine looks at it where it decides, and never keeps a copy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

import trio

from ..errors import UsageError

DOWNTIME_LIMIT_S: Final = 0.3
MAX_LIMIT_S: Final = 2000.0
# Below that a channel's share would not carry a part of a bundle within a stall timeout.
MIN_BANDWIDTH_BYTES: Final = 1 << 20
MAX_BANDWIDTH_BYTES: Final = 1 << 50


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationParameters:
    """What an operator may choose and change; the names are QEMU's where it has the parameter.

    `downtime_limit_s` is the longest black-out that is aimed at. Where pre-copy does not converge the engine may raise it
    step by step up to `max_downtime_limit_s`, and slow the vCPUs down with `auto_converge`. `max_bandwidth_bytes` a second
    is for all channels together, black-out included. Pre-copy, pauses included, may last `timeout_s`. With
    `pause_before_switchover` the engine goes on with pre-copy until `Steering.continue_switchover`. None is no limit.

    Raises UsageError for what cannot be.
    """

    downtime_limit_s: float = DOWNTIME_LIMIT_S
    max_downtime_limit_s: float | None = None
    max_bandwidth_bytes: int | None = None
    timeout_s: float | None = None
    auto_converge: bool = False
    pause_before_switchover: bool = False

    def __post_init__(self) -> None:
        _check_limit("downtime limit", self.downtime_limit_s)
        if self.max_downtime_limit_s is not None:
            _check_limit("maximal downtime limit", self.max_downtime_limit_s)
            if self.max_downtime_limit_s < self.downtime_limit_s:
                raise UsageError(
                    f"the maximal downtime limit of {self.max_downtime_limit_s:g} s is below the downtime limit of "
                    f"{self.downtime_limit_s:g} s"
                )
        if self.max_bandwidth_bytes is not None and not (
            MIN_BANDWIDTH_BYTES <= self.max_bandwidth_bytes <= MAX_BANDWIDTH_BYTES
        ):
            raise UsageError(
                f"a bandwidth limit is 1 MiB/s to 1 PiB/s, not {self.max_bandwidth_bytes} bytes a second"
            )
        if self.timeout_s is not None and not 0 < self.timeout_s < math.inf:
            raise UsageError(f"a timeout is above 0 s and finite, not {self.timeout_s:g} s")


class Steering:
    """An operator's hand on one migration. Not for a second one."""

    def __init__(self, parameters: MigrationParameters | None = None) -> None:
        self._parameters = parameters or MigrationParameters()
        self._changed = trio.Event()
        self._cancelled = trio.Event()
        self._paused = False
        self._engaged = False

    @property
    def parameters(self) -> MigrationParameters:
        """What holds now. Assigning other parameters takes effect at once, `dataclasses.replace` helps with it."""
        return self._parameters

    @parameters.setter
    def parameters(self, parameters: MigrationParameters) -> None:
        self._parameters = parameters
        self._changed.set()
        self._changed = trio.Event()

    @property
    def paused(self) -> bool:
        """Whether the migration waits for `continue_switchover`."""
        return self._paused

    def continue_switchover(self) -> None:
        """End a pause: after one more epoch the guest may be parked, and no pause comes any more.

        Raises UsageError where the migration does not wait.
        """
        if not self._paused:
            raise UsageError("the migration does not wait before its switchover")
        self._paused = False
        self.parameters = replace(self._parameters, pause_before_switchover=False)

    def cancel(self) -> None:
        """End the migration. Before the start token the guest goes on at the source, after it this has no effect."""
        self._cancelled.set()

    # The engine's side

    def engage(self) -> None:
        """From here on it steers one migration. Raises UsageError where it has steered one: it may be cancelled already."""
        if self._engaged:
            raise UsageError("this steering was another migration's: make one for each")
        self._engaged = True

    async def wait_changed(self) -> None:
        """Until other parameters are assigned."""
        await self._changed.wait()

    async def wait_cancelled(self) -> None:
        """Until `cancel` is called."""
        await self._cancelled.wait()

    async def pause(self, at_most_s: float) -> None:
        """Wait until the migration need not pause any more, or for `at_most_s`."""
        self._paused = True
        with trio.move_on_after(at_most_s):
            while self._parameters.pause_before_switchover:
                await self._changed.wait()
        self._paused = self._parameters.pause_before_switchover

    def waits(self, *, paused: bool) -> None:
        """Say whether the migration waits before its switchover."""
        self._paused = paused


def _check_limit(what: str, seconds: float) -> None:
    if not 0 < seconds < MAX_LIMIT_S:
        raise UsageError(f"a {what} is above 0 and below {MAX_LIMIT_S:g} s, not {seconds:g} s")
