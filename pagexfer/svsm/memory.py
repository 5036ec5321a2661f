"""Guest RAM as the SVSM sees it, and the reverse map table (RMP) that says what each page is.

The RMP is emulated: on a machine with SEV-SNP the processor keeps it, here an array does. A write to a page that is neither
validated nor shared is refused, where hardware raises #VC: a page that the hypervisor put in another's place is not
validated. A second PVALIDATE to the same state is refused too. Hardware does it without an error, and says with the carry
flag that nothing changed (AMD64 manual, volume 3); that a gfn is validated once, so that a swapped page is never validated
anew, is for the guest's own record to see to.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import operator
import os
import threading
import weakref
from itertools import pairwise
from typing import TYPE_CHECKING, Final

import numpy as np

from ..dirty import DirtyBitmap, check_form
from ..errors import GuestError, LocalProtocolError, PageStateError
from ..wire.constants import PAGE_SIZE, WORDS_PER_PAGE
from ..wire.page_state import PERMISSION_BITS, PRIVATE, SHARED, STATE_MASK, VALIDATED, vmpl_shift

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from numpy.typing import NDArray

_VALIDATED: Final = np.uint32(VALIDATED)
_ACCESSIBLE: Final = np.uint32(VALIDATED | SHARED)
# include/uapi/asm-generic/mman-common.h, Linux 5.14
_MADV_POPULATE_READ: Final = 22
_MADV_POPULATE_WRITE: Final = 23
# Runs of pages that one bundle may store one by one.
_MOST_STORES: Final = 64


class GuestMemory:
    """RAM of one guest, gfn 0 to `pages` - 1, and the state word of each page.

    `words` is RAM as uint64 of shape (pages, 512), `states` the uint32 state words (`wire.page_state`), `ram_fd` the
    memfd behind the RAM, which other mappings of the same RAM (vCPUs) are made from. One that `allocate` made ends with
    this object at the latest, as a file's does: who forgets `close` does not keep the RAM for good.
    """

    def __init__(self, ram_fd: int, ram_bytes: int) -> None:
        ram_bytes = _whole_pages(ram_bytes)
        mapping = mmap.mmap(ram_fd, ram_bytes, mmap.MAP_SHARED)
        self._set_up(ram_fd, np.frombuffer(mapping, dtype=np.uint64).reshape(-1, WORDS_PER_PAGE))

    def _set_up(self, ram_fd: int, words: NDArray[np.uint64]) -> None:
        self.ram_fd = ram_fd
        self.pages = len(words)
        self.words = words
        self.states: NDArray[np.uint32] = np.full(self.pages, 0, dtype=np.uint32)
        self._state_changes = DirtyBitmap(self.pages)
        # vCPUs change states while a migration asks which.
        self._changing_states = threading.Lock()
        # Pages that may differ from zero: all, unless `allocate` knows better.
        self._populated = DirtyBitmap.full(self.pages)
        # Threads write to pages of their own, but the words of a bitmap are everybody's.
        self._populating = threading.Lock()
        self._data: Callable[[], Iterable[tuple[int, int]]] | None = None
        self._store: Callable[[int, memoryview], None] | None = None
        self._holes: DirtyBitmap | None = None
        # (start, stop) of all gfns that had memory behind them at the last look.
        self.data_ranges: list[tuple[int, int]] = [(0, self.pages)]
        # Two sessions have nothing in common but the guest: each has a lock of its own, and maybe threads.
        self._claiming = threading.Lock()
        self._claimed = False
        self._sessions = 0
        self._end: weakref.finalize[[int], GuestMemory] | None = None

    @classmethod
    def allocate(cls, ram_bytes: int, name: str = "guest-ram") -> GuestMemory:
        """Fresh zeroed RAM in a memfd, no page validated.

        Raises PageStateError where the size is not whole pages, GuestError where this machine cannot have so much.
        """
        ram_bytes = _whole_pages(ram_bytes)
        try:
            ram_fd = os.memfd_create(name, os.MFD_CLOEXEC)
        except OSError as error:
            raise GuestError(f"this machine cannot provide RAM: {error.strerror}") from None
        try:
            os.ftruncate(ram_fd, ram_bytes)
            memory = cls(ram_fd, ram_bytes)
        except (OSError, MemoryError):
            os.close(ram_fd)
            raise GuestError(f"this machine cannot provide RAM of {ram_bytes >> 20} MiB") from None
        except BaseException:
            os.close(ram_fd)
            raise
        memory._end = weakref.finalize(memory, os.close, ram_fd)
        # Fresh RAM is known to be zero, so a zero page costs nothing until its page has been written.
        memory._populated.clear()
        return memory

    @classmethod
    def over(
        cls,
        words: NDArray[np.uint64],
        data: Callable[[], Iterable[tuple[int, int]]] | None = None,
        store: Callable[[int, memoryview], None] | None = None,
    ) -> GuestMemory:
        """RAM that is mapped already, `words` of shape (pages, 512); it has no `ram_fd` (-1).

        `data` gives (start, stop) of all gfns that have memory behind them now: every other page is zero, is not read on
        the way out, and is not provided in advance on the way in. Default: all have.

        `store` puts octets of whole pages where the page of a gfn begins, and raises OSError where it cannot; threads may
        call it at the same time for different pages. It is called for runs of pages that had no memory when the guest was
        made: where RAM is a file, writing to that spares page faults and zeroing. Default: by way of `words`.

        Raises LocalProtocolError where `words` is not whole pages of writable memory, one after the other.
        """
        check_form(words)
        if not words.flags.writeable:
            raise LocalProtocolError("RAM has to be writable")
        memory = cls.__new__(cls)
        memory._set_up(-1, words)
        memory._data = data
        memory._store = store
        memory.find_holes()
        if memory._holes is not None:
            memory._populated.clear_gfns(memory._holes.gfns())
        return memory

    def find_holes(self) -> None:
        """Ask again where memory is, if there is somebody to ask and was a hole at the last look.

        A page that is written after this is none the less a hole here, so the SVSM looks again in each epoch (`pending`).
        RAM without a hole is not asked for again, as the answer takes the kernel milliseconds for each GiB: a hole that
        comes into being there is read, which is right, and has memory again.

        Raises what `data` does, and then all of RAM has memory: what was written since the last look is reported once only.
        """
        if self._data is not None and (self._holes is None or self._holes.any()):
            holes = DirtyBitmap.full(self.pages)
            try:
                ranges = list(self._data())
                for start, stop in ranges:
                    holes.clear_range(start, stop)
            except BaseException:
                self._holes, self.data_ranges = DirtyBitmap(self.pages), [(0, self.pages)]
                raise
            self._holes, self.data_ranges = holes, ranges

    def in_holes(self, gfns: NDArray[np.int64] | range) -> NDArray[np.bool_] | None:
        """Which of `gfns` had no memory at the last look, hence were zero; None where all of them may have some."""
        holes = self._holes
        if holes is None or not holes.any_of(gfns):
            return None
        return holes.test(np.arange(gfns.start, gfns.stop) if isinstance(gfns, range) else gfns)

    def note_content(self) -> None:
        """Take pages that have memory behind them for written, whoever did that; to be called before any page comes.

        So what was there before, firmware or the host's doing, does not stay where the source's page is zero.
        """
        if self._data is not None:
            ranges = self._data()
        elif self.ram_fd >= 0:
            found = data_ranges(self.ram_fd, self.ram_bytes)
            ranges = ((start // PAGE_SIZE, -(-stop // PAGE_SIZE)) for start, stop in found)
        else:
            return  # every page counts as written
        with self._populating:
            for start, stop in ranges:
                self._populated.set_range(start, stop)

    def close(self) -> None:
        """Give the memfd back; the mapping itself ends with the last array that looks at it."""
        if self._end is not None:
            self._end()  # which does it once
        elif self.ram_fd >= 0:
            os.close(self.ram_fd)
        self.ram_fd = -1

    def prefault(self, start: int, length: int) -> bool:
        """Have the kernel provide pages for `length` bytes of RAM from byte `start` on, before they are written.

        Confidential RAM is pinned, so nothing is saved by providing it late, and a page fault costs more than the rest of
        an import. A part with holes is left as it is, though: whoever made that RAM did not want it pinned. Takes long for
        much memory and lets other threads run meanwhile. Returns False where the kernel does not do it (Linux before
        5.14, no memory left): then pages are provided one by one as they are written.

        Of RAM whose holes are known, what is provided here is there already, in a file, and has to be mapped only: as if
        to be read, which maps 16 pages at a time and leaves them writable, and takes a third of the time.
        """
        pages, holes = range(start // PAGE_SIZE, (start + length) // PAGE_SIZE), self._holes
        if holes is not None and holes.any_of(pages):
            return True
        address = self.words.ctypes.data + start
        advice = _MADV_POPULATE_WRITE if self._data is None else _MADV_POPULATE_READ
        failed: int = _libc().madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), advice)
        return failed == 0

    def map_ahead(self, start: int, length: int) -> bool:
        """As `prefault`, before `length` bytes are read. Returns False also for RAM that this process has mapped already.

        Where RAM is a file that another process made, reading a page for the first time costs more than sealing it.
        """
        return self._data is not None and self.prefault(start, length)

    @property
    def ram_bytes(self) -> int:
        return self.pages * PAGE_SIZE

    def claim(self, *, vacant: bool = False) -> int:
        """Make this guest one session's to move (G5); returns how many sessions had it by now, this one counted.

        Raises LocalProtocolError where it is another's, or was moved; with `vacant`, as a destination needs it, also where
        a guest is in it, which shows in its page states.
        """
        with self._claiming:
            self.require_unclaimed()
            if vacant and self.states.any():
                raise LocalProtocolError("there is a guest in this RAM already")
            self._claimed = True
            self._sessions += 1
            return self._sessions

    def require_unclaimed(self) -> None:
        """Raises LocalProtocolError where another session moves this guest, or has moved it."""
        if self._claimed:
            raise LocalProtocolError("another session moves this guest, or has moved it")

    def disclaim(self) -> None:
        """The session that claimed this guest has ended, and the guest goes on here."""
        self._claimed = False

    def launch(self) -> None:
        """The state of a guest that has booted: every page private, validated, VMPL1's to use."""
        self.states[:] = PRIVATE

    def pvalidate(self, gfns: NDArray[np.int64], *, validated: bool = True) -> None:
        """PVALIDATE each page of `gfns`. Raises PageStateError, changing nothing, where one already has that state."""
        pages = self._locate(gfns)
        with self._changing_states:
            current = (self.states[pages] & _VALIDATED) != 0
            if (current == validated).any():
                raise PageStateError(
                    f"{'second' if validated else 'needless'} PVALIDATE: page already in that state"
                )
            self.states[pages] ^= _VALIDATED
            self._state_changes.set_gfns(gfns)

    def rmpadjust(self, gfns: NDArray[np.int64], vmpl: int, permissions: int) -> None:
        """Set the permissions of `vmpl` on validated pages. Raises PageStateError where a page is not validated."""
        pages = self._locate(gfns)
        shift = vmpl_shift(vmpl)
        field = ((1 << PERMISSION_BITS) - 1) << shift
        with self._changing_states:
            if not (self.states[pages] & _VALIDATED).all():
                raise PageStateError("RMPADJUST of a page that is not validated")
            self.states[pages] = (self.states[pages] & np.uint32(STATE_MASK & ~field)) | np.uint32(
                (permissions << shift) & field
            )
            self._state_changes.set_gfns(gfns)

    def take_state_changes(self) -> DirtyBitmap:
        """Pages that PVALIDATE or RMPADJUST changed since the last call. Any thread may do so meanwhile."""
        with self._changing_states:
            return self._state_changes.take()

    def adopt_states(self, gfns: NDArray[np.int64] | range, states: NDArray[np.uint32]) -> None:
        """Bring pages to the states that the source recorded: PVALIDATE where that bit differs, RMPADJUST for the others.

        Only what differs is set, so no page is validated twice.
        """
        self.states[self._locate(gfns)] = states

    def write(self, gfns: NDArray[np.int64] | range, content: NDArray[np.uint64]) -> None:
        """Store `content` (uint64, shape (n, 512), contiguous) at `gfns`.

        Raises PageStateError where one may not be written, or `store` has no memory left for it.
        """
        pages = self._locate(gfns)
        if np.count_nonzero(self.states[pages] & _ACCESSIBLE) < len(gfns):
            raise PageStateError("write to a page that is neither validated nor shared")
        with self._populating:
            self._populated.set_gfns(gfns)
        if self._store is None or self._holes is None or not self._holes.any_of(gfns):
            self.words[pages] = content
            return
        # For more runs the calls would take longer than the page faults.
        breaks = [] if isinstance(gfns, range) else (np.flatnonzero(np.diff(gfns) != 1) + 1).tolist()
        if len(breaks) >= _MOST_STORES:
            self.words[pages] = content
            return
        octets = content.reshape(-1).view(np.uint8).data
        try:
            for start, stop in pairwise((0, *breaks, len(gfns))):
                self._store(int(gfns[start]), octets[start * PAGE_SIZE : stop * PAGE_SIZE])
        except OSError as error:
            raise PageStateError(f"RAM cannot be written: {error.strerror}") from None

    def zero(self, gfns: NDArray[np.int64]) -> None:
        """Make pages zero, or forget those that the guest gave up; only pages that may differ from zero are touched."""
        self._locate(gfns)
        with self._populating:
            used = gfns[self._populated.test(gfns)]
            self._populated.clear_gfns(used)
        if used.size:
            self.words[used] = 0

    def _locate(self, gfns: NDArray[np.int64] | range) -> slice | NDArray[np.int64]:
        """`gfns` as an index into RAM: a slice for a range, which numpy serves without gathering."""
        if isinstance(gfns, range):
            first, last = gfns.start, gfns.stop - 1
        elif gfns.size:
            first, last = int(gfns.min()), int(gfns.max())
        else:
            return gfns
        if first < 0 or last >= self.pages:
            raise PageStateError(f"gfn outside of RAM of {self.pages} pages")
        return slice(first, last + 1) if isinstance(gfns, range) else gfns


def data_ranges(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Byte ranges of a file that have memory behind them (SEEK_DATA); all else is zero and was never touched."""
    stop = 0
    while stop < size:
        try:
            start = os.lseek(fd, stop, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:  # nobody knows: to be read, and never to be taken for zero
                yield stop, size
            return  # nothing but a hole up to the end
        stop = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        if start < stop:
            yield start, stop


def _whole_pages(ram_bytes: int) -> int:
    """A size of RAM. Raises PageStateError where it is none."""
    try:
        size = operator.index(ram_bytes)
    except TypeError:
        raise PageStateError(f"a size of RAM is a whole number, not a {type(ram_bytes).__name__}") from None
    if size <= 0 or size % PAGE_SIZE:
        raise PageStateError(f"RAM of {size} bytes is not a positive number of {PAGE_SIZE}-byte pages")
    return size


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
