"""The SVSM's own dirty map, filled by the writers themselves: one byte per page in memory that they all share.

It may be used wherever every write to guest memory goes through code that marks it (vCPUs of a simulated guest, or
an SVSM that emulates writes).

Why a byte and not a bit. Several processes mark at once, without a lock. Storing a byte is one store, which no other
store to the bytes around it can undo. Setting a bit is three steps - load the word, or the bit in, store the word -
and a bit that another process set between the load and the store is lost, and its page with it.

Why no write is lost. A writer stores the page, then its mark. `collect` looks at the mark, clears it if it is set,
and returns; the page is read after that. x86-64 makes the stores of one processor visible in their order, so whoever
sees the mark, or overwrites it, has the page's new content before him. For any one write, its mark

- is stored before `collect` looks: it is reported, and the page is read after the write.
- is stored between the look and the clear, over a mark that was set already: the clear wipes both, but the page is
  reported because of the first, and is read after the clear, hence after the second write as well.
- is stored between the look and the clear, where no mark was set: `collect` clears only what it saw set, so the
  mark stays for the next `collect`. This is why the map is not simply filled with zeros.
- is stored after the clear: it stays for the next `collect`, though the page may already have been read as the
  writer left it. It is then sent twice, which is harmless.

The one reordering that x86-64 does allow, a later load that overtakes an earlier store, would break the second and
last case: a page read before the clear is visible. So `collect` ends with a full fence.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final

import numpy as np

from ..errors import LocalProtocolError
from .bitmap import DirtyBitmap

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Pages per step: the snapshot of a step and what is made from it stay in cache. A multiple of 8, so that each step
# fills whole bytes of the bitmap.
_STEP_PAGES: Final = 1 << 17


class ByteMapTracker:
    """Dirty tracker over `marks`, uint8 of shape (pages,), in which writers store 1 at a gfn AFTER writing its page.

    Writers go on storing whether or not the tracker is started; only one thread calls the tracker.
    """

    def __init__(self, marks: NDArray[np.uint8]) -> None:
        """Raises LocalProtocolError where `marks` is not one byte per page of a guest that has a page."""
        if marks.dtype != np.uint8 or marks.ndim != 1 or not marks.size:
            raise LocalProtocolError(
                f"a byte map is one uint8 per page, not {marks.dtype} of shape {marks.shape}"
            )
        self._marks = marks
        self._started = False
        self._fence = threading.Lock()

    def start(self) -> None:
        """Forget all marks and begin to track. Where it is started already, nothing changes."""
        if not self._started:
            self._started = True
            self.collect()

    def collect(self) -> DirtyBitmap:
        """Pages marked since `start` or the last `collect`; read them after this returned, never before.

        Raises LocalProtocolError where the tracker is not started.
        """
        if not self._started:
            raise LocalProtocolError("the byte map's tracker is not started: call start first")
        bitmap = DirtyBitmap(self._marks.size)
        octets = bitmap.words.view(np.uint8)
        for first in range(0, self._marks.size, _STEP_PAGES):
            self._collect_step(self._marks[first : first + _STEP_PAGES], octets[first // 8 :])
        # Taking a lock is a locked instruction, which on x86-64 is a full fence: every clear is visible before the
        # caller reads the first page.
        with self._fence:
            return bitmap

    def _collect_step(self, marks: NDArray[np.uint8], octets: NDArray[np.uint8]) -> None:
        """Move the marks of one step into the bitmap's bytes."""
        # Decide on a private copy: the marks change under our hands.
        seen = marks.copy()
        if not seen.any():
            return
        packed = np.packbits(seen, bitorder="little")  # any byte but 0 is a mark
        octets[: packed.size] = packed
        # By index: numpy stores exactly these bytes. An operation on the whole array would load and store their
        # neighbours too, and lose what was marked there in between.
        marks[np.flatnonzero(seen)] = 0

    def stop(self) -> None:
        """Stop tracking. Calling it again changes nothing."""
        self._started = False
