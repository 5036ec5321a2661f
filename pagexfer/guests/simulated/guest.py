"""The simulated guest: RAM in a memfd, one process a vCPU, and the self-checking pattern as its workload.

RAM, dirty map and control page are three memfds that each vCPU process maps for itself, so the guest really
writes beside the migration, on other cores and without the interpreter lock of the engine. What SEV-SNP does
in hardware (RMP, VMPL) is emulated; everything else is the real thing.
"""

from __future__ import annotations

import mmap
import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from ...dirty.byte_map import ByteMapTracker
from ...errors import GateError, GuestError
from ...svsm.memory import GuestMemory
from ..pattern import PATTERN_GFN, STATUS_GFN, Layout, RamCheck, check_ram, fill, read_status
from ..simulated_vcpu.control import MAX_RATE, ControlPage
from ..simulated_vcpu.registers import Registers
from .gate import SimulatedGate
from .hypervisor import KIND, SimulatedHypervisor

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

_IMPORT_ROOT: Final = Path(__file__).resolve().parents[3]

# A process has this long to start and import numpy, also on a machine that is busy with other tests.
_START_TIMEOUT_SECONDS: Final = 60.0


class SimulatedGuest:
    """A guest on processes (`guests.guest.Guest`). It lives until `close`, or as a context manager.

    Both constructors give a machine that is stopped and whose vCPUs are parked; `hypervisor.resume()` and
    `gate.release()`, in any order, let it run.
    """

    def __init__(self, ram_bytes: int, vcpus: int, write_rate_bytes: int) -> None:
        if not 0 <= write_rate_bytes <= MAX_RATE:
            raise GuestError(f"a write rate is 0 to 2^63 bytes a second, not {write_rate_bytes}")
        self._processes: list[subprocess.Popen[bytes]] = []
        self._bells: list[socket.socket] = []
        self._lifelines: list[int] = []
        self._marks_fd = -1
        self.memory = GuestMemory.allocate(ram_bytes)
        try:
            self._marks_fd = os.memfd_create("guest-dirty-map", os.MFD_CLOEXEC)
            os.ftruncate(self._marks_fd, self.memory.pages)
            mapping = mmap.mmap(self._marks_fd, self.memory.pages, mmap.MAP_SHARED)
            self._control = ControlPage.create(vcpus, write_rate_bytes)
        except OSError as error:
            self._close_memory()
            raise GuestError(f"a simulated guest cannot have its memory: {error.strerror}") from error
        marks = np.frombuffer(mapping, dtype=np.uint8)
        self.tracker = ByteMapTracker(marks)
        self.gate = SimulatedGate(self._control, self._bells, self.memory.pages)
        self.hypervisor = SimulatedHypervisor(self._control, self._processes)

    @classmethod
    def boot(
        cls, ram_bytes: int, vcpus: int, *, write_rate_bytes: int, free: float = 0.25, seed: int = 1
    ) -> Self:
        """A guest with its workload in place.

        `write_rate_bytes` a second is for all vCPUs together, 0 is an idle guest; `free` is the part of RAM
        that stays zero. Raises GuestError where RAM is too small or a process does not start.
        """
        layout = Layout.plan(ram_bytes, vcpus, free=free, seed=seed)
        guest = cls(ram_bytes, vcpus, write_rate_bytes)
        try:
            # All of it, also what stays zero: RAM of a confidential guest is pinned.
            guest.memory.prefault(0, ram_bytes)
            fill(guest.memory.words, layout)
            guest.memory.launch()
            for vcpu in range(vcpus):
                guest._control.set_registers(vcpu, Registers.at_boot(layout, vcpu).to_bytes())
            guest._start()
        except BaseException:
            guest.close()
            raise
        return guest

    @classmethod
    def empty(cls, ram_bytes: int, vcpus: int) -> Self:
        """A machine to migrate to: zero RAM, no page validated, vCPUs that wait for their state.

        Raises GuestError as `boot` does.
        """
        Layout.plan(ram_bytes, vcpus)
        guest = cls(ram_bytes, vcpus, 0)
        try:
            guest._start()
        except BaseException:
            guest.close()
            raise
        return guest

    @property
    def kind(self) -> str:
        return KIND

    def check(self) -> RamCheck:
        """Check all of RAM, and vCPU state against RAM. Raises GateError unless all vCPUs are parked."""
        vcpus = self.gate.vcpus
        if self.gate.parked() != vcpus:
            raise GateError("a guest is checked while it is parked: raise the flag and wait for every vCPU")
        words = self.memory.words
        result = check_ram(words, vcpus)
        faults = list(result.faults)
        for first, end in ((0, STATUS_GFN), (STATUS_GFN + vcpus, PATTERN_GFN)):
            used = np.flatnonzero(np.any(words[first:end], axis=1))
            if used.size:
                faults.append(f"{used.size} unused low pages are not zero, first gfn {first + int(used[0])}")
        for vcpu in range(vcpus):
            if self._control.registers(vcpu) is None:
                faults.append(f"vCPU {vcpu}: it has no state")
            elif self.gate.registers(vcpu).status != read_status(words, vcpu):
                faults.append(f"vCPU {vcpu}: its state and its status page disagree")
        return RamCheck(result.statuses, tuple(faults))

    def close(self) -> None:
        """End all vCPU processes and give memory back. Calling it again changes nothing."""
        # Killed and not asked: a vCPU has nothing to put in order, and one that is stopped would not hear.
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        for bell in self._bells:
            bell.close()
        while self._lifelines:
            os.close(self._lifelines.pop())
        self._control.close()
        self._close_memory()

    def _close_memory(self) -> None:
        if self._marks_fd >= 0:
            os.close(self._marks_fd)
            self._marks_fd = -1
        self.memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _start(self) -> None:
        """Start the vCPU processes, let each come to its park, and stop them as the hypervisor would."""
        for vcpu in range(self._control.vcpus):
            self._spawn(vcpu)
        for vcpu, bell in enumerate(self._bells):
            bell.settimeout(_START_TIMEOUT_SECONDS)
            try:
                started = bell.recv(1)
            except TimeoutError:
                started = b""
            if not started:
                raise GuestError(f"the process of vCPU {vcpu} did not start: its output says why")
            bell.setblocking(False)
        for process in self._processes:
            process.send_signal(signal.SIGSTOP)

    def _spawn(self, vcpu: int) -> None:
        with ExitStack() as its_ends:
            try:
                bell, vcpu_bell = socket.socketpair()
                its_ends.callback(vcpu_bell.close)
                self._bells.append(bell)
                lifeline_end, lifeline = os.pipe()
                its_ends.callback(os.close, lifeline_end)
                self._lifelines.append(lifeline)
                inherited = (
                    self.memory.ram_fd,
                    self._marks_fd,
                    self._control.fd,
                    vcpu_bell.fileno(),
                    lifeline_end,
                )
                arguments = [str(number) for number in (vcpu, *inherited)]
                process = subprocess.Popen(
                    [sys.executable, "-m", "pagexfer.guests.simulated_vcpu", *arguments],
                    pass_fds=inherited,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    env=_environment(),
                    process_group=0,  # Ctrl-C at a terminal is for the parent, which closes its guests
                )
            except OSError as error:
                raise GuestError(f"the process of vCPU {vcpu} cannot be started: {error}") from error
        self._processes.append(process)


def _environment() -> dict[str, str]:
    """Ours, so that the child finds the same package, and without a pool of BLAS threads that nobody uses."""
    paths = [str(_IMPORT_ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OPENBLAS_NUM_THREADS": "1"}
