"""Taking in what a tracker knows, before each epoch: all at once, or in steps where that means to read RAM.

The host can be answered between two steps, so that it may give up meanwhile, and knows how far this is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ..dirty import DirtyBitmap, SteppedTracker
from ..errors import LocalProtocolError

if TYPE_CHECKING:
    from ..dirty import DirtyTracker
    from .memory import GuestMemory


class Looked(NamedTuple):
    """How far a sweep is: pages that were looked at so far, and whether more are left."""

    pages: int
    more: bool


class Sweep:
    """One pass after the other over a guest's `memory`. A pass is open from its first step until `close`.

    `hinted` and `found` are pages that were reported by others, and count from the end of the next pass on.
    """

    def __init__(self, tracker: DirtyTracker | None, memory: GuestMemory) -> None:
        self._tracker = tracker
        self._memory = memory
        self._looked = 0
        self.is_open = False
        self.hinted = DirtyBitmap(memory.pages)
        self.found = DirtyBitmap(memory.pages)

    def step(self, pending: DirtyBitmap) -> Looked:
        """Mark in `pending` what was written among the next pages. Does nothing once all were looked at."""
        self.is_open = True
        start, stop = self._looked, self._memory.pages
        if start < stop:
            if isinstance(self._tracker, SteppedTracker):
                stop = min(start + self._tracker.step_pages, stop)
                pending.set_gfns(self._tracker.collect_part(start, stop))
            else:
                self._collect(pending)
        self._looked = stop
        return Looked(stop, more=stop < self._memory.pages)

    def close(self, pending: DirtyBitmap, lost: DirtyBitmap) -> None:
        """All that this pass found is pending, and so is what was reported or `lost`."""
        self._looked = 0
        self.is_open = False
        for bitmap in (self._memory.state_changes, self.hinted, self.found, lost):
            pending.union(bitmap.take())

    def whole(self, pending: DirtyBitmap, lost: DirtyBitmap) -> None:
        """A pass at once."""
        self._collect(pending)
        self.close(pending, lost)

    def require_closed(self) -> None:
        """Raise LocalProtocolError in the middle of a pass: what was written is known in part only."""
        if self.is_open:
            raise LocalProtocolError("an epoch is being begun: give EPOCH until it is complete")

    def _collect(self, pending: DirtyBitmap) -> None:
        if self._tracker is not None:
            pending.union(self._tracker.collect())
