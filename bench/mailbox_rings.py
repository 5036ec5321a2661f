"""What a ring and its answer take between two processes, and what of that is Python.

- two eventfds: each side writes one and sleeps in a read of the other; nothing else. The least there is.
- doorbells: the host's `Doorbells` and the SVSM's `Handler`, as in a migration, with all their ways to wait. The host
  writes a command of constants, the SVSM answers its number, and nobody reads or checks anything else.
- command: an empty command by `Slot` and `SlotService` through the same doorbells: registers written, copied, checked,
  performed under the session's lock, answered, copied and checked.
- direct call: the same command where the SVSM is called in the host's thread: all of its Python, and no doorbell.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import numpy as np
import trio

from pagexfer.wire.slot import NO_BUFFER, Command

from .doorbell import RoundTrips, ping_pong
from .mailbox_svsm import echo, local_slot, svsm
from .measure import rotated
from .options import progress

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from pagexfer.engine.doorbell import Doorbells
    from pagexfer.engine.slots import Slot
    from pagexfer.wire.slot import SlotMemory

EVENTFDS: Final = "two eventfds"
DOORBELLS: Final = "doorbells"
COMMAND: Final = "command"
DIRECT: Final = "direct call"


def round_trips(ram_fd: int, calls: int, repeats: int) -> dict[str, RoundTrips]:
    """Medians over alternating repeats, bare eventfds first."""
    local = local_slot()
    with svsm(ram_fd, 1) as (slot,), echo() as (memory, doorbells):
        ways: dict[str, Callable[[], RoundTrips]] = {
            EVENTFDS: lambda: ping_pong(calls),
            DOORBELLS: lambda: trio.run(_measure, _ringing(memory, doorbells), calls),
            COMMAND: lambda: trio.run(_measure, _commanding(slot), calls),
            DIRECT: lambda: trio.run(_measure, _commanding(local), calls),
        }
        found: dict[str, list[RoundTrips]] = {name: [] for name in ways}
        for number in range(repeats):
            progress(f"mailbox: round trips, round {number + 1} of {repeats}")
            for name in rotated(ways, number):
                found[name].append(ways[name]())
    return {name: _median(trips) for name, trips in found.items()}


def _ringing(memory: SlotMemory, doorbells: Doorbells) -> Callable[[], Awaitable[object]]:
    async def ring() -> None:
        memory.write_command(memory.status_sequence + 1, Command.EPOCH, NO_BUFFER, 0, 0, 0)
        await doorbells.ring()

    return ring


def _commanding(slot: Slot) -> Callable[[], Awaitable[object]]:
    return lambda: slot.command(Command.EPOCH)


async def _measure(ring: Callable[[], Awaitable[object]], calls: int) -> RoundTrips:
    await ring()
    taken = np.empty(calls)
    for call in range(calls):
        began = time.perf_counter()
        await ring()
        taken[call] = time.perf_counter() - began
    return RoundTrips.of(taken)


def _median(found: Sequence[RoundTrips]) -> RoundTrips:
    half, most = (
        float(np.median([getattr(trips, name) for trips in found])) for name in ("p50_us", "p99_us")
    )
    return RoundTrips(found[0].calls, half, most)
