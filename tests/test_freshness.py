"""A host that hides dirty bits, end to end over real TCP: what each freshness mode makes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

import pagexfer
from pagexfer.dirty import DirtyBitmap
from pagexfer.guests.checked import prove, start
from pagexfer.guests.kvm import KvmGuest
from pagexfer.guests.simulated import SimulatedGuest

from .kvm_guests import needs_kvm
from .test_migration import PSK, RAM, Witness, migrate

if TYPE_CHECKING:
    from pagexfer.dirty import DirtyTracker
    from pagexfer.engine.hypervisor import Hypervisor
    from pagexfer.guests.checked import CheckedGuest
    from pagexfer.migration import FreshnessChoice
    from pagexfer.svsm.gate import VcpuGate
    from pagexfer.svsm.memory import GuestMemory

WRITE_RATE_BYTES = 40 << 20
# Enough for RAM to be hashed on a busy machine too.
DOWNTIME_LIMIT_S = 1.0


class HidingLog:
    """A dirty log that leaves out every page with an odd gfn; `hidden` is what it left out so far."""

    def __init__(self, honest: DirtyTracker, pages: int) -> None:
        self._honest = honest
        self.hidden = DirtyBitmap(pages)

    def start(self) -> None:
        self._honest.start()

    def collect(self) -> DirtyBitmap:
        told = self._honest.collect()
        odd = told.gfns()[told.gfns() % 2 == 1]
        told.clear_gfns(odd)
        self.hidden.set_gfns(odd)
        return told

    def stop(self) -> None:
        self._honest.stop()


class SilentLog:
    """A dirty log that never tells of any write."""

    def __init__(self, pages: int) -> None:
        self._pages = pages

    def start(self) -> None:
        pass

    def collect(self) -> DirtyBitmap:
        return DirtyBitmap(self._pages)

    def stop(self) -> None:
        pass


class Lied:
    """A guest whose hypervisor gives another dirty log than its own, and is honest in all else."""

    def __init__(self, guest: CheckedGuest, dirty_log: DirtyTracker) -> None:
        self.kind = guest.kind
        self.memory: GuestMemory = guest.memory
        self.gate: VcpuGate = guest.gate
        self.tracker: DirtyTracker | None = guest.tracker
        self.hypervisor: Hypervisor = self
        self.dirty_log: DirtyTracker | None = dirty_log
        self._inner = guest.hypervisor
        self.stop = self._inner.stop
        self.resume = self._inner.resume
        self.save_device_state = self._inner.save_device_state
        self.load_device_state = self._inner.load_device_state


async def moved(
    source: pagexfer.Guest, destination: CheckedGuest, freshness: FreshnessChoice
) -> tuple[list[int], pagexfer.MigrationReport]:
    """Migrate; returns the gfns that differ when all has come, and the report."""
    stale: list[int] = []

    def look() -> None:
        differs = (source.memory.words != destination.memory.words).any(axis=1)
        stale.extend(np.flatnonzero(differs).tolist())

    report = await migrate(
        source,
        Witness(destination, look),
        2,
        downtime_limit_s=DOWNTIME_LIMIT_S,
        freshness=freshness,
    )
    return stale, report


@needs_kvm
class TestHostThatHidesDirtyBits:
    async def test_makes_the_guest_stale_where_its_log_is_believed(self) -> None:
        with (
            KvmGuest.boot(RAM, 2, write_rate_bytes=WRITE_RATE_BYTES) as source,
            KvmGuest.empty(RAM, 2) as destination,
        ):
            log = HidingLog(source.hypervisor.dirty_log, source.memory.pages)
            await start(source)
            stale, report = await moved(Lied(source, log), destination, "auto")
            assert stale
            assert log.hidden.test(np.array(stale)).all()
        assert report.freshness.label == "host-reported"
        assert report.info.audit is None

    async def test_is_caught_by_the_audit(self) -> None:
        with (
            KvmGuest.boot(RAM, 2, write_rate_bytes=WRITE_RATE_BYTES) as source,
            KvmGuest.empty(RAM, 2) as destination,
        ):
            log = HidingLog(source.hypervisor.dirty_log, source.memory.pages)
            await start(source)
            stale, report = await moved(Lied(source, log), destination, "digest-audit")
            assert stale == []
            proof = await prove(destination, 0.05)
            assert proof.consistent, proof.faults
            assert proof.progressed
            audit = report.info.audit
            assert audit is not None
            assert 0 < audit.pages <= log.hidden.count()
            assert audit.milliseconds > 0
        assert report.freshness.label == "digest-audit"
        described = report.info.as_dict()["audit"]
        assert described == {"milliseconds": round(audit.milliseconds, 1), "pages": audit.pages}


async def test_hidden_hints_do_not_matter_where_the_svsm_tracks() -> None:
    with (
        SimulatedGuest.boot(RAM, 2, write_rate_bytes=WRITE_RATE_BYTES) as source,
        SimulatedGuest.empty(RAM, 2) as destination,
    ):
        await start(source)
        stale, report = await moved(Lied(source, SilentLog(source.memory.pages)), destination, "auto")
        assert stale == []
    assert report.freshness.label == "svsm-tracked"


async def test_audit_finds_nothing_where_nobody_lies(
    guest_type: type[KvmGuest] | type[SimulatedGuest],
) -> None:
    with (
        guest_type.boot(RAM, 2, write_rate_bytes=WRITE_RATE_BYTES) as source,
        guest_type.empty(RAM, 2) as destination,
    ):
        await start(source)
        stale, report = await moved(source, destination, "digest-audit")
        assert stale == []
        proof = await prove(destination, 0.05)
        assert proof.consistent, proof.faults
    assert report.freshness.label == "digest-audit"
    assert report.info.audit is not None
    assert report.info.audit.pages == 0
    assert report.info.downtime is not None
    assert report.info.downtime > report.info.audit.milliseconds


async def test_an_audit_that_does_not_fit_the_downtime_limit_ends_the_migration_before_it_begins() -> None:
    with (
        SimulatedGuest.boot(RAM, 1, write_rate_bytes=0) as source,
        SimulatedGuest.empty(RAM, 1) as destination,
    ):
        await start(source)
        with pytest.RaisesGroup(pagexfer.TransferAborted, pagexfer.TransferAborted) as caught:
            await migrate(source, destination, 1, downtime_limit_s=0.0051, freshness="digest-audit")
        for aborted in caught.value.exceptions:
            assert isinstance(aborted, pagexfer.TransferAborted)
            assert (aborted.outcome, aborted.reason) == (pagexfer.Outcome.ENDED, "not-converging")
            assert "audit" in str(aborted)
        assert not destination.memory.words[: RAM // 8192].any()
        proof = await prove(source, 0.05)
        assert proof.consistent, proof.faults
        assert proof.progressed


async def test_unknown_freshness_is_refused() -> None:
    with (
        SimulatedGuest.empty(RAM, 1) as guest,
        pytest.raises(pagexfer.UsageError, match="freshness is auto or digest-audit, not host"),
    ):
        await pagexfer.send_guest(guest, "127.0.0.1", 4455, PSK, freshness="host")  # type: ignore[arg-type]
