"""Where a QEMU keeps its guest's RAM: memory backends found by QMP, opened, and mapped as one range of pages.

Pages are numbered through the backends in the order of their ids, which must be the same at both ends.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import weakref
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from ...errors import GuestError
from ...wire.constants import PAGE_SIZE, WORDS_PER_PAGE
from .qmp import QmpRefused
from .values import record, records, text, whole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from .qmp import QmpClient

_MAP_SHARED_FIXED: Final = 0x11
_MAP_NORESERVE: Final = 0x4000  # include/uapi/asm-generic/mman.h
_HUGE_BYTES: Final = 2 << 20
_MEMFD: Final = "/memfd:memory-backend-memfd"


@dataclass(frozen=True, slots=True)
class Backend:
    """One memory backend: `fd` is a file of `size` bytes whose memory comes in pages of `page_bytes`."""

    id: str
    size: int
    page_bytes: int
    fd: int

    def data(self) -> Iterator[tuple[int, int]]:
        """Byte ranges that have memory behind them (SEEK_DATA); all else is zero and was never touched."""
        stop = 0
        while stop < self.size:
            try:
                start = os.lseek(self.fd, stop, os.SEEK_DATA)
            except OSError:  # ENXIO: nothing but a hole up to the end
                return
            stop = min(os.lseek(self.fd, start, os.SEEK_HOLE), self.size)
            if start < stop:
                yield start, stop


async def find_backends(qmp: QmpClient) -> tuple[Backend, ...]:
    """The backends that hold all of the machine's RAM, by id, opened. Raises GuestError where RAM cannot be shared."""
    found: list[Backend] = []
    try:
        for entry in sorted(
            records(await qmp.execute("query-memdev")), key=lambda entry: str(entry.get("id"))
        ):
            found.append(await _open_backend(qmp, entry, found))
        summary = record(await qmp.execute("query-memory-size-summary"))
        ram_bytes = whole(summary.get("base-memory")) + whole(summary.get("plugged-memory", 0))
        if ram_bytes != sum(backend.size for backend in found):
            raise GuestError(
                f"the machine has {ram_bytes} bytes of RAM and its memory backends {sum(b.size for b in found)}: "
                "all RAM must be in memory backends with share=on, and these must hold nothing else"
            )
    except BaseException:
        close_backends(found)
        raise
    return tuple(found)


def close_backends(backends: tuple[Backend, ...] | list[Backend]) -> None:
    """Close the files; mappings stay."""
    for backend in backends:
        os.close(backend.fd)


def map_backends(backends: tuple[Backend, ...]) -> NDArray[np.uint64]:
    """All backends as one range of memory, uint64 of shape (pages, 512), that lives as long as the array."""
    total = sum(backend.size for backend in backends)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    reservation = mmap.mmap(-1, total + _HUGE_BYTES, flags)
    base = int(np.frombuffer(reservation, dtype=np.uint8).ctypes.data)
    offset = -base % _HUGE_BYTES  # huge pages are mapped at their own multiples only
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    address = base + offset
    for backend in backends:
        mapped = libc.mmap(
            ctypes.c_void_p(address),
            ctypes.c_size_t(backend.size),
            mmap.PROT_READ | mmap.PROT_WRITE,
            _MAP_SHARED_FIXED,
            backend.fd,
            ctypes.c_long(0),
        )
        if mapped != address:
            raise GuestError(
                f"memory backend {backend.id} cannot be mapped: {os.strerror(ctypes.get_errno())}"
            )
        address += backend.size
    return np.frombuffer(reservation, dtype=np.uint64, count=total // 8, offset=offset).reshape(
        -1, WORDS_PER_PAGE
    )


