"""Migrate a Linux in a stock QEMU live, on this machine, while it writes memory all the time, and check that it goes on.

python examples/qemu_live.py --json

Both QEMUs emulate (TCG). RAM moves over sealed channels, and so does device state, as QEMU's own stream. Before it goes on
at the destination, RAM of both sides is compared, byte by byte. Kernel and busybox are Debian's: see linux_guest.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

import pagexfer
from pagexfer.guests.qemu import QemuGuest
from pagexfer.testing.linux_guest import (
    COMMAND_LINE,
    complaints_of,
    find_busybox,
    find_kernel,
    pack_initramfs,
    rounds_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pagexfer.guests.qemu.hypervisor import QemuHypervisor

QEMU: Final = "qemu-system-x86_64"
_ROUNDS: Final = 20
_MIN_RAM_MIB: Final = 96
_PATIENCE_S: Final = 60.0
_COMPARED_BYTES: Final = 1 << 22


class NoGuest(pagexfer.PagexferError):
    """QEMU, or the guest in it, does not work on this machine."""


@dataclass(frozen=True, slots=True)
class Linux:
    """One QEMU: the file that has its RAM, its serial console, its monitor."""

    folder: Path

    @property
    def ram(self) -> Path:
        return self.folder / "ram"

    @property
    def monitor(self) -> Path:
        return self.folder / "qmp"

    @property
    def serial(self) -> bytes:
        """What the guest said at this side."""
        return (self.folder / "serial").read_bytes()

    async def wait_for_rounds(self, number: int) -> None:
        """Until the guest has done so many rounds here. Raises NoGuest where it takes too long."""
        with trio.move_on_after(_PATIENCE_S):
            while len(rounds_of(self.serial)) < number:  # noqa: ASYNC110 - a file tells nobody
                await trio.sleep(0.02)
            return
        raise NoGuest(f"the guest does not work: its console ends with {self.serial[-200:]!r}")


class Witness:
    """The destination's hypervisor, which compares RAM of both sides before it lets the guest go on."""

    def __init__(self, hypervisor: QemuHypervisor, source: Linux, destination: Linux) -> None:
        self._hypervisor = hypervisor
        self._files = (source.ram, destination.ram)
        self.dirty_log = hypervisor.dirty_log
        self.different_pages = -1
        self.took_ms = 0.0

    async def stop(self) -> None:
        await self._hypervisor.stop()

    async def resume(self) -> None:
        began = trio.current_time()
        self.different_pages = await trio.to_thread.run_sync(different_pages, *self._files)
        self.took_ms = 1000 * (trio.current_time() - began)
        await self._hypervisor.resume()

    async def save_device_state(self) -> bytes:
        return await self._hypervisor.save_device_state()

    async def load_device_state(self, state: bytes) -> None:
        await self._hypervisor.load_device_state(state)


class WitnessedGuest:
    """A QEMU guest behind a witness."""

    def __init__(self, guest: QemuGuest, witness: Witness) -> None:
        self.kind = guest.kind
        self.memory = guest.memory
        self.gate = guest.gate
        self.tracker = guest.tracker
        self.hypervisor = witness


