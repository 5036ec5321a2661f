"""What the command prints, and what becomes of a migration where nobody can read it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import termios
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pagexfer.cli.output import ProgressLine
from pagexfer.engine.progress import MigrationInfo, RamInfo, Status, ThrottleInfo

from .test_cli import COMMAND, GUEST, TIMEOUT_S, Destination, key_file, run
from .wire_vectors import data_of, load

if TYPE_CHECKING:
    from collections.abc import Iterator

UNWRITABLE = ["full disk", "closed pipe"]


@pytest.fixture
def psk(tmp_path: Path) -> str:
    return key_file(tmp_path / "psk", "0123456789abcdef" * 4)


@contextmanager
def unwritable(kind: str) -> Iterator[int]:
    """A descriptor that takes nothing."""
    if kind == "closed pipe":
        reading, writing = os.pipe()
        os.close(reading)
    else:
        writing = os.open("/dev/full", os.O_WRONLY)
    try:
        yield writing
    finally:
        os.close(writing)


def run_without_output(kind: str, *arguments: str) -> tuple[int, list[str]]:
    """Exit code, and the lines of standard error that are no progress, of a command whose output nobody can read."""
    with unwritable(kind) as output:
        done = subprocess.run(
            [*COMMAND, *arguments],
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    return done.returncode, [line for line in done.stderr.splitlines() if " epoch " not in line]


def cannot_write(lines: list[str]) -> bool:
    return lines[-1].startswith("pagexfer: cannot write the report to standard output: ")


@pytest.mark.parametrize("kind", UNWRITABLE)
@pytest.mark.parametrize("form", [["--json"], []], ids=["json", "table"])
def test_a_move_without_output_has_the_code_of_its_outcome(psk: str, kind: str, form: list[str]) -> None:
    side = Destination("--psk-file", psk, "--run-for", "100ms", *GUEST)
    code, lines = run_without_output(kind, "send", "--to", side.address, "--psk-file", psk, *GUEST, *form)
    assert (code, len(lines)) == (0, 1), lines
    assert cannot_write(lines)
    assert side.end()[0] == 0


@pytest.mark.parametrize("kind", UNWRITABLE)
def test_a_destination_without_output_has_the_code_of_its_outcome(psk: str, kind: str) -> None:
    with unwritable(kind) as output:
        side = Destination("--psk-file", psk, "--run-for", "100ms", *GUEST, output=output)
    sent = run("send", "--to", side.address, "--psk-file", psk, *GUEST)
    code, _, errors = side.end()
    assert (sent.returncode, code) == (0, 0), errors
    assert cannot_write(errors.splitlines())


@pytest.mark.parametrize("kind", UNWRITABLE)
def test_a_refused_move_without_output_is_refused(tmp_path: Path, psk: str, kind: str) -> None:
    side = Destination("--psk-file", psk, *GUEST)
    wrong = key_file(tmp_path / "wrong", "0f" * 32)
    code, lines = run_without_output(kind, "send", "--to", side.address, "--psk-file", wrong, *GUEST)
    side.process.terminate()
    side.end()
    assert code == 3
    assert "cannot write the report" in lines[0]
    assert "pre-shared key" in lines[1]


@pytest.mark.parametrize("kind", UNWRITABLE)
def test_a_demo_without_output(kind: str) -> None:
    code, lines = run_without_output(kind, "demo", "--json", *GUEST)
    assert code == 0
    assert cannot_write(lines)


@pytest.mark.parametrize("kind", UNWRITABLE)
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["send", "--help"]])
def test_help_that_cannot_be_written(kind: str, arguments: list[str]) -> None:
    code, lines = run_without_output(kind, *arguments)
    assert (code, lines) == (2, ["pagexfer: cannot write to standard output"])


@pytest.mark.parametrize("group", [[], ["attest"], ["ledger"]])
def test_the_list_of_commands_is_not_cut_short(group: list[str]) -> None:
    lines = run(*group, "--help").stdout.split("Commands:\n")[1].splitlines()
    assert [line for line in lines if line.endswith("...")] == []


@pytest.mark.parametrize("kind", UNWRITABLE)
def test_an_answer_that_cannot_be_written_is_none(tmp_path: Path, kind: str) -> None:
    ledger, psk = tmp_path / "ledger", tmp_path / "psk"
    vector = load("ledger")["ledgers"][2]
    ledger.write_bytes(data_of(vector))
    psk.write_bytes(bytes.fromhex(vector["psk"]))
    command = ("ledger", "verify", str(ledger), "--psk-file", str(psk))
    assert run(*command).returncode == 0
    code, lines = run_without_output(kind, *command)
    assert (code, len(lines)) == (2, 1)
    assert cannot_write(lines)


# Standard error


@pytest.mark.parametrize("isolated", [[], ["--isolated"]])
def test_an_interrupt_at_a_terminal_shows_no_traceback(psk: str, isolated: list[str]) -> None:
    """It goes to all of a command's processes that are of its group."""
    with socket.create_server(("127.0.0.1", 0)) as destination:  # which says nothing
        to = f"127.0.0.1:{destination.getsockname()[1]}"
        with subprocess.Popen(
            [*COMMAND, "send", "--to", to, "--psk-file", psk, *GUEST, *isolated],
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        ) as process:
            destination.settimeout(TIMEOUT_S)
            with destination.accept()[0]:
                os.killpg(process.pid, signal.SIGINT)
                _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1
    assert errors.splitlines()[-1] == "pagexfer: cancelled by a signal"
    assert "Traceback" not in errors


