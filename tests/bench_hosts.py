"""The bench between two machines as processes of this one: a listener and its source."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Timer
from time import monotonic, sleep
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

HOST: Final = "127.0.0.1"
PSK: Final = b"a pre-shared key of 32 bytes ..."
PATIENCE_S: Final = 120.0
SMALL: Final = ("--ram", "4MiB", "--channels", "1,2")


@dataclass
class Process:
    """One side, the leader of a session of its own: all of its processes can be found by that."""

    process: subprocess.Popen[str]
    lines: list[str]

    def line_with(self, text: str) -> str:
        """The next line of standard error that contains `text`."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))
            if text in line:
                return self.lines[-1]
        pytest.fail(f"no {text!r} in {self.lines}")

    def end(self) -> tuple[int, str]:
        """Exit code and standard output, once it ended and nothing is left of it."""
        assert self.process.stderr is not None
        assert self.process.stdout is not None
        self.lines += self.process.stderr.read().splitlines()
        output = self.process.stdout.read()
        code = self.process.wait()
        patience = monotonic() + PATIENCE_S
        while session_members(self.process.pid):  # of a child's child nobody tells us
            assert monotonic() < patience, "processes are left"
            sleep(0.005)
        assert not any("Traceback" in line for line in self.lines), self.lines
        return code, output


@contextmanager
def hosts(*arguments: str, namespace: str = "") -> Iterator[Process]:
    """The command; whatever is still there of it in the end is killed."""
    inside = ["ip", "netns", "exec", namespace] if namespace else []
    command = [*inside, sys.executable, "-m", "bench", "hosts", *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        patience = Timer(PATIENCE_S, _kill, [process.pid])
        patience.start()
        try:
            yield Process(process, [])
        finally:
            patience.cancel()
            _kill(process.pid)


def _kill(session: int) -> None:
    for process in session_members(session):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def session_members(session: int) -> list[int]:
    """All processes of a session that are more than a zombie."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            state, _, _, of = entry.joinpath("stat").read_text().rpartition(") ")[2].split()[:4]
            if int(of) == session and state not in "ZX":
                found.append(int(entry.name))
    return found


def key_file(folder: Path) -> str:
    """A file with the key that both sides have."""
    path = folder / "psk"
    path.touch(mode=0o600)
    path.write_bytes(PSK)
    return str(path)


@contextmanager
def listener(psk: str, *arguments: str) -> Iterator[tuple[Process, int]]:
    with hosts("--listen", f"{HOST}:0", "--psk-file", psk, *arguments) as process:
        said = process.line_with("listening at ")
        yield process, int(said.split(",")[0].rpartition(":")[2])


def source_arguments(psk: str, port: int, *arguments: str) -> tuple[str, ...]:
    return "--to", f"{HOST}:{port}", "--psk-file", psk, *arguments
