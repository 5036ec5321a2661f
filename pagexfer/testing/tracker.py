"""A dirty tracker that is asked for a part of RAM at a time, as one is that has to read RAM; it reads marks instead."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..dirty.byte_map import ByteMapTracker

if TYPE_CHECKING:
    from numpy.typing import NDArray


class SteppedMarks(ByteMapTracker):
    """`dirty.SteppedTracker` over `marks`, one uint8 a page, for a guest that writes in the caller's own thread."""

    def __init__(self, marks: NDArray[np.uint8], step_pages: int) -> None:
        super().__init__(marks)
        self.step_pages = step_pages
        self._written = marks

    def collect_part(self, start: int, stop: int) -> NDArray[np.int64]:
        found: NDArray[np.int64] = start + np.flatnonzero(self._written[start:stop])
        self._written[found] = 0
        return found
