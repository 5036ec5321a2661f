"""A source and a destination of a few pages, all in this process, with a hypervisor whose every call a test may change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import trio

from pagexfer.dirty import DirtyBitmap
from pagexfer.svsm.memory import GuestMemory
from pagexfer.testing import BytesGate
from pagexfer.wire.constants import PAGE_SIZE

from .small_guests import PAGES, VCPUS, SmallGuest

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from pagexfer.dirty import DirtyTracker

DEVICE_STATE: Final = b"what the devices were doing"


class FailingLog:
    """A dirty log that never has a page, and fails in the call that `fails` names."""

    def __init__(self, fails: str, error: type[Exception]) -> None:
        self._fails = fails
        self._error = error

    def start(self) -> None:
        self._call("start")

    def collect(self) -> DirtyBitmap:
        self._call("collect")
        return DirtyBitmap(PAGES)

    def stop(self) -> None:
        self._call("stop")

    def _call(self, name: str) -> None:
        if name == self._fails:
            raise self._error(f"the dirty log cannot {name}")


class TestHypervisor:
    """`engine.hypervisor.Hypervisor` that notes its calls; each `before_*` runs first and may wait or raise."""

    __test__ = False

    def __init__(self, dirty_log: DirtyTracker | None = None) -> None:
        self.dirty_log = dirty_log
        self.calls: list[str] = []
        self.device_state = DEVICE_STATE
        self.loaded = b""
        self.before_stop = trio.lowlevel.checkpoint
        self.before_resume = trio.lowlevel.checkpoint
        self.before_save = trio.lowlevel.checkpoint
        self.before_load = trio.lowlevel.checkpoint

    async def stop(self) -> None:
        await self._call("stop", self.before_stop)

    async def resume(self) -> None:
        await self._call("resume", self.before_resume)

    async def save_device_state(self) -> bytes:
        await self._call("save", self.before_save)
        return self.device_state

    async def load_device_state(self, state: bytes) -> None:
        await self._call("load", self.before_load)
        self.loaded = state

    async def _call(self, name: str, before: Callable[[], Awaitable[None]]) -> None:
        await before()
        self.calls.append(name)


class SourceGuest(SmallGuest):
    """A `guests.guest.Guest` that runs."""

    kind = "small"

    def __init__(self, dirty_log: DirtyTracker | None = None) -> None:
        super().__init__()
        self.hypervisor = TestHypervisor(dirty_log)


class DestinationGuest:
    """A `guests.guest.Guest` that never ran."""

    kind = "small"
    tracker = None

    def __init__(self) -> None:
        self.memory = GuestMemory.allocate(PAGES * PAGE_SIZE)
        self.gate = BytesGate.waiting(VCPUS)
        self.hypervisor = TestHypervisor()


class SmallMachine:
    """One guest and the place it may go to."""

    def __init__(self, dirty_log: DirtyTracker | None = None) -> None:
        self.source = SourceGuest(dirty_log)
        self.destination = DestinationGuest()

    def moved(self) -> bool:
        """Whether the guest runs at the destination alone, with the same RAM."""
        return (
            self.destination.gate.running
            and not self.source.gate.running
            and self.destination.hypervisor.calls[-1] == "resume"
            and np.array_equal(self.source.memory.words, self.destination.memory.words)
        )

    def stayed(self) -> bool:
        """Whether the guest runs at the source alone, and never ran at the destination."""
        return (
            self.source.gate.running
            and self.source.hypervisor.calls[-1:] in ([], ["resume"])  # what was not stopped is not continued
            and not self.destination.gate.running
            and "resume" not in self.destination.hypervisor.calls
        )
