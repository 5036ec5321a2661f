"""Stock QEMUs for tests: a boot sector that writes memory all the time, checks itself and counts, under TCG."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pagexfer.guests.qemu import QemuGuest


def _version(program: str) -> str:
    return subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout


QEMU = shutil.which("qemu-system-x86_64")
# From QEMU 8.1 on a memfd is no memory that pagexfer can move.
MOVES_MEMFDS = QEMU is not None and tuple(map(int, re.findall(r"\d+", _version(QEMU))[:2])) < (8, 1)
needs_qemu = pytest.mark.skipif(QEMU is None, reason="qemu-system-x86_64 is not installed")

# Real-mode code, for each round: raise the dword at 0x7e00, then the first dword of each page from 0x20000 to 0x7ffff, and
# count at 0x7e04 every one that is not the number of rounds then.
_CODE = bytes.fromhex(
    "fa6631c08ed88ee066ff06007ebb00208ec32666a100006640663b06007e740566ff06047e2666a3000081c3000181fb008075dcebd2"
)
_ROUNDS_WORD = (0x7, 0xE00 // 8)
_HUGE_FILES = Path("/dev/hugepages")
_FREE_HUGE_PAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")


@contextmanager
def qemu(
    folder: Path,
    *options: str,
    incoming: bool = False,
    share: str = "on",
    sizes: tuple[int, int] = (16, 16),
    huge: bool = False,
    memfd: bool = MOVES_MEMFDS,
    mem_path: str | None = None,
    others: bool = False,
) -> Iterator[Path]:
    """A QEMU with `sizes` MiB in two shared backends, the second one a memfd where it may be (of huge pages, with `huge`).

    The first one's file is `m0` in `folder`, or `mem_path`. With `others` there is a second monitor, `other` in `folder`.

    Gives the path of its monitor.
    """
    folder.mkdir(exist_ok=True)
    disk, monitor = folder / "boot", folder / "qmp"
    monitors = [monitor, folder / "other"] if others else [monitor]
    second = _HUGE_FILES / f"{os.getpid()}-{folder.name}" if huge else folder / "m1"
    if memfd:
        kind = f"memory-backend-memfd{',hugetlb=on,hugetlbsize=2M' if huge else ''}"
    else:
        kind = f"memory-backend-file,mem-path={second}"
    disk.write_bytes(_CODE.ljust(510, b"\0") + b"\x55\xaa" + bytes(1440 * 1024 - 512))
    command = [
        str(QEMU),
        *("-accel", "tcg", "-m", f"{sum(sizes)}M", "-nodefaults", "-no-user-config", "-display", "none"),
        *(
            "-object",
            f"memory-backend-file,id=m0,size={sizes[0]}M,share={share},mem-path={mem_path or folder / 'm0'}",
        ),
        *("-object", f"{kind},id=m1,size={sizes[1]}M,share={share}"),
        *("-numa", "node,memdev=m0", "-numa", "node,memdev=m1"),
        *("-drive", f"if=floppy,format=raw,readonly=on,file={disk}", "-boot", "a"),
        *(option for path in monitors for option in ("-qmp", f"unix:{path},server=on,wait=off")),
        *(["-incoming", "defer"] if incoming else []),
        *options,
    ]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        while not all(map(_listens, monitors)):
            assert process.poll() is None, "QEMU ended at once"
        yield monitor
    finally:
        process.kill()
        process.wait()
        second.unlink(missing_ok=True)


def needs_huge_pages(pages: int) -> pytest.MarkDecorator:
    """Of 2 MiB, which a QEMU has as a memfd or as a file."""
    reserved = _FREE_HUGE_PAGES.exists() and int(_FREE_HUGE_PAGES.read_text()) >= pages
    where = "/proc/sys/vm/nr_hugepages" if MOVES_MEMFDS else f"/proc/sys/vm/nr_hugepages, {_HUGE_FILES}"
    return pytest.mark.skipif(
        not reserved or not (MOVES_MEMFDS or _HUGE_FILES.is_mount()),
        reason=f"no {pages} huge pages of 2 MiB: see {where}",
    )


def _listens(path: Path) -> bool:
    """Whether somebody listens at this UNIX socket, who takes one client only (flags of /proc/net/unix)."""
    lines = Path("/proc/net/unix").read_text().splitlines()
    return any(line.endswith(f" {path}") and line.split()[3] == "00010000" for line in lines)


def rounds(guest: QemuGuest) -> int:
    return int(guest.memory.words[_ROUNDS_WORD]) & 0xFFFF_FFFF


def errors(guest: QemuGuest) -> int:
    return int(guest.memory.words[_ROUNDS_WORD]) >> 32


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(30):
        while not condition():  # noqa: ASYNC110 - the guest has no event to wait for
            await trio.sleep(0.005)


async def goes_on(guest: QemuGuest) -> None:
    """Until the guest has done some more rounds."""
    before = rounds(guest)
    await until(lambda: rounds(guest) > before + 10)
