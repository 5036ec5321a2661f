"""The examples do what they say, run by hand as a user would."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from examples.qemu_live import QEMU, different_pages
from pagexfer.errors import GuestError
from pagexfer.testing.linux_guest import find_busybox, find_kernel

from .tracked_ram import needs_pagemap

EXAMPLES = Path(__file__).parent.parent / "examples"
GUEST = ["--guest", "simulated", "--ram", "16", "--vcpus", "1"]


def test_source_and_destination(tmp_path: Path) -> None:
    psk = tmp_path / "psk"
    psk.write_text("0123456789abcdef" * 4)
    destination = subprocess.Popen(
        [sys.executable, EXAMPLES / "destination.py", "--listen", "127.0.0.1:0", "--psk-file", psk, *GUEST],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert destination.stdout is not None
        address = destination.stdout.readline().split()[-1]
        source = subprocess.run(
            [sys.executable, EXAMPLES / "source.py", "--to", address, "--psk-file", psk, *GUEST],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        output, errors = destination.communicate(timeout=60)
    finally:
        destination.kill()
        destination.communicate()
    assert (source.returncode, source.stderr) == (0, "")
    assert f"the guest runs at {address}" in source.stdout
    assert (destination.returncode, errors) == (0, "")
    assert "consistent: True, goes on: True" in output


@needs_pagemap
def test_a_monitor_migrates_itself(tmp_path: Path) -> None:
    psk = tmp_path / "psk"
    psk.write_text("0123456789abcdef" * 4)
    command = [sys.executable, str(EXAMPLES / "vmm_pagemap.py"), "--psk-file", str(psk), "--ram", "32"]
    destination = subprocess.Popen(
        [*command, "--listen", "127.0.0.1:0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert destination.stdout is not None
        port = destination.stdout.readline().split()[-1]
        source = subprocess.run(
            [*command, "--to", f"127.0.0.1:{port}"], capture_output=True, text=True, timeout=60, check=False
        )
        output, errors = destination.communicate(timeout=60)
    finally:
        destination.kill()
        destination.communicate()
    assert (source.returncode, source.stderr) == (0, "")
    assert "who saw its writes: host-reported" in source.stdout
    assert (destination.returncode, errors) == (0, "")
    assert "consistent: True, goes on: True" in output


@pytest.mark.parametrize(
    ("example", "option"), [("source", "--to"), ("destination", "--listen"), ("vmm_pagemap", "--to")]
)
@pytest.mark.parametrize("wrong", ["4455", "127.0.0.1:ssh"])
def test_an_address_that_is_none_is_bad_usage(example: str, option: str, wrong: str) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{example}.py", option, wrong, "--psk-file", "psk"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert f"'{wrong}'" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("example", "arguments"),
    [
        ("vmm_pagemap", ["--to", "127.0.0.1:1", "--psk-file", "psk", "--vcpus", "0"]),
        ("vmm_pagemap", ["--to", "127.0.0.1:1", "--psk-file", "psk", "--ram", "1"]),
        ("qemu_live", ["--channels", "0"]),
        ("qemu_live", ["--ram", "1"]),
    ],
)
def test_numbers_that_cannot_be_are_bad_usage(example: str, arguments: list[str]) -> None:
    command = [sys.executable, str(EXAMPLES / f"{example}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "error: " in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("example", ["destination", pytest.param("vmm_pagemap", marks=needs_pagemap)])
def test_an_interrupt_is_one_line(tmp_path: Path, example: str) -> None:
    psk = tmp_path / "psk"
    psk.write_text("0123456789abcdef" * 4)
    command = [sys.executable, str(EXAMPLES / f"{example}.py"), "--listen", "127.0.0.1:0"]
    with subprocess.Popen(
        [*command, "--psk-file", str(psk), "--ram", "16"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    ) as process:
        assert process.stdout is not None
        assert "listening" in process.stdout.readline()
        os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it
        _, errors = process.communicate(timeout=60)
    # Python itself may add that a task was about to begin.
    assert process.returncode == 1
    assert errors.splitlines()[0] == "interrupted"
    assert "Traceback" not in errors


def test_the_program_of_the_readme_runs_as_it_stands(tmp_path: Path) -> None:
    readme = (EXAMPLES.parent / "README.md").read_text()
    program = readme.split("## As a library")[1].split("```python\n")[1].split("```")[0]
    (tmp_path / "program.py").write_text(program)
    done = subprocess.run(
        [sys.executable, tmp_path / "program.py"], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "ms of black-out" in done.stdout
    assert "consistent=True, progressed=True" in done.stdout


def test_a_source_without_a_destination(tmp_path: Path) -> None:
    psk = tmp_path / "psk"
    psk.write_text("0123456789abcdef" * 4)
    source = subprocess.run(
        [sys.executable, EXAMPLES / "source.py", "--to", "127.0.0.1:1", "--psk-file", psk, *GUEST],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert source.returncode == 1
    assert "Connection refused" in source.stderr
    assert len(source.stderr.splitlines()) == 1


def test_a_linux_in_a_qemu_moves_live() -> None:
    if shutil.which(QEMU) is None:
        pytest.skip(f"{QEMU} is not installed")
    try:
        find_kernel(download=False), find_busybox(download=False)
    except GuestError as missing:
        pytest.skip(str(missing))
    moved = subprocess.run(
        [sys.executable, EXAMPLES / "qemu_live.py", "--json"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (moved.returncode, moved.stderr) == (0, "")
    report = json.loads(moved.stdout)
    assert (report["status"], report["freshness"]) == ("completed", "digest-audit")
    assert (report["guest"]["consistent"], report["guest"]["progressed"]) == (True, True)
    assert 0 < report["downtime"] < 10_000
    last, first = report["serial"]["source"][-1], report["serial"]["destination"][0]
    assert last != first
    assert (
        report["ram"]["duplicate"] > report["ram"]["normal"]
    )  # most of a small Linux's RAM was never touched


def test_ram_that_differs_is_seen(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(bytes(5 << 20))
    other.write_bytes(bytes(5 << 20))
    assert different_pages(one, other) == 0
    with other.open("r+b") as file:
        for offset in (4095, 4096, (5 << 20) - 1):
            file.seek(offset)
            file.write(b"x")
    assert different_pages(one, other) == 3
    other.write_bytes(bytes(4 << 20))
    assert different_pages(one, other) == 256
