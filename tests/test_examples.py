"""The examples do what they say, run by hand as a user would."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