def test_an_interrupt_of_a_demo_shows_no_traceback() -> None:
    with subprocess.Popen(
        [*COMMAND, "demo", *GUEST], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0
    ) as process:
        assert process.stderr is not None
        assert "listening" in process.stderr.readline()  # the destination; of the source nobody knows
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1
    assert "Traceback" not in errors
    assert "KeyboardInterrupt" not in errors
    assert errors.splitlines()[-1] == "pagexfer: interrupted"


@pytest.mark.parametrize("columns", [40, 80, 200, 0])
def test_the_progress_line_fits_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (24, columns))
    with os.fdopen(terminal, "w") as errors:
        monkeypatch.setattr(sys, "stderr", errors)
        line = ProgressLine()
        for remaining in (200 << 30, 0):
            ram = RamInfo(
                400 << 30, transferred=200 << 30, remaining=remaining, dirty_sync_count=12, mbps=123456
            )
            throttle = ThrottleInfo(99, 50.0)
            line.show(MigrationInfo(Status.ACTIVE, 1, 1, 1, 1234, 50, ram, (), throttle=throttle))
        shown = ""
        while shown.count("\x1b[K") < 2:  # the kernel hands it over in parts
            shown += os.read(ours, 4096).decode()
    os.close(ours)
    _, *lines = shown.split("\r")
    assert len(lines) == 2
    assert all(line.startswith("active") and line.endswith("\x1b[K") for line in lines)
    assert "\n" not in shown
    longest = max(len(line.removesuffix("\x1b[K")) for line in lines)
    assert longest == 79 if not columns else longest < columns
    assert (columns == 200) is ("throttle 99 %" in shown)


@pytest.mark.parametrize("kind", UNWRITABLE)
def test_a_demo_whose_progress_cannot_be_written(kind: str) -> None:
    with unwritable(kind) as errors:
        done = subprocess.run(
            [*COMMAND, "demo", "--json", *GUEST],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    assert done.returncode == 0
    assert json.loads(done.stdout)["guest"]["consistent"]


@pytest.mark.parametrize("kind", [*UNWRITABLE, "none"])
def test_both_sides_without_standard_error(tmp_path: Path, psk: str, kind: str) -> None:
    closed = ["sh", "-c", 'exec "$@" 2>&-', "sh"] if kind == "none" else []
    both = ["--psk-file", psk, *GUEST]
    with unwritable("full disk" if kind == "none" else kind) as errors:
        side = subprocess.Popen(
            [*closed, *COMMAND, "receive", "--listen", "127.0.0.1:0", "--run-for", "100ms", *both],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        try:
            sent = subprocess.run(
                [*closed, *COMMAND, "send", "--to", f"127.0.0.1:{listening_port(side)}", *both],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                timeout=TIMEOUT_S,
                check=False,
            )
            output, _ = side.communicate(timeout=TIMEOUT_S)
        finally:
            side.kill()
            side.wait()
    assert (sent.returncode, side.returncode) == (0, 0)
    assert "completed" in sent.stdout
    assert "completed" in output


def listening_port(process: subprocess.Popen[str]) -> int:
    """Where a process that cannot say so listens (proc(5), net/tcp: state 0A), once it does."""
    end = time.monotonic() + TIMEOUT_S
    while process.poll() is None and time.monotonic() < end:
        open_files = set()
        for entry in Path(f"/proc/{process.pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed since
                open_files.add(os.readlink(entry))
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in open_files:
                return int(words[1].partition(":")[2], 16)
        time.sleep(0.02)
    raise AssertionError("nobody listens")
