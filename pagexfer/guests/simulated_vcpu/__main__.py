"""One vCPU of a simulated guest: the main of its process.

It writes the pattern over its slice of RAM in batches, and between two batches it looks at the global flag.
Parking, it stores its registers in the control page, raises its own flag and sleeps; it goes on from the
registers that it finds there then, which on a destination are those of the source's vCPU. For each batch:
pages first, status page next, marks in the dirty map last. The tracker takes a mark away before the page is
read for export, so a page that was marked before it was written could be exported old and never again.

Two descriptors tie the process to its guest. The doorbell is a socket: any byte on it means "look at the
control page". The lifeline is a pipe on which nothing is ever written; its end kills the process, see
`_die_with`.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import select
import signal
import socket
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Final, NoReturn

import numpy as np

from ...wire.constants import WORDS_PER_PAGE
from ..duty_cycle import SLICE_S, DutyCycle
from ..pattern import (
    STATUS_GFN,
    STATUS_WORD_BAD_GFN,
    STATUS_WORD_ERRORS,
    STATUS_WORD_POSITION,
    STATUS_WORD_ROUND,
    STATUS_WORD_STEPS,
    STATUS_WORD_TICKS,
    page_content,
)
from .control import ControlPage
from .pace import Pace
from .registers import Registers, parse_registers_untrusted

if TYPE_CHECKING:
    from numpy.typing import NDArray

_TICK_SECONDS: Final = 0.01  # between heartbeats
_NO_GFNS: Final = np.empty(0, dtype=np.int64)


class Vcpu:
    """vCPU `number` on RAM (uint64 of shape (pages, 512)) and dirty map (uint8 of shape (pages,)).

    Registers, duty cycle, pace and the time of the next heartbeat are there from the first release on.
    """

    _registers: Registers
    _cycle: DutyCycle
    _pace: Pace
    _next_tick: float

    def __init__(
        self,
        number: int,
        words: NDArray[np.uint64],
        marks: NDArray[np.uint8],
        control: ControlPage,
        bell: socket.socket,
    ) -> None:
        self._number = number
        self._words = words
        self._marks = marks
        self._control = control
        self._bell = bell
        self._poll = select.poll()
        self._poll.register(bell, select.POLLIN)

    def run(self) -> NoReturn:
        """Park, tell the parent that we have, and work for ever after."""
        generation = self._control.generation
        self._control.set_own_flag(self._number, generation)
        self._bell.send(b"\0")
        self._await_release(generation)
        while True:
            generation = self._control.generation
            if generation % 2:
                self._park(generation)
            else:
                self._work()

    def _park(self, generation: int) -> None:
        self._control.set_registers(self._number, self._registers.to_bytes())
        self._control.set_own_flag(self._number, generation)
        self._await_release(generation)

    def _await_release(self, generation: int) -> None:
        while self._control.generation == generation:
            self._sleep(None)
        # The gate lowers its flag only when every vCPU has registers.
        self._registers = parse_registers_untrusted(self._control.registers(self._number) or b"")
        now = time.monotonic()
        self._cycle = DutyCycle()
        self._pace = Pace(self._control.rate / self._control.vcpus, now)
        self._next_tick = now

    def _work(self) -> None:
        """One batch, and a sleep where nothing may be written yet."""
        now = time.monotonic()
        held = self._cycle.held_s(now, self._control.throttle)
        if held:
            self._sleep(min(held, SLICE_S))  # the throttle may be lifted meanwhile
            return
        now = self._cycle.guest_time(now)
        pages = self._pace.pages_allowed(now)
        gfns = self._write_batch(pages) if pages else _NO_GFNS
        self._pace.spend(len(gfns))
        ticks = now >= self._next_tick
        if ticks:
            self._registers = replace(self._registers, ticks=self._registers.ticks + 1)
            self._next_tick = now + _TICK_SECONDS
        if pages or ticks:
            self._write_status()
            self._marks[gfns] = 1
            self._marks[STATUS_GFN + self._number] = 1
        self._sleep(0 if pages else min(self._pace.delay(), self._next_tick - now))

    def _write_batch(self, pages: int) -> NDArray[np.int64]:
        """Check and write up to `pages` pages, all of one round, and step the registers. Returns the gfns."""
        old = self._registers
        count = min(pages, old.slice_pages - old.position)
        offsets = (old.index + np.arange(count, dtype=np.int64) * old.stride) % old.slice_pages
        gfns = old.first_gfn + offsets
        expected = page_content(gfns, old.round - 1, old.seed)
        wrong = np.flatnonzero(np.any(self._words[gfns] != expected, axis=1))
        self._words[gfns] = page_content(gfns, old.round, old.seed)
        ends = old.position + count == old.slice_pages
        self._registers = replace(
            old,
            round=old.round + ends,
            position=0 if ends else old.position + count,
            index=(old.index + count * old.stride) % old.slice_pages,
            steps=old.steps + count,
            errors=old.errors + len(wrong),
            bad_gfn=int(gfns[wrong[-1]]) if len(wrong) else old.bad_gfn,
        )
        return gfns

    def _write_status(self) -> None:
        page = self._words[STATUS_GFN + self._number]
        registers = self._registers
        page[STATUS_WORD_ROUND] = registers.round
        page[STATUS_WORD_POSITION] = registers.position
        page[STATUS_WORD_STEPS] = registers.steps
        page[STATUS_WORD_ERRORS] = registers.errors
        page[STATUS_WORD_BAD_GFN] = registers.bad_gfn
        page[STATUS_WORD_TICKS] = registers.ticks

    def _sleep(self, seconds: float | None) -> None:
        """Sleep until the doorbell rings, at most `seconds`. Its end means that the guest is closed."""
        timeout = None if seconds is None else math.ceil(max(seconds, 0) * 1000)
        if self._poll.poll(timeout) and not self._bell.recv(4096):
            sys.exit(0)


def main(arguments: list[str]) -> NoReturn:
    """Arguments: vCPU number, then the descriptors of RAM, dirty map, control page, doorbell, lifeline."""
    number, ram_fd, marks_fd, control_fd, bell_fd, lifeline_fd = (int(argument) for argument in arguments)
    _die_with(lifeline_fd)
    words = _map(ram_fd).view(np.uint64).reshape(-1, WORDS_PER_PAGE)
    bell = socket.socket(fileno=bell_fd)
    Vcpu(number, words, _map(marks_fd), ControlPage(control_fd), bell).run()


def _die_with(lifeline_fd: int) -> None:
    """Have the kernel kill this process when the lifeline ends: when the parent is gone, however it went.

    The end of a pipe can raise a signal of our choice, and SIGKILL also ends a process that the hypervisor
    has stopped; reading the pipe would not. PR_SET_PDEATHSIG will not do: it fires when the parent's *thread*
    ends.
    """
    fcntl.fcntl(lifeline_fd, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline_fd, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline_fd, fcntl.F_SETFL, fcntl.fcntl(lifeline_fd, fcntl.F_GETFL) | os.O_ASYNC)
    ended = select.poll()
    ended.register(lifeline_fd, select.POLLIN)
    if ended.poll(0):  # before the signal was set up
        sys.exit(0)


def _map(memory_fd: int) -> NDArray[np.uint8]:
    size = os.fstat(memory_fd).st_size
    return np.frombuffer(mmap.mmap(memory_fd, size, mmap.MAP_SHARED), dtype=np.uint8)


if __name__ == "__main__":
    main(sys.argv[1:])