async def move(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Boot a guest, migrate it, let it go on; returns the report."""
    kernel, busybox = find_kernel(download=True), find_busybox(download=True)
    initramfs = folder / "initramfs"
    initramfs.write_bytes(pack_initramfs(busybox))
    machine = ["-kernel", str(kernel), "-initrd", str(initramfs), "-append", COMMAND_LINE]
    with (
        _qemu(folder / "source", options.ram, machine) as here,
        _qemu(folder / "destination", options.ram, [*machine, "-incoming", "defer"]) as there,
    ):
        await here.wait_for_rounds(_ROUNDS)
        async with (
            QemuGuest.attach(here.monitor) as source,
            QemuGuest.attach(there.monitor, incoming=True) as destination,
        ):
            witness = Witness(destination.hypervisor, here, there)
            report = await _migrate(source, WitnessedGuest(destination, witness), options.channels)
            await there.wait_for_rounds(_ROUNDS)
            return _describe(report, here.serial, there.serial, witness)


async def _migrate(source: QemuGuest, destination: WitnessedGuest, channels: int) -> pagexfer.MigrationReport:
    """Both sides in this process; each has its own end of the pre-shared key."""
    key = pagexfer.PskAttestor(os.urandom(32))

    async def receive(task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED) -> None:
        await pagexfer.receive_guest(destination, "127.0.0.1", 0, key, on_listening=task_status.started)

    async with trio.open_nursery() as nursery:
        port: int = await nursery.start(receive)
        return await pagexfer.send_guest(
            source, "127.0.0.1", port, key, channels=channels, downtime_limit_s=1
        )


def _describe(
    report: pagexfer.MigrationReport, before: bytes, after: bytes, witness: Witness
) -> dict[str, object]:
    complaints = complaints_of(before + after)
    if witness.different_pages:
        complaints.append(f"pages that differed when the guest was to go on: {witness.different_pages}")
    error = {"error": {"reason": "guest", "message": complaints[0]}} if complaints else {}
    return {
        **report.info.as_dict(),
        **error,
        # The comparison is this example's, and not a part of any migration.
        "downtime": round((report.info.downtime or 0.0) - witness.took_ms, 1),
        "comparison": round(witness.took_ms, 1),
        "freshness": report.freshness.label,
        "guest": {
            "kind": "qemu",
            "consistent": not complaints,
            "progressed": len(rounds_of(after)) >= _ROUNDS,
            "rounds-at-source": len(rounds_of(before)),
            "rounds-at-destination": len(rounds_of(after)),
        },
        "serial": {"source": _lines(before)[-3:], "destination": _lines(after)[:3]},
    }


def _lines(log: bytes) -> list[str]:
    return [line for line in log.decode(errors="replace").splitlines() if line]


def different_pages(source: Path, destination: Path) -> int:
    """Pages of 4 KiB that are not the same in two files; reads them, so that their holes stay holes."""
    different = abs(source.stat().st_size - destination.stat().st_size) // 4096
    with source.open("rb", buffering=0) as one, destination.open("rb", buffering=0) as other:
        while (here := one.read(_COMPARED_BYTES)) and (there := other.read(_COMPARED_BYTES)):
            if here != there:
                starts = range(0, len(here), 4096)
                different += sum(here[at : at + 4096] != there[at : at + 4096] for at in starts)
    return different


@contextmanager
def _qemu(folder: Path, ram_mib: int, options: list[str]) -> Iterator[Linux]:
    linux = Linux(folder)
    folder.mkdir()
    command = [
        *(QEMU, "-accel", "tcg", "-nodefaults", "-no-user-config", "-display", "none", "-m", f"{ram_mib}M"),
        *("-object", f"memory-backend-file,id=ram,size={ram_mib}M,share=on,mem-path={linux.ram}"),
        *("-machine", "pc,memory-backend=ram", "-serial", f"file:{folder / 'serial'}"),
        *("-qmp", f"unix:{linux.monitor},server=on,wait=off", *options),
    ]
    if shutil.which(QEMU) is None:
        raise NoGuest(f"{QEMU} is not installed")
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        try:
            while not (linux.monitor.exists() and (folder / "serial").exists()):
                if process.poll() is not None:
                    raise NoGuest(f"QEMU ended at once, with exit code {process.returncode}")
            yield linux
        finally:
            process.kill()


def main() -> int:
    """Read the command line and migrate."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ram", type=int, default=256, metavar="MIB")
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if options.channels < 1:
        parser.error("--channels: one or more")
    if options.ram < _MIN_RAM_MIB:
        parser.error(f"--ram: {_MIN_RAM_MIB} or more, for Linux has to boot in it")
    report: dict[str, object] = {"status": "failed"}
    code = pagexfer.Outcome.ENDED
    memory = Path("/dev/shm")
    try:
        with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
            report = trio.run(move, options, Path(folder))
    except* pagexfer.UsageError as failed:
        code = pagexfer.Outcome.USAGE
        report["error"] = _describe_error(failed)
    except* pagexfer.PagexferError as failed:
        report["error"] = _describe_error(failed)
    except* KeyboardInterrupt:
        report["error"] = {"reason": "cancelled", "message": "interrupted"}
    print(json.dumps(report) if options.json else json.dumps(report, indent=2))
    error = report.get("error")
    if not isinstance(error, dict):
        return pagexfer.Outcome.COMPLETED
    print(error["message"], file=sys.stderr)
    return code


def _describe_error(failed: BaseException) -> dict[str, str]:
    while isinstance(failed, BaseExceptionGroup):
        failed = failed.exceptions[0]
    return {
        "reason": failed.reason if isinstance(failed, pagexfer.TransferAborted) else "guest",
        "message": str(failed),
    }


if __name__ == "__main__":
    sys.exit(main())
