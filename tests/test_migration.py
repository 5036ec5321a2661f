"""The main job, end to end over real TCP: a guest that keeps writing moves, and is the same on the other side."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import trio

import pagexfer
from pagexfer.guests.checked import prove, start
from pagexfer.guests.simulated import SimulatedGuest

if TYPE_CHECKING:
    from collections.abc import Callable

    from pagexfer.dirty import DirtyTracker
    from pagexfer.engine.hypervisor import Hypervisor
    from pagexfer.guests.checked import CheckedGuest
    from pagexfer.guests.kvm import KvmGuest
    from pagexfer.migration import FreshnessChoice
    from pagexfer.svsm.gate import VcpuGate
    from pagexfer.svsm.memory import GuestMemory

PSK = pagexfer.PskAttestor(bytes(range(32)))
RAM = 32 << 20


class Witness:
    """A destination guest that lets a test look once everything has come and before the guest may run.

    Device state is loaded at exactly that moment: the SVSM has verified the manifest, READY is not said yet.
    """

    tracker: DirtyTracker | None = None

    def __init__(self, guest: CheckedGuest, look: Callable[[], None]) -> None:
        self.kind = guest.kind
        self.memory: GuestMemory = guest.memory
        self.gate: VcpuGate = guest.gate
        self.hypervisor: Hypervisor = self
        self.dirty_log: DirtyTracker | None = None
        self._inner = guest.hypervisor
        self._look = look

    async def stop(self) -> None:
        await self._inner.stop()

    async def resume(self) -> None:
        await self._inner.resume()

    async def save_device_state(self) -> bytes:
        return await self._inner.save_device_state()

    async def load_device_state(self, state: bytes) -> None:
        self._look()
        await self._inner.load_device_state(state)


async def migrate(
    source: pagexfer.Guest,
    destination: pagexfer.Guest,
    channels: int,
    *,
    downtime_limit_s: float = 0.3,
    freshness: FreshnessChoice = "auto",
    on_progress: Callable[[pagexfer.MigrationInfo], None] = lambda _info: None,
) -> pagexfer.MigrationReport:
    """Both sides in this process; returns the source's report once both are done."""
    async with trio.open_nursery() as nursery:
        port: int = await nursery.start(serve, destination)
        return await pagexfer.send_guest(
            source,
            "127.0.0.1",
            port,
            PSK,
            channels=channels,
            downtime_limit_s=downtime_limit_s,
            freshness=freshness,
            on_progress=on_progress,
        )


async def serve(guest: pagexfer.Guest, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED) -> None:
    await pagexfer.receive_guest(guest, "127.0.0.1", 0, PSK, on_listening=task_status.started)


@pytest.mark.parametrize(
    ("channels", "rate_mib"),
    [(1, 0), (1, 40), (4, 40), (16, 40)],
    ids=["1-idle", "1-busy", "4-busy", "16-busy"],
)
async def test_a_busy_guest_moves_and_goes_on(
    guest_type: type[KvmGuest] | type[SimulatedGuest], channels: int, rate_mib: int
) -> None:
    with (
        guest_type.boot(RAM, 2, write_rate_bytes=rate_mib << 20) as source,
        guest_type.empty(RAM, 2) as destination,
    ):
        looks = []

        def look() -> None:
            assert source.gate.parked() == 2
            assert np.array_equal(source.memory.words, destination.memory.words)
            assert np.array_equal(source.memory.states, destination.memory.states)
            looks.append(source.memory.words.copy())

        await start(source)
        report = await migrate(source, Witness(destination, look), channels)
        proof = await prove(destination, 0.1)
        assert proof.consistent, proof.faults
        assert proof.progressed
        # The source stood still from black-out on, for good.
        assert len(looks) == 1
        assert np.array_equal(source.memory.words, looks[0])
        assert not np.array_equal(source.memory.words, destination.memory.words)

    info = report.info
    assert info.status is pagexfer.Status.COMPLETED
    assert len(info.channels) == channels
    assert all(channel.pages for channel in info.channels)
    assert info.ram.normal + info.ram.duplicate >= RAM // 4096
    assert info.ram.duplicate >= RAM // 4096 // 4  # free memory is a quarter
    assert info.ram.remaining == 0
    assert report.freshness.label == ("host-reported" if source.kind == "kvm" else "svsm-tracked")


async def test_page_states_move_with_the_pages() -> None:
    with (
        SimulatedGuest.boot(RAM, 1, write_rate_bytes=0) as source,
        SimulatedGuest.empty(RAM, 1) as destination,
    ):
        last = source.memory.pages - 1
        source.memory.rmpadjust(np.arange(last - 9, last), 2, 0b0101)
        source.memory.pvalidate(np.array([last]), validated=False)
        await start(source)
        await migrate(source, destination, 2)
        assert np.array_equal(source.memory.states, destination.memory.states)
        assert destination.memory.states[last] & 2 == 0


async def test_a_guest_that_writes_faster_than_the_limit_allows_goes_on_at_the_source(
    guest_type: type[KvmGuest] | type[SimulatedGuest],
) -> None:
    with guest_type.boot(RAM, 2, write_rate_bytes=1 << 50) as source, guest_type.empty(RAM, 2) as destination:
        await start(source)
        with pytest.RaisesGroup(pagexfer.TransferAborted, pagexfer.TransferAborted) as caught:
            await migrate(source, destination, 2, downtime_limit_s=0.001)
        for aborted in caught.value.exceptions:
            assert isinstance(aborted, pagexfer.TransferAborted)
            assert aborted.outcome is pagexfer.Outcome.ENDED
            assert aborted.reason == "not-converging"
            assert "MiB/s" in str(aborted)
        proof = await prove(source, 0.05)
        assert proof.consistent, proof.faults
        assert proof.progressed
