"""The guest that is moved: a few pages, vCPUs of some bytes each, and the truth about both.

The truth is what the referee holds the SVSMs against: how often each page has changed, and which vCPU really runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from ...dirty.content import ContentTracker
from ...svsm.memory import GuestMemory
from ...svsm.page_digest import fresh_digest
from ...wire.constants import PAGE_SIZE
from ...wire.page_state import SHARED, VALIDATED
from ..gate import BytesGate
from ..tracker import SteppedMarks
from .schedule import Tracking

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ...dirty import DirtyTracker

# The larger guests take two steps to begin an epoch.
_STEP_PAGES: Final = 32


class WatchedGate(BytesGate):
    """A gate that knows which vCPU really runs: `running` alone says what the SVSM has found out so far."""

    def __init__(self, states: list[bytes], *, running: bool) -> None:
        super().__init__(states, running=running)
        self._raised = not running
        self.dead = False

    def raise_flag(self) -> None:
        self._raised = True
        super().raise_flag()

    def release(self) -> None:
        super().release()
        self._raised = False

    def moving(self, vcpu: int) -> bool:
        """Whether this vCPU runs: nobody raised the flag, or it has not seen it yet."""
        return self.running and not self.dead and (not self._raised or vcpu in self.slow)

    @property
    def any_moving(self) -> bool:
        """Whether the guest runs here, in whole or in part."""
        return self.running and any(self.moving(vcpu) for vcpu in range(self.vcpus))


class Machine:
    """Memory and gate of one machine: where the guest runs, or where it may go."""

    def __init__(self, memory: GuestMemory, gate: WatchedGate) -> None:
        self.memory = memory
        self.gate = gate

    @classmethod
    def empty(cls, pages: int, vcpus: int) -> Machine:
        """One that waits for a guest."""
        return cls(GuestMemory.allocate(pages * PAGE_SIZE), WatchedGate([b""] * vcpus, running=False))

    def same_as(self, other: Machine) -> bool:
        """Whether RAM, page states and vCPU states are the same, byte for byte."""
        return (
            np.array_equal(self.memory.words, other.memory.words)
            and np.array_equal(self.memory.states, other.memory.states)
            and self.gate.states == other.gate.states
        )

    def crash(self) -> None:
        """All that was in it is gone."""
        self.memory.words[:] = 0
        self.gate.dead = True


class HostileGuest(Machine):
    """The running guest. `log` is the hypervisor's dirty log, `tracker` what the SVSM has of its own, if anything."""

    def __init__(self, pages: int, vcpus: int, tracking: Tracking) -> None:
        states = [b"vCPU %d as it booted" % vcpu for vcpu in range(vcpus)]
        super().__init__(GuestMemory.allocate(pages * PAGE_SIZE), WatchedGate(states, running=True))
        self.memory.launch()
        used = np.arange(1, pages // 2 + 1, dtype=np.uint64)
        self.memory.words[: used.size] = (used * np.uint64(0x9E3779B97F4A7C15))[:, np.newaxis]
        self._marks: NDArray[np.uint8] = np.zeros(pages, dtype=np.uint8)
        self.tracking = tracking
        self.tracker: DirtyTracker | None = None
        if tracking is Tracking.SVSM:
            self.tracker = SteppedMarks(self._marks, _STEP_PAGES)
        elif tracking is Tracking.COMPARISON:
            self.tracker = ContentTracker(self.memory.words, fresh_digest())
        self._versions = [1] * pages
        self._before: dict[int, NDArray[np.uint64]] = {}  # what a page was before it was written last
        self.log: set[int] = set()
        self._steps = 0

    def is_now(self, gfn: int) -> tuple[int, bytes]:
        """What a page is, to be compared with what it was.

        How often it has changed; where only content counts, its state, and its content if by that state it has any.
        """
        if not self.tracking.compares:
            return self._versions[gfn], b""
        state = int(self.memory.states[gfn])
        return state, self.memory.words[gfn].tobytes() if state & (VALIDATED | SHARED) else b""

    def write(self, x: int, y: int, z: int) -> bool:
        """A vCPU stores to a page, if one runs and may: nearly always something, now and then zeros."""
        vcpu, gfn = y % self.gate.vcpus, x % self.memory.pages
        if not self.gate.moving(vcpu) or not self.memory.states[gfn] & (VALIDATED | SHARED):
            return False
        self._before[gfn] = self.memory.words[gfn].copy()
        self.memory.words[gfn, z % 8 :] = z if z % 7 else 0
        self._written(vcpu, gfn)
        return True

    def take_back(self) -> None:
        """A vCPU, if one runs and may, makes each page what it was before it was written last, as it does to a lock."""
        for gfn, before in self._before.items():
            if self.gate.moving(0) and self.memory.states[gfn] & (VALIDATED | SHARED):
                self.memory.words[gfn] = before
                self._written(0, gfn)
        self._before.clear()

    def change_state(self, x: int, y: int, z: int) -> bool:
        """A vCPU changes what a page is, if one runs: its permissions, or whether it is validated at all."""
        vcpu, gfns = y % self.gate.vcpus, np.array([x % self.memory.pages])
        if not self.gate.moving(vcpu):
            return False
        validated = bool(self.memory.states[gfns[0]] & VALIDATED)
        if validated and z % 2:
            self.memory.rmpadjust(gfns, 1, z % 32)
        else:
            self.memory.pvalidate(gfns, validated=not validated)
            self.memory.words[gfns] = 0  # a page that changes hands has lost its content
        self._changed(vcpu, int(gfns[0]))
        return True

    def _written(self, vcpu: int, gfn: int) -> None:
        self._marks[gfn] = 1
        self._changed(vcpu, gfn)
        self.log.add(gfn)

    def _changed(self, vcpu: int, gfn: int) -> None:
        self._steps += 1
        self._versions[gfn] += 1
        self.gate.states[vcpu] = b"vCPU %d after %d steps" % (vcpu, self._steps)
