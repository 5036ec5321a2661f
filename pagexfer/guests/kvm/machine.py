"""A virtual machine over /dev/kvm: RAM and control page in two memory slots, vCPUs, no devices but the pacing port."""

from __future__ import annotations

import fcntl
import os
import struct
from typing import TYPE_CHECKING, Final

from ...dirty.kvm_log import MemorySlot
from ...errors import GateError, GuestError
from ...wire.constants import PAGE_SIZE
from . import cpuid, ioctls, state
from .control import ControlPage, RunSwitch
from .image import first_debug_registers, first_registers, first_special_registers
from .vcpu import Vcpu, create_vcpu

if TYPE_CHECKING:
    from ...svsm.memory import GuestMemory
    from ..pattern import Layout

DEVICE: Final = "/dev/kvm"

# RAM is one slot from gpa 0, below the gap that x86 machines keep for devices; the control page is in that gap.
MAX_RAM_BYTES: Final = 3 << 30

RAM_SLOT: Final = 0

_KICK_TIMEOUT_S: Final = 5.0

# Pages written between two exits at full speed: a few milliseconds, so that the exit costs next to nothing.
_MAX_BATCH_PAGES: Final = 1024
_BATCH_GOAL_S: Final = 0.005
_IDLE_TICK_S: Final = 0.01


def unavailable_reason() -> str | None:
    """Why this process cannot run KVM guests, and what to do; None where it can."""
    if os.uname().machine != "x86_64":
        return f"KVM guests are x86-64, and this machine is {os.uname().machine}: use a simulated guest"
    try:
        device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return (
            f"{DEVICE} is missing: enable virtualisation, load kvm_amd or kvm_intel, or use a simulated guest"
        )
    except PermissionError:
        return f"{DEVICE} is not permitted: add this user to its group, or use a simulated guest"
    except OSError as error:
        return f"{DEVICE} cannot be opened ({error.strerror}): use a simulated guest"
    try:
        version = fcntl.ioctl(device, ioctls.KVM_GET_API_VERSION, 0)
        if version != ioctls.KVM_API_VERSION:
            return f"{DEVICE} speaks API {version}, not {ioctls.KVM_API_VERSION}: use a simulated guest"
    except OSError as error:
        return f"{DEVICE} is not KVM's ({error.strerror}): use a simulated guest"
    finally:
        os.close(device)
    return None


