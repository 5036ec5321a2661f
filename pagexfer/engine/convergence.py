"""When to stop pre-copying: pure functions over what was measured.

After each epoch the guest has written some pages again. Either what is pending can be sent within the downtime limit, then
the guest is parked; or another epoch makes it less; or it does not get less any more, and more epochs would only wear
the link. Every verdict says its reason, for people.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ..wire.constants import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Sequence

# What black-out costs beside sending pages: parking, vCPU and device state, manifest, two round trips.
FIXED_DOWNTIME_S: Final = 0.005
# Bandwidth is measured over the last epochs; the newest tell most about the black-out to come.
BANDWIDTH_EPOCHS: Final = 3
# Pre-copy is stalled when this many epochs and this much time went by without a new low of pending pages, where a low
# counts only if it is a clear one.
STALL_EPOCHS: Final = 8
STALL_S: Final = 2.0
CLEAR_GAIN: Final = 0.95


class Decision(enum.Enum):
    """What to do with the pages that are pending now."""

    TRANSFER = "transfer"
    SWITCHOVER = "switchover"
    GIVE_UP = "give up"


@dataclass(frozen=True, slots=True)
class EpochSample:
    """One epoch: pages pending when it began, when that was, and what it took to send them."""

    pending_pages: int
    began_s: float
    sent_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """A decision, the downtime to expect if the guest were parked now, and why."""

    decision: Decision
    expected_downtime_s: float
    reason: str


def bandwidth(samples: Sequence[EpochSample]) -> float:
    """Bytes per second over the last epochs; 0 where nothing was sent yet."""
    recent = samples[-BANDWIDTH_EPOCHS:]
    seconds = sum(sample.seconds for sample in recent)
    return sum(sample.sent_bytes for sample in recent) / seconds if seconds > 0 else 0.0


def decide(
    samples: Sequence[EpochSample],
    pending_pages: int,
    now_s: float,
    downtime_limit_s: float,
    audit_s: float = 0.0,
) -> Verdict:
    """What to do next, with `pending_pages` to send and the finished epochs in `samples`.

    `audit_s` is what hashing all of RAM in black-out is expected to take, 0 where that is not done.
    """
    fixed = FIXED_DOWNTIME_S + audit_s
    if audit_s and fixed > downtime_limit_s:
        return Verdict(
            Decision.GIVE_UP,
            fixed,
            f"the audit of all RAM in black-out takes about {audit_s * 1000:.0f} ms, more than the downtime limit of "
            f"{downtime_limit_s * 1000:.0f} ms leaves. Raise the downtime limit, or migrate without the audit",
        )
    if not samples:
        return Verdict(Decision.TRANSFER, math.inf, "the first epoch sends all of RAM")
    rate = bandwidth(samples)
    pending_bytes = pending_pages * PAGE_SIZE
    sending_s = pending_bytes / rate if rate else math.inf if pending_bytes else 0.0
    expected = fixed + sending_s
    if expected <= downtime_limit_s:
        return Verdict(
            Decision.SWITCHOVER,
            expected,
            f"expected downtime {expected * 1000:.0f} ms is within the limit of {downtime_limit_s * 1000:.0f} ms",
        )
    if _stalled(samples, pending_pages, now_s):
        return Verdict(
            Decision.GIVE_UP,
            expected,
            f"pre-copy does not converge: the guest writes about {_written_per_second(samples, pending_pages):.0f} MiB/s, "
            f"the channels carry {rate / 2**20:.0f} MiB/s; expected downtime {expected * 1000:.0f} ms stays above the "
            f"limit of {downtime_limit_s * 1000:.0f} ms. Raise the downtime limit, or slow the guest down",
        )
    return Verdict(Decision.TRANSFER, expected, "another epoch makes pending pages fewer")


def _stalled(samples: Sequence[EpochSample], pending_pages: int, now_s: float) -> bool:
    low = samples[0].pending_pages
    low_at, low_s = 0, samples[0].began_s
    history = [(sample.pending_pages, sample.began_s) for sample in samples[1:]] + [(pending_pages, now_s)]
    for index, (pages, began_s) in enumerate(history, start=1):
        if pages < low * CLEAR_GAIN:
            low, low_at, low_s = pages, index, began_s
    return len(history) - low_at >= STALL_EPOCHS and now_s - low_s >= STALL_S


def _written_per_second(samples: Sequence[EpochSample], pending_pages: int) -> float:
    """MiB of different pages written per second during the last epoch."""
    return pending_pages * PAGE_SIZE / 2**20 / max(samples[-1].seconds, 1e-3)
