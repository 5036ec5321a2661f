"""An EXPORT that takes as long as the host likes: a handler's thread stands still inside of the SVSM, and the host goes on.

The thread stops where the SVSM has read the pages or where it seals them, both outside of its lock. It and the host's own
thread never run at the same time, so what a schedule does is the same in every run.
"""

from __future__ import annotations

import enum
import threading
from typing import TYPE_CHECKING, Generic, TypeVar
from unittest.mock import patch

from ...svsm.export import Packager

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager

    import numpy as np
    from numpy.typing import NDArray

    from ...svsm.export import Package
    from ...wire.slot import SessionStatus

_T = TypeVar("_T")


class Point(enum.Enum):
    """Where a thread is stopped."""

    READ = "the pages are read"  # those of a guest whose tracker sees every write only when they are sealed
    SEAL = "they are about to be sealed"


class Hold(Generic[_T]):
    """One call in a thread of its own, which `point` stops. `owner` is whose key seals in it.

    Whoever judges what comes of the call is to set `sent`, what each page was when the call stopped, and `state`, what the
    session's was right before the call went on.
    """

    def __init__(self, call: Callable[[], _T], point: Point, owner: object) -> None:
        self._call = call
        self.point = point
        self.owner = owner
        self.state: SessionStatus | None = None
        self.sent: Mapping[int, tuple[int, bytes]] = {}
        self.is_waiting = False
        self._news = threading.Semaphore(0)
        self._go = threading.Event()
        self._results: list[_T] = []
        self._errors: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, daemon=True)

    def begin(self) -> bool:
        """Let the call begin; True once it stands still at its point, False where it ended before."""
        self._thread.start()
        self._news.acquire()
        return self.is_waiting

    def finish(self) -> _T:
        """Let the call end; what it gives or raises."""
        self.is_waiting = False
        self._go.set()
        self._thread.join()
        if self._errors:
            raise self._errors[0]
        return self._results[0]

    def pass_by(self, point: Point) -> None:
        """To be called by every thread that comes by a point."""
        if self.is_mine and point is self.point and not self._go.is_set():
            self.is_waiting = True
            self._news.release()
            self._go.wait()

    @property
    def is_mine(self) -> bool:
        """Whether the thread that asks is the call's."""
        return threading.current_thread() is self._thread

    def _run(self) -> None:
        try:
            self._results.append(self._call())
        except BaseException as error:
            self._errors.append(error)
        self._news.release()


def watched_reads(pass_by: Callable[[], None]) -> AbstractContextManager[object]:
    """Call `pass_by` meanwhile whenever pages were read to be sealed."""
    package = Packager.package

    def watched(packager: Packager, found: NDArray[np.int64], capacity: int) -> Package:
        packaged = package(packager, found, capacity)
        pass_by()
        return packaged

    return patch.object(Packager, "package", watched)
