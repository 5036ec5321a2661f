"""Stock QEMUs that stand still, for bench.qemu and bench.compression: how they start, their monitors and their CPU time.

A machine is emulated (TCG), with all RAM in one shared file. One that is halted has a ROM in place of its BIOS that halts
at once, so that nobody but the bench ever writes its RAM.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import trio

from pagexfer.errors import GuestError
from pagexfer.guests.qemu.qmp import QmpClient
from pagexfer.testing.linux_guest import find_busybox, find_kernel, pack_initramfs

from .options import BenchFailed, CannotRun
from .pair import cpu_clock
from .scale import MEMORY_PER_RAM, available_memory

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

QEMU: Final = "qemu-system-x86_64"
# QEMU's own choice for a pre-shared key would be ChaCha20, which takes twice as long on processors with AES instructions.
PRIORITY: Final = "NORMAL:-CIPHER-ALL:+AES-128-GCM"
CREDENTIALS: Final = "tls"
_USER: Final = "bench"

_ROM_BYTES: Final = 1 << 16
# At the reset vector, 16 bytes below the end: cli; hlt; jmp back to the hlt.
_HALT: Final = b"\xfa\xf4\xeb\xfd".ljust(16, b"\xf4")
_FILL_BYTES: Final = 1 << 24
# The kernel's own busybox as init, which sleeps; without "quiet" the console says that it got so far.
_COMMAND_LINE: Final = "console=ttyS0 panic=-1 rdinit=/bin/busybox -- sleep 1000000"
_BOOTED: Final = b"as init process"
_BOOT_TIMEOUT_S: Final = 120.0
_START_TIMEOUT_S: Final = 30.0
_POLL_S: Final = 0.01
_WATCHED_S: Final = 0.5


class QemuFailed(BenchFailed):
    """A QEMU ended, does not start, or did not do what it was told to."""


@dataclass(frozen=True, slots=True)
class Machine:
    """One QEMU: its process, its monitor, the file that is its RAM, its serial console."""

    process_id: int
    folder: Path

    @property
    def monitor(self) -> Path:
        return self.folder / "qmp"

    @property
    def events(self) -> Path:
        """A monitor of its own for whoever listens while the other one is in use: each takes one client at a time."""
        return self.folder / "events"

    @property
    def ram(self) -> Path:
        return self.folder / "ram"

    @property
    def serial(self) -> Path:
        return self.folder / "serial"

    def cpu_seconds(self) -> float:
        """What the process has spent in all its threads, also those that ended (clock_getcpuclockid)."""
        return time.clock_gettime(cpu_clock(self.process_id))


@dataclass(frozen=True, slots=True)
class Shape:
    """What both machines of a migration have in common; `options` are QEMU's."""

    ram_bytes: int
    options: tuple[str, ...]
    keys: Path


def need_qemu() -> None:
    """Raises CannotRun where there is no QEMU."""
    if shutil.which(QEMU) is None:
        raise CannotRun(f"{QEMU} is not installed")


def qemu_version() -> str:
    """What the QEMU here says of itself."""
    said = subprocess.run([QEMU, "--version"], capture_output=True, text=True, check=True).stdout
    return said.splitlines()[0].removeprefix("QEMU emulator version ")


def make_keys(folder: Path) -> Path:
    """A folder with a pre-shared key, as tls-creds-psk reads it."""
    folder.mkdir()
    (folder / "keys.psk").write_text(f"{_USER}:{os.urandom(32).hex()}\n")
    return folder


def halted_options(folder: Path) -> tuple[str, ...]:
    """For a machine that halts at once and never wrote its RAM."""
    rom = folder / "rom"
    rom.write_bytes(_HALT.rjust(_ROM_BYTES, b"\xf4"))
    return ("-bios", str(rom))


def linux_options(folder: Path) -> tuple[str, ...]:
    """For a machine that boots a Linux, which then sleeps. Raises GuestError where there is no kernel or busybox."""
    kernel, busybox = find_kernel(download=False), find_busybox(download=False)
    initramfs = folder / "initramfs"
    initramfs.write_bytes(pack_initramfs(busybox))
    return ("-kernel", str(kernel), "-initrd", str(initramfs), "-append", _COMMAND_LINE)


def fill(ram: Path, ram_bytes: int, seed: int) -> None:
    """What cannot be compressed, as the content of a file that a machine then has as RAM."""
    random = np.random.default_rng(seed)
    with ram.open("wb") as file:
        for start in range(0, ram_bytes, _FILL_BYTES):
            file.write(random.bytes(min(_FILL_BYTES, ram_bytes - start)))


