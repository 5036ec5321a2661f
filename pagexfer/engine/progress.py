"""What a migration reports while it runs and at its end, under the names of QEMU's `query-migrate`.

`Counters` is the engine's own tally; `MigrationInfo` an immutable snapshot of it for users.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from ..wire.constants import PAGE_SIZE

# Of a migration that is not completed, as it is shown with one digit.
_MOST_PERCENT: Final = 99.9


class Status(enum.Enum):
    """Where a migration stands, by QEMU's names."""

    SETUP = "setup"
    ACTIVE = "active"
    PRE_SWITCHOVER = "pre-switchover"  # waits for the operator; the guest runs, pre-copy goes on
    DEVICE = "device"  # black-out: vCPUs are parked
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class RamInfo:
    """RAM figures as QEMU's MigrationStats defines them: bytes, but pages for `duplicate`, `normal` and the rates."""

    total: int
    transferred: int = 0
    remaining: int = 0
    duplicate: int = 0
    normal: int = 0
    dirty_sync_count: int = 0
    dirty_pages_rate: int = 0
    mbps: float = 0.0
    pages_per_second: int = 0

    def as_dict(self) -> dict[str, int | float]:
        return {
            "total": self.total,
            "transferred": self.transferred,
            "remaining": self.remaining,
            "duplicate": self.duplicate,
            "normal": self.normal,
            "normal-bytes": self.normal * PAGE_SIZE,
            "dirty-sync-count": self.dirty_sync_count,
            "dirty-pages-rate": self.dirty_pages_rate,
            "mbps": round(self.mbps, 1),
            "pages-per-second": self.pages_per_second,
            "page-size": PAGE_SIZE,
        }


@dataclass(frozen=True, slots=True)
class ChannelInfo:
    """What one channel carried so far, and how often its connection was lost and replaced."""

    channel: int
    bundles: int
    pages: int
    transferred: int
    replaced: int = 0

    def as_dict(self) -> dict[str, int]:
        return {
            "channel": self.channel,
            "bundles": self.bundles,
            "pages": self.pages,
            "transferred": self.transferred,
            "replaced": self.replaced,
        }


@dataclass(frozen=True, slots=True)
class AuditInfo:
    """The audit in black-out: what it took, and how many changed pages neither tracker nor dirty log had reported."""

    milliseconds: float
    pages: int

    def as_dict(self) -> dict[str, int | float]:
        return {"milliseconds": round(self.milliseconds, 1), "pages": self.pages}


@dataclass(frozen=True, slots=True)
class ThrottleInfo:
    """How the vCPUs are slowed down: percentage now, and over all of pre-copy, each weighted by how long it lasted."""

    percentage: int
    slowdown: float


@dataclass(frozen=True, slots=True)
class MigrationInfo:
    """A migration at one moment. Times are milliseconds, as QEMU has them.

    `downtime` is known at the source, from black-out on, and `expected_downtime` there once an epoch was measured; None
    elsewhere. `percent` never goes back, and is 100 for a completed migration alone.
    """

    status: Status
    total_time: float
    setup_time: float
    downtime: float | None
    expected_downtime: float | None
    percent: float
    ram: RamInfo
    channels: tuple[ChannelInfo, ...]
    audit: AuditInfo | None = None
    throttle: ThrottleInfo | None = None
    downtime_limit: float | None = None

    def as_dict(self) -> dict[str, object]:
        """The snapshot with QEMU's key names, ready for JSON; what there was none of is left out."""
        described: dict[str, object] = {
            "status": self.status.value,
            "total-time": round(self.total_time, 1),
            "setup-time": round(self.setup_time, 1),
        }
        if self.downtime is not None:
            described["downtime"] = round(self.downtime, 1)
        if self.expected_downtime is not None:
            described["expected-downtime"] = round(self.expected_downtime, 1)
        described["percent"] = round(self.percent, 1)
        described["ram"] = self.ram.as_dict()
        described["channels"] = len(self.channels)
        described["channel"] = [channel.as_dict() for channel in self.channels]
        if self.audit is not None:
            described["audit"] = self.audit.as_dict()
        if self.throttle is not None:
            described["cpu-throttle-percentage"] = self.throttle.percentage
            described["guest-slowdown-percentage"] = round(self.throttle.slowdown, 1)
        if self.downtime_limit is not None:
            described["downtime-limit"] = round(self.downtime_limit, 1)
        return described


class ChannelTally:
    """What one channel has carried; its worker adds to it."""

    __slots__ = ("bundles", "channel", "duplicate", "normal", "replaced", "transferred")

    def __init__(self, channel: int) -> None:
        self.channel = channel
        self.bundles = 0
        self.normal = 0
        self.duplicate = 0
        self.transferred = 0
        self.replaced = 0

    def add(self, pages: int, zero_pages: int, transferred: int) -> None:
        """One bundle of `pages` pages, `zero_pages` of them without payload, that took `transferred` bytes."""
        self.bundles += 1
        self.normal += pages - zero_pages
        self.duplicate += zero_pages
        self.transferred += transferred


