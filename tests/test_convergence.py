"""When pre-copy ends: the verdict over measured epochs, case by case."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagexfer.engine.convergence import (
    FIXED_DOWNTIME_S,
    STALL_EPOCHS,
    STALL_S,
    Decision,
    EpochSample,
    bandwidth,
    decide,
)
from pagexfer.wire.constants import PAGE_SIZE

_LIMIT_S = 0.3
_RATE = 100 << 20  # bytes a second that the channels carry
_TOO_MANY = int(2 * _LIMIT_S * _RATE / PAGE_SIZE)


def _epochs(pending: list[int], seconds: float) -> list[EpochSample]:
    """One sample for each count of pending pages, each epoch of `seconds` at `_RATE`."""
    return [
        EpochSample(pages, number * seconds, int(_RATE * seconds), seconds)
        for number, pages in enumerate(pending)
    ]


def test_the_first_epoch_sends_everything() -> None:
    verdict = decide([], 10, 0.0, _LIMIT_S)
    assert verdict.decision is Decision.TRANSFER
    assert verdict.expected_downtime_s == math.inf


def test_pages_that_fit_the_limit_mean_switchover() -> None:
    pages = int(0.1 * _RATE / PAGE_SIZE)
    verdict = decide(_epochs([100000], 1.0), pages, 1.0, _LIMIT_S)
    assert verdict.decision is Decision.SWITCHOVER
    assert verdict.expected_downtime_s == pytest.approx(FIXED_DOWNTIME_S + pages * PAGE_SIZE / _RATE)
    assert "105 ms" in verdict.reason
    assert "300 ms" in verdict.reason


def test_the_fixed_cost_counts() -> None:
    pages = int(_LIMIT_S * _RATE / PAGE_SIZE)
    assert decide(_epochs([100000], 1.0), pages, 1.0, _LIMIT_S).decision is Decision.TRANSFER


def test_the_audit_counts_as_downtime() -> None:
    pages = int(0.2 * _RATE / PAGE_SIZE)
    assert decide(_epochs([100000], 1.0), pages, 1.0, _LIMIT_S, 0.09).decision is Decision.SWITCHOVER
    verdict = decide(_epochs([100000], 1.0), pages, 1.0, _LIMIT_S, 0.11)
    assert verdict.decision is Decision.TRANSFER
    assert verdict.expected_downtime_s == pytest.approx(FIXED_DOWNTIME_S + 0.11 + 0.2, rel=1e-3)


@pytest.mark.parametrize("epochs", [0, 1])
def test_an_audit_that_is_too_long_is_said_before_anything_is_sent(epochs: int) -> None:
    verdict = decide(_epochs([100000] * epochs, 1.0), 0, 1.0, _LIMIT_S, _LIMIT_S)
    assert verdict.decision is Decision.GIVE_UP
    assert "audit of all RAM in black-out takes about 300 ms" in verdict.reason
    assert "limit of 300 ms" in verdict.reason


def test_fewer_pages_each_time_are_worth_another_epoch() -> None:
    history = [int(_TOO_MANY * 0.9**-number) for number in range(30, 0, -1)]
    for length in range(1, len(history)):
        samples = _epochs(history[:length], 1.0)
        assert decide(samples, history[length], float(length), _LIMIT_S).decision is Decision.TRANSFER


def test_slow_convergence_is_not_cut_off() -> None:
    # Two per cent less an epoch: no epoch is a clear gain over the last, but three together are.
    history = [int(_TOO_MANY * 0.98**-number) for number in range(100, 0, -1)]
    for length in range(1, len(history)):
        samples = _epochs(history[:length], 1.0)
        assert decide(samples, history[length], float(length), _LIMIT_S).decision is Decision.TRANSFER


@pytest.mark.parametrize(
    ("epochs", "seconds", "decision"),
    [
        (STALL_EPOCHS, STALL_S / STALL_EPOCHS, Decision.GIVE_UP),
        (STALL_EPOCHS - 1, STALL_S, Decision.TRANSFER),  # long enough, too few epochs
        (4 * STALL_EPOCHS, STALL_S / STALL_EPOCHS / 5, Decision.TRANSFER),  # epochs enough, too short
    ],
)
def test_a_stall_takes_epochs_and_time(epochs: int, seconds: float, decision: Decision) -> None:
    samples = _epochs([_TOO_MANY] * epochs, seconds)
    assert decide(samples, _TOO_MANY, epochs * seconds, _LIMIT_S).decision is decision


def test_a_new_low_starts_the_wait_anew() -> None:
    stalled = [_TOO_MANY * 2] * (STALL_EPOCHS + 2)
    assert decide(_epochs(stalled, 1.0), _TOO_MANY * 2, 10.0, _LIMIT_S).decision is Decision.GIVE_UP
    low = [*stalled, _TOO_MANY]
    assert decide(_epochs(low, 1.0), _TOO_MANY, 11.0, _LIMIT_S).decision is Decision.TRANSFER


def test_the_reason_to_give_up_has_the_numbers() -> None:
    # 60 MiB are written again during each second; the channels carry 100 MiB/s.
    pages = 60 * 256
    reason = decide(_epochs([pages] * 20, 1.0), pages, 20.0, _LIMIT_S).reason
    for part in ("60 MiB/s", "100 MiB/s", "605 ms", "300 ms"):
        assert part in reason
    assert reason.isprintable()


def test_bandwidth_is_that_of_the_last_epochs() -> None:
    samples = [EpochSample(1, 0.0, 1000, 1.0), *(EpochSample(1, 0.0, 10, 1.0) for _ in range(3))]
    assert bandwidth(samples) == 10.0
    assert bandwidth([]) == 0.0
    assert bandwidth([EpochSample(0, 0.0, 0, 0.0)]) == 0.0


_samples = st.lists(
    st.builds(
        EpochSample,
        st.integers(0, 1 << 30),
        st.floats(0, 1e6),
        st.integers(0, 1 << 45),
        st.floats(0, 1e4),
    ),
    max_size=12,
)


@given(_samples, st.integers(0, 1 << 30), st.floats(0, 1e6), st.floats(0.001, 2000))
def test_never_switches_over_above_the_limit(
    samples: list[EpochSample], pending: int, now: float, limit: float
) -> None:
    verdict = decide(samples, pending, now, limit)
    if verdict.decision is Decision.SWITCHOVER:
        rate = bandwidth(samples)
        assert verdict.expected_downtime_s <= limit
        assert pending == 0 or (rate > 0 and pending * PAGE_SIZE / rate <= limit)
    assert verdict.reason
