"""The control page: how gate and VMM speak to the guest code, and the switch that vCPU threads wait on.

The page stands in a memory slot of its own, outside of RAM: it has no dirty log, is never migrated, and each side of a
migration has its own. It plays the page that an SVSM shares with its vCPUs and nobody else.

A park has a ticket. The park flag holds the ticket of the park that is wanted, 0 for none, and a vCPU parks by copying
it to its own flag. So an own flag from an earlier park, whose vCPU may be just about to go on, counts for nothing.
"""

from __future__ import annotations

import mmap
import threading
from typing import Final

import numpy as np

from ...dirty.kvm_log import MemorySlot
from ...wire.constants import PAGE_SIZE

CONTROL_GPA: Final = 0xE000_0000
CONTROL_SLOT: Final = 1

# Words of the page; guest.S has the same offsets in bytes. Flags of different writers are in different cache lines.
_PARK_FLAG: Final = 0
_BATCH: Final = 8
_OWN_FLAGS: Final = 16
_OWN_FLAG_WORDS: Final = 8


class ControlPage:
    """Words that guest code and VMM both see at any time. Written by one side each, so no lock is needed to read."""

    def __init__(self) -> None:
        self._words = np.frombuffer(mmap.mmap(-1, PAGE_SIZE), dtype=np.uint64)
        self.slot = MemorySlot(CONTROL_SLOT, CONTROL_GPA, 1, self._words.ctypes.data)

    @property
    def park_flag(self) -> int:
        """Ticket of the park that is wanted; 0: go on."""
        return int(self._words[_PARK_FLAG])

    @park_flag.setter
    def park_flag(self, ticket: int) -> None:
        self._words[_PARK_FLAG] = ticket

    @property
    def batch(self) -> int:
        """Pages that a vCPU writes between two exits for pacing; 0: none, it only ticks."""
        return int(self._words[_BATCH])

    @batch.setter
    def batch(self, pages: int) -> None:
        self._words[_BATCH] = pages

    def parked(self, vcpu: int) -> bool:
        """Whether `vcpu` has raised its own flag for the park that is wanted now."""
        ticket = self.park_flag
        return ticket != 0 and int(self._words[_OWN_FLAGS + vcpu * _OWN_FLAG_WORDS]) == ticket

    def adopt_parked(self, vcpu: int) -> None:
        """Raise the own flag of a vCPU that was given the state of a parked one."""
        self._words[_OWN_FLAGS + vcpu * _OWN_FLAG_WORDS] = self._words[_PARK_FLAG]


class RunSwitch:
    """What decides whether vCPU threads enter the guest. Change anything only with `lock` held, then notify `changed`."""

    def __init__(self, control: ControlPage) -> None:
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)  # vCPU threads wait here
        self.left_guest = threading.Condition(self.lock)  # those who wait for a vCPU thread wait here
        self.control = control
        self.running = False
        self.closed = False
        self.throttle = 0  # percentage of time in which no vCPU runs
        self.batch_seconds = 0.0  # time that one batch of one vCPU takes at the wanted write rate
