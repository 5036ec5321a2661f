"""The dirty bitmap, and the trackers that fill it."""

from .bitmap import DirtyBitmap, as_run
from .ram import PageCopies, check_form
from .tracker import ComparingTracker, DirtyTracker, SteppedTracker, collected, collected_part

__all__ = [
    "ComparingTracker",
    "DirtyBitmap",
    "DirtyTracker",
    "PageCopies",
    "SteppedTracker",
    "as_run",
    "check_form",
    "collected",
    "collected_part",
]
