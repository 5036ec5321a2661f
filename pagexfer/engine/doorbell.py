"""The host's doorbells of a slot whose SVSM lives in another process: two eventfds, one each way."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import trio

from ..errors import SvsmLost

if TYPE_CHECKING:
    from ..wire.slot import SlotMemory

# A bell that got lost costs this much: the answer is looked for also without one.
FALLBACK_S: Final = 0.05
# To sleep and be woken takes longer than this: an answer that comes sooner is waited for awake.
POLL_S: Final = 50e-6
# An answer that was slept for and came within this time came sooner than the sleeper woke.
SLEEP_S: Final = 200e-6


class Doorbells:
    """Rings the SVSM on `to_svsm` and waits for its answer on `to_host`, at most `timeout_s`.

    Where the answer before came at once, the next one is looked for awake, for `POLL_S` at most, and only then slept for.
    """

    def __init__(self, slot: SlotMemory, to_svsm: int, to_host: int, timeout_s: float) -> None:
        self._slot = slot
        self._to_svsm = to_svsm
        self._to_host = to_host
        self._timeout_s = timeout_s
        self._lost = False
        self._is_quick = False

    async def ring(self) -> None:
        """Until the command in the registers is answered. Raises SvsmLost where it is not, and from then on at once.

        A cancel waits for the answer: a slot has one command at a time, and the next one may be ABORT.
        """
        if not self._lost:
            with suppress(BlockingIOError):  # a full counter has rung often enough
                os.eventfd_write(self._to_svsm, 1)
            began = time.perf_counter()
            while self._is_quick and not self._answered():
                os.sched_yield()  # on a busy machine the other side waits for this very core
                self._is_quick = time.perf_counter() - began < POLL_S
            end = trio.current_time() + self._timeout_s
            while not self._lost and not self._answered():
                await self._sleep()
                self._lost = self._lost or (trio.current_time() >= end and not self._answered())
                self._is_quick = time.perf_counter() - began < SLEEP_S
        if self._lost:
            raise SvsmLost(f"the SVSM did not answer within {self._timeout_s:g} s, or is gone")

    def give_up(self) -> None:
        """The SVSM is known to be gone: whoever waits for it hears that at once."""
        self._lost = True
        trio.lowlevel.notify_closing(self._to_host)

    async def _sleep(self) -> None:
        """Until the bell rings, or for as long as a lost one may cost."""
        with (
            suppress(BlockingIOError, trio.ClosedResourceError),
            trio.CancelScope(shield=True, deadline=trio.current_time() + FALLBACK_S),
        ):
            await trio.lowlevel.wait_readable(self._to_host)
            os.eventfd_read(self._to_host)

    def _answered(self) -> bool:
        return self._slot.status_sequence == self._slot.command_sequence
