"""When pre-copy ends: the verdict over measured epochs, case by case."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagexfer.engine.convergence import (
    FIXED_DOWNTIME_S,
    RAMP_EPOCHS,
    RAMP_FACTOR,
    ROUND_TRIPS,
    STALL_EPOCHS,
    STALL_S,
    THROTTLE_EPOCHS,
    THROTTLE_INITIAL,
    THROTTLE_MAX,
    THROTTLE_STEP,
    Costs,
    Decision,
    EpochSample,
    Pressure,
    Verdict,
    bandwidth,
    decide,
    hold,
    press,
    sending_s,
)
from pagexfer.engine.steering import MigrationParameters
from pagexfer.wire.constants import PAGE_SIZE

_LIMIT_S = 0.3
_PLAIN = MigrationParameters(downtime_limit_s=_LIMIT_S)
_THROTTLING = MigrationParameters(downtime_limit_s=_LIMIT_S, auto_converge=True)
_RAMP = MigrationParameters(downtime_limit_s=_LIMIT_S, max_downtime_limit_s=2.0)
_NO_PRESSURE = Pressure(0, _LIMIT_S)
_RATE = 100 << 20  # bytes a second that the channels carry
_TOO_MANY = int(2 * _LIMIT_S * _RATE / PAGE_SIZE)


def _epochs(pending: list[int], seconds: float, pressure: Pressure = _NO_PRESSURE) -> list[EpochSample]:
    """One sample for each count of pending pages, each epoch of `seconds` at `_RATE`."""
    return [
        EpochSample(pages, number * seconds, int(_RATE * seconds), seconds, pressure)
        for number, pages in enumerate(pending)
    ]


def _decide(samples: list[EpochSample], pending: int, now_s: float, costs: Costs = Costs()) -> Verdict:  # noqa: B008
    return decide(samples, pending, now_s, _NO_PRESSURE, _PLAIN, costs)


def test_the_first_epoch_sends_everything() -> None:
    verdict = _decide([], 10, 0.0)
    assert verdict.decision is Decision.TRANSFER
    assert verdict.expected_downtime_s == math.inf


def test_pages_that_fit_the_limit_mean_switchover() -> None:
    pages = int(0.1 * _RATE / PAGE_SIZE)
    verdict = _decide(_epochs([100000], 1.0), pages, 1.0)
    assert verdict.decision is Decision.SWITCHOVER
    assert verdict.expected_downtime_s == pytest.approx(FIXED_DOWNTIME_S + pages * PAGE_SIZE / _RATE)
    assert f"{verdict.expected_downtime_s * 1000:.0f} ms" in verdict.reason
    assert "300 ms" in verdict.reason


def test_the_fixed_costs_count() -> None:
    pages = int(_LIMIT_S * _RATE / PAGE_SIZE)
    assert _decide(_epochs([100000], 1.0), pages, 1.0).decision is Decision.TRANSFER


def test_round_trips_count() -> None:
    near = _decide(_epochs([100000], 1.0), 100, 1.0)
    far = _decide(_epochs([100000], 1.0), 100, 1.0, Costs(round_trip_s=0.05))
    assert far.expected_downtime_s - near.expected_downtime_s == pytest.approx(ROUND_TRIPS * 0.05)


def test_the_audit_counts_as_downtime() -> None:
    pages = int(0.2 * _RATE / PAGE_SIZE)
    room_s = _LIMIT_S - 0.2 - FIXED_DOWNTIME_S
    samples = _epochs([100000], 1.0)
    assert _decide(samples, pages, 1.0, Costs(audit_s=room_s - 0.005)).decision is Decision.SWITCHOVER
    verdict = _decide(samples, pages, 1.0, Costs(audit_s=room_s + 0.005))
    assert verdict.decision is Decision.TRANSFER
    assert verdict.expected_downtime_s == pytest.approx(_LIMIT_S + 0.005, rel=1e-3)


def test_looking_for_changed_pages_counts_as_downtime() -> None:
    samples = _epochs([100000], 1.0)
    assert _decide(samples, 0, 1.0, Costs(look_s=_LIMIT_S - FIXED_DOWNTIME_S)).decision is Decision.SWITCHOVER
    verdict = _decide(samples, 0, 1.0, Costs(look_s=_LIMIT_S))
    assert verdict.decision is Decision.TRANSFER
    assert verdict.expected_downtime_s == pytest.approx(_LIMIT_S + FIXED_DOWNTIME_S)


@pytest.mark.parametrize("epochs", [0, 1])
def test_an_audit_that_is_too_long_is_said_before_anything_is_sent(epochs: int) -> None:
    verdict = _decide(_epochs([100000] * epochs, 1.0), 0, 1.0, Costs(audit_s=_LIMIT_S))
    assert verdict.decision is Decision.GIVE_UP
    assert "audit of all RAM in black-out takes about 300 ms" in verdict.reason
    assert "limit of 300 ms" in verdict.reason


def test_an_audit_may_take_what_the_limit_may_be_raised_to() -> None:
    assert decide([], 1, 0.0, _NO_PRESSURE, _RAMP, Costs(audit_s=1.0)).decision is Decision.TRANSFER


@pytest.mark.parametrize("gain", [0.9, 0.98])
def test_fewer_pages_are_worth_another_epoch(gain: float) -> None:
    # At 0.98 no epoch is a clear gain over the last, but three together are.
    history = [int(_TOO_MANY * gain**-number) for number in range(30, 0, -1)]
    for length in range(1, len(history)):
        assert (
            _decide(_epochs(history[:length], 1.0), history[length], float(length)).decision
            is Decision.TRANSFER
        )


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
    assert _decide(samples, _TOO_MANY, epochs * seconds).decision is decision


def test_a_new_low_starts_the_wait_anew() -> None:
    stalled = [_TOO_MANY * 2] * (STALL_EPOCHS + 2)
    assert _decide(_epochs(stalled, 1.0), _TOO_MANY * 2, 10.0).decision is Decision.GIVE_UP
    low = [*stalled, _TOO_MANY]
    assert _decide(_epochs(low, 1.0), _TOO_MANY, 11.0).decision is Decision.TRANSFER


def test_new_pressure_starts_the_wait_anew() -> None:
    samples = _epochs([_TOO_MANY] * 20, 1.0, Pressure(0, _LIMIT_S / 2))
    assert _decide(samples, _TOO_MANY, 20.0).decision is Decision.TRANSFER


@pytest.mark.parametrize(
    ("parameters", "pressure"),
    [(_THROTTLING, Pressure(50, _LIMIT_S)), (_RAMP, Pressure(0, _LIMIT_S))],
    ids=["throttle", "ramp"],
)
def test_nothing_is_given_up_while_pressure_can_rise(
    parameters: MigrationParameters, pressure: Pressure
) -> None:
    samples = _epochs([_TOO_MANY * 9] * 20, 1.0, pressure)
    args = (samples, _TOO_MANY * 9, 20.0, pressure, parameters, Costs())
    assert decide(*args, can_throttle=True).decision is Decision.TRANSFER
    # A hypervisor that cannot throttle leaves nothing to wait for; the ramp does.
    given_up = parameters is _THROTTLING
    assert (decide(*args, can_throttle=False).decision is Decision.GIVE_UP) is given_up


@pytest.mark.parametrize(
    ("parameters", "most"),
    [(_THROTTLING, Pressure(THROTTLE_MAX, _LIMIT_S)), (_RAMP, Pressure(0, 2.0))],
    ids=["throttle", "ramp"],
)
def test_the_most_pressure_that_does_not_help_ends_it(
    parameters: MigrationParameters, most: Pressure
) -> None:
    samples = _epochs([_TOO_MANY * 9] * STALL_EPOCHS, 1.0, most)
    verdict = decide(samples, _TOO_MANY * 9, 8.0, most, parameters, Costs(), can_throttle=True)
    assert verdict.decision is Decision.GIVE_UP
    assert ("slowed down by 99 %" in verdict.reason) is (parameters is _THROTTLING)


def test_the_reason_to_give_up_has_the_numbers() -> None:
    # 60 MiB are written again during each second; the channels carry 100 MiB/s.
    pages = 60 * 256
    reason = _decide(_epochs([pages] * 20, 1.0), pages, 20.0).reason
    for part in ("60 MiB/s", "100 MiB/s", "608 ms", "300 ms"):
        assert part in reason
    assert reason.isprintable()


# What an epoch takes


def _sample(sent_bytes: int, seconds: float) -> EpochSample:
    return EpochSample(1, 0.0, sent_bytes, seconds, _NO_PRESSURE)


def test_bandwidth_is_that_of_the_last_epochs() -> None:
    samples = [_sample(1000, 1.0), *(_sample(10, 1.0) for _ in range(4))]
    assert bandwidth(samples) == 10.0
    assert bandwidth([]) == 0.0
    assert bandwidth([_sample(0, 0.0)]) == 0.0


def test_epochs_of_different_sizes_tell_fixed_time_from_time_by_byte() -> None:
    samples = [_sample(size << 20, 0.02 + size / 100) for size in (64, 16, 4)]
    assert sending_s(samples, 8 << 20, None) == pytest.approx(0.02 + 0.08)


def test_epochs_of_one_size_tell_a_rate_alone() -> None:
    samples = [_sample(100 << 20, seconds) for seconds in (0.9, 1.1)]
    assert sending_s(samples, 50 << 20, None) == pytest.approx(0.5)


def test_two_epochs_tell_no_fixed_time() -> None:
    samples = [_sample(size << 20, seconds) for size, seconds in ((24, 0.37), (6, 0.2))]
    assert sending_s(samples, 3 << 20, None) == pytest.approx(0.57 / 10)


def test_nothing_faster_than_the_limit_is_expected() -> None:
    assert sending_s([_sample(100 << 20, 1.0)], 10 << 20, 20 << 20) == pytest.approx(0.5)


def test_pages_shrink_as_those_of_the_last_epoch_did() -> None:
    samples = [replace(_sample(100 << 20, 1.0), shrunk=shrunk) for shrunk in (1.0, 0.5)]
    assert sending_s(samples, 40 << 20, None) == pytest.approx(0.2)
    assert sending_s(samples, 40 << 20, 50 << 20) == pytest.approx(0.4)


def test_a_guest_whose_writes_shrink_enough_is_not_slowed_down() -> None:
    samples = [replace(sample, shrunk=0.4) for sample in _epochs([_TOO_MANY] * 2, 1.0)]
    pages = _RATE // PAGE_SIZE  # as many bytes as the channels carry, before they shrink
    assert press(samples, pages, _THROTTLING, can_throttle=True).throttle == 0
    unshrunk = [replace(sample, shrunk=1.0, pending_pages=pages) for sample in samples]
    assert press(unshrunk, pages, _THROTTLING, can_throttle=True).throttle > 0


def test_what_the_channels_carry_is_said_in_pages() -> None:
    samples = [replace(sample, shrunk=0.5) for sample in _epochs([4 * _TOO_MANY] * 20, 1.0)]
    assert "channels carry 200 MiB/s" in _decide(samples, 4 * _TOO_MANY, 20.0).reason


def test_nothing_is_known_before_anything_was_sent() -> None:
    assert sending_s([_sample(0, 1.0)], 1, None) == math.inf
    assert sending_s([], 0, None) == 0.0


# Throttle and ramp


def _run(
    parameters: MigrationParameters, epochs: int, written_pages: int = _TOO_MANY, *, can_throttle: bool = True
) -> list[Pressure]:
    """The pressure of each epoch, where each is of one second and this much is written meanwhile."""
    samples: list[EpochSample] = []
    for number in range(epochs):
        pressure = press(samples, written_pages, parameters, can_throttle=can_throttle)
        samples.append(EpochSample(written_pages, float(number), _RATE, 1.0, pressure))
    return [sample.pressure for sample in samples]


def test_the_throttle_goes_up_as_qemu_has_it() -> None:
    throttles = [pressure.throttle for pressure in _run(_THROTTLING, 24)]
    steps = list(dict.fromkeys(throttles))
    assert steps == [0, *range(THROTTLE_INITIAL, THROTTLE_MAX, THROTTLE_STEP), THROTTLE_MAX]
    assert throttles[: 2 * THROTTLE_EPOCHS] == [0] * THROTTLE_EPOCHS + [THROTTLE_INITIAL] * THROTTLE_EPOCHS


def test_the_throttle_stays_where_the_guest_writes_little() -> None:
    half = _RATE // 2 // PAGE_SIZE
    assert {pressure.throttle for pressure in _run(_THROTTLING, 10, half)} == {0}
    assert {pressure.throttle for pressure in _run(_THROTTLING, 10, half + 1)} != {0}


def test_nothing_is_throttled_unasked_or_where_it_cannot_be() -> None:
    assert {pressure.throttle for pressure in _run(_PLAIN, 10)} == {0}
    assert {pressure.throttle for pressure in _run(_THROTTLING, 10, can_throttle=False)} == {0}


def test_auto_converge_turned_off_lifts_the_throttle() -> None:
    samples = _epochs([_TOO_MANY] * 3, 1.0, Pressure(50, _LIMIT_S))
    assert press(samples, _TOO_MANY, _PLAIN, can_throttle=True).throttle == 0


def test_the_limit_goes_up_step_by_step_to_its_maximum() -> None:
    limits = [pressure.downtime_limit_s for pressure in _run(_RAMP, 20)]
    assert limits == sorted(limits)
    assert limits[: RAMP_EPOCHS + 1] == pytest.approx([_LIMIT_S] * RAMP_EPOCHS + [_LIMIT_S * RAMP_FACTOR])
    assert limits[-1] == _RAMP.max_downtime_limit_s


def test_the_limit_stays_while_pages_get_fewer() -> None:
    samples = _epochs([_TOO_MANY * 2**number for number in range(8, 0, -1)], 1.0)
    assert press(samples, _TOO_MANY, _RAMP, can_throttle=False) == _NO_PRESSURE


def test_what_is_held_is_the_last_pressure_within_the_limits_of_now() -> None:
    samples = _epochs([_TOO_MANY] * 20, 1.0, Pressure(50, 1.0))
    assert hold(samples, replace(_RAMP, auto_converge=True), can_throttle=True) == Pressure(50, 1.0)
    assert hold(samples, _THROTTLING, can_throttle=True) == Pressure(50, _LIMIT_S)
    assert hold(samples, _RAMP, can_throttle=True) == Pressure(0, 1.0)
    assert hold([], _RAMP, can_throttle=False) == _NO_PRESSURE


def test_throttling_comes_before_the_ramp() -> None:
    both = replace(_RAMP, auto_converge=True)
    pressures = _run(both, 60)
    first_raised = next(number for number, each in enumerate(pressures) if each.downtime_limit_s > _LIMIT_S)
    assert pressures[first_raised].throttle == THROTTLE_MAX
    assert pressures[-1] == Pressure(THROTTLE_MAX, 2.0)


@pytest.mark.parametrize("limit_s", [0.1, 0.8])
def test_another_limit_holds_from_the_next_decision_on(limit_s: float) -> None:
    samples = _epochs([_TOO_MANY], 1.0)
    changed = MigrationParameters(downtime_limit_s=limit_s)
    assert press(samples, _TOO_MANY, changed, can_throttle=False) == Pressure(0, limit_s)


_parameters = st.builds(
    MigrationParameters,
    downtime_limit_s=st.floats(0.001, 100),
    max_downtime_limit_s=st.none() | st.floats(100, 1999),
    max_bandwidth_bytes=st.none() | st.integers(1 << 20, 1 << 40),
    auto_converge=st.booleans(),
)
_pressures = st.builds(Pressure, st.integers(0, 99), st.floats(0.001, 1999))
_samples = st.lists(
    st.builds(
        EpochSample,
        st.integers(0, 1 << 30),
        st.floats(0, 1e6),
        st.integers(0, 1 << 45),
        st.floats(0, 1e4),
        _pressures,
    ),
    max_size=12,
)


@given(_samples, st.integers(0, 1 << 30), st.floats(0, 1e6), _pressures, _parameters, st.booleans())
def test_never_switches_over_above_the_limit(
    samples: list[EpochSample],
    pending: int,
    now: float,
    pressure: Pressure,
    parameters: MigrationParameters,
    can_throttle: bool,
) -> None:
    verdict = decide(samples, pending, now, pressure, parameters, Costs(), can_throttle=can_throttle)
    assert verdict.reason
    assert verdict.expected_downtime_s >= 0
    if verdict.decision is Decision.SWITCHOVER:
        assert samples
        assert verdict.expected_downtime_s <= pressure.downtime_limit_s
        if parameters.max_bandwidth_bytes is not None:
            sending = pending * PAGE_SIZE / parameters.max_bandwidth_bytes
            assert sending <= pressure.downtime_limit_s


@given(_samples, st.integers(0, 1 << 30), _parameters, st.booleans())
def test_pressure_stays_within_what_the_operator_allows(
    samples: list[EpochSample], pending: int, parameters: MigrationParameters, can_throttle: bool
) -> None:
    pressure = press(samples, pending, parameters, can_throttle=can_throttle)
    limits = (parameters.downtime_limit_s, parameters.max_downtime_limit_s or parameters.downtime_limit_s)
    assert limits[0] <= pressure.downtime_limit_s <= limits[1]
    assert 0 <= pressure.throttle <= THROTTLE_MAX
    if not (parameters.auto_converge and can_throttle):
        assert pressure.throttle == 0
