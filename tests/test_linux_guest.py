"""The small Linux: its archive is one that cpio reads, and its console is read right."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from pagexfer.errors import GuestError
from pagexfer.testing.linux_guest import (
    complaints_of,
    find_busybox,
    find_kernel,
    main,
    pack_initramfs,
    rounds_of,
)

if TYPE_CHECKING:
    from pathlib import Path


def test_cpio_reads_the_archive(tmp_path: Path) -> None:
    try:
        busybox = find_busybox(download=False)
    except GuestError as missing:
        pytest.skip(str(missing))
    listed = subprocess.run(
        [busybox, "cpio", "-t", "-v"], input=pack_initramfs(busybox), capture_output=True, check=True
    )
    lines = [line.split() for line in listed.stdout.decode().splitlines()]
    assert [line[-1] for line in lines] == ["bin", "dev", "dev/console", "bin/busybox", "init"]
    assert [line[0] for line in lines] == [
        "drwxr-xr-x",
        "drwxr-xr-x",
        "crw-------",
        "-rwxr-xr-x",
        "-rwxr-xr-x",
    ]


@pytest.mark.parametrize(
    ("log", "rounds", "complaints"),
    [
        (b"", [], 0),
        (b"Linux\r\nround 1\r\nround 2\r\nround 3", [1, 2], 0),
        (b"round 1\r\nround 3\r\n", [1, 3], 1),
        (b"round 1\r\nround 1\r\nround 2\r\n", [1, 1, 2], 1),
        (b"round 1\r\nERROR in page 7\r\nround 2\r\n", [1, 2], 1),
        (b"round 1\r\n[    3.1] Kernel panic - not syncing\r\n", [1], 1),
    ],
)
def test_what_a_console_says(log: bytes, rounds: list[int], complaints: int) -> None:
    assert rounds_of(log) == rounds
    assert len(complaints_of(log)) == complaints


def test_what_is_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GuestError, match="busybox-static is not installed"):
        find_busybox(download=False)
    with pytest.raises(GuestError, match="cannot download"):
        find_busybox(download=True)
    assert main() == 2
    monkeypatch.setattr("pathlib.Path.glob", lambda _path, _pattern: iter(()))
    with pytest.raises(GuestError, match="linux-image-cloud-amd64 is not installed"):
        find_kernel(download=False)
