"""What a migration reports: QEMU's names and units, and figures that never go back."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagexfer.engine.progress import AuditInfo, ChannelTally, Progress, Status
from pagexfer.wire.constants import PAGE_SIZE

_PAGES = 1000


def _progress(channels: int = 2) -> Progress:
    progress = Progress(_PAGES * PAGE_SIZE, now=100.0)
    progress.channels = [ChannelTally(channel) for channel in range(channels)]
    return progress


def test_names_are_those_of_query_migrate() -> None:
    described = _progress().info(100.0).as_dict()
    assert list(described) == [
        "status",
        "total-time",
        "setup-time",
        "percent",
        "ram",
        "channels",
        "channel",
    ]
    progress = _progress()
    progress.expected_downtime_s = 0.1234
    progress.park(101.0)
    described = progress.info(101.05).as_dict()
    assert list(described)[3:5] == ["downtime", "expected-downtime"]
    assert (described["downtime"], described["expected-downtime"]) == (50.0, 123.4)
    ram = described["ram"]
    assert isinstance(ram, dict)
    assert set(ram) == {
        "total",
        "transferred",
        "remaining",
        "duplicate",
        "normal",
        "normal-bytes",
        "dirty-sync-count",
        "dirty-pages-rate",
        "mbps",
        "pages-per-second",
        "page-size",
    }
    assert {status.value for status in Status} == {
        "setup",
        "active",
        "pre-switchover",
        "device",
        "completed",
        "failed",
        "cancelled",
    }


def test_times_are_milliseconds_and_rates_are_qemu_units() -> None:
    progress = _progress()
    progress.set_up(100.5)
    progress.begin_epoch(_PAGES)
    progress.channels[0].add(600, 100, 2_000_000)
    progress.channels[1].add(300, 0, 1_000_000)
    progress.dirty_pages_rate = 41.6
    progress.expected_downtime_s = 0.25
    progress.park(104.0)
    info = progress.info(104.5)
    assert info.status is Status.DEVICE
    assert (info.total_time, info.setup_time, info.downtime) == (4500.0, 500.0, 500.0)
    assert info.expected_downtime == 250.0
    assert info.ram.total == _PAGES * PAGE_SIZE
    assert info.ram.transferred == 3_000_000
    assert (info.ram.normal, info.ram.duplicate) == (800, 100)
    assert info.ram.remaining == 100 * PAGE_SIZE
    assert info.ram.dirty_sync_count == 1
    assert info.ram.dirty_pages_rate == 42
    assert info.ram.mbps == pytest.approx(3_000_000 * 8 / 1e6 / 4)  # megabits a second, from the set-up on
    assert info.ram.pages_per_second == 225
    assert info.percent == pytest.approx(90.0)
    assert [(channel.bundles, channel.pages, channel.transferred) for channel in info.channels] == [
        (1, 600, 2_000_000),
        (1, 300, 1_000_000),
    ]


def test_audit_is_described_where_there_was_one() -> None:
    progress = _progress()
    progress.audit = AuditInfo(12.345, 7)
    described = progress.info(100.0).as_dict()
    assert described["audit"] == {"milliseconds": 12.3, "pages": 7}
    assert progress.info(100.0).audit == AuditInfo(12.345, 7)


def test_nothing_is_divided_by_before_the_set_up() -> None:
    info = _progress().info(100.0)
    assert (info.ram.mbps, info.ram.pages_per_second, info.percent) == (0.0, 0, 0.0)
    assert info.setup_time == info.total_time == 0.0


def test_what_is_not_known_is_not_said() -> None:
    info = _progress().info(100.0)
    assert (info.downtime, info.expected_downtime) == (None, None)
    assert not {"downtime", "expected-downtime"} & info.as_dict().keys()


def test_a_migration_that_goes_on_is_never_shown_as_complete() -> None:
    progress = _progress()
    progress.begin_epoch(_PAGES)
    progress.channels[0].add(_PAGES, 0, 1)
    assert progress.info(101.0).as_dict()["percent"] == 99.9
    progress.begin_epoch(10)
    assert progress.info(102.0).as_dict()["percent"] == 99.9
    progress.channels[0].add(10, 0, 1)
    progress.end(Status.COMPLETED, 103.0)
    assert progress.info(103.0).as_dict()["percent"] == 100.0


def test_after_the_end_figures_stand_still() -> None:
    progress = _progress()
    progress.set_up(101.0)
    progress.begin_epoch(10)
    progress.end(Status.COMPLETED, 102.0)
    assert progress.info(102.0) == progress.info(500.0)
    assert progress.info(500.0).ram.remaining == 0
    assert progress.info(500.0).percent == 100.0


def test_a_failed_migration_is_not_complete() -> None:
    progress = _progress()
    progress.begin_epoch(_PAGES)
    progress.channels[0].add(250, 0, 1)
    progress.end(Status.FAILED, 102.0)
    info = progress.info(102.0)
    assert info.ram.remaining == 750 * PAGE_SIZE
    assert info.percent == pytest.approx(25.0)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("epoch"), st.integers(0, _PAGES)),
            st.tuples(st.just("add"), st.integers(0, 300)),
        )
    )
)
def test_percent_never_goes_back_and_all_of_it_is_json(steps: list[tuple[str, int]]) -> None:
    progress = _progress()
    progress.set_up(100.0)
    last = 0.0
    for number, (step, pages) in enumerate(steps):
        if step == "epoch":
            progress.begin_epoch(pages)
        else:
            progress.channels[number % 2].add(pages, pages // 2, pages * 100)
        info = progress.info(101.0 + number)
        assert last <= info.percent <= 100.0
        assert 0 <= info.ram.remaining <= info.ram.total
        last = info.percent
        described = info.as_dict()
        assert json.loads(json.dumps(described, allow_nan=False)) == described
