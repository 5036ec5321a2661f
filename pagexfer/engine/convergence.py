"""When to stop pre-copying, and how to press a guest that writes too much: pure functions over what was measured.

After each epoch the guest has written some pages again. Either what is pending can be sent within the downtime limit, then
the guest is parked; or another epoch makes it less; or it does not get less any more. Then, as far as the operator allows
it, the vCPUs are slowed down or the downtime limit is raised, step by step; and where nothing is left to do, the migration
ends, as more epochs would only wear the link. Every verdict says its reason, for people.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ..wire.constants import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .steering import MigrationParameters

# What black-out costs beside sending pages and round trips: parking, vCPU and device state, manifest, release of vCPUs.
# Eight milliseconds are what two processes on one machine take for it.
FIXED_DOWNTIME_S: Final = 0.008
# Answers that black-out waits for beside that to its epoch: READY and RUNNING.
ROUND_TRIPS: Final = 2
# Sending is judged by the last epochs; the newest tell most about the black-out to come.
MEASURED_EPOCHS: Final = 4
# A line through epochs of about one size would be drawn by chance.
_UNLIKE: Final = 2.0
# And through two it always can be: one of them that was disturbed would put it anywhere.
_LINE_EPOCHS: Final = 3
# Pre-copy is stalled when this many epochs and this much time went by without a new low of pending pages, where a low
# counts only if it is a clear one.
STALL_EPOCHS: Final = 8
STALL_S: Final = 2.0
CLEAR_GAIN: Final = 0.95
# The throttle, with the values and the rule that QEMU has: one step when in each of two epochs the guest wrote more than
# half as much as was sent.
THROTTLE_INITIAL: Final = 20
THROTTLE_STEP: Final = 10
THROTTLE_MAX: Final = 99
THROTTLE_EPOCHS: Final = 2
THROTTLE_SHARE: Final = 0.5
# The downtime limit is raised by half when so many epochs brought no new low.
RAMP_EPOCHS: Final = 2
RAMP_FACTOR: Final = 1.5


class Decision(enum.Enum):
    """What to do with the pages that are pending now."""

    TRANSFER = "transfer"
    SWITCHOVER = "switchover"
    GIVE_UP = "give up"


@dataclass(frozen=True, slots=True)
class Pressure:
    """What helps a guest to converge: the percentage of time that its vCPUs are kept from running, and the limit."""

    throttle: int
    downtime_limit_s: float


@dataclass(frozen=True, slots=True)
class EpochSample:
    """One epoch: pages pending when it began, when that was, what it took to send them, and the pressure meanwhile.

    `shrunk` is how many bytes were sent for each byte of pages with content: below 1 only where they are compressed. The
    pages of the next epoch are taken to shrink as those of the last one did.
    """

    pending_pages: int
    began_s: float
    sent_bytes: int
    seconds: float
    pressure: Pressure
    shrunk: float = 1.0


@dataclass(frozen=True, slots=True)
class Costs:
    """What black-out is expected to cost beside sending pages: hashing all of RAM, a round trip, a look for changes."""

    audit_s: float = 0.0
    round_trip_s: float = 0.0
    look_s: float = 0.0

    @property
    def fixed_s(self) -> float:
        return FIXED_DOWNTIME_S + ROUND_TRIPS * self.round_trip_s + self.audit_s + self.look_s


@dataclass(frozen=True, slots=True)
class Verdict:
    """A decision, the downtime to expect if the guest were parked now, and why."""

    decision: Decision
    expected_downtime_s: float
    reason: str


def bandwidth(samples: Sequence[EpochSample]) -> float:
    """Bytes per second over the last epochs; 0 where nothing was sent yet."""
    recent = samples[-MEASURED_EPOCHS:]
    seconds = sum(sample.seconds for sample in recent)
    return sum(sample.sent_bytes for sample in recent) / seconds if seconds > 0 else 0.0


def sending_s(samples: Sequence[EpochSample], pending_bytes: int, max_bandwidth_bytes: int | None) -> float:
    """Seconds that one more epoch of pages of `pending_bytes` is expected to take.

    An epoch takes a fixed time and a time by byte; where the last epochs differ enough in size, they tell both.
    """
    if not pending_bytes:
        return 0.0
    recent = [sample for sample in samples[-MEASURED_EPOCHS:] if sample.sent_bytes]
    if not recent:
        return math.inf
    fixed_s, per_byte_s = _line([(sample.sent_bytes, sample.seconds) for sample in recent])
    if max_bandwidth_bytes is not None:
        per_byte_s = max(per_byte_s, 1 / max_bandwidth_bytes)
    return fixed_s + pending_bytes * recent[-1].shrunk * per_byte_s


def hold(samples: Sequence[EpochSample], parameters: MigrationParameters, *, can_throttle: bool) -> Pressure:
    """The pressure of the last epoch, as far as the operator allows it now."""
    last = samples[-1].pressure if samples else Pressure(0, parameters.downtime_limit_s)
    limit_s = min(max(last.downtime_limit_s, parameters.downtime_limit_s), _ceiling_s(parameters))
    return Pressure(last.throttle if parameters.auto_converge and can_throttle else 0, limit_s)


def press(
    samples: Sequence[EpochSample],
    pending_pages: int,
    parameters: MigrationParameters,
    *,
    can_throttle: bool,
) -> Pressure:
    """The pressure for one epoch more: that of the last one, or one step above it.

    Slowing the guest down goes first, as the black-out is what its users notice.
    """
    held = hold(samples, parameters, can_throttle=can_throttle)
    if parameters.auto_converge and can_throttle and held.throttle < THROTTLE_MAX:
        return Pressure(_next_throttle(samples, pending_pages), held.downtime_limit_s)
    settled = _settled(samples, samples[-1].pressure) if samples else ()
    if settled and _epochs_since_low(settled, pending_pages) >= RAMP_EPOCHS:
        limit_s = min(held.downtime_limit_s * RAMP_FACTOR, _ceiling_s(parameters))
        return Pressure(held.throttle, limit_s)
    return held


def decide(
    samples: Sequence[EpochSample],
    pending_pages: int,
    now_s: float,
    pressure: Pressure,
    parameters: MigrationParameters,
    costs: Costs,
    *,
    can_throttle: bool = False,
) -> Verdict:
    """What to do next, with `pending_pages` to send, the finished epochs in `samples`, and `pressure` from now on."""
    limit_s = pressure.downtime_limit_s
    if costs.audit_s and costs.fixed_s > _ceiling_s(parameters):
        return Verdict(
            Decision.GIVE_UP,
            costs.fixed_s,
            f"the audit of all RAM in black-out takes about {costs.audit_s * 1000:.0f} ms, more than the downtime limit "
            f"of {_ceiling_s(parameters) * 1000:.0f} ms leaves. Raise the downtime limit, or migrate without the audit",
        )
    if not samples:
        return Verdict(Decision.TRANSFER, math.inf, "the first epoch sends all of RAM")
    expected = costs.fixed_s + sending_s(samples, pending_pages * PAGE_SIZE, parameters.max_bandwidth_bytes)
    if expected <= limit_s:
        return Verdict(
            Decision.SWITCHOVER,
            expected,
            f"expected downtime {expected * 1000:.0f} ms is within the limit of {limit_s * 1000:.0f} ms",
        )
    throttles_more = parameters.auto_converge and can_throttle and pressure.throttle < THROTTLE_MAX
    at_most = not throttles_more and limit_s >= _ceiling_s(parameters)
    if at_most and _stalled(_settled(samples, pressure), pending_pages, now_s):
        return Verdict(
            Decision.GIVE_UP, expected, _no_convergence(samples, pending_pages, expected, pressure)
        )
    return Verdict(Decision.TRANSFER, expected, "another epoch makes pending pages fewer")


def _line(epochs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Fixed seconds of an epoch and seconds by byte, from bytes and seconds: least squares, where that makes sense."""
    sizes = [size for size, _ in epochs]
    mean_bytes = sum(sizes) / len(epochs)
    mean_s = sum(seconds for _, seconds in epochs) / len(epochs)
    if len(epochs) >= _LINE_EPOCHS and max(sizes) >= _UNLIKE * min(sizes):
        square = sum((size - mean_bytes) ** 2 for size in sizes)
        product = sum((size - mean_bytes) * (seconds - mean_s) for size, seconds in epochs)
        fixed_s = mean_s - product / square * mean_bytes
        if product > 0 and fixed_s >= 0:
            return fixed_s, product / square
    return 0.0, mean_s / mean_bytes


