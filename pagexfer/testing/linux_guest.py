"""A small Linux for a QEMU: Debian's kernel and busybox, with a workload that writes memory and checks itself.

All is found on this machine, or else downloaded from Debian by apt-get and unpacked into a cache folder.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ..errors import GuestError, Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator

COMMAND_LINE: Final = "console=ttyS0 quiet panic=-1"

# Rewrites 8 MiB in each round: a page's text has the round's number, and is compared with that of the last round first.
_INIT: Final = rb"""#!/bin/busybox sh
exec /bin/busybox awk 'BEGIN {
    for (pad = "."; length(pad) < 4000; ) pad = pad pad
    for (i = 0; i < 2048; i++) page[i] = "0 " pad
    for (round = 1; ; round++) {
        old = (round - 1) " " pad
        new = round " " pad
        for (i = 0; i < 2048; i++) {
            if (page[i] != old) print "ERROR in page " i
            page[i] = new
        }
        print "round " round
    }
}'
"""
_DIRECTORY, _FILE, _CONSOLE = 0o040755, 0o100755, 0o020600
_CONSOLE_DEVICE: Final = (5, 1)


def find_kernel(*, download: bool) -> Path:
    """A kernel image that can be read. Raises GuestError where there is none."""
    for path in sorted(Path("/boot").glob("vmlinuz*"), reverse=True):
        if os.access(path, os.R_OK):
            return path
    return _from_debian("linux-image-cloud-amd64", "boot/vmlinuz*", download=download)


def find_busybox(*, download: bool) -> Path:
    """A busybox that needs no libraries. Raises GuestError where there is none."""
    path = shutil.which("busybox")
    if path is not None and b"/ld-linux" not in Path(path).read_bytes()[:4096]:
        return Path(path)
    return _from_debian("busybox-static", "bin/busybox", download=download)


def pack_initramfs(busybox: Path) -> bytes:
    """An archive in cpio's "newc" format (Linux, Documentation/driver-api/early-userspace/buffer-format.rst)."""
    inodes = count(1)
    return b"".join(
        [
            _entry(next(inodes), "bin", _DIRECTORY),
            _entry(next(inodes), "dev", _DIRECTORY),
            _entry(next(inodes), "dev/console", _CONSOLE, device=_CONSOLE_DEVICE),
            _entry(next(inodes), "bin/busybox", _FILE, busybox.read_bytes()),
            _entry(next(inodes), "init", _FILE, _INIT),
            _entry(0, "TRAILER!!!", 0),
        ]
    )


def rounds_of(log: bytes) -> list[int]:
    """Numbers of the rounds that a serial log tells of, without a last line that is cut off."""
    return [int(number) for number in re.findall(rb"^round (\d+)\r?\n", log, re.MULTILINE)]


def complaints_of(log: bytes) -> list[str]:
    """What is wrong in a serial log: lines of the workload's own check, of the kernel, and rounds that are missing."""
    found = re.findall(rb"^.*(?:ERROR|BUG|Oops|panic|segfault).*$", log, re.MULTILINE)
    rounds = rounds_of(log)
    missing = [] if rounds == list(range(1, len(rounds) + 1)) else ["the rounds are not 1, 2, 3 ..."]
    return [line.decode(errors="replace").strip() for line in found] + missing


def main() -> int:
    """Have what a guest needs on this machine; returns the exit code."""
    try:
        print(find_kernel(download=True), find_busybox(download=True))
    except GuestError as error:
        print(error, file=sys.stderr)
        return Outcome.USAGE
    return Outcome.COMPLETED


def _entry(inode: int, name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
    path = name.encode() + b"\0"
    fields = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(path), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + path
    return _padded(head) + _padded(content)


def _padded(part: bytes) -> bytes:
    return part + bytes(-len(part) % 4)


def _from_debian(package: str, pattern: str, *, download: bool) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pagexfer" / package
    if not cache.is_dir():
        if not download:
            raise GuestError(f"{package} is not installed, and not in {cache}")
        _download(package, cache)
    for path in sorted(cache.glob(pattern), reverse=True):
        return path
    raise GuestError(f"{package} in {cache} has no {pattern}")


def _download(package: str, cache: Path) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache.parent) as folder:
        try:
            subprocess.run(
                ["apt-get", "download", _actual(package)], cwd=folder, check=True, capture_output=True
            )
            unpacked = Path(folder) / "unpacked"
            for archive in Path(folder).glob("*.deb"):
                subprocess.run(["dpkg-deb", "-x", archive, unpacked], check=True, capture_output=True)
            unpacked.rename(cache)  # at once, so that a cache that is there is whole
        except (OSError, subprocess.CalledProcessError) as error:
            raise GuestError(
                f"{package} is not installed, and apt-get cannot download it ('apt-get update' first?): {error}"
            ) from None


def _actual(package: str) -> str:
    """What `package` stands for: a kernel's name without a version is a package without content."""
    shown = subprocess.run(
        ["apt-cache", "depends", "--important", package], check=True, capture_output=True, text=True
    )
    return next(_kernels(shown.stdout), package)


def _kernels(shown: str) -> Iterator[str]:
    return (match[1] for match in re.finditer(r"Depends: (linux-image-\d\S*)", shown))


if __name__ == "__main__":
    sys.exit(main())