class Machine:
    """One VM with `memory` as its RAM and `count` vCPUs that wait for a state. `close` must be called."""

    def __init__(self, memory: GuestMemory, count: int) -> None:
        """Raises GuestError where KVM is missing or refuses."""
        reason = unavailable_reason()
        if reason is not None:
            raise GuestError(reason)
        self.control = ControlPage()
        self.switch = RunSwitch(self.control)
        self.vcpus: list[Vcpu] = []
        self.write_rate_bytes = 0
        self.ram_slot = MemorySlot(RAM_SLOT, 0, memory.pages, memory.words.ctypes.data)
        device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
        try:
            self.vm_fd = _create_vm(device)
            try:
                self._build(device, count)
            except BaseException:
                self.close()
                raise
        finally:
            os.close(device)

    def _build(self, device: int, count: int) -> None:
        self.ram_slot.register(self.vm_fd)
        self.control.slot.register(self.vm_fd)
        try:
            self._host = _describe(device, self.vm_fd)
            run_bytes = fcntl.ioctl(device, ioctls.KVM_GET_VCPU_MMAP_SIZE, 0)
        except OSError as error:
            raise GuestError(f"KVM did not describe its vCPUs: {error.strerror}") from error
        for index in range(count):
            self.vcpus.append(create_vcpu(self.vm_fd, index, run_bytes, self.switch))
        self.set_write_rate(0)

    def set_first_states(self, layout: Layout) -> None:
        """Put every vCPU before its first instruction, parked. Raises GuestError where KVM refuses."""
        for vcpu in self.vcpus:
            reset = bytearray(ioctls.SREGS_BYTES)
            try:
                self._give_cpuid(vcpu, cpuid.of_vcpu(self._host.cpuid, vcpu.index))
                fcntl.ioctl(vcpu.fd, ioctls.KVM_GET_SREGS, reset, True)
                fcntl.ioctl(vcpu.fd, ioctls.KVM_SET_SREGS, first_special_registers(bytes(reset)))
                fcntl.ioctl(vcpu.fd, ioctls.KVM_SET_REGS, first_registers(vcpu.index))
                debug_registers = first_debug_registers(vcpu.index, layout)
                fcntl.ioctl(vcpu.fd, ioctls.KVM_SET_DEBUGREGS, debug_registers)
            except OSError as error:
                raise GuestError(f"KVM refused the first state of a vCPU: {error.strerror}") from error
            except GateError as error:
                raise GuestError(str(error)) from error
            self.hold(vcpu)

    def hold(self, vcpu: Vcpu) -> None:
        """`vcpu`, which is out of the guest, now has a state: it counts as parked, and goes on when all is released."""
        with self.switch.lock:
            self.control.adopt_parked(vcpu.index)
            vcpu.runnable = True
            self.switch.changed.notify_all()

    def save_vcpu(self, vcpu: Vcpu) -> state.VcpuState:
        """Raises GateError where KVM refuses. The vCPU is out of the guest."""
        return state.save(vcpu.fd, vcpu.cpuid, self._host)

    def load_vcpu(self, vcpu: Vcpu, saved: state.VcpuState) -> None:
        """Raises GateError where this machine cannot hold `saved`. The vCPU is out of the guest."""
        state.check_fits(saved, self._host)
        # Once a vCPU has run, KVM takes at most what it would give back, which by kind of KVM is not what it was given.
        if saved.cpuid != vcpu.cpuid:
            self._give_cpuid(vcpu, saved.cpuid)
        state.load(vcpu.fd, saved, self._host)

    def set_write_rate(self, write_rate_bytes: int) -> None:
        """Pace all vCPUs together to `write_rate_bytes` per second of page writes; 0: an idle guest."""
        pages_per_second = write_rate_bytes / PAGE_SIZE / len(self.vcpus)
        with self.switch.lock:
            self.write_rate_bytes = write_rate_bytes
            if write_rate_bytes == 0:
                self.control.batch = 0
                self.switch.batch_seconds = _IDLE_TICK_S
            else:
                self.control.batch = min(max(1, int(pages_per_second * _BATCH_GOAL_S)), _MAX_BATCH_PAGES)
                self.switch.batch_seconds = self.control.batch / pages_per_second
            self.switch.changed.notify_all()

    def set_throttle(self, percentage: int) -> None:
        """Keep all vCPUs from running for so much of the time."""
        with self.switch.lock:
            self.switch.throttle = percentage
            self.switch.changed.notify_all()

    def set_running(self, running: bool) -> None:
        """Let vCPUs enter the guest, or kick them out; `wait_stopped` waits for the end of that."""
        with self.switch.lock:
            self.switch.running = running
            self._apply_switch(kick=not running)

    def wait_stopped(self, timeout: float = _KICK_TIMEOUT_S) -> None:
        """Raises GuestError where a vCPU is still in the guest after `timeout` seconds each."""
        for vcpu in self.vcpus:
            if not vcpu.wait_outside(timeout):
                raise GuestError(f"vCPU {vcpu.index} did not leave the guest within {timeout:g} s")

    def close(self) -> None:
        """End all threads and give the VM back. Calling it again changes nothing.

        Raises GuestError, with nothing given back, where a vCPU does not leave the guest.
        """
        with self.switch.lock:
            self.switch.closed = True
            self._apply_switch(kick=True)
        self.wait_stopped()
        for vcpu in self.vcpus:
            vcpu.close()
        self.vcpus.clear()
        if self.vm_fd >= 0:
            os.close(self.vm_fd)
            self.vm_fd = -1

    def _give_cpuid(self, vcpu: Vcpu, given: bytes) -> None:
        state.give_cpuid(vcpu.fd, given)
        vcpu.cpuid = given

    def _apply_switch(self, *, kick: bool) -> None:
        self.switch.changed.notify_all()
        if kick:
            for vcpu in self.vcpus:
                vcpu.kick()


def _create_vm(device: int) -> int:
    try:
        return fcntl.ioctl(device, ioctls.KVM_CREATE_VM, 0)
    except OSError as error:
        raise GuestError(f"KVM refused a new VM ({error.strerror}): use a simulated guest") from error


def _describe(device: int, vm_fd: int) -> state.Host:
    """Raises OSError where KVM does not say."""
    xsave_bytes = fcntl.ioctl(vm_fd, ioctls.KVM_CHECK_EXTENSION, ioctls.KVM_CAP_XSAVE2)
    scales_tsc = fcntl.ioctl(vm_fd, ioctls.KVM_CHECK_EXTENSION, ioctls.KVM_CAP_TSC_CONTROL)
    return state.Host(
        cpuid.offered(device),
        _msr_indices(device),
        max(ioctls.XSAVE_BYTES, xsave_bytes),
        scales_tsc > 0,
    )


def _msr_indices(device: int) -> tuple[int, ...]:
    """Every MSR that KVM saves and restores for a guest."""
    most = state.MAX_MSRS
    # struct kvm_msr_list: number of indices u32, indices u32
    buffer = bytearray(4 + 4 * most)
    struct.pack_into("<I", buffer, 0, most)
    fcntl.ioctl(device, ioctls.KVM_GET_MSR_INDEX_LIST, buffer, True)
    (count,) = struct.unpack_from("<I", buffer)
    return struct.unpack_from(f"<{count}I", buffer, 4)
