"""The process that has a guest: alive or gone, and never taken for another one that got its id."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import pytest

from pagexfer.errors import UsageError
from pagexfer.svsm import processes
from pagexfer.svsm.journal import FileJournal, abandon
from pagexfer.svsm.processes import lives, process_of
from pagexfer.wire.handshake import Role
from pagexfer.wire.journal import JournalRecord
from pagexfer.wire.slot import SessionStatus

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
    assert lives(replace(own(), start=own().start - 2)) is False


_UNSHARE: Final = ("unshare", "--user", "--map-root-user", "--fork")
# Run in other namespaces: what it says of the process in its argument, or of a child.
_SAYS: Final = """
import pickle, subprocess, sys
from pagexfer.errors import UsageError
from pagexfer.svsm.processes import lives, process_of
if len(sys.argv) > 1:
    print(lives(pickle.loads(bytes.fromhex(sys.argv[1]))))
else:
    with subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL) as child:
        try:
            print(lives(process_of(child.pid)))
        except UsageError as error:
            print(error)
        child.kill()
"""


def said_elsewhere(namespaces: str, *arguments: str) -> str:
    """What `_SAYS` says in other namespaces."""
    unshare = [*_UNSHARE, *namespaces.split()]
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip(f"no namespaces here: {namespaces}")
    done = subprocess.run(
        [*unshare, sys.executable, "-c", _SAYS, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.mark.parametrize("boottime", ["100000", "-1"])
def test_it_lives_in_another_time_namespace_as_well(child: subprocess.Popen[bytes], boottime: str) -> None:
    """There /proc says another start of it, and `recover --abandon` would take it for a later process."""
    process = pickle.dumps(process_of(child.pid)).hex()
    assert said_elsewhere(f"--time --boottime {boottime}", process) == "True"
    child.kill()
    child.wait()
    assert said_elsewhere(f"--time --boottime {boottime}", process) == "False"


def test_its_start_may_be_rounded_otherwise_in_another_time_namespace(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    process, offsets = own(), tmp_path / "offsets"
    monkeypatch.setattr(processes, "_TIME_OFFSETS", offsets)
    assert lives(process)  # a kernel without time namespaces
    offsets.write_text("monotonic        7         0\nboottime         0   9999999\n")
    assert lives(process)
    offsets.write_text("monotonic        0         0\nboottime         1         0\n")
    assert lives(process) is False


def test_a_proc_of_another_pid_namespace_shows_other_processes() -> None:
    """As after `unshare --pid` without a /proc of its own: behind the same number is somebody else there."""
    said = said_elsewhere("--pid")
    assert said.endswith("cannot be seen: /proc is that of another pid namespace")
    assert said_elsewhere("--pid --mount-proc") == "True"


def test_from_outside_of_its_container_it_is_seen_as_long_as_it_lives(tmp_path: Path) -> None:
    """Where `recover --abandon` would else believe that it is gone."""
    said_elsewhere("--pid --mount-proc")
    say = (
        "import os, pickle, sys; from pagexfer.svsm.processes import process_of;"
        "os.write(1, pickle.dumps(process_of(os.getpid())).hex().encode() + b'\\n'); sys.stdin.read()"
    )
    with subprocess.Popen(
        [*_UNSHARE, "--pid", "--mount-proc", sys.executable, "-c", say],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as outside:
        assert outside.stdout is not None
        process: GuestProcess = pickle.loads(bytes.fromhex(outside.stdout.readline()))
        assert (process.id, lives(process)) == (1, True)
        assert lives(replace(process, start=process.start - 2)) is None
        assert lives(replace(process, id=2)) is None
        assert lives(replace(process, boot=bytes(16))) is None
        path = tmp_path / "journal"
        with FileJournal(path) as journal:
            journal.record(
                JournalRecord(Role.DESTINATION, SessionStatus.VERIFIED, bytes(16), bytes(16), process)
            )
        with pytest.raises(UsageError, match="process 1 still has the whole guest"):
            abandon(path)
        outside.communicate()
    assert lives(process) is None
    abandon(path)


def test_of_a_proc_of_another_pid_namespace_nothing_is_believed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    process, status = own(), tmp_path / "status"
    monkeypatch.setattr(processes, "_STATUS", status)
    for ids, found in (("NSpid:\t77", True), ("", True), ("NSpid:\t77\t5", None)):
        status.write_text(f"Name:\tNSpid: 1 2\n{ids}\nThreads:\t1\n")
        assert lives(process) is found


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
