"""The protocol of everything that can say which pages were written, and of what knows by what was sent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from ..errors import GuestError
from .bitmap import DirtyBitmap

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .ram import PageCopies


class DirtyTracker(Protocol):
    """Reports pages written since the last `collect`. A write that races with it is reported by it or by the next."""

    def start(self) -> None:
        """Begin to track; from here on no write is lost. Raises GuestError where this machine cannot."""
        ...

    def collect(self) -> DirtyBitmap:
        """Pages written since `start` or the last `collect`, and forget them: a bitmap of as many pages as RAM has.

        What it raises may have cost what was found by then: the caller takes every page as written, here and in parts.
        """
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


@runtime_checkable
class ComparingTracker(SteppedTracker, Protocol):
    """Reports pages that are not as they were sent: it sees no write, and needs none reported to it.

    After `start` nothing was sent, and every page counts as zero. A page that `collect` reports counts as it was then until
    it is sent. So whoever sends all pages once, and then every page that is reported, has sent what RAM is as soon as a
    `collect` on a guest that stands still reports nothing more.
    """

    def sent(self, gfns: NDArray[np.int64], copies: PageCopies, in_use: NDArray[np.bool_]) -> None:
        """Pages `gfns` (ascending) were sent as the first of these `copies`; those not `in_use` are zero and not read.

        Threads may call it at the same time for different pages, but not beside `collect`, which has to see all that was
        sent before it.
        """
        ...


def collected(tracker: DirtyTracker, pages: int, name: str) -> DirtyBitmap:
    """What `tracker`, which people call `name`, collects of RAM of `pages` pages. Raises GuestError where that is none.

    A bitmap of fewer pages would say of the others that nobody wrote to them.
    """
    report: object = tracker.collect()
    if not isinstance(report, DirtyBitmap):
        raise GuestError(f"the {name} gave a {type(report).__name__}, not a DirtyBitmap")
    if report.pages != pages:
        raise GuestError(f"the {name} reports {report.pages} pages, RAM has {pages}")
    return report


def collected_part(tracker: SteppedTracker, start: int, stop: int, name: str) -> NDArray[np.int64]:
    """As `collected`, of the pages `start` to `stop` - 1 alone."""
    gfns: object = tracker.collect_part(start, stop)
    if not isinstance(gfns, np.ndarray) or gfns.ndim != 1 or gfns.dtype.kind not in "iu":
        raise GuestError(f"the {name} gave a {type(gfns).__name__}, not an array of gfns")
    if gfns.size and not start <= int(gfns.min()) <= int(gfns.max()) < stop:
        raise GuestError(
            f"the {name} reports gfns {gfns.min()} to {gfns.max()} where it was asked for {start} to {stop - 1}"
        )
    return gfns.astype(np.int64, copy=False)