class Progress:
    """The tally of one migration. Every method that needs the time takes it, in seconds of one clock."""

    def __init__(self, ram_bytes: int, now: float) -> None:
        self.status = Status.SETUP
        self.channels: list[ChannelTally] = []
        self.other_bytes = 0  # control, tokens, vCPU and device state
        self.dirty_sync_count = 0
        self.dirty_pages_rate = 0.0
        self.expected_downtime_s: float | None = None
        self.downtime_limit_s: float | None = None
        self.audit: AuditInfo | None = None
        self._ram_bytes = ram_bytes
        self._began = now
        self._set_up: float | None = None
        self._parked: float | None = None
        self._ended: float | None = None
        self._epoch_pending = ram_bytes // PAGE_SIZE
        self._pages_before_epoch = 0
        self._percent = 0.0
        # Percentage since when, and the sum of percentage times seconds before.
        self._throttle: int | None = None
        self._throttled_at = now
        self._throttled = 0.0

    @property
    def pages(self) -> int:
        """Pages sent so far, zero pages among them."""
        return sum(tally.normal + tally.duplicate for tally in self.channels)

    @property
    def data_pages(self) -> int:
        """Pages with content sent so far."""
        return sum(tally.normal for tally in self.channels)

    @property
    def transferred(self) -> int:
        """Bytes sent so far."""
        return self.other_bytes + sum(tally.transferred for tally in self.channels)

    def set_up(self, now: float) -> None:
        """Handshake and channels are done; pages begin to move."""
        self._set_up = now
        self.status = Status.ACTIVE

    def begin_epoch(self, pending_pages: int) -> None:
        """An epoch begins with this much to send."""
        self.dirty_sync_count += 1
        self._epoch_pending = pending_pages
        self._pages_before_epoch = self.pages

    def throttle(self, percentage: int, now: float) -> None:
        """From now on the vCPUs are slowed down by so much."""
        self._throttled = self._throttled_until(now)
        self._throttle, self._throttled_at = percentage, now

    def wait(self, *, waiting: bool) -> None:
        """The operator is waited for, or not any more."""
        self.status = Status.PRE_SWITCHOVER if waiting else Status.ACTIVE

    def park(self, now: float) -> None:
        """Black-out begins."""
        self._parked = now
        self.status = Status.DEVICE

    def end(self, status: Status, now: float) -> None:
        """The migration is over; figures stand still from here on."""
        self.status = status
        self._ended = now

    def info(self, now: float) -> MigrationInfo:
        """A snapshot."""
        now = self._ended if self._ended is not None else now
        pages = self.pages
        remaining_pages = max(0, self._epoch_pending - (pages - self._pages_before_epoch))
        if self.status is Status.COMPLETED:
            remaining_pages = 0
        remaining = remaining_pages * PAGE_SIZE
        # Whatever is sent already, the guest may write again until it is parked.
        most = 100.0 if self.status is Status.COMPLETED else _MOST_PERCENT
        self._percent = max(self._percent, min(100 * (1 - remaining / self._ram_bytes), most))
        moving_s = max(now - self._set_up, 1e-6) if self._set_up is not None else 0.0
        ram = RamInfo(
            total=self._ram_bytes,
            transferred=self.transferred,
            remaining=remaining,
            duplicate=sum(tally.duplicate for tally in self.channels),
            normal=self.data_pages,
            dirty_sync_count=self.dirty_sync_count,
            dirty_pages_rate=round(self.dirty_pages_rate),
            mbps=self.transferred * 8 / 1e6 / moving_s if moving_s else 0.0,
            pages_per_second=round(pages / moving_s) if moving_s else 0,
        )
        return MigrationInfo(
            self.status,
            1000 * (now - self._began),
            1000 * ((self._set_up if self._set_up is not None else now) - self._began),
            1000 * (now - self._parked) if self._parked is not None else None,
            1000 * self.expected_downtime_s if self.expected_downtime_s is not None else None,
            self._percent,
            ram,
            tuple(
                ChannelInfo(
                    tally.channel,
                    tally.bundles,
                    tally.normal + tally.duplicate,
                    tally.transferred,
                    tally.replaced,
                )
                for tally in self.channels
            ),
            self.audit,
            self._throttle_info(now),
            1000 * self.downtime_limit_s if self.downtime_limit_s is not None else None,
        )

    def _throttle_info(self, now: float) -> ThrottleInfo | None:
        if self._throttle is None or self._set_up is None:
            return None
        until = self._parked if self._parked is not None else now
        running_s = max(until - self._set_up, 1e-6)
        return ThrottleInfo(self._throttle, self._throttled_until(until) / running_s)

    def _throttled_until(self, now: float) -> float:
        # A guest that is parked is not slowed down: what is set then does not count.
        until = min(now, self._parked) if self._parked is not None else now
        return self._throttled + (self._throttle or 0) * max(until - self._throttled_at, 0.0)
