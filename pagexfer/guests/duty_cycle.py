"""How a vCPU is slowed down: slices in which it may run, and between them time in which it may not. Pure: time comes in.

The slice is QEMU's. What is kept from a vCPU is in proportion to what it had, so that work that overruns its slice pays
for it. The vCPU's own pace goes by a clock that stands still meanwhile: otherwise a guest that is not busy all the time
would catch up what it was kept from, and a percentage would mean nothing.
"""

from __future__ import annotations

from typing import Final

from ..errors import GuestError

SLICE_S: Final = 0.01
MAX_PERCENTAGE: Final = 99
# A vCPU that stood still for other reasons does not pay for that time.
_MAX_SLICE_S: Final = 2 * SLICE_S


class DutyCycle:
    """The slices of one vCPU."""

    def __init__(self) -> None:
        self._slice_at: float | None = None  # when the slice began, or will begin
        self._held_s = 0.0

    def held_s(self, now: float, percentage: int) -> float:
        """Seconds from `now` for which the vCPU must not run; 0 where it may."""
        if not percentage:
            if self._slice_at is not None:
                self._held_s -= max(self._slice_at - now, 0.0)
            self._slice_at = None
            return 0.0
        if self._slice_at is None:
            self._slice_at = now
        had_s = now - self._slice_at
        if had_s < 0:
            return -had_s
        if had_s < SLICE_S:
            return 0.0
        held_s = min(had_s, _MAX_SLICE_S) * percentage / (100 - percentage)
        self._slice_at = now + held_s
        self._held_s += held_s
        return held_s

    def guest_time(self, now: float) -> float:
        """Time without what the vCPU was kept from."""
        return now - self._held_s


def check_percentage(percentage: int) -> None:
    """Raises GuestError where a vCPU cannot be slowed down by so much."""
    if not 0 <= percentage <= MAX_PERCENTAGE:
        raise GuestError(f"a throttle is 0 to {MAX_PERCENTAGE} per cent, not {percentage}")
