"""The token bucket of a simulated vCPU, on a clock of numbers."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from pagexfer.guests.simulated_vcpu.pace import MAX_BATCH_PAGES, Pace, burst_bytes
from pagexfer.wire.constants import PAGE_SIZE


@given(rate=st.floats(1, 1e12), times=st.lists(st.floats(0, 0.1), min_size=1, max_size=50))
def test_pace_never_exceeds_its_rate(rate: float, times: list[float]) -> None:
    pace = Pace(rate, 0.0)
    spent = 0
    for now in itertools.accumulate(times):
        pages = pace.pages_allowed(now)
        assert 0 <= pages <= MAX_BATCH_PAGES
        pace.spend(pages)
        spent += pages * PAGE_SIZE
        assert spent <= rate * now * (1 + 1e-9) + burst_bytes(rate)


@given(rate=st.floats(4096, 1e9))
def test_pace_keeps_its_rate_when_asked_in_time(rate: float) -> None:
    pace, now, spent = Pace(rate, 0.0), 0.0, 0
    for _ in range(500):
        now += pace.delay() + 1e-6
        pages = pace.pages_allowed(now)
        pace.spend(pages)
        spent += pages * PAGE_SIZE
    assert spent >= 0.98 * rate * now - burst_bytes(rate)
