"""KVM's dirty log on a guest that really writes: every page that changed is in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from pagexfer.dirty import DirtyBitmap
from pagexfer.errors import LocalProtocolError
from pagexfer.guests.kvm import KvmGuest
from pagexfer.guests.pattern import STATUS_GFN

from .kvm_guests import FULL_SPEED, RAM_BYTES, VCPUS, needs_kvm, park, progress, run_and_park, start

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def source() -> Iterator[KvmGuest]:
    """A busy guest that has not started yet."""
    with KvmGuest.boot(RAM_BYTES, VCPUS, write_rate_bytes=FULL_SPEED) as guest:
        yield guest


@pytest.fixture
def destination() -> Iterator[KvmGuest]:
    with KvmGuest.empty(RAM_BYTES, VCPUS) as guest:
        yield guest


@needs_kvm
class TestDirtyLog:
    async def test_reports_exactly_what_changed(self, source: KvmGuest) -> None:
        await run_and_park(source)
        log = source.hypervisor.dirty_log
        log.start()
        log.start()
        before = source.memory.words.copy()
        source.gate.release()
        await progress(source, 20)
        await park(source)
        reported = log.collect().gfns()
        changed = np.flatnonzero((source.memory.words != before).any(axis=1))
        # Page tables may be reported without a change: the processor's walk over them can count as a write.
        assert set(changed) <= set(reported)
        assert list(changed[changed >= STATUS_GFN]) == list(reported[reported >= STATUS_GFN])
        assert not log.collect().any()

    async def test_copy_by_rounds_of_the_log_loses_no_page(
        self, source: KvmGuest, destination: KvmGuest
    ) -> None:
        await start(source)
        await progress(source, 1)
        log = source.hypervisor.dirty_log
        log.start()
        copied = source.memory.words.copy()
        for _ in range(20):
            await progress(source, 20)
            gfns = log.collect().gfns()
            assert gfns.size
            copied[gfns] = source.memory.words[gfns]
        await park(source)
        gfns = log.collect().gfns()
        copied[gfns] = source.memory.words[gfns]
        log.stop()
        log.stop()
        assert np.array_equal(copied, source.memory.words)

    async def test_is_a_bitmap_of_all_pages_and_ends_with_stop(self, source: KvmGuest) -> None:
        log = source.hypervisor.dirty_log
        with pytest.raises(LocalProtocolError, match="not started"):
            log.collect()
        log.start()
        assert log.collect() == DirtyBitmap(source.memory.pages)
        log.stop()
        with pytest.raises(LocalProtocolError, match="not started"):
            log.collect()

    async def test_start_after_stop_begins_anew(self, source: KvmGuest) -> None:
        log = source.hypervisor.dirty_log
        log.start()
        await run_and_park(source)
        log.stop()
        log.start()
        assert not log.collect().any()
