"""vCPU state of the KVM guest: every part of it arrives, and nothing that is not a state is taken for one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagexfer.errors import GateError, GuestError, MalformedData
from pagexfer.guests.kvm import KvmGuest, ioctls
from pagexfer.guests.kvm.hypervisor import parse_device_state_untrusted
from pagexfer.guests.kvm.state import VcpuState, encode, parse_untrusted

from .kvm_guests import (
    FULL_SPEED,
    RAM_BYTES,
    VCPUS,
    edit_state,
    move,
    needs_kvm,
    park,
    progress,
    run_and_park,
    steps,
    until,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

# MSRs that go on ticking: IA32_TIME_STAMP_COUNTER, HV_X64_MSR_VP_RUNTIME, HV_X64_MSR_TIME_REF_COUNT.
TICKING_MSRS = {0x10, 0x4000_0010, 0x4000_0020}

UNKNOWN_MSR = ioctls.MSR_ENTRY.pack(0x1234_5678, 0, 1)


@pytest.fixture
def source() -> Iterator[KvmGuest]:
    """A busy guest that has not started yet."""
    with KvmGuest.boot(RAM_BYTES, VCPUS, write_rate_bytes=FULL_SPEED) as guest:
        yield guest


@pytest.fixture
def destination() -> Iterator[KvmGuest]:
    with KvmGuest.empty(RAM_BYTES, VCPUS) as guest:
        yield guest


def msrs_of(state: VcpuState) -> dict[int, int]:
    return {index: value for index, _, value in ioctls.MSR_ENTRY.iter_unpack(state.msrs)}


@needs_kvm
class TestSaveAndLoad:
    async def test_state_saved_again_is_the_same(self, source: KvmGuest, destination: KvmGuest) -> None:
        await run_and_park(source)
        move(source, destination)
        for vcpu in range(VCPUS):
            saved = parse_untrusted(source.gate.save_state(vcpu))
            again = parse_untrusted(destination.gate.save_state(vcpu))
            assert msrs_of(saved).keys() == msrs_of(again).keys()
            changed = {index for index, value in msrs_of(saved).items() if msrs_of(again)[index] != value}
            assert changed <= TICKING_MSRS
            assert encode(replace(saved, msrs=b"")) == encode(replace(again, msrs=b""))

    async def test_every_part_of_a_state_is_loaded(self, source: KvmGuest, destination: KvmGuest) -> None:
        def colour(state: VcpuState) -> VcpuState:
            kernel_gs_base = ioctls.MSR_ENTRY.pack(0xC000_0102, 0, 0x1234_5000)
            msrs = [
                kernel_gs_base if entry[:4] == kernel_gs_base[:4] else entry
                for entry in (state.msrs[start : start + 16] for start in range(0, len(state.msrs), 16))
            ]
            assert kernel_gs_base in msrs
            # struct kvm_xcrs: number u32, flags u32, then xcr u32, reserved u32, value u64: XCR0 = x87 and SSE
            assert state.xcrs[16:24] == (1).to_bytes(8, "little")
            xcrs = state.xcrs[:16] + (3).to_bytes(8, "little") + state.xcrs[24:]
            # struct kvm_vcpu_events: nmi.masked is byte 14
            events = bytearray(state.vcpu_events)
            events[14] = 1
            return replace(state, msrs=b"".join(msrs), xcrs=xcrs, vcpu_events=bytes(events))

        coloured = edit_state(source.gate.save_state(0), colour)
        destination.gate.load_state(0, coloured)
        wanted, found = parse_untrusted(coloured), parse_untrusted(destination.gate.save_state(0))
        assert (found.xcrs, found.vcpu_events) == (wanted.xcrs, wanted.vcpu_events)
        assert msrs_of(found)[0xC000_0102] == 0x1234_5000

    async def test_state_may_be_loaded_again_into_a_parked_vcpu(self, source: KvmGuest) -> None:
        await run_and_park(source)
        ram, states = source.memory.words.copy(), [source.gate.save_state(vcpu) for vcpu in range(VCPUS)]
        source.gate.release()
        await progress(source)
        with pytest.raises(GateError, match="not parked"):
            source.gate.load_state(0, states[0])
        await park(source)
        source.memory.words[:] = ram
        assert "registers" in " ".join(source.check().faults)
        for vcpu in range(VCPUS):
            source.gate.load_state(vcpu, states[vcpu])
        assert source.check().consistent
        await run_and_park(source)
        assert source.check().consistent


@needs_kvm
class TestRefusedState:
    async def test_msr_that_this_host_cannot_hold(self, source: KvmGuest, destination: KvmGuest) -> None:
        state = edit_state(
            source.gate.save_state(0), lambda state: replace(state, msrs=UNKNOWN_MSR + state.msrs)
        )
        with pytest.raises(GateError, match="MSR 0x12345678"):
            destination.gate.load_state(0, state)
        assert destination.gate.parked() == 0
        destination.gate.load_state(0, source.gate.save_state(0))
        assert destination.gate.parked() == 1

    async def test_vcpu_with_half_a_state_does_not_run(self, source: KvmGuest) -> None:
        await run_and_park(source)
        whole = source.gate.save_state(0)
        half = edit_state(whole, lambda state: replace(state, msrs=UNKNOWN_MSR + state.msrs))
        with pytest.raises(GateError, match="MSR 0x12345678"):
            source.gate.load_state(0, half)
        assert source.gate.parked() == 1
        before = steps(source)
        source.gate.release()
        await until(lambda: steps(source)[1] > before[1])
        assert steps(source)[0] == before[0]
        source.gate.raise_flag()
        source.gate.load_state(0, whole)
        await until(lambda: source.gate.parked() == VCPUS)
        assert source.check().consistent

    async def test_xsave_area_of_another_processor(self, source: KvmGuest, destination: KvmGuest) -> None:
        state = edit_state(
            source.gate.save_state(0), lambda state: replace(state, xsave=state.xsave + bytes(64))
        )
        with pytest.raises(GateError, match="XSAVE area"):
            destination.gate.load_state(0, state)

    async def test_malformed_states(self, destination: KvmGuest) -> None:
        for state in (b"", bytes(100), bytes(1 << 17)):
            with pytest.raises(GateError, match="vCPU 0 cannot take its state"):
                destination.gate.load_state(0, state)
            with pytest.raises(GuestError, match="device state"):
                await destination.hypervisor.load_device_state(state)


def state_blob() -> bytes:
    return encode(
        VcpuState(
            cpuid=bytes(2 * ioctls.CPUID_ENTRY_BYTES),
            sregs=bytes(ioctls.SREGS_BYTES),
            xcrs=bytes(ioctls.XCRS_BYTES),
            xsave=bytes(ioctls.XSAVE_BYTES),
            regs=bytes(ioctls.REGS_BYTES),
            msrs=bytes(3 * ioctls.MSR_ENTRY.size),
            vcpu_events=bytes(ioctls.VCPU_EVENTS_BYTES),
            debugregs=bytes(ioctls.DEBUGREGS_BYTES),
            mp_state=bytes(ioctls.MP_STATE_BYTES),
        )
    )


class TestStateBlob:
    def test_round_trip(self) -> None:
        assert encode(parse_untrusted(state_blob())) == state_blob()

    def test_no_prefix_is_a_state(self) -> None:
        blob = state_blob()
        for length in range(len(blob)):
            with pytest.raises(MalformedData):
                parse_untrusted(blob[:length])

    def test_trailing_bytes(self) -> None:
        with pytest.raises(MalformedData):
            parse_untrusted(state_blob() + b"\0")

    @given(st.binary(max_size=300))
    def test_any_bytes(self, blob: bytes) -> None:
        for candidate in (blob, state_blob()[:16] + blob, state_blob()[:24] + blob):
            with pytest.raises(MalformedData):
                parse_untrusted(candidate)

    @given(st.data())
    def test_flipped_bits_are_refused_or_seen(self, data: st.DataObject) -> None:
        blob = bytearray(state_blob())
        blob[data.draw(st.integers(0, len(blob) - 1))] ^= data.draw(st.integers(1, 255))
        try:
            parsed = parse_untrusted(bytes(blob))
        except MalformedData:
            return
        assert encode(parsed) == bytes(blob) != state_blob()

    @given(st.binary(max_size=40))
    def test_any_device_state(self, state: bytes) -> None:
        with pytest.raises(MalformedData):
            parse_device_state_untrusted(state)
