"""The dirty bitmap, and the trackers that fill it."""

from .bitmap import DirtyBitmap
from .tracker import DirtyTracker

__all__ = ["DirtyBitmap", "DirtyTracker"]
