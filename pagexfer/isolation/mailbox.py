"""The SVSM's end of a mailbox: slots in one memfd, a pair of doorbells and a handler for each."""

from __future__ import annotations

import fcntl
import mmap
import os
import time
from typing import TYPE_CHECKING, Final

from ..errors import UsageError
from ..svsm.handler import Handler
from ..wire.slot import SlotGeometry, SlotMemory

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

    from ..svsm.service import SlotService

# include/uapi/linux/fcntl.h; without them the host could take memory away under the SVSM, which would die of it.
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
# How long a command is waited for that is under way when a mailbox ends, where nobody says how long.
END_TIMEOUT_S: Final = 5.0


class Mailbox:
    """`count` slots of one geometry, which `open` fills in order. A context manager that ends their handlers.

    Raises UsageError where this process may not have the memory.

    At its end a handler may still be at a command; it serves none after that.
    """

    def __init__(
        self,
        count: int,
        buffers: int,
        buffer_bytes: int,
        on_death: Callable[[], None],
        cpus: tuple[int, ...] = (),
    ) -> None:
        self._buffers = buffers
        self._buffer_bytes = buffer_bytes
        self._on_death = on_death
        self._cpus = cpus
        self._slot_bytes = SlotGeometry(0, buffers, buffer_bytes).slot_bytes
        self._bells: list[int] = []
        self._stopped = False
        self.handlers: list[Handler] = []
        try:
            self.memory_fd = os.memfd_create("mailbox", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            try:
                os.ftruncate(self.memory_fd, count * self._slot_bytes)
                fcntl.fcntl(self.memory_fd, fcntl.F_ADD_SEALS, _SEALS)
                self._memory = memoryview(mmap.mmap(self.memory_fd, count * self._slot_bytes))
            except BaseException:
                os.close(self.memory_fd)
                raise
        except OSError as error:
            raise UsageError(f"no memory for the mailbox: {error.strerror}; see 'ulimit -n'") from None

    def open(self, slot_id: int, serve: Callable[[SlotMemory], SlotService]) -> list[int]:
        """Lay out the next slot and have it served; returns its doorbells, to the SVSM and to the host.

        Raises UsageError where this process may not have as many files or threads.
        """
        start = len(self.handlers) * self._slot_bytes
        memory = self._memory[start : start + self._slot_bytes]
        slot = SlotMemory.format(memory, SlotGeometry(slot_id, self._buffers, self._buffer_bytes))
        cpu = self._cpus[len(self.handlers) % len(self._cpus)] if self._cpus else None
        try:
            to_svsm, to_host = self._bell(), self._bell()
            handler = Handler(slot, serve(slot), to_svsm, to_host, self._on_death, cpu)
        except OSError as error:
            raise UsageError(f"no doorbell for slot {slot_id}: {error.strerror}; see 'ulimit -n'") from None
        try:
            handler.start()
        except RuntimeError as error:
            raise UsageError(f"no thread for slot {slot_id}: {error}; see 'ulimit -u'") from None
        self.handlers.append(handler)
        return [to_svsm, to_host]

    def stop(self, timeout_s: float = END_TIMEOUT_S) -> list[str]:
        """Serve no slot any more; returns the names of the handlers that are at a command that does not end in time."""
        self._stopped = True
        for handler in self.handlers:
            handler.stop()
        end = time.monotonic() + timeout_s
        for handler in self.handlers:
            handler.thread.join(max(end - time.monotonic(), 0.0))
        return [handler.thread.name for handler in self.handlers if handler.thread.is_alive()]

    def _bell(self) -> int:
        bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._bells.append(bell)
        return bell

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._stopped:
            self.stop()
        for descriptor in (*self._bells, self.memory_fd):
            os.close(descriptor)
