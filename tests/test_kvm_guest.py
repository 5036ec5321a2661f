"""The KVM guest: it really runs, parks, moves by hand to another VM, and finds every page or register that gets lost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import trio

from pagexfer.errors import GateError, GuestError
from pagexfer.guests import kvm
from pagexfer.guests.kvm import KvmGuest, ioctls, machine
from pagexfer.guests.kvm.hypervisor import parse_device_state_untrusted
from pagexfer.guests.kvm.image import CODE_GPA, GUEST_CODE
from pagexfer.guests.kvm.state import VcpuState, parse_untrusted
from pagexfer.guests.kvm.vcpu import BURST_SECONDS, PARK_PORT
from pagexfer.guests.pattern import RamCheck, page_content
from pagexfer.wire.page_state import PRIVATE

from .kvm_guests import (
    FULL_SPEED,
    RAM_BYTES,
    VCPUS,
    edit_state,
    errors,
    move,
    needs_kvm,
    park,
    progress,
    run_and_park,
    start,
    steps,
    ticks,
    until,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from pagexfer.guests.guest import Guest


@pytest.fixture
def source() -> Iterator[KvmGuest]:
    """A busy guest that has not started yet."""
    with KvmGuest.boot(RAM_BYTES, VCPUS, write_rate_bytes=FULL_SPEED) as guest:
        yield guest


@pytest.fixture
def destination() -> Iterator[KvmGuest]:
    with KvmGuest.empty(RAM_BYTES, VCPUS) as guest:
        yield guest


@needs_kvm
class TestRun:
    async def test_boots_makes_progress_and_parks_consistent(self, source: KvmGuest) -> None:
        assert source.gate.vcpus == source.gate.parked() == VCPUS
        assert source.check().consistent
        assert np.all(source.memory.states == PRIVATE)
        await run_and_park(source)
        result = source.check()
        assert result.consistent, result.faults
        assert result.activity > 2 * 1000
        assert all(status.ticks > 0 for status in result.statuses)

    async def test_has_the_shape_of_a_guest(self, source: KvmGuest) -> None:
        guest: Guest = source
        assert (guest.kind, guest.tracker) == ("kvm", None)
        assert guest.memory.ram_bytes == RAM_BYTES
        assert guest.hypervisor.dirty_log is not None

    def test_all_its_ram_has_memory_behind_it(self, source: KvmGuest) -> None:
        assert os.lseek(source.memory.ram_fd, 0, os.SEEK_HOLE) == RAM_BYTES

    async def test_parked_guest_stands_still_and_goes_on(self, source: KvmGuest) -> None:
        await run_and_park(source)
        before = source.memory.words.copy()
        registers = [parse_untrusted(source.gate.save_state(vcpu)).regs for vcpu in range(VCPUS)]
        for values in registers:  # the OUT of the park is done with
            rip = ioctls.REGS.unpack(values)[16] - CODE_GPA
            assert GUEST_CODE[rip - 2 : rip] == bytes((0xE6, PARK_PORT))
        await source.hypervisor.resume()
        assert [parse_untrusted(source.gate.save_state(vcpu)).regs for vcpu in range(VCPUS)] == registers
        assert np.array_equal(source.memory.words, before)
        source.gate.release()
        assert source.gate.parked() == 0
        await progress(source)
        await park(source)
        assert source.check().consistent

    async def test_every_park_in_a_row_is_a_new_one(self, source: KvmGuest) -> None:
        await start(source)
        for _ in range(100):
            await park(source)
            before = steps(source)
            assert source.check().consistent
            assert steps(source) == before
            source.gate.release()

    async def test_parks_at_once_when_asleep_for_pacing(self) -> None:
        with KvmGuest.boot(RAM_BYTES, VCPUS, write_rate_bytes=1) as guest:  # one page in more than an hour
            await start(guest)
            await until(lambda: min(steps(guest)) > 0)
            await park(guest)
            result = guest.check()
            assert result.consistent, result.faults
            assert max(steps(guest)) < 100

    async def test_stop_keeps_vcpus_from_running_and_resume_goes_on(self, source: KvmGuest) -> None:
        await start(source)
        await progress(source)
        await source.hypervisor.stop()
        await source.hypervisor.stop()
        before = source.memory.words.copy()
        source.gate.raise_flag()
        assert np.array_equal(source.memory.words, before)
        assert source.gate.parked() == 0
        with pytest.raises(GateError, match="vCPU 0 is not parked"):
            source.gate.save_state(0)
        await source.hypervisor.resume()
        await park(source)
        await source.hypervisor.stop()
        assert source.check().consistent
        source.gate.release()
        await source.hypervisor.resume()
        await progress(source)

    async def test_stop_and_resume_under_load_lose_nothing(self, source: KvmGuest) -> None:
        await start(source)
        for _ in range(50):
            await source.hypervisor.stop()
            assert all(vcpu.wait_outside(0) for vcpu in source._machine.vcpus)
            await source.hypervisor.resume()
        await progress(source)
        await park(source)
        result = source.check()
        assert result.consistent, result.faults

    async def test_stop_and_close_need_no_help_of_the_guest(self, source: KvmGuest) -> None:
        source.memory.words[8, 0] = 0xFEEB  # jmp to itself
        await start(source)
        await until(lambda: not any(vcpu.wait_outside(0) for vcpu in source._machine.vcpus))
        source.gate.raise_flag()
        await source.hypervisor.stop()
        assert all(vcpu.wait_outside(0) for vcpu in source._machine.vcpus)
        assert source.gate.parked() == 0
        await source.hypervisor.resume()
        await until(lambda: not any(vcpu.wait_outside(0) for vcpu in source._machine.vcpus))
        source.close()

    async def test_signals_that_the_process_blocks_do_not_hold_up_the_guest(self) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        try:
            with KvmGuest.boot(RAM_BYTES, VCPUS, write_rate_bytes=FULL_SPEED) as guest:
                await start(guest)
                for vcpu in guest._machine.vcpus:
                    assert vcpu._thread.ident is not None
                    signal.pthread_kill(vcpu._thread.ident, signal.SIGUSR1)
                await progress(guest)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    async def test_write_rate_is_kept(self) -> None:
        rate_bytes = 4 << 20
        with KvmGuest.boot(RAM_BYTES, VCPUS, write_rate_bytes=rate_bytes) as guest:
            started = time.monotonic()
            await start(guest)
            await until(lambda: sum(steps(guest)) >= 300)
            written = sum(steps(guest))
            elapsed = time.monotonic() - started
            # A batch per vCPU is written before it is paid for.
            batches = VCPUS * guest._machine.control.batch
            assert written <= rate_bytes / 4096 * (elapsed + BURST_SECONDS) + batches

    async def test_idle_guest_ticks_and_writes_no_page(self) -> None:
        with KvmGuest.boot(RAM_BYTES, VCPUS, write_rate_bytes=0) as guest:
            started = time.monotonic()
            await start(guest)
            await until(lambda: min(ticks(guest)) >= 10)
            ticked = max(ticks(guest))
            elapsed = time.monotonic() - started
            assert ticked <= (elapsed + BURST_SECONDS) * 100 + 1
            assert steps(guest) == [0, 0]
            await park(guest)
            assert guest.check().consistent

    def test_needs_no_main_thread(self) -> None:
        results: list[RamCheck] = []

        async def live() -> None:
            with KvmGuest.boot(RAM_BYTES, VCPUS, write_rate_bytes=FULL_SPEED) as guest:
                await run_and_park(guest)
                guest.gate.release()
                await guest.hypervisor.stop()
                await guest.hypervisor.resume()
                await park(guest)
                results.append(guest.check())

        thread = threading.Thread(target=trio.run, args=(live,))
        thread.start()
        thread.join()
        assert [result.consistent for result in results] == [True]

    async def test_a_vcpu_that_ends_on_its_own_is_reported(self, source: KvmGuest) -> None:
        source.memory.words[8] = 0xFFFF_FFFF_FFFF_FFFF  # no instruction: an exception without a handler
        await start(source)
        await until(lambda: all(vcpu.fault for vcpu in source._machine.vcpus))
        source.gate.raise_flag()
        assert source.gate.parked() == 0
        assert source.check().faults[0].startswith("vCPU 0 ended: KVM exit reason 8")
        with pytest.raises(GateError, match="vCPU 1 ended"):
            source.gate.save_state(1)

    async def test_close_ends_threads_of_a_running_guest_and_may_be_repeated(self) -> None:
        guest = KvmGuest.boot(RAM_BYTES, VCPUS, write_rate_bytes=FULL_SPEED)
        await start(guest)
        await progress(guest, 1)
        threads = [thread for thread in threading.enumerate() if thread.name.startswith("vcpu-")]
        assert len(threads) == VCPUS
        guest.close()
        guest.close()
        assert not any(thread.is_alive() for thread in threads)


@needs_kvm
class TestMove:
    async def test_guest_goes_on_at_the_destination(self, source: KvmGuest, destination: KvmGuest) -> None:
        await run_and_park(source)
        move(source, destination)
        await destination.hypervisor.load_device_state(await source.hypervisor.save_device_state())
        assert destination.gate.parked() == VCPUS
        assert destination.check() == source.check()
        before = steps(destination)
        await run_and_park(destination)
        result = destination.check()
        assert result.consistent, result.faults
        assert all(now >= then + 1000 for now, then in zip(steps(destination), before, strict=True))

    async def test_guest_moves_before_its_first_instruction(
        self, source: KvmGuest, destination: KvmGuest
    ) -> None:
        move(source, destination)
        await destination.hypervisor.load_device_state(await source.hypervisor.save_device_state())
        await run_and_park(destination)
        assert destination.check().consistent

    async def test_empty_destination_never_runs_without_a_state(self, destination: KvmGuest) -> None:
        assert not destination.memory.words.any()
        assert not destination.memory.states.any()
        assert destination.gate.parked() == 0
        await start(destination)
        await destination.hypervisor.stop()
        assert not any(vcpu._has_run for vcpu in destination._machine.vcpus)
        assert not destination.memory.words.any()
        with pytest.raises(GateError, match="not parked"):
            destination.gate.save_state(0)

    async def test_write_rate_travels_with_the_device_state(self, destination: KvmGuest) -> None:
        with KvmGuest.boot(RAM_BYTES, VCPUS, write_rate_bytes=4 << 20) as guest:
            state = await guest.hypervisor.save_device_state()
        await destination.hypervisor.load_device_state(state)
        assert parse_device_state_untrusted(await destination.hypervisor.save_device_state())[1] == 4 << 20
        assert destination._machine.control.batch > 0


def lose(words: NDArray[np.uint64], gfn: int) -> None:
    words[gfn] = 0


def make_stale(words: NDArray[np.uint64], gfn: int) -> None:
    words[gfn] = page_content(np.array([gfn]), int(words[gfn, 1]) - 1, 1)[0]


def tear(words: NDArray[np.uint64], gfn: int) -> None:
    words[gfn, 256:] = page_content(np.array([gfn]), int(words[gfn, 1]) - 1, 1)[0, 256:]


def flip(words: NDArray[np.uint64], gfn: int) -> None:
    words[gfn].view(np.uint8)[3000] ^= 0x10


def flip_checksum(words: NDArray[np.uint64], gfn: int) -> None:
    words[gfn, 511] ^= np.uint64(1)


def swap(words: NDArray[np.uint64], gfn: int) -> None:
    words[gfn] = words[gfn + 1]


@needs_kvm
class TestLoss:
    @pytest.mark.parametrize("damage", [lose, make_stale, tear, flip, flip_checksum, swap])
    async def test_damaged_page_is_found_by_check_and_by_the_guest(
        self,
        source: KvmGuest,
        destination: KvmGuest,
        damage: Callable[[NDArray[np.uint64], int], None],
    ) -> None:
        await run_and_park(source)
        move(source, destination)
        await destination.hypervisor.load_device_state(await source.hypervisor.save_device_state())
        damage(destination.memory.words, 100)
        assert "first gfn 100" in " ".join(destination.check().faults)
        await start(destination)
        await until(lambda: errors(destination) > 0)
        await progress(destination)
        await park(destination)
        assert errors(destination) == 1
        assert "last gfn 100" in " ".join(destination.check().faults)

    @pytest.mark.parametrize(
        ("start_byte", "name"),
        [(160, "XMM0"), (176, "XMM1"), (32 + 7 * 16, "MM7")],
        ids=lambda value: str(value),
    )
    async def test_lost_vector_register_breaks_the_guest(
        self, source: KvmGuest, destination: KvmGuest, start_byte: int, name: str
    ) -> None:
        await run_and_park(source)
        move(source, destination)
        await destination.hypervisor.load_device_state(await source.hypervisor.save_device_state())

        def zero(state: VcpuState) -> VcpuState:
            area = bytearray(state.xsave)
            assert any(area[start_byte : start_byte + 8]), name
            area[start_byte : start_byte + 8] = bytes(8)
            return replace(state, xsave=bytes(area))

        destination.gate.load_state(0, edit_state(source.gate.save_state(0), zero))
        await start(destination)
        await until(lambda: errors(destination) > 0)
        await park(destination)
        assert not destination.check().consistent

    async def test_lost_debug_register_is_found(self, source: KvmGuest, destination: KvmGuest) -> None:
        move(source, destination)
        lost = edit_state(
            source.gate.save_state(1), lambda state: replace(state, debugregs=bytes(8) + state.debugregs[8:])
        )
        destination.gate.load_state(1, lost)
        assert destination.check().faults == ("vCPU 1: its registers are not as its status page says",)

    async def test_lost_general_register_is_found(self, source: KvmGuest, destination: KvmGuest) -> None:
        await run_and_park(source)
        move(source, destination)
        r14 = slice(ioctls.REGS_R14 * 8, ioctls.REGS_R14 * 8 + 8)

        def step_back(state: VcpuState) -> VcpuState:
            position = int.from_bytes(state.regs[r14], "little") + 1
            return replace(
                state, regs=state.regs[: r14.start] + position.to_bytes(8, "little") + state.regs[r14.stop :]
            )

        destination.gate.load_state(0, edit_state(source.gate.save_state(0), step_back))
        assert destination.check().faults == ("vCPU 0: its registers are not as its status page says",)

    @pytest.mark.parametrize("gfn", [1, 4, 7, 8, 9])
    async def test_damaged_reserved_page_is_found(self, source: KvmGuest, gfn: int) -> None:
        await run_and_park(source)
        source.memory.words[gfn, 3] ^= np.uint64(0x1000)
        assert source.check().faults == (f"page {gfn} of code or tables is not as booted",)


@needs_kvm
class TestRefusals:
    def test_ram_too_big(self) -> None:
        with pytest.raises(GuestError, match="at most 3GiB"):
            KvmGuest.empty((3 << 30) + 4096, 1)

    def test_ram_too_small(self) -> None:
        with pytest.raises(GuestError, match="too small"):
            KvmGuest.boot(64 << 12, 1, write_rate_bytes=0)

    def test_negative_write_rate(self) -> None:
        with pytest.raises(GuestError, match="write rate"):
            KvmGuest.boot(RAM_BYTES, 1, write_rate_bytes=-1)

    async def test_no_such_vcpu(self, source: KvmGuest) -> None:
        for vcpu in (-1, VCPUS):
            with pytest.raises(GateError, match="there is no vCPU"):
                source.gate.save_state(vcpu)

    async def test_check_of_a_running_guest(self, source: KvmGuest) -> None:
        await start(source)
        with pytest.raises(GateError, match="not parked"):
            source.check()


class TestImage:
    @pytest.mark.skipif(
        shutil.which("as") is None or shutil.which("objcopy") is None,
        reason="GNU as and objcopy are missing: install binutils",
    )
    def test_embedded_code_is_the_assembled_source(self, tmp_path: Path) -> None:
        code = Path(kvm.__file__).with_name("guest.S")
        object_file, binary = tmp_path / "guest.o", tmp_path / "guest.bin"
        subprocess.run(["as", "--64", "-o", object_file, code], check=True)
        subprocess.run(["objcopy", "-O", "binary", "-j", ".text", object_file, binary], check=True)
        assert binary.read_bytes() == GUEST_CODE


class TestUnavailable:
    def test_missing_device(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(machine, "DEVICE", str(tmp_path / "kvm"))
        assert "is missing" in str(kvm.unavailable_reason())
        with pytest.raises(GuestError, match="use a simulated guest"):
            KvmGuest.empty(RAM_BYTES, 1)

    def test_device_that_is_not_kvm(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(machine, "DEVICE", "/dev/null")
        assert "is not KVM's" in str(kvm.unavailable_reason())
