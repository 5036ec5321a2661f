"""The hostile network over real sockets: whatever it does to the frames, one side may run the guest, or nobody says so.

Which outcome a fault has depends on how far the migration came when it struck; that an outcome is the right one does not.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import pytest
import trio

from pagexfer.errors import Outcome, TransferAborted
from pagexfer.migration import MigrationReport, receive_guest, send_guest
from pagexfer.testing.hostile.proxy import FAULTS, HostileProxy

from .engine_guests import SmallMachine
from .loopback import HOST
from .small_guests import ATTESTOR, PAGES

if TYPE_CHECKING:
    from pagexfer.testing.hostile.proxy import Fault
    from pagexfer.testing.proxy import Frame

SEEDS: Final = range(80)
CHANNELS: Final = 3
_STALL_S: Final = 0.25
# What a destination needs at most to find out that its source is gone; one that never heard of it waits for the next.
_PATIENCE_S: Final = 1.0

End = MigrationReport | TransferAborted


class _Migration:
    """One migration of a guest that writes on, through a hostile network, and how both sides ended."""

    def __init__(self) -> None:
        self.machine = SmallMachine()
        self.source: End | None = None
        self.destination: End | None = None  # None where it still waits for a source

    async def run(self, seed: int, seen: list[Frame]) -> Counter[Fault]:
        async with trio.open_nursery() as nursery:
            port = await nursery.start(self._receive)
            proxy = HostileProxy(HOST, port, seed, CHANNELS, seen)
            nursery.start_soon(self._write)
            await self._send(await nursery.start(proxy.serve))
            with trio.move_on_after(_PATIENCE_S):
                while self.destination is None:  # noqa: ASYNC110 (a side has no event)
                    await trio.sleep(0.001)
            nursery.cancel_scope.cancel()
        return proxy.done

    async def _write(self) -> None:
        """The guest: a page every millisecond as long as it runs at the source."""
        number = 0
        while True:
            if self.machine.source.gate.running:
                number += 1
                self.machine.source.write(number * 7 % PAGES, number)
            await trio.sleep(0.001)

    async def _send(self, port: int) -> None:
        try:
            self.source = await send_guest(
                self.machine.source, HOST, port, ATTESTOR, channels=CHANNELS, stall_timeout_s=_STALL_S
            )
        except TransferAborted as aborted:
            self.source = aborted

    async def _receive(self, task_status: trio.TaskStatus[int]) -> None:
        try:
            self.destination = await receive_guest(
                self.machine.destination,
                HOST,
                0,
                ATTESTOR,
                stall_timeout_s=_STALL_S / 2,
                on_listening=task_status.started,
            )
        except TransferAborted as aborted:
            self.destination = aborted


@pytest.fixture(scope="module")
def documented_reasons() -> set[str]:
    """Reasons in protocol.md, but for the one that means a defect."""
    text = (Path(__file__).parent.parent / "docs" / "protocol.md").read_text()
    table = text.split("| reason | meaning |")[1].split("\n\n")[0]
    return set(re.findall(r"^\| ([a-z-]+) \|", table, flags=re.MULTILINE)) - {"internal"}


async def test_one_side_may_run_whatever_the_network_does(documented_reasons: set[str]) -> None:
    seen: list[Frame] = []
    outcomes: Counter[str] = Counter()
    faults: Counter[Fault] = Counter()
    for seed in SEEDS:
        migration = _Migration()
        faults += await migration.run(seed, seen)
        outcome = _judge(migration, documented_reasons, seed)
        outcomes[outcome.name] += 1
        migration.machine.source.memory.close()
        migration.machine.destination.memory.close()
        del seen[:-200]
    print(dict(outcomes), {fault.value: count for fault, count in faults.items()})
    assert faults.keys() == set(FAULTS)
    assert outcomes["COMPLETED"] >= 5
    assert outcomes["ENDED"] >= 5


def _judge(migration: _Migration, documented: set[str], seed: int) -> Outcome:
    source, destination, machine = migration.source, migration.destination, migration.machine
    said = f"seed {seed}: {source!r}, {destination!r}"
    for end in (source, destination):
        if isinstance(end, TransferAborted):
            assert end.reason in documented, said
            assert str(end).isprintable(), said
    runs_there = isinstance(destination, MigrationReport)
    assert machine.destination.gate.running is runs_there, said
    assert not (machine.source.gate.running and machine.destination.gate.running), said
    if runs_there:
        assert np.array_equal(machine.source.memory.words, machine.destination.memory.words), said
        assert np.array_equal(machine.source.memory.states, machine.destination.memory.states), said
        assert machine.source.gate.states == machine.destination.gate.states, said
    if isinstance(source, MigrationReport):
        assert machine.moved(), said
        return Outcome.COMPLETED
    assert source is not None, said
    assert source.outcome in (Outcome.ENDED, Outcome.REFUSED, Outcome.UNDECIDED), said
    if source.outcome is Outcome.UNDECIDED:
        assert not machine.source.gate.running, said
    else:
        assert machine.stayed(), said
    return source.outcome
