"""The simulated guest on its real processes: it runs, parks, migrates by hand, and shows every loss."""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
import trio

from pagexfer.errors import GateError, GuestError
from pagexfer.guests.pattern import PATTERN_GFN, STATUS_GFN, Layout, Status, read_status
from pagexfer.guests.simulated import SimulatedGuest
from pagexfer.guests.simulated_vcpu.pace import MAX_BATCH_PAGES, burst_bytes
from pagexfer.guests.simulated_vcpu.registers import REGISTERS_BYTES, Registers
from pagexfer.wire.constants import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from pagexfer.guests.guest import Guest

_MIB = 1 << 20
_UNBOUNDED = 1 << 40  # bytes a second: a guest that never sleeps
_PATIENCE_SECONDS = 20


async def _until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(_PATIENCE_SECONDS):
        while not condition():  # noqa: ASYNC110 - what changes is memory that other processes write
            await trio.sleep(0.0003)


async def _run(guest: SimulatedGuest) -> None:
    await guest.hypervisor.resume()
    guest.gate.release()


async def _park(guest: SimulatedGuest) -> None:
    guest.gate.raise_flag()
    await _until(lambda: guest.gate.parked() == guest.gate.vcpus)


def _spin_until_parked(guest: SimulatedGuest) -> None:
    """As an SVSM that looks at once: what it saves then must be whole."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while guest.gate.parked() < guest.gate.vcpus:
        assert time.monotonic() < deadline


def _statuses(guest: SimulatedGuest) -> list[Status]:
    return [read_status(guest.memory.words, vcpu) for vcpu in range(guest.gate.vcpus)]


async def _until_steps(guest: SimulatedGuest, more: int) -> None:
    """Wait until every vCPU has written `more` pages from now."""
    goals = [status.steps + more for status in _statuses(guest)]
    await _until(
        lambda: all(status.steps >= goal for status, goal in zip(_statuses(guest), goals, strict=True))
    )


def _send(source: SimulatedGuest, destination: SimulatedGuest, gfns: NDArray[np.int64]) -> None:
    if gfns.size:
        destination.memory.write(gfns, source.memory.words[gfns])


def _hand_over(source: SimulatedGuest, destination: SimulatedGuest) -> None:
    for vcpu in range(source.gate.vcpus):
        destination.gate.load_state(vcpu, source.gate.save_state(vcpu))


async def _migrate_live(source: SimulatedGuest, destination: SimulatedGuest) -> NDArray[np.int64]:
    """All rounds but the last: the source ends parked. Returns the gfns that are still to be sent."""
    everything = np.arange(source.memory.pages, dtype=np.int64)
    destination.memory.adopt_states(everything, source.memory.states)
    source.tracker.start()
    _send(source, destination, everything)
    for _ in range(50):
        _send(source, destination, source.tracker.collect().gfns())
        await trio.lowlevel.checkpoint()
    await _until_steps(source, 3 * MAX_BATCH_PAGES)  # so that some of them are surely not sent yet
    await _park(source)
    return source.tracker.collect().gfns()


# Running and parking


async def test_begins_parked_and_stopped() -> None:
    with SimulatedGuest.boot(_MIB, 2, write_rate_bytes=_UNBOUNDED) as guest:
        port: Guest = guest
        assert (port.kind, port.gate.vcpus, port.memory.ram_bytes) == ("simulated", 2, _MIB)
        assert port.hypervisor.dirty_log is None
        assert guest.gate.parked() == 2
        assert guest.check().faults == ()
        await guest.hypervisor.resume()
        assert guest.gate.parked() == 2
        await guest.hypervisor.stop()
        guest.gate.release()
        assert guest.gate.parked() == 0
        assert [status.steps for status in _statuses(guest)] == [0, 0]
        await guest.hypervisor.resume()
        await _until_steps(guest, 1)


def test_all_ram_has_memory_behind_it() -> None:
    with SimulatedGuest.boot(_MIB, 1, write_rate_bytes=0, free=0.9) as guest:
        assert os.lseek(guest.memory.ram_fd, 0, os.SEEK_HOLE) == _MIB


async def test_two_vcpus_write_and_pass_the_check() -> None:
    with SimulatedGuest.boot(2 * _MIB, 2, write_rate_bytes=_UNBOUNDED, seed=5) as guest:
        await _run(guest)
        await _until_steps(guest, 3 * Layout.plan(2 * _MIB, 2).slice_pages)
        await _park(guest)
        result = guest.check()
        assert result.faults == ()
        assert all(status.round > 3 and status.ticks > 0 for status in result.statuses)


async def test_a_parked_guest_writes_nothing_and_goes_on() -> None:
    with SimulatedGuest.boot(_MIB, 2, write_rate_bytes=_UNBOUNDED) as guest:
        await _run(guest)
        await _until_steps(guest, 200)
        await _park(guest)
        before = guest.memory.words.copy()
        await guest.hypervisor.stop()
        await guest.hypervisor.resume()
        guest.gate.raise_flag()
        assert guest.gate.parked() == 2
        assert np.array_equal(guest.memory.words, before)
        guest.gate.release()
        guest.gate.release()
        await _until_steps(guest, 200)


async def test_a_vcpu_goes_on_from_what_was_loaded() -> None:
    with SimulatedGuest.boot(_MIB, 1, write_rate_bytes=_UNBOUNDED) as guest:
        await _run(guest)
        await _until_steps(guest, 100)
        await _park(guest)
        words, state = guest.memory.words.copy(), guest.gate.save_state(0)
        guest.gate.release()
        await _until_steps(guest, 1000)
        await _park(guest)
        guest.memory.words[:] = words
        guest.gate.load_state(0, state)
        assert guest.check().faults == ()
        guest.gate.release()
        await _until_steps(guest, 1000)
        await _park(guest)
        assert guest.check().faults == ()


async def test_flag_raised_and_lowered_in_any_rhythm() -> None:
    chance = random.Random(3)
    with SimulatedGuest.boot(_MIB, 2, write_rate_bytes=_UNBOUNDED) as guest:
        await _run(guest)
        steps = 0
        for _ in range(200):
            for _ in range(chance.randrange(3)):  # flags that no vCPU may have seen
                guest.gate.raise_flag()
                guest.gate.release()
            guest.gate.raise_flag()
            _spin_until_parked(guest)
            saved = [guest.gate.registers(vcpu).status for vcpu in range(2)]
            assert saved == _statuses(guest)
            assert sum(status.steps for status in saved) >= steps
            steps = sum(status.steps for status in saved)
            guest.gate.release()
        await _until_steps(guest, 1)
        await _park(guest)
        assert guest.check().faults == ()


async def test_check_wants_a_parked_guest() -> None:
    with SimulatedGuest.boot(_MIB, 1, write_rate_bytes=0) as guest:
        await _run(guest)
        with pytest.raises(GateError, match="parked"):
            guest.check()
        with pytest.raises(GateError, match="not parked"):
            guest.gate.save_state(0)


@pytest.mark.parametrize("gfn", [0, 15, STATUS_GFN + 1, PATTERN_GFN - 1])
async def test_check_finds_stray_writes_below_the_pattern(gfn: int) -> None:
    with SimulatedGuest.boot(_MIB, 1, write_rate_bytes=0) as guest:
        guest.memory.words[gfn, 511] = 1
        assert guest.check().faults == (f"1 unused low pages are not zero, first gfn {gfn}",)


# The hypervisor's part


def _is_stopped(process_id: int) -> bool:
    with open(f"/proc/{process_id}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] == "T"


async def test_stop_is_real_and_parks_nobody() -> None:
    with SimulatedGuest.boot(_MIB, 2, write_rate_bytes=_UNBOUNDED) as guest:
        await _run(guest)
        await _until_steps(guest, 1)
        for _ in range(20):
            await guest.hypervisor.stop()
            await guest.hypervisor.stop()
            assert all(_is_stopped(process_id) for process_id in guest.hypervisor.process_ids)
            await guest.hypervisor.resume()
        await guest.hypervisor.stop()
        guest.gate.raise_flag()
        assert guest.gate.parked() == 0
        await guest.hypervisor.resume()
        await guest.hypervisor.resume()
        await _until(lambda: guest.gate.parked() == 2)
        assert guest.check().faults == ()


async def test_idle_guest_only_ticks() -> None:
    with SimulatedGuest.boot(_MIB, 2, write_rate_bytes=0) as guest:
        guest.tracker.start()
        await _run(guest)
        await _until(lambda: all(status.ticks >= 3 for status in _statuses(guest)))
        await _park(guest)
        assert guest.tracker.collect().gfns().tolist() == [STATUS_GFN, STATUS_GFN + 1]
        result = guest.check()
        assert result.faults == ()
        assert [status.steps for status in result.statuses] == [0, 0]


async def test_write_rate_is_a_bound() -> None:
    rate = 16 * _MIB
    with SimulatedGuest.boot(2 * _MIB, 2, write_rate_bytes=rate) as guest:
        await guest.hypervisor.resume()
        begin = time.monotonic()
        guest.gate.release()
        await _until_steps(guest, 1000)
        await _park(guest)
        elapsed = time.monotonic() - begin
        written = sum(status.steps for status in guest.check().statuses) * PAGE_SIZE
        assert written <= rate * elapsed + 2 * burst_bytes(rate / 2)


async def test_device_state_carries_the_write_rate() -> None:
    with (
        SimulatedGuest.boot(_MIB, 1, write_rate_bytes=_UNBOUNDED) as source,
        SimulatedGuest.empty(_MIB, 1) as destination,
    ):
        _send_all(source, destination)
        await destination.hypervisor.load_device_state(await source.hypervisor.save_device_state())
        await _run(destination)
        await _until_steps(destination, 1000)


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: b"",
        lambda state: state + b"\0",
        lambda state: b"\0" + state[1:],
        lambda state: state[:4] + b"\2" + state[5:],
        lambda state: state[:6] + b"\1" + state[7:],
        lambda state: state[:8] + b"\xff" * 8,
    ],
)
async def test_malformed_device_state_is_refused(damage: Callable[[bytes], bytes]) -> None:
    with SimulatedGuest.boot(_MIB, 1, write_rate_bytes=5000) as guest:
        state = await guest.hypervisor.save_device_state()
        with pytest.raises(GuestError, match="device state"):
            await guest.hypervisor.load_device_state(damage(state))
        assert await guest.hypervisor.save_device_state() == state


async def test_death_of_a_vcpu_is_reported() -> None:
    with SimulatedGuest.boot(_MIB, 2, write_rate_bytes=_UNBOUNDED) as guest:
        await _run(guest)
        victim = guest.hypervisor.process_ids[1]
        await _ended_by(lambda: os.kill(victim, signal.SIGKILL), [victim])
        for call in (guest.hypervisor.stop, guest.hypervisor.resume):
            with pytest.raises(GuestError, match="vCPU 1 has ended with code -9"):
                await call()
        guest.gate.raise_flag()
        await _until(lambda: guest.gate.parked() == 1)
        with pytest.raises(GateError, match="vCPU 1 is not parked"):
            guest.gate.save_state(1)


# Migration by hand


def _send_all(source: SimulatedGuest, destination: SimulatedGuest) -> None:
    """All of a parked guest but its device state."""
    everything = np.arange(source.memory.pages, dtype=np.int64)
    destination.memory.adopt_states(everything, source.memory.states)
    _send(source, destination, everything)
    _hand_over(source, destination)


async def test_live_migration_by_hand() -> None:
    with (
        SimulatedGuest.boot(32 * _MIB, 2, write_rate_bytes=_UNBOUNDED) as source,
        SimulatedGuest.empty(32 * _MIB, 2) as destination,
    ):
        await _run(source)
        await _until_steps(source, 1)
        last = await _migrate_live(source, destination)
        _send(source, destination, last)
        _hand_over(source, destination)
        await destination.hypervisor.load_device_state(await source.hypervisor.save_device_state())
        assert np.array_equal(destination.memory.words, source.memory.words)
        assert np.array_equal(destination.memory.states, source.memory.states)
        assert source.check().faults == destination.check().faults == ()
        await _run(destination)
        await _until_steps(destination, 2 * Layout.plan(32 * _MIB, 2).slice_pages)
        await _park(destination)
        assert destination.check().faults == ()
        assert source.gate.parked() == 2
        source.gate.release()  # a move that fails late: the source goes on as if nothing had been
        await _until_steps(source, 100)
        await _park(source)
        assert source.check().faults == ()


async def test_missed_dirty_page_is_found_by_the_check_and_by_the_guest() -> None:
    with (
        SimulatedGuest.boot(2 * _MIB, 1, write_rate_bytes=_UNBOUNDED) as source,
        SimulatedGuest.empty(2 * _MIB, 1) as destination,
    ):
        await _run(source)
        await _until_steps(source, 1000)
        last = await _migrate_live(source, destination)
        stale = np.any(source.memory.words[last] != destination.memory.words[last], axis=1)
        missed = int(last[stale & (last >= PATTERN_GFN)][0])
        _send(source, destination, last[last != missed])
        _hand_over(source, destination)
        (fault,) = destination.check().faults
        assert "vCPU 0: 1 pages differ" in fault
        assert f"first gfn {missed}," in fault
        await destination.hypervisor.load_device_state(await source.hypervisor.save_device_state())
        await _run(destination)
        await _until(lambda: read_status(destination.memory.words, 0).errors > 0)
        await _park(destination)
        (status,) = destination.check().statuses
        assert (status.errors, status.bad_gfn) == (1, missed)


async def test_old_vcpu_state_breaks_the_guest_visibly() -> None:
    with (
        SimulatedGuest.boot(_MIB, 1, write_rate_bytes=_UNBOUNDED) as source,
        SimulatedGuest.empty(_MIB, 1) as destination,
    ):
        old = source.gate.save_state(0)
        await _run(source)
        await _until_steps(source, 1000)
        await _park(source)
        _send_all(source, destination)
        destination.gate.load_state(0, old)
        assert destination.check().faults == ("vCPU 0: its state and its status page disagree",)
        await destination.hypervisor.load_device_state(await source.hypervisor.save_device_state())
        await _run(destination)
        await _until(lambda: read_status(destination.memory.words, 0).errors > 0)


# vCPU state


async def test_empty_guest_waits_for_state() -> None:
    with SimulatedGuest.empty(_MIB, 2) as guest:
        assert not guest.memory.states.any()
        assert not guest.memory.words.any()
        assert "vCPU 1: it has no state" in guest.check().faults
        assert guest.gate.parked() == 2
        layout = Layout.plan(_MIB, 2)
        guest.gate.load_state(0, Registers.at_boot(layout, 0).to_bytes())
        with pytest.raises(GateError, match="vCPU 1 cannot be released"):
            guest.gate.release()
        with pytest.raises(GateError, match="vCPU 1 has no state yet"):
            guest.gate.save_state(1)
        assert guest.gate.parked() == 2
        for vcpu in (-1, 2):
            with pytest.raises(GateError, match="there is no vCPU"):
                guest.gate.load_state(vcpu, guest.gate.save_state(0))


async def test_bad_vcpu_states_are_refused() -> None:
    with SimulatedGuest.boot(_MIB, 2, write_rate_bytes=0) as guest:
        good = guest.gate.save_state(0)
        for bad in (b"", good[:-1], good + b"\0", bytes(REGISTERS_BYTES), guest.gate.save_state(1)):
            with pytest.raises(GateError):
                guest.gate.load_state(0, bad)
        assert guest.gate.save_state(0) == good
        await _run(guest)
        await _until(lambda: guest.gate.parked() == 0)
        with pytest.raises(GateError, match="not parked"):
            guest.gate.load_state(0, good)


# Ends


async def _ended_by(action: Callable[[], object], process_ids: list[int]) -> None:
    """Do `action` and wait until all `process_ids` have ended, reaped or not."""
    watches = [os.pidfd_open(process_id) for process_id in process_ids]
    try:
        action()
        with trio.fail_after(_PATIENCE_SECONDS):
            for watch in watches:
                await trio.lowlevel.wait_readable(watch)
    finally:
        for watch in watches:
            os.close(watch)


_PARENT = """
import os, sys, time, trio
from pagexfer.guests.simulated import SimulatedGuest

