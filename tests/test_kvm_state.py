"""vCPU state of the KVM guest: every part of it arrives, and nothing that is not a state is taken for one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagexfer.errors import GateError, GuestError, MalformedData
from pagexfer.guests.kvm import KvmGuest, cpuid, ioctls
from pagexfer.guests.kvm import state as kvm_state
from pagexfer.guests.kvm.hypervisor import parse_device_state_untrusted
from pagexfer.guests.kvm.state import Host, VcpuState, encode, parse_untrusted

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


class FakeKvm:
    """Stands for `fcntl.ioctl`: every call succeeds and changes nothing, but for the TSC."""

    def __init__(self, tsc_khz: int) -> None:
        self.tsc_khz = tsc_khz
        self.requests: list[int] = []

    def ioctl(self, _fd: int, request: int, argument: int | bytearray = 0, _mutate: bool = True) -> int:
        self.requests.append(request)
        if request == ioctls.KVM_SET_TSC_KHZ and isinstance(argument, int):
            self.tsc_khz = argument
        if request == ioctls.KVM_SET_MSRS and isinstance(argument, bytearray):
            count, _ = ioctls.ENTRIES_HEADER.unpack_from(argument)
            return int(count)
        return self.tsc_khz if request == ioctls.KVM_GET_TSC_KHZ else 0


@pytest.fixture
def kvm(monkeypatch: pytest.MonkeyPatch) -> FakeKvm:
    fake = FakeKvm(2_000_000)
    monkeypatch.setattr("fcntl.ioctl", fake.ioctl)
    return fake


def with_tsc(khz: int) -> VcpuState:
    return replace(parse_untrusted(state_blob()), tsc_khz=ioctls.TSC_KHZ.pack(khz))


def every_feature(entries: bytes) -> bytes:
    """CPUID entries that have all that their leaves can say."""
    full = b""
    for function, index, flags, *registers in ioctls.CPUID_ENTRY.iter_unpack(entries):
        for place, register in enumerate("abcd"):
            if register in cpuid._FEATURES.get((function, index), ""):
                registers[place] = 0xFFFF_FFFF
        full += ioctls.CPUID_ENTRY.pack(function, index, flags, *registers)
    return full


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

    async def test_each_vcpu_has_its_own_apic_id(self, source: KvmGuest, destination: KvmGuest) -> None:
        await run_and_park(source)
        move(source, destination)
        for guest in (source, destination):
            for vcpu in range(VCPUS):
                entries = parse_untrusted(guest.gate.save_state(vcpu)).cpuid
                own = [
                    (ebx >> 24) if function == 1 else edx
                    for function, _, _, _, ebx, _, edx in ioctls.CPUID_ENTRY.iter_unpack(entries)
                    if function in (0x1, 0xB, 0x1F)
                ]
                assert set(own) == {vcpu}

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

    async def test_features_that_this_host_lacks(self, source: KvmGuest, destination: KvmGuest) -> None:
        def enable(state: VcpuState) -> VcpuState:
            return replace(state, cpuid=every_feature(state.cpuid))

        whole = source.gate.save_state(0)
        with pytest.raises(GateError, match=r"this host lacks \d+ features .* CPUID 0x1.0 ecx bit"):
            destination.gate.load_state(0, edit_state(whole, enable))
        assert destination.gate.parked() == 0
        destination.gate.load_state(0, whole)

    async def test_a_tsc_that_this_host_cannot_have(self, source: KvmGuest, destination: KvmGuest) -> None:
        if source._machine._host.scales_tsc:
            pytest.skip("this host can give a vCPU a TSC of any speed")
        fastest = ioctls.TSC_KHZ.pack(99_000_000)
        state = edit_state(source.gate.save_state(0), lambda state: replace(state, tsc_khz=fastest))
        with pytest.raises(GateError, match="TSC"):
            destination.gate.load_state(0, state)

    async def test_malformed_states(self, destination: KvmGuest) -> None:
        for state in (b"", bytes(100), bytes(1 << 17)):
            with pytest.raises(GateError, match="vCPU 0 cannot take its state"):
                destination.gate.load_state(0, state)
            with pytest.raises(GuestError, match="device state"):
                await destination.hypervisor.load_device_state(state)


class TestOrder:
    def test_what_changes_registers_is_read_before_them(self, kvm: FakeKvm) -> None:
        kvm_state.save(-1, b"", Host(b"", (0x10,), ioctls.XSAVE_BYTES, scales_tsc=False))
        assert kvm.requests[:2] == [ioctls.KVM_GET_MP_STATE, ioctls.KVM_GET_VCPU_EVENTS]
        later = {ioctls.KVM_GET_SREGS, ioctls.KVM_GET_REGS, ioctls.KVM_GET_DEBUGREGS, ioctls.KVM_GET_MSRS}
        assert later <= set(kvm.requests[2:])


class TestTimeStampCounter:
    @pytest.mark.parametrize("khz", [2_000_000, 2_000_499, 1_999_501])
    def test_one_that_is_as_fast_is_left_alone(self, kvm: FakeKvm, khz: int) -> None:
        kvm_state.load(-1, with_tsc(khz), Host(b"", (), ioctls.XSAVE_BYTES, scales_tsc=False))
        assert ioctls.KVM_SET_TSC_KHZ not in kvm.requests

    @pytest.mark.parametrize("khz", [1_999_000, 2_001_000, 4_000_000])
    def test_one_that_differs_is_refused_where_it_cannot_be_scaled(self, kvm: FakeKvm, khz: int) -> None:
        with pytest.raises(GateError, match=f"TSC has {khz} kHz, this host's 2000000"):
            kvm_state.load(-1, with_tsc(khz), Host(b"", (), ioctls.XSAVE_BYTES, scales_tsc=False))
        assert ioctls.KVM_SET_MSRS not in kvm.requests

    @pytest.mark.parametrize("khz", [0, 0xFFFF_FFFF])
    def test_one_that_no_processor_has_is_refused(self, kvm: FakeKvm, khz: int) -> None:
        with pytest.raises(GateError, match=f"no processor's TSC has {khz} kHz"):
            kvm_state.load(-1, with_tsc(khz), Host(b"", (), ioctls.XSAVE_BYTES, scales_tsc=True))
        assert not kvm.requests

    def test_one_that_differs_is_scaled_before_its_msr_is_set(self, kvm: FakeKvm) -> None:
        state = replace(with_tsc(3_000_000), msrs=ioctls.MSR_ENTRY.pack(0x10, 0, 7))
        kvm_state.load(-1, state, Host(b"", (), ioctls.XSAVE_BYTES, scales_tsc=True))
        assert kvm.tsc_khz == 3_000_000
        assert kvm.requests.index(ioctls.KVM_SET_TSC_KHZ) < kvm.requests.index(ioctls.KVM_SET_MSRS)
        assert kvm_state.save(-1, b"", Host(b"", (), ioctls.XSAVE_BYTES, True)).tsc_khz == state.tsc_khz


class TestCpuid:
    ENTRIES = b"".join(
        ioctls.CPUID_ENTRY.pack(function, index, 0, 0x11, 0x22, 0x44, 0x88)
        for function, index in ((0x0, 0), (0x1, 0), (0x7, 0), (0xB, 0), (0xB, 1), (0x8000_001E, 0))
    )

    def test_a_host_with_the_same_or_more_will_do(self) -> None:
        assert cpuid.lacking(self.ENTRIES, self.ENTRIES) == []
        assert cpuid.lacking(self.ENTRIES, every_feature(self.ENTRIES)) == []
        assert cpuid.lacking(b"", self.ENTRIES) == []

    def test_each_feature_that_is_not_there_is_named(self) -> None:
        few = self.ENTRIES.replace(
            ioctls.CPUID_ENTRY.pack(0x7, 0, 0, 0x11, 0x22, 0x44, 0x88),
            ioctls.CPUID_ENTRY.pack(0x7, 0, 0, 0x10, 0x02, 0x44, 0x80),
        )
        assert cpuid.lacking(self.ENTRIES, few) == ["CPUID 0x7.0 ebx bit 5", "CPUID 0x7.0 edx bit 3"]
        assert len(cpuid.lacking(every_feature(self.ENTRIES), b"")) == (2 + 3) * 32

    def test_what_is_no_feature_may_differ(self) -> None:
        assert cpuid.lacking(cpuid.of_vcpu(self.ENTRIES, 3), self.ENTRIES) == []

    def test_a_vcpu_has_its_number_wherever_there_is_one(self) -> None:
        own = {
            (function, index): registers
            for function, index, _, *registers in ioctls.CPUID_ENTRY.iter_unpack(
                cpuid.of_vcpu(self.ENTRIES, 5)
            )
        }
        assert own[0x1, 0] == [0x11, 0x0500_0022, 0x44, 0x88]
        assert own[0xB, 0] == own[0xB, 1] == [0x11, 0x22, 0x44, 5]
        assert own[0x8000_001E, 0] == [5, 5, 0x44, 0x88]
        assert own[0x0, 0] == own[0x7, 0] == [0x11, 0x22, 0x44, 0x88]


def state_blob() -> bytes:
    return encode(
        VcpuState(
            cpuid=bytes(2 * ioctls.CPUID_ENTRY.size),
            sregs=bytes(ioctls.SREGS_BYTES),
            xcrs=bytes(ioctls.XCRS_BYTES),
            xsave=bytes(ioctls.XSAVE_BYTES),
            regs=bytes(ioctls.REGS_BYTES),
            msrs=bytes(3 * ioctls.MSR_ENTRY.size),
            vcpu_events=bytes(ioctls.VCPU_EVENTS_BYTES),
            debugregs=bytes(ioctls.DEBUGREGS_BYTES),
            mp_state=bytes(ioctls.MP_STATE_BYTES),
            tsc_khz=bytes(ioctls.TSC_KHZ.size),
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
