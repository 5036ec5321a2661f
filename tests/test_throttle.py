"""Throttled vCPUs: the duty cycle as arithmetic, and what it does to guests that really run."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from pagexfer.engine.hypervisor import ThrottlingHypervisor
from pagexfer.errors import GuestError
from pagexfer.guests.checked import start
from pagexfer.guests.duty_cycle import SLICE_S, DutyCycle
from pagexfer.guests.pattern import read_status

from .engine_guests import TestHypervisor

if TYPE_CHECKING:
    from pagexfer.guests.checked import CheckedGuest
    from pagexfer.guests.kvm import KvmGuest
    from pagexfer.guests.simulated import SimulatedGuest

RAM = 16 << 20


# The duty cycle


@given(st.integers(1, 99), st.floats(0.0001, SLICE_S))
def test_a_vcpu_runs_for_the_rest_of_the_time(percentage: int, step_s: float) -> None:
    cycle, now, ran = DutyCycle(), 1000.0, 0.0
    for _ in range(1000):
        held = cycle.held_s(now, percentage)
        if held:
            now += held
        else:
            now += step_s
            ran += step_s
    assert ran / (now - 1000.0) == pytest.approx(1 - percentage / 100, rel=0.05, abs=0.05)
    assert cycle.guest_time(now) - 1000.0 == pytest.approx(ran, abs=1e-6)


def test_without_a_throttle_nothing_is_held() -> None:
    cycle = DutyCycle()
    assert [cycle.held_s(1000.0 + number, 0) for number in range(100)] == [0.0] * 100
    assert cycle.guest_time(5.0) == 5.0


def test_a_throttle_that_is_lifted_gives_the_rest_of_the_wait_back() -> None:
    cycle = DutyCycle()
    assert cycle.held_s(0.0, 50) == 0.0
    assert cycle.held_s(SLICE_S, 50) == pytest.approx(SLICE_S)
    lifted_at = 1.5 * SLICE_S
    assert cycle.held_s(lifted_at, 0) == 0.0
    assert cycle.guest_time(lifted_at) == pytest.approx(SLICE_S)


def test_a_vcpu_that_stood_still_does_not_pay_for_it() -> None:
    cycle = DutyCycle()
    cycle.held_s(0.0, 99)
    assert cycle.held_s(3600.0, 99) <= 2.0


# Real guests


async def _written(guest: CheckedGuest, seconds: float) -> float:
    """Pages that all vCPUs wrote per second."""

    def steps() -> int:
        return sum(read_status(guest.memory.words, vcpu).steps for vcpu in range(guest.gate.vcpus))

    before, began = steps(), time.monotonic()
    await trio.sleep(seconds)
    return (steps() - before) / (time.monotonic() - began)


async def test_a_throttled_guest_writes_less_and_catches_nothing_up(
    guest_type: type[KvmGuest] | type[SimulatedGuest],
) -> None:
    with guest_type.boot(RAM, 1, write_rate_bytes=40 << 20) as guest:
        assert isinstance(guest.hypervisor, ThrottlingHypervisor)
        await start(guest)
        allowed = 40 << 8  # pages a second; that no more is written holds on however busy a machine
        for percentage in (50, 90):
            await guest.hypervisor.throttle(percentage)
            assert 0 < await _written(guest, 0.4) < 1.3 * allowed * (1 - percentage / 100) + 600
        await guest.hypervisor.throttle(0)
        with trio.fail_after(30):
            while await _written(guest, 0.3) < 0.6 * allowed:
                pass


async def test_a_guest_that_is_fully_throttled_parks_at_once(
    guest_type: type[KvmGuest] | type[SimulatedGuest],
) -> None:
    # Each vCPU is held for 990 ms of a second. Were a park to wait for that, the median of five would show it.
    with guest_type.boot(RAM, 2, write_rate_bytes=100 << 20) as guest:
        await start(guest)
        await guest.hypervisor.throttle(99)
        took = []
        for _ in range(5):
            await trio.sleep(0.03)
            began = time.monotonic()
            guest.gate.raise_flag()
            with trio.fail_after(20):
                while guest.gate.parked() < 2:  # noqa: ASYNC110 (the gate has no event)
                    await trio.sleep(0.0005)
            took.append(time.monotonic() - began)
            guest.gate.release()
        assert sorted(took)[2] < 0.25


@pytest.mark.parametrize("percentage", [-1, 100])
async def test_a_percentage_that_is_none(
    guest_type: type[KvmGuest] | type[SimulatedGuest], percentage: int
) -> None:
    with guest_type.empty(RAM, 1) as guest, pytest.raises(GuestError, match=f"not {percentage}$"):
        await guest.hypervisor.throttle(percentage)


def test_a_hypervisor_that_cannot_throttle_says_so_by_its_type() -> None:
    assert not isinstance(TestHypervisor(), ThrottlingHypervisor)
