"""One vCPU: its file descriptor and the thread that runs it.

The thread is kicked out of KVM_RUN by a signal that is blocked in this thread and unblocked by KVM within KVM_RUN only
(KVM_SET_SIGNAL_MASK). So it needs no handler and hence no main thread, it is never delivered to Python code, and a kick
that comes just before KVM_RUN stays pending and ends it at once.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import signal
import struct
import threading
import time
from typing import TYPE_CHECKING, Final

from ...errors import GateError, GuestError
from ..duty_cycle import DutyCycle
from . import ioctls

if TYPE_CHECKING:
    from .control import RunSwitch

KICK_SIGNAL: Final = signal.SIGRTMIN

# Ports of guest.S
PACE_PORT: Final = 0x10
PARK_PORT: Final = 0x11

# A vCPU that was late (its thread had no CPU, or it stood still) catches up at most this much of its write rate.
BURST_SECONDS: Final = 0.02

# struct kvm_signal_mask: length u32 of the set, then the set of signals that are blocked within KVM_RUN
_SIGNAL_MASK: Final = struct.Struct("<IQ")


class Vcpu:
    """vCPU number `index` of the VM behind `vm_fd`. It runs where `switch` and its own flag let it.

    `cpuid` has the entries that it was given. `runnable` is false until it has a state worth running. `fault` says why it
    can never run again, None while it can.
    """

    def __init__(self, vm_fd: int, index: int, run_bytes: int, switch: RunSwitch) -> None:
        self.index = index
        self.cpuid = b""
        self.runnable = False
        self.fault: str | None = None
        self._switch = switch
        self._in_guest = False
        self._has_run = False
        self._ioctl = ctypes.CDLL(None, use_errno=True).ioctl
        self._ioctl.argtypes = ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong
        self._cycle = DutyCycle()
        self._due = 0.0  # in the guest's time, which stands still while the vCPU is throttled
        self.fd = fcntl.ioctl(vm_fd, ioctls.KVM_CREATE_VCPU, index)
        try:
            fcntl.ioctl(self.fd, ioctls.KVM_SET_SIGNAL_MASK, _mask_in_guest())
            self._run = mmap.mmap(self.fd, run_bytes, mmap.MAP_SHARED)
        except BaseException:
            os.close(self.fd)
            raise
        self._thread = threading.Thread(target=self._loop, name=f"vcpu-{index}", daemon=True)

    def start_thread(self) -> None:
        self._thread.start()

    def kick(self) -> None:
        """Get the thread out of the guest. The caller holds the switch's lock."""
        if self._in_guest:
            signal.pthread_kill(self._thread.ident or 0, KICK_SIGNAL)

    def wait_outside(self, timeout: float) -> bool:
        """Wait until the thread is out of the guest; False after `timeout` seconds."""
        with self._switch.lock:
            return self._switch.left_guest.wait_for(lambda: not self._in_guest, timeout)

    @property
    def is_parked(self) -> bool:
        """Whether it has a state, has raised its own flag for the park that is wanted, and can still go on."""
        return self.runnable and self.fault is None and self._switch.control.parked(self.index)

    def require_readable(self, timeout: float) -> None:
        """Return when registers may be read: parked and out of the guest. Raises GateError where it is not parked.

        The own flag goes up an instant before the OUT that ends KVM_RUN, hence a short wait.
        """
        if self.fault is not None:
            raise GateError(f"vCPU {self.index} ended: {self.fault}")
        if not self.is_parked:
            raise GateError(f"vCPU {self.index} is not parked")
        if not self.wait_outside(timeout):
            raise GateError(
                f"vCPU {self.index} raised its flag but did not leave the guest within {timeout:g} s"
            )

    def require_writable(self, timeout: float) -> None:
        """Return when a state may be loaded: parked, or never run. Raises GateError otherwise."""
        if self._has_run and self.runnable:
            self.require_readable(timeout)

    def close(self) -> None:
        """End the thread, which the switch has been told by now, and give up the vCPU."""
        if self._thread.ident is not None:
            self._thread.join()
        self._run.close()
        os.close(self.fd)

    def _loop(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {KICK_SIGNAL})
        while self._wait_for_turn():
            self._enter_guest()

    def _wait_for_turn(self) -> bool:
        """Sleep until the guest may be entered; False where that will never be."""
        switch = self._switch
        with switch.lock:
            self._in_guest = False
            switch.left_guest.notify_all()
            while not switch.closed:
                if self._may_run():
                    # A wanted park is neither paced nor throttled: the way to the next step boundary is part of the
                    # black-out.
                    pause = 0.0 if switch.control.park_flag else self._pause()
                    if pause <= 0:
                        self._in_guest = self._has_run = True
                        return True
                    switch.changed.wait(pause)
                else:
                    switch.changed.wait()
        return False

    def _pause(self) -> float:
        """Seconds until pace and throttle let the vCPU run."""
        now = time.monotonic()
        held = self._cycle.held_s(now, self._switch.throttle)
        return max(held, self._due - self._cycle.guest_time(now))

    def _may_run(self) -> bool:
        can_run = self.runnable and self.fault is None
        return can_run and self._switch.running and not self._switch.control.parked(self.index)

    def _enter_guest(self) -> None:
        if not self._kvm_run():
            return
        (reason,) = ioctls.RUN_EXIT_REASON.unpack_from(self._run, ioctls.RUN_EXIT_REASON_OFFSET)
        if reason == ioctls.KVM_EXIT_IO:
            self._handle_port()
        else:
            self.fault = f"KVM exit reason {reason} that the guest code never causes"

    def _kvm_run(self) -> bool:
        """Enter the guest. True where it left on its own, false where a kick or a failure ended it."""
        # Not fcntl.ioctl: Python 3.14 calls again where a signal ended the call: here for ever, as it is pending.
        if self._ioctl(self.fd, ioctls.KVM_RUN, 0) >= 0:
            return True
        error = ctypes.get_errno()
        if error == errno.EINTR:
            while signal.sigtimedwait({KICK_SIGNAL}, 0) is not None:
                pass
        else:
            self.fault = f"KVM_RUN failed: {os.strerror(error)}"
        return False

    def _handle_port(self) -> None:
        access = ioctls.RUN_IO.unpack_from(self._run, ioctls.RUN_IO_OFFSET)
        if access == (ioctls.KVM_EXIT_IO_OUT, 1, PACE_PORT):
            now = self._cycle.guest_time(time.monotonic())
            self._due = max(self._due, now - BURST_SECONDS) + self._switch.batch_seconds
        elif access == (ioctls.KVM_EXIT_IO_OUT, 1, PARK_PORT):
            self._complete_exit()
        else:
            self.fault = f"access to port {access[2]:#x} that this machine does not have"

    def _complete_exit(self) -> None:
        """Let KVM finish the OUT of the last exit, which it may do no sooner than in the next KVM_RUN.

        Before that rip may stand at the OUT or behind it, by kind of KVM, and registers are not fit to be saved.
        """
        self._run[ioctls.RUN_IMMEDIATE_EXIT_OFFSET] = 1
        self._kvm_run()
        self._run[ioctls.RUN_IMMEDIATE_EXIT_OFFSET] = 0


def _mask_in_guest() -> bytes:
    """struct kvm_signal_mask: what this thread blocks, and hence those it starts do, without the kick.

    To unblock more would end every KVM_RUN at once while such a signal is pending.
    """
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ()) - {KICK_SIGNAL}
    return _SIGNAL_MASK.pack(8, sum(1 << (number - 1) for number in blocked))


def create_vcpu(vm_fd: int, index: int, run_bytes: int, switch: RunSwitch) -> Vcpu:
    """A vCPU whose thread waits for its turn. Raises GuestError where KVM refuses."""
    try:
        vcpu = Vcpu(vm_fd, index, run_bytes, switch)
    except OSError as error:
        raise GuestError(f"KVM refused vCPU {index}: {error.strerror}") from error
    vcpu.start_thread()
    return vcpu
