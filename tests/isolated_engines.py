"""A small guest's migration one of whose engines is a process of its own, and how to find that process."""

from __future__ import annotations

import os
import shlex
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from pagexfer.engine.steering import Steering
from pagexfer.errors import TransferAborted, UsageError
from pagexfer.migration import receive_guest, send_guest
from pagexfer.testing.proxy import Action, FaultProxy

from .engine_guests import SmallMachine
from .machines import ATTESTOR, HOST, PATIENCE_S, Side

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Literal

    import pytest

    from pagexfer.testing.proxy import Frame

STALL_S: Final = 1.5


def engine_processes() -> list[int]:
    """Engine processes of this one, the destination's first."""
    # A child counts as the thread's that made it, which may have ended: so all processes are looked at.
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = (process / "stat").read_text().rpartition(") ")[2].split()[1]
            if int(parent) == os.getpid() and b"engine_process" in (process / "cmdline").read_bytes():
                found.append(int(process.name))
        except OSError:
            continue
    return sorted(found)


def start_hostile_engines(folder: Path, monkeypatch: pytest.MonkeyPatch, what: str, *words: str) -> None:
    """Have `hostile_engine.py` be started for each engine's process from now on."""
    script = folder / "engine"
    command = shlex.join([sys.executable, str(Path(__file__).parent / "hostile_engine.py"), what, *words])
    script.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    script.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(script))


@dataclass
class IsolatedMove:
    """One migration of a small guest; the engine of one side is isolated. `act` is called once `point` comes by.

    Errors but those that end a migration are raised.
    """

    isolated: Literal["source", "destination"]
    machine: SmallMachine = field(default_factory=SmallMachine)
    steering: Steering = field(default_factory=Steering)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)  # of the isolated side
    patience_s: float = PATIENCE_S
    point: Callable[[Frame], bool] | None = None
    act: Callable[[], None] = lambda: None
    unusable: UsageError | None = None
    sent: Side = field(default_factory=Side)
    received: Side = field(default_factory=Side)

    async def run(self) -> None:
        """Until the source has ended, and for `patience_s` until the destination has."""
        with trio.fail_after(PATIENCE_S):
            async with trio.open_nursery() as network:
                async with trio.open_nursery() as sides:
                    port = await sides.start(self._receive)
                    if self.point is not None:
                        proxy = FaultProxy(HOST, port, self.point, Action.PASS, self.act)
                        port = await network.start(proxy.serve)
                    await self._send(port)
                    sides.cancel_scope.deadline = trio.current_time() + self.patience_s
                network.cancel_scope.cancel()
        assert engine_processes() == []

    async def _send(self, port: int) -> None:
        try:
            with self.scope if self.isolated == "source" else nullcontext():
                self.sent.end = await send_guest(
                    self.machine.source,
                    HOST,
                    port,
                    ATTESTOR,
                    channels=2,
                    steering=self.steering,
                    stall_timeout_s=STALL_S,
                    isolated=self.isolated == "source",
                    on_progress=self.sent.progress.append,
                )
        except TransferAborted as aborted:
            self.sent.end = aborted
        except UsageError as error:
            self.unusable = error

    async def receive_alone(self) -> None:
        """The destination's side of a migration that no source begins."""
        with trio.fail_after(PATIENCE_S):
            await self._receive()
        assert engine_processes() == []

    async def _receive(self, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED) -> None:
        try:
            with self.scope if self.isolated == "destination" else nullcontext():
                self.received.end = await receive_guest(
                    self.machine.destination,
                    HOST,
                    0,
                    ATTESTOR,
                    stall_timeout_s=STALL_S,
                    isolated=self.isolated == "destination",
                    on_listening=task_status.started,
                    on_progress=self.received.progress.append,
                    on_stranger=self.received.strangers.append,
                )
        except TransferAborted as aborted:
            self.received.end = aborted
        except UsageError as error:
            self.unusable = error
