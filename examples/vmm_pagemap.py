"""A virtual machine monitor that migrates itself: its vCPUs are threads that write its own memory, and nobody marks it.

Which pages they wrote says the kernel (PAGEMAP_SCAN, Linux 6.7 or later). The file implements `pagexfer.Guest` from the
ground up, so it is the place to look when you bring a machine of your own.

python examples/vmm_pagemap.py --listen 0.0.0.0:4455 --psk-file psk
python examples/vmm_pagemap.py --to 192.0.2.7:4455 --psk-file psk
"""

from __future__ import annotations

import argparse
import struct
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import trio

import pagexfer
from pagexfer.dirty.pagemap import PagemapTracker
from pagexfer.errors import GateError, GuestError
from pagexfer.svsm.memory import GuestMemory

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

# What a vCPU has besides RAM: steps it has done, u64.
_STATE: Final = struct.Struct("<Q")
_STEPS_PER_TICK: Final = 8
_TICK_S: Final = 0.002


class Vcpu(threading.Thread):
    """Step n fills page n of this vCPU's slice, which is a ring, with n + 1: so its state says what its RAM must be.

    All it shares with others is guarded by `changed`.
    """

    def __init__(self, ram: np.ndarray[tuple[int, ...], np.dtype[np.uint64]]) -> None:
        super().__init__(daemon=True)
        self._ram = ram
        self.changed = threading.Condition()
        self.steps: int | None = None  # None: it never ran and has no state yet
        self.flag = True  # the gate's
        self.parked = True  # its own flag: it touches no memory until `flag` is lowered
        self.running = False  # the hypervisor's
        self.inside = False
        self.ended = False

    def run(self) -> None:
        """Work in ticks; between two of them look at the flags."""
        while True:
            with self.changed:
                self.inside = False
                self.parked = self.flag
                self.changed.notify_all()
                self.changed.wait_for(lambda: self.ended or (self.running and not self.flag))
                if self.ended:
                    return
                self.parked, self.inside = False, True
                first = self.steps or 0
            for step in range(first, first + _STEPS_PER_TICK):
                self._ram[step % len(self._ram)] = step + 1
            self.steps = first + _STEPS_PER_TICK
            time.sleep(_TICK_S)

    def set(self, **flags: bool) -> None:
        """Change flags, and wake whoever waits for one."""
        with self.changed:
            for name, up in flags.items():
                setattr(self, name, up)
            self.changed.notify_all()

    def wait_outside(self) -> None:
        """Until it touches no memory. It is told to stop."""
        with self.changed:
            self.changed.wait_for(lambda: not self.inside)

    def consistent(self) -> bool:
        """Whether RAM is what the state of this parked vCPU says."""
        pages, last = np.arange(len(self._ram)), (self.steps or 0) - 1
        filled = last - (last - pages) % len(pages) + 1
        return bool((self._ram == np.maximum(filled, 0)[:, None].astype(np.uint64)).all())


class Gate:
    """`svsm.gate.VcpuGate`: how the trusted side parks vCPUs."""

    def __init__(self, threads: list[Vcpu]) -> None:
        self._threads = threads

    @property
    def vcpus(self) -> int:
        return len(self._threads)

    def raise_flag(self) -> None:
        for thread in self._threads:
            thread.set(flag=True)

    def parked(self) -> int:
        return sum(thread.flag and thread.parked for thread in self._threads)

    def save_state(self, vcpu: int) -> bytes:
        thread = self._parked(vcpu)
        if thread.steps is None:
            raise GateError(f"vCPU {vcpu} has no state yet")
        return _STATE.pack(thread.steps)

    def load_state(self, vcpu: int, state: bytes) -> None:
        if len(state) != _STATE.size:
            raise GateError(f"the state of a vCPU has {_STATE.size} bytes, not {len(state)}")
        (self._parked(vcpu).steps,) = _STATE.unpack(state)

    def release(self) -> None:
        if any(thread.steps is None for thread in self._threads):
            raise GateError("a vCPU cannot be released: load its state first")
        for thread in self._threads:
            thread.set(flag=False)

    def _parked(self, vcpu: int) -> Vcpu:
        thread = self._threads[vcpu]
        if not (thread.flag and thread.parked):
            raise GateError(f"vCPU {vcpu} is not parked")
        return thread