def _ceiling_s(parameters: MigrationParameters) -> float:
    return max(parameters.max_downtime_limit_s or 0.0, parameters.downtime_limit_s)


def _next_throttle(samples: Sequence[EpochSample], pending_pages: int) -> int:
    if len(samples) < THROTTLE_EPOCHS:
        return samples[-1].pressure.throttle if samples else 0
    recent = samples[-THROTTLE_EPOCHS:]
    throttle = recent[-1].pressure.throttle
    written_pages = [*(sample.pending_pages for sample in recent[1:]), pending_pages]
    for sample, pages in zip(recent, written_pages, strict=True):
        settled = sample.pressure.throttle == throttle
        if not settled or pages * PAGE_SIZE * sample.shrunk <= THROTTLE_SHARE * sample.sent_bytes:
            return throttle
    return min(throttle + THROTTLE_STEP, THROTTLE_MAX) if throttle else THROTTLE_INITIAL


def _settled(samples: Sequence[EpochSample], pressure: Pressure) -> Sequence[EpochSample]:
    """The last epochs, as far as they ran under this pressure: what came before says nothing about it."""
    count = 0
    for sample in reversed(samples):
        if sample.pressure != pressure:
            break
        count += 1
    return samples[len(samples) - count :]


def _low(samples: Sequence[EpochSample], pending_pages: int, now_s: float) -> tuple[int, float]:
    """Epochs since the last clear low of pending pages, and when that was."""
    low, low_at, low_s = samples[0].pending_pages, 0, samples[0].began_s
    history = [(sample.pending_pages, sample.began_s) for sample in samples[1:]] + [(pending_pages, now_s)]
    for index, (pages, began_s) in enumerate(history, start=1):
        if pages < low * CLEAR_GAIN:
            low, low_at, low_s = pages, index, began_s
    return len(history) - low_at, low_s


def _epochs_since_low(samples: Sequence[EpochSample], pending_pages: int) -> int:
    return _low(samples, pending_pages, math.inf)[0]


def _stalled(samples: Sequence[EpochSample], pending_pages: int, now_s: float) -> bool:
    if not samples:
        return False
    epochs, low_s = _low(samples, pending_pages, now_s)
    return epochs >= STALL_EPOCHS and now_s - low_s >= STALL_S


def _no_convergence(
    samples: Sequence[EpochSample], pending_pages: int, expected_s: float, pressure: Pressure
) -> str:
    written = pending_pages * PAGE_SIZE / 2**20 / max(samples[-1].seconds, 1e-3)
    carried = bandwidth(samples) / samples[-1].shrunk
    slowed = f", slowed down by {pressure.throttle} %" if pressure.throttle else ""
    return (
        f"pre-copy does not converge: the guest writes about {written:.0f} MiB/s{slowed}, "
        f"the channels carry {carried / 2**20:.0f} MiB/s; expected downtime {expected_s * 1000:.0f} ms stays "
        f"above the limit of {pressure.downtime_limit_s * 1000:.0f} ms. Raise the downtime limit, or slow the guest down"
    )
