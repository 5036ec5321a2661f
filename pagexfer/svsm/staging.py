"""Private memory of the trusted side, in areas that are used for one command and then by the next.

An area that was used last is given out first, so that it is still in the cache. There are as many as commands were ever
carried out at the same time: one where all slots are served by one thread.
"""

from __future__ import annotations

import mmap
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class StagingPool:
    """Staging areas of one session, for all its slots. Any thread may use it: a list's append and pop are atomic."""

    def __init__(self) -> None:
        self._free: list[memoryview] = []

    def take(self, size: int) -> memoryview:
        """At least `size` bytes, which hold whatever they held."""
        try:
            area = self._free.pop()
        except IndexError:
            return memoryview(mmap.mmap(-1, size))
        return area if len(area) >= size else memoryview(mmap.mmap(-1, size))

    def give(self, area: memoryview) -> None:
        """Give back what `take` gave."""
        self._free.append(area)

    @contextmanager
    def area(self, size: int) -> Iterator[memoryview]:
        """An area for the time of a `with` block."""
        area = self.take(size)
        try:
            yield area
        finally:
            self.give(area)