class Monitor:
    """`engine.hypervisor.Hypervisor`: the host's side of the machine, which has no devices."""

    def __init__(self, threads: list[Vcpu], dirty_log: PagemapTracker) -> None:
        self._threads = threads
        self.dirty_log = dirty_log

    async def stop(self) -> None:
        for thread in self._threads:
            thread.set(running=False)
        for thread in self._threads:
            await trio.to_thread.run_sync(thread.wait_outside)

    async def resume(self) -> None:
        for thread in self._threads:
            thread.set(running=True)
        await trio.lowlevel.checkpoint()

    async def save_device_state(self) -> bytes:
        await trio.lowlevel.checkpoint()
        return b""

    async def load_device_state(self, state: bytes) -> None:
        await trio.lowlevel.checkpoint()
        if state:
            raise GuestError("this machine has no devices, and takes no state of any")


class Machine:
    """`pagexfer.Guest`. Without `booted` it has no state, and waits to receive one."""

    kind = "example"
    tracker = (
        None  # the kernel that sees the writes is the host's: what it says is a hint, and the report says so
    )

    def __init__(self, ram_bytes: int, vcpus: int, *, booted: bool) -> None:
        self.memory = GuestMemory.allocate(ram_bytes)
        self._threads = [Vcpu(ram) for ram in np.array_split(self.memory.words, vcpus)]
        self._dirty_log = PagemapTracker(self.memory.words)
        self.gate = Gate(self._threads)
        self.hypervisor = Monitor(self._threads, self._dirty_log)
        if booted:
            self.memory.launch()
            for vcpu in range(vcpus):
                self.gate.load_state(vcpu, _STATE.pack(0))
        for thread in self._threads:
            thread.start()

    def steps(self) -> list[int]:
        return [thread.steps or 0 for thread in self._threads]

    async def consistent(self) -> bool:
        """Park the machine and look at all of its RAM."""
        self.gate.raise_flag()
        for thread in self._threads:
            await trio.to_thread.run_sync(thread.wait_outside)
        return all(thread.consistent() for thread in self._threads)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for thread in self._threads:
            thread.set(ended=True)
            thread.join()
        self._dirty_log.stop()
        self.memory.close()


async def send(options: argparse.Namespace) -> int:
    """Run a machine and send it away while it works; returns the exit code."""
    host, port = options.to
    psk = pagexfer.PskAttestor.from_file(options.psk_file)
    with Machine(options.ram << 20, options.vcpus, booted=True) as machine:
        await machine.hypervisor.resume()
        machine.gate.release()
        report = await pagexfer.send_guest(machine, host, port, psk)
    print(
        f"the machine runs at {host}:{port} after {report.info.ram.dirty_sync_count} epochs; "
        f"who saw its writes: {report.freshness.label}"
    )
    return pagexfer.Outcome.COMPLETED


async def receive(options: argparse.Namespace) -> int:
    """Receive a machine, let it work on, and check it; returns the exit code."""
    host, port = options.listen
    psk = pagexfer.PskAttestor.from_file(options.psk_file)
    listening = partial(print, "listening at port", flush=True)
    with Machine(options.ram << 20, options.vcpus, booted=False) as machine:
        await pagexfer.receive_guest(machine, host, port, psk, on_listening=listening)
        arrived = machine.steps()
        await trio.sleep(0.5)
        consistent = await machine.consistent()
        goes_on = all(now > then for now, then in zip(machine.steps(), arrived, strict=True))
    print(f"consistent: {consistent}, goes on: {goes_on}")
    return pagexfer.Outcome.COMPLETED if consistent and goes_on else pagexfer.Outcome.UNDECIDED


def address(text: str) -> tuple[str, int]:
    """HOST:PORT, an IPv6 host in brackets."""
    host, _, port = text.rpartition(":")
    if not host:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return host.strip("[]"), int(port)


def main() -> int:
    """Read the command line, and send or receive."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    end = parser.add_mutually_exclusive_group(required=True)
    end.add_argument("--to", type=address, metavar="HOST:PORT")
    end.add_argument("--listen", type=address, metavar="HOST:PORT")
    parser.add_argument("--psk-file", required=True, type=Path)
    parser.add_argument("--ram", type=int, default=256, metavar="MIB")
    parser.add_argument("--vcpus", type=int, default=2)
    options = parser.parse_args()
    if options.vcpus < 1 or options.ram < options.vcpus:
        parser.error("a machine has one vCPU or more, and a MiB or more for each")
    try:
        try:
            return trio.run(send if options.to else receive, options)
        except pagexfer.TransferAborted as aborted:
            print(f"{aborted} ({aborted.outcome.name.lower()})", file=sys.stderr)
            return aborted.outcome
        except pagexfer.PagexferError as error:
            print(error, file=sys.stderr)
            return pagexfer.Outcome.USAGE
    except* KeyboardInterrupt:  # trio raises it in a group
        print("interrupted", file=sys.stderr)
    return pagexfer.Outcome.ENDED


if __name__ == "__main__":
    sys.exit(main())
