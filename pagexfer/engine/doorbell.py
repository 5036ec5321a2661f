"""The host's doorbells of a slot whose SVSM lives in another process: two eventfds, one each way."""

from __future__ import annotations

import os
import select
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import trio

from ..errors import SvsmLost

if TYPE_CHECKING:
    from ..wire.slot import SlotMemory

# A bell that got lost costs this much: the answer is looked for also without one.
FALLBACK_S: Final = 0.05
# To sleep and be woken takes longer than this: an answer that comes sooner is waited for awake. Where that is in vain it is
# left out more and more often, and at most this often.
POLL_S: Final = 50e-6
MAX_PAUSE: Final = 64


class Doorbells:
    """Rings the SVSM on `to_svsm` and waits for its answer on `to_host`, at most `timeout_s`.

    Where answers come at once they are looked for awake, for `POLL_S` at most, and only then slept for. A thread without an
    event loop sleeps at once, as its waking is cheap.
    """

    def __init__(self, slot: SlotMemory, to_svsm: int, to_host: int, timeout_s: float) -> None:
        self._slot = slot
        self._to_svsm = to_svsm
        self._to_host = to_host
        self._timeout_s = timeout_s
        self._lost = False
        self._rings, self._pause = 0, 1
        self._poll = select.poll()
        self._poll.register(to_host, select.POLLIN)

    async def ring(self) -> None:
        """Until the command in the registers is answered. Raises SvsmLost where it is not, and from then on at once.

        A cancel waits for the answer: a slot has one command at a time, and the next one may be ABORT.
        """
        if not self._lost:
            self._signal()
            if not trio.lowlevel.in_trio_run():
                self._block()
            elif not self._look():
                await self._wait()
        if self._lost:
            raise SvsmLost(f"the SVSM did not answer within {self._timeout_s:g} s, or is gone")

    def give_up(self) -> None:
        """The SVSM is known to be gone: whoever waits for it hears that at once."""
        self._lost = True
        trio.lowlevel.notify_closing(self._to_host)

    def _signal(self) -> None:
        try:
            os.eventfd_write(self._to_svsm, 1)
        except BlockingIOError:  # a full counter has rung often enough
            return

    def _look(self) -> bool:
        """Look for the answer awake, unless that was in vain lately; True where it is there."""
        self._rings += 1
        if self._rings % self._pause == 0:
            end = time.perf_counter() + POLL_S
            while not self._slot.is_answered:
                os.sched_yield()  # on a busy machine the other side waits for this very core
                if time.perf_counter() >= end:
                    self._pause = min(2 * self._pause, MAX_PAUSE)
                    return self._slot.is_answered
            self._pause = 1
        return self._slot.is_answered

    def _block(self) -> None:
        """As `_wait`, in a thread without an event loop."""
        began = time.monotonic()
        while not self._lost and not self._slot.is_answered:
            if self._poll.poll(1000 * FALLBACK_S):
                with suppress(BlockingIOError):
                    os.eventfd_read(self._to_host)
            late = time.monotonic() - began >= self._timeout_s
            self._lost = self._lost or (late and not self._slot.is_answered)

    async def _wait(self) -> None:
        """Sleep until the answer is there, or does not come in time."""
        began = trio.current_time()
        while not self._lost and not self._slot.is_answered:
            await self._sleep()
            late = trio.current_time() - began >= self._timeout_s
            self._lost = self._lost or (late and not self._slot.is_answered)

    async def _sleep(self) -> None:
        """Until the bell rings, or for as long as a lost one may cost."""
        with (
            suppress(BlockingIOError, trio.ClosedResourceError),
            trio.CancelScope(shield=True, deadline=trio.current_time() + FALLBACK_S),
        ):
            await trio.lowlevel.wait_readable(self._to_host)
            os.eventfd_read(self._to_host)
