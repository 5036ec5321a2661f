"""The dirty bitmap, and the trackers that fill it."""

from .bitmap import DirtyBitmap, as_run
from .tracker import DirtyTracker, SteppedTracker

__all__ = ["DirtyBitmap", "DirtyTracker", "SteppedTracker", "as_run"]
