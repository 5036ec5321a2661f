"""A migration handler: the thread that serves one slot whose host lives in another process.

It sleeps on the slot's doorbell and starts on its signal. A bell that got lost costs a bounded wait, as the handler looks
at the registers from time to time also without one.
"""

from __future__ import annotations

import os
import select
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..wire.slot import SlotMemory
    from .service import SlotService

# Looks without a bell. One look takes some 20 µs, so that a thousand idle handlers use a few percent of a core.
FALLBACK_MS: Final = 1000
# Looks for the next command before sleep, some 10 µs: about what a sleeper takes to wake. Five times as many cost an
# isolated move 5 % more CPU than they save. Where they are in vain they are left out more and more often, and at most this
# often.
LOOKS: Final = 12
MAX_PAUSE: Final = 64


class Handler:
    """Serves `service` over `slot` from `start` to `stop`: woken by the eventfd `to_svsm`, it answers on `to_host`.

    `cpu` pins the thread. Where the thread dies of a defect, or is killed, `on_death` is called in it, the command that it
    was at is answered as a fault, and the slot serves nothing any more.

    The thread has doorbells of its own and closes them at its very end: a command may take longer than anybody waits for
    it, and what it was given may be closed by then, and the numbers other files'.
    """

    def __init__(
        self,
        slot: SlotMemory,
        service: SlotService,
        to_svsm: int,
        to_host: int,
        on_death: Callable[[], None],
        cpu: int | None = None,
    ) -> None:
        self._slot = slot
        self._service = service
        self._wakes = to_svsm  # its maker's, who closes it after `stop`
        self._to_svsm, self._to_host = _copies(to_svsm, to_host)
        self._on_death = on_death
        self._cpu = cpu
        self._stopping = False
        name = f"handler-{slot.geometry.slot_id}"
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin to serve."""
        try:
            self.thread.start()
        except RuntimeError:  # there can be no more threads
            self._close()
            raise

    def stop(self) -> None:
        """Serve nothing any more: `thread` ends once the command that is being carried out is done."""
        self._stopping = True
        _ring(self._wakes)

    def _run(self) -> None:
        try:
            self._live()
        finally:
            self._close()

    def _close(self) -> None:
        os.close(self._to_svsm)
        os.close(self._to_host)

    def _live(self) -> None:
        ended = False
        try:
            if self._cpu is not None:
                os.sched_setaffinity(0, {self._cpu})  # of this thread alone
            self._serve()
            ended = True
        finally:
            if not ended:
                try:
                    self._on_death()
                finally:  # the session's end may call the guest's own code, which can fail as well
                    self._service.fault(self._slot.command_sequence)
                    _ring(self._to_host)

    def _serve(self) -> None:
        bell = select.poll()
        bell.register(self._to_svsm, select.POLLIN)
        slot, service = self._slot, self._service
        answered = 0
        looks, pause, commands = 0, 1, 0
        while not self._stopping:
            seen = slot.command_sequence
            if seen != answered:
                if looks:
                    pause = 1  # it was worth it
                # What cannot be read has no number of its own: it is not looked at twice.
                answered = service.service() or seen
                _ring(self._to_host)
                commands += 1
                looks = 0 if commands % pause else LOOKS
            elif looks:
                os.sched_yield()  # on a busy machine the host waits for this very core
                looks -= 1
                if not looks:
                    pause = min(2 * pause, MAX_PAUSE)
            elif bell.poll(FALLBACK_MS):
                with suppress(BlockingIOError):
                    os.eventfd_read(self._to_svsm)


def _copies(first: int, second: int) -> tuple[int, int]:
    copy = os.dup(first)
    try:
        return copy, os.dup(second)
    except OSError:
        os.close(copy)
        raise


def _ring(bell: int) -> None:
    try:
        os.eventfd_write(bell, 1)
    except BlockingIOError:  # a counter that is full has rung often enough
        return
