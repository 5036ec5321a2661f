"""The dirty bitmap, and the trackers that fill it."""

from .bitmap import DirtyBitmap, as_run
from .ram import PageCopies
from .tracker import ComparingTracker, DirtyTracker, SteppedTracker

__all__ = [
    "ComparingTracker",
    "DirtyBitmap",
    "DirtyTracker",
    "PageCopies",
    "SteppedTracker",
    "as_run",
]