async def run(guest):
    await guest.hypervisor.resume()
    if sys.argv[1] == "running":
        guest.gate.release()
    if sys.argv[1] == "stopped":
        await guest.hypervisor.stop()

guest = SimulatedGuest.boot(1 << 20, 2, write_rate_bytes=1 << 40)
trio.run(run, guest)
print(os.getpid(), *guest.hypervisor.process_ids, flush=True)
time.sleep(60)
"""


# The parent's parent, in their session, adopts orphans: so the kernel wakes no stopped ones, as in an orphaned group.
_PR_SET_CHILD_SUBREAPER = 36
_GRANDPARENT = """
import ctypes, subprocess, sys

ctypes.CDLL(None).prctl(int(sys.argv[1]), 1, 0, 0, 0)
subprocess.run([sys.executable, "-c", *sys.argv[2:]], stdin=subprocess.DEVNULL)
sys.stdin.read()
"""


def _start_parent(state: str) -> subprocess.Popen[bytes]:
    arguments = ["-c", _GRANDPARENT, str(_PR_SET_CHILD_SUBREAPER), _PARENT, state]
    return subprocess.Popen([sys.executable, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE)


@pytest.mark.parametrize("state", ["running", "parked", "stopped"])
async def test_no_vcpu_outlives_its_parent(state: str) -> None:
    with _start_parent(state) as grandparent:
        assert grandparent.stdout is not None
        parent, *vcpus = (int(word) for word in grandparent.stdout.readline().split())
        assert len(vcpus) == 2
        await _ended_by(lambda: os.kill(parent, signal.SIGKILL), vcpus)


async def test_close_ends_everything() -> None:
    gc.collect()  # what tests before this one have left
    before = len(os.listdir("/proc/self/fd"))
    guest = SimulatedGuest.boot(_MIB, 2, write_rate_bytes=_UNBOUNDED)
    await _run(guest)
    await _until_steps(guest, 1)
    await _ended_by(guest.close, list(guest.hypervisor.process_ids))
    guest.close()
    del guest
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


async def test_close_ends_a_stopped_guest() -> None:
    guest = SimulatedGuest.empty(_MIB, 1)
    await _ended_by(guest.close, list(guest.hypervisor.process_ids))


@pytest.mark.parametrize(
    ("ram_bytes", "vcpus", "rate"),
    [(4096, 1, 0), (_MIB + 1, 1, 0), (_MIB, 0, 0), (_MIB, 33, 0), (_MIB, 1, -1)],
)
def test_impossible_guests_are_refused(ram_bytes: int, vcpus: int, rate: int) -> None:
    with pytest.raises(GuestError):
        SimulatedGuest.boot(ram_bytes, vcpus, write_rate_bytes=rate)
    if rate == 0:
        with pytest.raises(GuestError):
            SimulatedGuest.empty(ram_bytes, vcpus)


def test_a_vcpu_that_does_not_start_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    for executable in ("/bin/false", "/nonexistent"):
        monkeypatch.setattr(sys, "executable", executable)
        with pytest.raises(GuestError, match="vCPU 0"):
            SimulatedGuest.empty(_MIB, 1)
