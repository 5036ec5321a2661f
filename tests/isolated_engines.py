"""A small guest's migration one of whose engines is a process of its own, and how to find that process."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from pagexfer.engine.steering import Steering
from pagexfer.errors import TransferAborted
from pagexfer.migration import receive_guest, send_guest

from .engine_guests import SmallMachine
from .machines import ATTESTOR, HOST, PATIENCE_S, Side

if TYPE_CHECKING:
    from typing import Literal

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


@dataclass
class IsolatedMove:
    """One migration of a small guest; the engine of one side is isolated. Errors of no known kind are raised."""

    isolated: Literal["source", "destination"]
    machine: SmallMachine = field(default_factory=SmallMachine)
    steering: Steering = field(default_factory=Steering)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    patience_s: float = PATIENCE_S
    sent: Side = field(default_factory=Side)
    received: Side = field(default_factory=Side)

    async def run(self) -> None:
        """Until the source has ended, and for `patience_s` until the destination has."""
        with trio.fail_after(PATIENCE_S):
            async with trio.open_nursery() as nursery:
                port = await nursery.start(self._receive)
                await self._send(port)
                nursery.cancel_scope.deadline = trio.current_time() + self.patience_s
        assert engine_processes() == []

    async def _send(self, port: int) -> None:
        try:
            with self.scope:
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

    async def _receive(self, task_status: trio.TaskStatus[int]) -> None:
        try:
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
