"""The one protocol of everything that can say which pages were written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .bitmap import DirtyBitmap


class DirtyTracker(Protocol):
    """Reports pages written since the last `collect`. A write that races with it is reported by it or by the next."""

    def start(self) -> None:
        """Begin to track; from here on no write is lost. Raises GuestError where this machine cannot."""
        ...

    def collect(self) -> DirtyBitmap:
        """Pages written since `start` or the last `collect`, and forget them."""
        ...

    def stop(self) -> None:
        """Stop tracking. Calling it again changes nothing."""
        ...


@runtime_checkable
class SteppedTracker(DirtyTracker, Protocol):
    """A tracker that has to read RAM to say what was written, and so can be asked for a part of it at a time."""

    @property
    def step_pages(self) -> int:
        """Pages that one call of `collect_part` should get: some tens of milliseconds of work."""
        ...

    def collect_part(self, start: int, stop: int) -> NDArray[np.int64]:
        """As `collect`, of the pages `start` to `stop` - 1 alone, sorted; asked from 0 on, part by part, until the last."""
        ...
