"""Where a QEMU keeps its guest's RAM: memory backends found by QMP, opened, and mapped as one range of pages.

Pages are numbered through the backends in the order of their ids, which must be the same at both ends.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import stat
import weakref
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from ...errors import GuestError
from ...svsm.memory import data_ranges
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
# From here on x-ignore-shared leaves out RAM in named files only (`migrate_ram_is_ignored` of QEMU's migration/ram.c).
_NAMED_FILES_ONLY: Final = (8, 1, 0)


@dataclass(frozen=True, slots=True)
class Backend:
    """One memory backend: `fd` is a file of `size` bytes whose memory comes in pages of `page_bytes`."""

    id: str
    size: int
    page_bytes: int
    fd: int

    def data(self) -> Iterator[tuple[int, int]]:
        """Byte ranges that have memory behind them; all else is zero and was never touched."""
        return data_ranges(self.fd, self.size)


async def find_backends(qmp: QmpClient) -> tuple[Backend, ...]:
    """The backends that hold all of the machine's RAM, by id, opened. Raises GuestError where RAM cannot be shared."""
    found: list[Backend] = []
    try:
        for entry in sorted(
            records(await qmp.execute("query-memdev")), key=lambda entry: str(entry.get("id"))
        ):
            found.append(await _open_backend(qmp, entry, found))
        ram_bytes = await _ram_bytes(qmp)
        if ram_bytes != _total(found):
            raise GuestError(
                f"the machine has {ram_bytes} bytes of RAM and its memory backends {_total(found)}: "
                "all RAM must be in memory backends with share=on, and these must hold nothing else"
            )
    except BaseException:
        close_backends(found)
        raise
    return tuple(found)


async def check_unchanged(qmp: QmpClient, backends: tuple[Backend, ...]) -> None:
    """Raises GuestError where the machine has other RAM by now than these backends hold: some was plugged or unplugged."""
    now = {
        text(entry.get("id")): whole(entry.get("size"))
        for entry in records(await qmp.execute("query-memdev"))
    }
    if now != {backend.id: backend.size for backend in backends} or await _ram_bytes(qmp) != _total(backends):
        raise GuestError("memory was plugged into this QEMU, or unplugged, while it was being moved")


def close_backends(backends: tuple[Backend, ...] | list[Backend]) -> None:
    """Close the files, for the next migration to have; mappings stay, and so does what `writer` gave."""
    for backend in backends:
        with suppress(OSError):
            fcntl.flock(backend.fd, fcntl.LOCK_UN)
        os.close(backend.fd)


def map_backends(backends: tuple[Backend, ...]) -> NDArray[np.uint64]:
    """All backends as one range of memory, uint64 of shape (pages, 512), that lives as long as the array."""
    total = _total(backends)
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


async def _ram_bytes(qmp: QmpClient) -> int:
    summary = record(await qmp.execute("query-memory-size-summary"))
    return whole(summary.get("base-memory")) + whole(summary.get("plugged-memory", 0))


def _total(backends: tuple[Backend, ...] | list[Backend]) -> int:
    return sum(backend.size for backend in backends)


async def _open_backend(qmp: QmpClient, entry: dict[str, object], others: list[Backend]) -> Backend:
    name, size = text(entry.get("id")), whole(entry.get("size"))
    if entry.get("share") is not True:
        raise GuestError(f"memory backend {name} is not shared: start QEMU with share=on for it")
    kind = text(await _property(qmp, name, "type"))
    if kind == "memory-backend-file":
        if await _optional(qmp, name, "offset", default=0):
            raise GuestError(f"memory backend {name} begins inside of its file, which is not supported")
        if await _optional(qmp, name, "readonly", default=False):
            raise GuestError(f"memory backend {name} is readonly, and the destination's would be written to")
        fd = _open_file(qmp.process_id, text(await _property(qmp, name, "mem-path")), name)
    elif kind == "memory-backend-memfd":
        if qmp.version >= _NAMED_FILES_ONLY:
            raise GuestError(
                f"memory backend {name} is a memfd, which this QEMU puts into its own stream: use memory-backend-file"
            )
        fd = _open_memfd(qmp.process_id, name, size, others)
    else:
        raise GuestError(f"memory backend {name} is a {kind}: only files and memfds can be reached")
    try:
        _check_file(fd, name, size)
    except BaseException:
        os.close(fd)
        raise
    block = os.fstatvfs(fd).f_bsize
    return Backend(name, size, block if block >= _HUGE_BYTES else PAGE_SIZE, fd)


def _check_file(fd: int, name: str, size: int) -> None:
    """Raises GuestError where it does not hold whole pages of that size, or another migration has it."""
    if os.fstat(fd).st_size < size:
        raise GuestError(f"the file of memory backend {name} is smaller than its {size} bytes")
    if size % PAGE_SIZE:
        raise GuestError(f"memory backend {name} of {size} bytes is not whole pages")
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise GuestError(f"memory backend {name} is another migration's: this guest moves already") from None
    except OSError:
        return  # a file system without locks


async def _property(qmp: QmpClient, name: str, key: str) -> object:
    return await qmp.execute("qom-get", {"path": f"/objects/{name}", "property": key})


async def _optional(qmp: QmpClient, name: str, key: str, *, default: object) -> object:
    try:
        return await _property(qmp, name, key)
    except QmpRefused:  # a QEMU that does not have it yet
        return default


def _open_file(process_id: int, mem_path: str, name: str) -> int:
    """The file that QEMU has as this backend's memory, and no other that goes by its name by now, or here."""
    process = Path(f"/proc/{process_id}")
    # QEMU may have another root, and another working directory.
    seen = process / "root" / mem_path.lstrip("/") if mem_path.startswith("/") else process / "cwd" / mem_path
    with _readable(process_id):
        try:
            wanted = seen.stat()
        except (FileNotFoundError, NotADirectoryError):
            raise GuestError(f"memory backend {name}: its file {mem_path} is not there any more") from None
        if not stat.S_ISREG(wanted.st_mode):
            raise GuestError(f"memory backend {name} has {mem_path} as mem-path, which is not a file")
        for link, status in _open_files(process):
            if os.path.samestat(status, wanted):
                return os.open(link, os.O_RDWR | os.O_CLOEXEC)
    raise GuestError(f"memory backend {name}: {mem_path} is not the file that QEMU uses, but a later one")


def _open_memfd(process_id: int, name: str, size: int, others: list[Backend]) -> int:
    """The memfd of that size among QEMU's open files: QMP does not say which one it is."""
    taken = {os.fstat(backend.fd).st_ino for backend in others}
    with _readable(process_id):
        candidates = {
            status.st_ino: link
            for link, status in _open_files(Path(f"/proc/{process_id}"))
            if os.readlink(link).startswith(_MEMFD) and status.st_size == size and status.st_ino not in taken
        }
        if len(candidates) == 1:
            return os.open(next(iter(candidates.values())), os.O_RDWR | os.O_CLOEXEC)
    raise GuestError(
        f"memory backend {name} is one of {len(candidates)} memfds of {size} bytes, which cannot be told apart: "
        "use memory-backend-file"
    )


def _open_files(process: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for link in (process / "fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            yield link, link.stat()


@contextmanager
def _readable(process_id: int) -> Iterator[None]:
    """Raises GuestError where the files of a process are not there to be read."""
    try:
        yield
    except OSError as error:
        raise GuestError(
            f"the files of process {process_id}, which listens at the monitor, cannot be read: {error.strerror}; it has to "
            "be QEMU itself, and this its user or root"
        ) from error
