"""Taking in what a tracker knows, before each epoch: all at once, or in steps where that means to read RAM.

The host can be answered between two steps, so that it may give up meanwhile, and knows how far this is.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, NamedTuple

from ..dirty import SteppedTracker, collected, collected_part
from ..errors import LocalProtocolError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..dirty import DirtyBitmap, DirtyTracker

TRACKER: Final = "guest's tracker"  # as people are told of it


class Looked(NamedTuple):
    """How far a sweep is: pages that were looked at so far, and whether more are left."""

    pages: int
    more: bool


class Sweep:
    """One pass after the other over the `pages` pages of a guest. A pass is open from its first step until `close`."""

    def __init__(self, tracker: DirtyTracker | None, pages: int) -> None:
        self._tracker = tracker
        self._pages = pages
        self._looked = 0
        self.is_open = False

    def step(self, pending: DirtyBitmap) -> Looked:
        """Mark in `pending` what was written among the next pages. Does nothing once all were looked at."""
        self.is_open = True
        start, stop = self._looked, self._pages
        if start < stop and isinstance(self._tracker, SteppedTracker):
            stop = min(start + self._tracker.step_pages, stop)
            with all_if_it_fails(pending, start, stop):
                pending.set_gfns(collected_part(self._tracker, start, stop, TRACKER))
        elif start < stop and self._tracker is not None:
            with all_if_it_fails(pending, start, stop):
                pending.union(collected(self._tracker, self._pages, TRACKER))
        self._looked = stop
        return Looked(stop, more=stop < self._pages)

    def skip(self) -> None:
        """Open a pass that has nothing to look for."""
        self.is_open = True
        self._looked = self._pages

    def close(self) -> None:
        """All that this pass found is pending; the next step begins another pass."""
        self._looked = 0
        self.is_open = False

    def require_closed(self) -> None:
        """Raise LocalProtocolError in the middle of a pass: what was written is known in part only."""
        if self.is_open:
            raise LocalProtocolError("an epoch is being begun: give EPOCH until it is complete")


@contextmanager
def all_if_it_fails(pending: DirtyBitmap, start: int, stop: int) -> Iterator[None]:
    """Asking a tracker about pages `start` to `stop` - 1. Where it fails half-way, all of them are pending.

    What it had found by then is lost with it, and it does not report the same write twice.
    """
    try:
        yield
    except BaseException:
        pending.set_range(start, stop)
        raise
