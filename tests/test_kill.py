"""One side is a process and dies, or is stopped, at a moment that an event triggers: the other ends with one clear line.

Whoever still may run the guest proves that it does, and no process is left behind.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio

from pagexfer.errors import Outcome, TransferAborted
from pagexfer.testing.proxy import Action, FaultProxy, after_bytes, at_bundle, at_frame
from pagexfer.wire.bundle import BundleKind
from pagexfer.wire.framing import FrameType

from .machines import HOST, PATIENCE_S, RAM_BYTES, VCPUS, Machines, goes_on, never_ran

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from pagexfer.testing.proxy import Frame

_PSK: Final = b"a pre-shared key of 32 bytes ..."
_GUEST: Final = ("--guest", "simulated", "--ram", f"{RAM_BYTES >> 20}MiB", "--vcpus", str(VCPUS), "--json")
# With it the process is the SVSM's, and its engine another one.
_ISOLATED: Final = ("--isolated",)
# An engine whose SVSM died says so, unless its peer is quicker to see that a connection is gone.
_REASONS: Final = {False: ("connection",), True: ("svsm", "cancelled", "connection")}
_CALM: Final = ("--write-rate", "30MiB", "--downtime-limit", "1s")


class _Side:
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

    async def end(self) -> int:
        """Its exit code, once it ended and all that it said was read."""
        async with self._news:
            while not self._ended:
                await self._news.wait()
        return await self.process.wait()

    def signal(self, number: signal.Signals) -> None:
        """Signal the process alone; its vCPUs and its engine are noted, to see later that they are gone."""
        self.children = _children(self.process.pid)
        assert len(self.children) == VCPUS + self._isolated
        os.kill(self.process.pid, number)

    def report(self) -> dict[str, Any]:
        """The one object on standard output, after a look at the one line on standard error."""
        report: dict[str, Any] = json.loads(self.output)
        assert not any("Traceback" in line for line in self.lines), self.lines
        if "error" in report:
            assert self.lines[-1] == f"pagexfer: {report['error']['message']}"
        return report


@asynccontextmanager
async def _side(*arguments: str) -> AsyncIterator[_Side]:
    async with trio.open_nursery() as nursery:
        process = await trio.lowlevel.open_process(
            [sys.executable, "-m", "pagexfer", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        side = _Side(process, isolated="--isolated" in arguments)
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


@pytest.fixture
def psk(tmp_path: Path) -> str:
    path = tmp_path / "psk"
    path.touch(mode=0o600)
    path.write_bytes(_PSK)
    return str(path)


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    with Machines() as machines:
        yield machines


def _receive(psk: str, *options: str) -> tuple[str, ...]:
    journal = _journals(psk)[1]
    return (
        *("receive", "--listen", f"{HOST}:0", "--psk-file", psk, "--journal", journal),
        *("--run-for", "50ms", *options, *_GUEST),
    )


def _send(psk: str, port: int, *options: str) -> tuple[str, ...]:
    journal = _journals(psk)[0]
    return "send", "--to", f"{HOST}:{port}", "--psk-file", psk, "--journal", journal, *options, *_GUEST


def _journals(psk: str) -> tuple[str, str]:
    """Where the source and the destination keep theirs."""
    return f"{psk}.source", f"{psk}.destination"


def _recover(*arguments: str) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "pagexfer", "recover", "--json", *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    report: dict[str, Any] = json.loads(done.stdout)
    return done.returncode, report


async def _port(side: _Side) -> int:
    return int((await side.line_with("listening at ")).rpartition(":")[2])


def _exists(process: int) -> bool:
    return Path(f"/proc/{process}").exists()


def _children(process: int) -> list[int]:
    # A child counts as the thread's that made it.
    tasks = Path(f"/proc/{process}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def _goes_on(report: dict[str, Any]) -> bool:
    guest = report["guest"]
    return guest["consistent"] is True and guest["progressed"] is True and guest["faults"] == []


async def test_destination_killed_while_it_waits(psk: str) -> None:
    with trio.fail_after(PATIENCE_S):
        async with _side(*_receive(psk)) as destination:
            port = await _port(destination)
            destination.signal(signal.SIGKILL)
        async with _side(*_send(psk, port, *_CALM)) as source:
            assert await source.end() == Outcome.ENDED
    report = source.report()
    assert "Connection refused" in report["error"]["message"]
    assert _goes_on(report)


@pytest.mark.parametrize(
    ("point", "outcome", "left", "options"),
    [
        (lambda: at_frame(FrameType.HELLO, channel=0), Outcome.ENDED, "KEYED", ()),
        (lambda: after_bytes(1, 1 << 20), Outcome.ENDED, "KEYED", ()),
        (lambda: at_bundle(BundleKind.MANIFEST), Outcome.ENDED, "KEYED", ()),
        (lambda: at_bundle(BundleKind.START_TOKEN), Outcome.UNDECIDED, "VERIFIED", ()),
        (lambda: after_bytes(1, 1 << 20), Outcome.ENDED, "KEYED", _ISOLATED),
        (lambda: at_bundle(BundleKind.START_TOKEN), Outcome.UNDECIDED, "VERIFIED", _ISOLATED),
    ],
    ids=["handshake", "mid-epoch", "black-out", "start-token", "isolated-mid-epoch", "isolated-start-token"],
)
async def test_destination_killed_at(
    psk: str,
    point: Callable[[], Callable[[Frame], bool]],
    outcome: Outcome,
    left: str,
    options: tuple[str, ...],
) -> None:
    with trio.fail_after(PATIENCE_S):
        async with _side(*_receive(psk, *options)) as destination, trio.open_nursery() as nursery:
            proxy = FaultProxy(
                HOST,
                await _port(destination),
                point(),
                Action.DELAY,
                lambda: destination.signal(signal.SIGKILL),
            )
            async with _side(*_send(psk, await nursery.start(proxy.serve), *_CALM)) as source:
                assert await source.end() == outcome
            nursery.cancel_scope.cancel()
    report = source.report()
    if outcome is Outcome.ENDED:
        assert report["error"]["reason"] in _REASONS[bool(options)]
        assert _goes_on(report)
    else:
        assert "stays parked here" in report["error"]["message"]
        assert "progressed" not in report["guest"]
    await _only_the_source_may_run(psk, left)


async def _only_the_source_may_run(psk: str, left: str) -> None:
    """What both journals say after the destination died in the state `left`, in which it never ran the guest."""
    source, destination = _journals(psk)
    code, report = await trio.to_thread.run_sync(_recover, source, destination)
    assert report["destination-state"] == left
    assert report["source-state"] == ("STARTED" if left == "VERIFIED" else "ABORTED")
    if left == "VERIFIED":
        assert (code, report["may-run"]) == (Outcome.UNDECIDED, "not decided yet")
        code, alone = await trio.to_thread.run_sync(_recover, "--abandon", destination)
        assert (code, alone["may-run"]) == (Outcome.COMPLETED, "not this side")
        code, report = await trio.to_thread.run_sync(_recover, source, destination)
    assert (code, report["may-run"]) == (Outcome.COMPLETED, "the source")


@pytest.mark.parametrize(
    ("point", "options"),
    [
        (lambda: after_bytes(1, 1 << 20), ()),
        (lambda: at_bundle(BundleKind.MANIFEST), ()),
        (lambda: at_bundle(BundleKind.MANIFEST), _ISOLATED),
    ],
    ids=["mid-epoch", "black-out", "isolated-black-out"],
)
async def test_destination_stopped_at(
    psk: str, machines: Machines, point: Callable[[], Callable[[Frame], bool]], options: tuple[str, ...]
) -> None:
    await machines.start()
    with trio.fail_after(PATIENCE_S):
        async with _side(*_receive(psk, *options)) as destination, trio.open_nursery() as nursery:
            port = await _port(destination)
            proxy = FaultProxy(HOST, port, point(), Action.DELAY, lambda: destination.signal(signal.SIGSTOP))
            sent = await machines.send(await nursery.start(proxy.serve), 0.3)
            destination.process.kill()
            nursery.cancel_scope.cancel()
    assert isinstance(sent.end, TransferAborted)
    assert (sent.end.outcome, sent.end.reason) == (Outcome.ENDED, "connection")
    assert proxy.reached.is_set()
    assert await goes_on(machines.source)
    assert never_ran(machines.destination)


@pytest.mark.parametrize(
    ("point", "outcome", "left", "options"),
    [
        (lambda: after_bytes(1, 1 << 20), Outcome.ENDED, "KEYED", ()),
        (lambda: at_bundle(BundleKind.MANIFEST), Outcome.ENDED, "KEYED", ()),
        (lambda: at_bundle(BundleKind.START_TOKEN), Outcome.COMPLETED, "STARTED", ()),
        (lambda: at_bundle(BundleKind.MANIFEST), Outcome.ENDED, "KEYED", _ISOLATED),
        (lambda: at_bundle(BundleKind.START_TOKEN), Outcome.COMPLETED, "STARTED", _ISOLATED),
    ],
    ids=["mid-epoch", "black-out", "start-token", "isolated-black-out", "isolated-start-token"],
)
async def test_source_killed_at(
    psk: str,
    point: Callable[[], Callable[[Frame], bool]],
    outcome: Outcome,
    left: str,
    options: tuple[str, ...],
) -> None:
    with trio.fail_after(PATIENCE_S):
        async with _side(*_receive(psk)) as destination, trio.open_nursery() as nursery:
            sources: list[_Side] = []
            proxy = FaultProxy(
                HOST,
                await _port(destination),
                point(),
                Action.PASS,
                lambda: sources[0].signal(signal.SIGKILL),
            )
            async with _side(*_send(psk, await nursery.start(proxy.serve), *_CALM, *options)) as source:
                sources.append(source)
                assert await source.end() == -signal.SIGKILL
            assert await destination.end() == outcome
            nursery.cancel_scope.cancel()
    report = destination.report()
    if outcome is Outcome.COMPLETED:
        assert _goes_on(report)  # the token had left: the guest is the destination's
    else:
        assert report["error"]["reason"] in _REASONS[bool(options)]
        assert "progressed" not in report["guest"]
    code, verdict = await trio.to_thread.run_sync(_recover, *_journals(psk))
    assert verdict["source-state"] == left
    runner = "the destination" if outcome is Outcome.COMPLETED else "the source"
    assert (code, verdict["may-run"]) == (Outcome.COMPLETED, runner)


@pytest.mark.parametrize("side", ["source", "destination"])
async def test_a_disk_that_is_full_at_switchover(psk: str, side: str) -> None:
    """What cannot be written down is not done: no start token leaves, or no vCPU runs; and the source may run the guest."""
    sides: dict[str, _Side] = {}

    def fill_disk() -> None:
        resource.prlimit(sides[side].process.pid, resource.RLIMIT_FSIZE, (0, 0))

    with trio.fail_after(PATIENCE_S):
        async with _side(*_receive(psk)) as destination, trio.open_nursery() as nursery:
            sides["destination"] = destination
            point = BundleKind.READY if side == "source" else BundleKind.START_TOKEN
            proxy = FaultProxy(HOST, await _port(destination), at_bundle(point), Action.PASS, fill_disk)
            async with _side(*_send(psk, await nursery.start(proxy.serve), *_CALM)) as source:
                sides["source"] = source
                code = await source.end()
            assert await destination.end() == Outcome.ENDED
            nursery.cancel_scope.cancel()
    assert destination.report()["error"]["reason"] == "journal"
    report = source.report()
    assert "the journal could not be written" in report["error"]["message"]
    if side == "source":
        assert (code, report["error"]["reason"]) == (Outcome.ENDED, "journal")
        assert _goes_on(report)
        code, verdict = await trio.to_thread.run_sync(_recover, *_journals(psk))
        assert (verdict["source-state"], verdict["destination-state"]) == ("KEYED", "FAILED")
        assert (code, verdict["may-run"]) == (Outcome.COMPLETED, "the source")
    else:  # it could not write down that it FAILED either, so it gave no abort token
        assert (code, report["error"]["reason"]) == (Outcome.UNDECIDED, "undecided")
        await _only_the_source_may_run(psk, "VERIFIED")


async def test_a_disk_that_is_full_from_the_beginning(psk: str) -> None:
    """The destination ends at once instead of refusing one source after the other."""
    with trio.fail_after(PATIENCE_S):
        async with _side(*_receive(psk)) as destination:
            port = await _port(destination)
            resource.prlimit(destination.process.pid, resource.RLIMIT_FSIZE, (0, 0))
            async with _side(*_send(psk, port, *_CALM)) as source:
                assert await source.end() == Outcome.ENDED
            assert await destination.end() == Outcome.ENDED
    for side in (source, destination):
        assert side.report()["error"]["reason"] == "journal"
    assert _goes_on(source.report())
    assert not await trio.Path(_journals(psk)[1]).exists()
