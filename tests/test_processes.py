"""The process that has a guest: alive or gone, and never taken for another one that got its id."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from pagexfer.errors import UsageError
from pagexfer.svsm import processes
from pagexfer.svsm.processes import lives, process_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pagexfer.wire.journal import GuestProcess


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def own() -> GuestProcess:
    return process_of(os.getpid())


def test_a_process_lives_until_it_has_ended(child: subprocess.Popen[bytes]) -> None:
    process = process_of(child.pid)
    assert (process.id, lives(process)) == (child.pid, True)
    child.send_signal(signal.SIGSTOP)
    assert lives(process)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert lives(process) is False  # nobody has waited for it yet
    child.wait()
    assert lives(process) is False
    with pytest.raises(UsageError, match=f"process {child.pid}, which has the guest, cannot be seen"):
        process_of(child.pid)


def test_a_first_thread_that_has_ended_leaves_its_process() -> None:
    code = (
        "import ctypes, os, threading\n"
        "def say():\n"
        "    while ') Z ' not in open('/proc/self/stat').read(): pass\n"
        "    os.write(1, b'Z'); threading.Event().wait()\n"
        "threading.Thread(target=say).start()\n"
        "ctypes.CDLL(None).pthread_exit(None)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"Z"
        assert lives(process_of(process.pid))
        process.kill()


def test_a_later_process_with_its_id_is_another_one() -> None:
    assert lives(replace(own(), start=own().start - 1)) is False


@pytest.mark.parametrize("changes", [{"boot": bytes(16)}, {"namespace": 1}])
def test_elsewhere_nobody_can_see_it(changes: dict[str, object]) -> None:
    assert lives(replace(own(), **changes)) is None  # type: ignore[arg-type]


def test_a_process_that_is_hidden_lives(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """/proc may show a user no processes but his own (hidepid): where there is one of this id, it may be this one."""
    process = own()

    def hidden(_process_id: int) -> list[bytes]:
        return [(tmp_path / "stat").read_bytes()]

    monkeypatch.setattr(processes, "_fields", hidden)
    assert lives(process)
    assert lives(replace(process, id=1 << 40)) is False


def test_without_proc_nobody_can_see_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    process = own()
    monkeypatch.setattr(processes, "_BOOT_ID", tmp_path / "boot_id")
    assert lives(process) is None
    with pytest.raises(UsageError):
        process_of(os.getpid())
