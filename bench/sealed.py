"""A whole migration of a simulated guest between two processes, and what each side spent on it.

What is counted begins with the first page and ends with the migration: neither start nor handshake is in it. A side is all
of its processes but vCPUs: where the engine is isolated, its process as well.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import trio

import pagexfer
from pagexfer.guests.simulated import SimulatedGuest

from .pair import DIRECT, Route, Side, Watch, children, run_pair

if TYPE_CHECKING:
    from collections.abc import Callable

    from pagexfer.dirty import DirtyBitmap, DirtyTracker
    from pagexfer.engine.hypervisor import Hypervisor
    from pagexfer.svsm.gate import VcpuGate
    from pagexfer.svsm.memory import GuestMemory

PSK: Final = bytes(range(32))


@dataclass(frozen=True, slots=True)
class Move:
    """One migration: of which guest, and how. `free` is the part of RAM that is zero."""

    ram_bytes: int
    channels: int
    free: float = 0.0
    bundle_pages: int | None = None
    write_rate_bytes: int = 0
    downtime_limit_s: float = 0.3
    seed: int = 1
    isolated: bool = False
    channel_threads: bool | None = None


@dataclass(frozen=True, slots=True)
class Moved:
    """What the source says at the end. A migration that does not converge is given up after `moving_s`.

    `dirty_pages_per_s` are the different pages that the guest wrote, in the last epoch. Of what was sent, `arrived_bytes`
    are what the destination had at the end: the rest was in buffers on the way.
    """

    side: Side
    converged: bool
    moving_s: float
    downtime_s: float
    epochs: int
    bundles: int
    sent_bytes: int
    dirty_pages_per_s: float
    arrived_bytes: int = 0


class _Announced:
    """A guest that says when its dirty tracker is started, which is right before the first page is exported."""

    def __init__(self, guest: SimulatedGuest, on_first_page: Callable[[], None]) -> None:
        self.kind: str = guest.kind
        self.memory: GuestMemory = guest.memory
        self.gate: VcpuGate = guest.gate
        self.hypervisor: Hypervisor = guest.hypervisor
        self.tracker: DirtyTracker = _AnnouncedTracker(guest.tracker, on_first_page)


class _AnnouncedTracker:
    def __init__(self, tracker: DirtyTracker, on_start: Callable[[], None]) -> None:
        self._tracker = tracker
        self._on_start = on_start

    def start(self) -> None:
        self._on_start()
        self._tracker.start()

    def collect(self) -> DirtyBitmap:
        return self._tracker.collect()

    def stop(self) -> None:
        self._tracker.stop()


def run_move(move: Move, route: Route = DIRECT) -> tuple[Moved, Side | None]:
    """Migrate between two fresh processes; the destination has nothing to say of a migration that was given up."""
    moved, (side, arrived_bytes) = run_pair(receive, send, move, route)
    return replace(moved, arrived_bytes=arrived_bytes), side


def receive(
    move: Move,
    host: str,
    on_listening: Callable[[int], None],
    on_first_page: Callable[[], None] = lambda: None,
) -> tuple[Side | None, int]:
    """The destination, in a process of its own, and the bytes that came.

    Its RAM is provided before the source comes, which does not count.
    """
    watch: list[Watch] = []
    arrived_bytes = 0

    def watch_from_setup(info: pagexfer.MigrationInfo) -> None:
        nonlocal arrived_bytes
        arrived_bytes = info.ram.transferred
        if watch:
            watch[0].look()
        elif info.status is not pagexfer.Status.SETUP:
            watch.append(Watch(spared))
            on_first_page()

    async def main(guest: SimulatedGuest) -> Side | None:
        attestor = pagexfer.PskAttestor(PSK)
        try:
            await pagexfer.receive_guest(
                guest,
                host,
                0,
                attestor,
                isolated=move.isolated,
                channel_threads=move.channel_threads,
                on_listening=on_listening,
                on_progress=watch_from_setup,
            )
        except pagexfer.TransferAborted:
            return None
        return watch[0].side(move.ram_bytes)

    with SimulatedGuest.empty(move.ram_bytes, 1) as guest:
        spared = children()
        return trio.run(main, guest), arrived_bytes


def send(
    move: Move,
    host: str,
    port: int,
    on_first_page: Callable[[], None] = lambda: None,
    attestor: pagexfer.PskAttestor | None = None,
) -> Moved:
    """The source, in a process of its own. Raises TransferAborted for any other end than the two in `Moved`.

    Its RAM is all there from its boot on, zero pages too: reading one meets no page fault.
    """
    seen: list[pagexfer.MigrationInfo] = []
    watch: list[Watch] = []

    def on_progress(info: pagexfer.MigrationInfo) -> None:
        seen[:] = [info]
        if watch:
            watch[0].look()

    def first_page() -> None:
        watch.append(Watch(spared))
        on_first_page()

    async def main(guest: SimulatedGuest) -> Moved:
        await guest.hypervisor.resume()
        guest.gate.release()
        converged = True
        try:
            await pagexfer.send_guest(
                _Announced(guest, first_page),
                host,
                port,
                attestor or pagexfer.PskAttestor(PSK),
                channels=move.channels,
                downtime_limit_s=move.downtime_limit_s,
                bundle_pages=move.bundle_pages,
                isolated=move.isolated,
                channel_threads=move.channel_threads,
                on_progress=on_progress,
            )
        except pagexfer.TransferAborted as aborted:
            if aborted.reason != "not-converging":
                raise
            converged = False
        last = seen[0]
        return Moved(
            watch[0].side(move.ram_bytes),
            converged,
            (last.total_time - last.setup_time) / 1000,
            (last.downtime or 0.0) / 1000,
            last.ram.dirty_sync_count,
            sum(channel.bundles for channel in last.channels),
            last.ram.transferred,
            last.ram.dirty_pages_rate,
        )

    with SimulatedGuest.boot(
        move.ram_bytes, 1, write_rate_bytes=move.write_rate_bytes, free=move.free, seed=move.seed
    ) as guest:
        spared = children()
        return trio.run(main, guest)