@contextmanager
def source_machine(
    ram_bytes: int, options: Callable[[Path], tuple[str, ...]], fill_ram: Callable[[Path], None] | None = None
) -> Iterator[tuple[Path, Shape, Machine]]:
    """The machine that all migrations begin with, its shape, and a folder in memory for the others.

    Its RAM is provided, as is what it will have read: else the first migration alone would meet the page faults of that.
    Raises CannotRun where there is no memory for two of them.
    """
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        folder = Path(name)
        if ram_bytes * MEMORY_PER_RAM > min(available_memory(), shutil.disk_usage(folder).free):
            raise CannotRun(f"there is no memory for two machines of {ram_bytes >> 20} MiB")
        shape = Shape(ram_bytes, options(folder), make_keys(folder / "keys"))
        own = folder / "source"
        own.mkdir()
        if fill_ram is not None:
            fill_ram(own / "ram")
        with start(own, shape, prealloc=True) as source:
            yield folder, shape, source


@contextmanager
def destination_machine(folder: Path, shape: Shape, *, prealloc: bool = True) -> Iterator[Machine]:
    """A machine that waits for one migration."""
    with (
        tempfile.TemporaryDirectory(dir=folder) as there,
        start(Path(there), shape, incoming=True, prealloc=prealloc) as machine,
    ):
        yield machine


def compare_ram(source: Machine, destination: Machine, way: str) -> None:
    """Raises QemuFailed where a way left RAM behind; only for a guest that stands still."""
    if not filecmp.cmp(source.ram, destination.ram, shallow=False):
        raise QemuFailed(f"{way}: RAM of both sides differs")


@contextmanager
def start(folder: Path, shape: Shape, *, incoming: bool = False, prealloc: bool = False) -> Iterator[Machine]:
    """A QEMU that answers, and so has its RAM provided where it is to be `prealloc`; `folder`/ram may be there already."""
    role = "server" if incoming else f"client,username={_USER}"
    machine_ram = f"memory-backend-file,id=ram,size={shape.ram_bytes},share=on,mem-path={folder / 'ram'}"
    command = [
        *(QEMU, "-accel", "tcg", "-nodefaults", "-no-user-config", "-display", "none"),
        *("-m", f"{shape.ram_bytes}B", "-machine", "pc,memory-backend=ram"),
        *("-object", machine_ram + (",prealloc=on" if prealloc else "")),
        "-object",
        f"tls-creds-psk,id={CREDENTIALS},dir={shape.keys},priority={PRIORITY},endpoint={role}",
        *(
            "-qmp",
            f"unix:{folder / 'qmp'},server=on,wait=off",
            "-qmp",
            f"unix:{folder / 'events'},server=on,wait=off",
        ),
        *("-serial", f"file:{folder / 'serial'}"),
        *shape.options,
        *(["-incoming", "defer"] if incoming else []),
    ]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        machine = Machine(process.pid, folder)
        deadline = time.monotonic() + _START_TIMEOUT_S
        # Its socket is there for a moment before anybody listens.
        while not _answers(machine):
            if process.poll() is not None or time.monotonic() > deadline:
                raise QemuFailed("a QEMU does not start: its output says why")
            time.sleep(_POLL_S)
        yield machine
    finally:
        process.kill()
        process.wait()


def wait_booted(machine: Machine) -> None:
    """Until the Linux of `linux_options` sleeps. Raises QemuFailed where that takes too long."""
    deadline = time.monotonic() + _BOOT_TIMEOUT_S
    while _BOOTED not in machine.serial.read_bytes() or _is_busy(machine):
        if time.monotonic() > deadline:
            raise QemuFailed("the Linux does not boot, or does not come to rest")
        time.sleep(_POLL_S)


def _is_busy(machine: Machine) -> bool:
    """Whether it spends more than a fifth of a core, as it does until all of booting is done."""
    before = machine.cpu_seconds()
    time.sleep(_WATCHED_S)
    return machine.cpu_seconds() - before > _WATCHED_S / 5


@asynccontextmanager
async def monitor(machine: Machine) -> AsyncIterator[QmpClient]:
    """A client of the machine's monitor, which takes one at a time."""
    qmp = await QmpClient.connect(machine.monitor)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(qmp.run)
            yield qmp
            nursery.cancel_scope.cancel()
    finally:
        qmp.close()


@contextmanager
def resumption(machine: Machine) -> Iterator[Callable[[], float]]:
    """What waits until the machine's vCPUs go on, and says when that was by its own word, as `time.time()` counts."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_START_TIMEOUT_S)
        connection.connect(str(machine.events))
        connection.sendall(b'{"execute": "qmp_capabilities"}\n')

        def resumed_at() -> float:
            with suppress(OSError):  # it ended, or has been silent for too long
                for line in connection.makefile("rb"):
                    said = json.loads(line)
                    if said.get("event") == "RESUME":
                        at = said["timestamp"]
                        return float(at["seconds"]) + float(at["microseconds"]) / 1e6
            raise QemuFailed("a QEMU did not say that its guest went on")

        yield resumed_at


def _answers(machine: Machine) -> bool:
    async def ask() -> None:
        async with monitor(machine) as qmp:
            await qmp.execute("query-status", timeout_s=_START_TIMEOUT_S)

    try:
        trio.run(ask)
    except GuestError:
        return False
    return True
