"""The two sides of a migration as processes of the pagexfer command: to end one at a moment, and to hear the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import trio

from pagexfer.errors import Outcome

from .machines import HOST, PATIENCE_S, RAM_BYTES, VCPUS

if TYPE_CHECKING:
    import signal
    from collections.abc import AsyncIterator

_PSK: Final = b"a pre-shared key of 32 bytes ..."
_GUEST: Final = ("--guest", "simulated", "--ram", f"{RAM_BYTES >> 20}MiB", "--vcpus", str(VCPUS), "--json")
# With it the process is the SVSM's, and its engine another one.
ISOLATED: Final = ("--isolated",)
CALM: Final = ("--write-rate", "30MiB", "--downtime-limit", "1s")


class SideProcess:
    """One side of a migration as a process."""

    def __init__(self, process: trio.Process, *, isolated: bool) -> None:
        self.process = process
        self._isolated = isolated
        self.lines: list[str] = []
        self.output = b""
        self.children: list[int] = []
        self._news = trio.Condition()
        self._ended = False

    async def read(self) -> None:
        assert self.process.stderr is not None
        assert self.process.stdout is not None
        rest = b""
        async for part in self.process.stderr:
            *lines, rest = (rest + part).split(b"\n")
            async with self._news:
                self.lines += [line.decode() for line in lines]
                self._news.notify_all()
        async for part in self.process.stdout:
            self.output += part
        async with self._news:
            self._ended = True
            self._news.notify_all()

    async def line_with(self, text: str) -> str:
        """The first line of standard error that contains `text`."""
        async with self._news:
            while not any(text in line for line in self.lines):
                assert not self._ended, self.lines
                await self._news.wait()
        return next(line for line in self.lines if text in line)

    async def port(self) -> int:
        """Where a destination listens."""
        return int((await self.line_with("listening at ")).rpartition(":")[2])

    async def end(self) -> int:
        """Its exit code, once it ended and all that it said was read."""
        async with self._news:
            while not self._ended:
                await self._news.wait()
        return await self.process.wait()

    def note_children(self) -> None:
        """Note its vCPUs and its engine, to see later that they are gone."""
        self.children = _children(self.process.pid)
        assert len(self.children) == VCPUS + self._isolated

    def signal(self, number: signal.Signals) -> None:
        """Signal the process alone, whose children are noted."""
        self.note_children()
        os.kill(self.process.pid, number)

    def report(self) -> dict[str, Any]:
        """The one object on standard output, after a look at the one line on standard error."""
        report: dict[str, Any] = json.loads(self.output)
        assert not any("Traceback" in line for line in self.lines), self.lines
        if "error" in report:
            assert self.lines[-1] == f"pagexfer: {report['error']['message']}"
        return report


@asynccontextmanager
async def side_process(*arguments: str) -> AsyncIterator[SideProcess]:
    """Start the command; at the end wait for its end, and for that of its children that were noted."""
    async with trio.open_nursery() as nursery:
        process = await trio.lowlevel.open_process(
            [sys.executable, "-m", "pagexfer", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        side = SideProcess(process, isolated="--isolated" in arguments)
        try:
            nursery.start_soon(side.read)
            yield side
            with trio.fail_after(PATIENCE_S):
                await side.end()
                while any(map(_exists, side.children)):  # noqa: ASYNC110 (of a child's child nobody tells us)
                    await trio.sleep(0.005)
        finally:
            if process.returncode is None:
                process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
            nursery.cancel_scope.cancel()


def new_psk(folder: Path) -> str:
    """A file with a pre-shared key; beside it the sides keep their journals."""
    path = folder / "psk"
    path.touch(mode=0o600)
    path.write_bytes(_PSK)
    return str(path)


def receive_arguments(psk: str, *options: str) -> tuple[str, ...]:
    journal = journals(psk)[1]
    return (
        *("receive", "--listen", f"{HOST}:0", "--psk-file", psk, "--journal", journal),
        *("--run-for", "50ms", *options, *_GUEST),
    )


def send_arguments(psk: str, port: int, *options: str) -> tuple[str, ...]:
    journal = journals(psk)[0]
    return "send", "--to", f"{HOST}:{port}", "--psk-file", psk, "--journal", journal, *options, *_GUEST


def journals(psk: str) -> tuple[str, str]:
    """Where the source and the destination keep theirs."""
    return f"{psk}.source", f"{psk}.destination"


def recover(*arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit code and report of that command."""
    done = subprocess.run(
        [sys.executable, "-m", "pagexfer", "recover", "--json", *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    report: dict[str, Any] = json.loads(done.stdout)
    return done.returncode, report


def _exists(process: int) -> bool:
    return Path(f"/proc/{process}").exists()


def _children(process: int) -> list[int]:
    # A child counts as the thread's that made it.
    tasks = Path(f"/proc/{process}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def guest_goes_on(report: dict[str, Any]) -> bool:
    """Whether a side says that every vCPU wrote on, and that all of the guest is right."""
    guest = report["guest"]
    return guest["consistent"] is True and guest["progressed"] is True and guest["faults"] == []


async def only_the_source_may_run(psk: str, source_state: str, left: str) -> None:
    """What both journals say after the destination died in the state `left`, in which it never ran the guest."""
    source, destination = journals(psk)
    code, report = await trio.to_thread.run_sync(recover, source, destination)
    assert (report["source-state"], report["destination-state"]) == (source_state, left)
    if source_state == "STARTED":
        assert (code, report["may-run"]) == (Outcome.UNDECIDED, "not decided yet")
        code, alone = await trio.to_thread.run_sync(recover, "--abandon", destination)
        assert (code, alone["may-run"]) == (Outcome.COMPLETED, "not this side")
        code, report = await trio.to_thread.run_sync(recover, source, destination)
    assert (code, report["may-run"]) == (Outcome.COMPLETED, "the source")