def writer(backends: tuple[Backend, ...]) -> Callable[[int, memoryview], None] | None:
    """What writes octets of whole pages to the backends' files from a gfn on; None where these cannot be written so.

    It raises OSError where a file has no room, for which a mapping would have its process killed. It has descriptors of its
    own, as long as it lives: a thread that hangs in it may outlive `close_backends`.
    """
    if any(backend.page_bytes != PAGE_SIZE for backend in backends):
        return None  # hugetlbfs has no write(2)
    ends = tuple(accumulate(backend.size for backend in backends))
    files = ExitStack()
    fds = []
    for backend in backends:
        fds.append(os.dup(backend.fd))
        files.callback(os.close, fds[-1])

    def write(gfn: int, octets: memoryview) -> None:
        at = gfn * PAGE_SIZE
        for fd, backend, end in zip(fds, backends, ends, strict=True):
            here = octets[: max(end - at, 0)]
            octets = octets[len(here) :]
            while here:
                written = os.pwrite(fd, here, at - end + backend.size)
                if not written:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                here = here[written:]
                at += written

    weakref.finalize(write, files.close)
    return write


def data_gfns(backends: tuple[Backend, ...]) -> list[tuple[int, int]]:
    """(start, stop) of gfns with memory behind them; all other pages are zero."""
    ranges = []
    first = 0
    for backend in backends:
        ranges += [
            ((first + start) // PAGE_SIZE, -(-(first + stop) // PAGE_SIZE)) for start, stop in backend.data()
        ]
        first += backend.size
    return ranges


async def _open_backend(qmp: QmpClient, entry: dict[str, object], others: list[Backend]) -> Backend:
    name, size = text(entry.get("id")), whole(entry.get("size"))
    if entry.get("share") is not True:
        raise GuestError(f"memory backend {name} is not shared: start QEMU with share=on for it")
    kind = text(await _property(qmp, name, "type"))
    if kind == "memory-backend-file":
        if await _optional(qmp, name, "offset", 0):
            raise GuestError(f"memory backend {name} begins inside of its file, which is not supported")
        path = Path(text(await _property(qmp, name, "mem-path")))
        fd = _open_file(path, name)
    elif kind == "memory-backend-memfd":
        fd = _open_memfd(qmp.process_id, name, size, others)
    else:
        raise GuestError(f"memory backend {name} is a {kind}: only files and memfds can be reached")
    if os.fstat(fd).st_size < size:
        os.close(fd)
        raise GuestError(f"the file of memory backend {name} is smaller than its {size} bytes")
    if size % PAGE_SIZE:
        os.close(fd)
        raise GuestError(f"memory backend {name} of {size} bytes is not whole pages")
    block = os.fstatvfs(fd).f_bsize
    return Backend(name, size, block if block >= _HUGE_BYTES else PAGE_SIZE, fd)


async def _property(qmp: QmpClient, name: str, key: str) -> object:
    return await qmp.execute("qom-get", {"path": f"/objects/{name}", "property": key})


async def _optional(qmp: QmpClient, name: str, key: str, default: object) -> object:
    try:
        return await _property(qmp, name, key)
    except QmpRefused:  # a QEMU that does not have it yet
        return default


def _open_file(path: Path, name: str) -> int:
    if not path.is_file():
        raise GuestError(
            f"memory backend {name} has {path} as mem-path, which is not a file that can be reached here"
        )
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise GuestError(f"memory backend {name}: {path} cannot be opened: {error.strerror}") from error


def _open_memfd(process_id: int, name: str, size: int, others: list[Backend]) -> int:
    """The memfd of that size among QEMU's open files: QMP does not say which one it is."""
    taken = {os.fstat(backend.fd).st_ino for backend in others}
    candidates: dict[int, Path] = {}
    try:
        for link in Path(f"/proc/{process_id}/fd").iterdir():
            if os.readlink(link).startswith(_MEMFD):
                status = link.stat()
                if status.st_size == size and status.st_ino not in taken:
                    candidates[status.st_ino] = link
        if len(candidates) == 1:
            return os.open(next(iter(candidates.values())), os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise GuestError(
            f"the files of QEMU's process {process_id} cannot be read: {error.strerror}"
        ) from error
    raise GuestError(
        f"memory backend {name} is one of {len(candidates)} memfds of {size} bytes, which cannot be told apart: "
        "use memory-backend-file"
    )
