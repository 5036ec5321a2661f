"""Where the work of a channel is done: in the engine's event loop, or in a thread of the channel's own without one.

The engine decides everything in its loop. What a channel does within an epoch, it may do in a thread: the same code, whose
every wait is then a wait of that thread (`Interrupt.wait`), so that it never gives control to a loop. Sealing, opening,
copying and the kernel's part of TCP run without the interpreter's lock; a thread that waits costs a system call, where a
task in a loop costs several and the loop's bookkeeping.
"""

from __future__ import annotations

import os
import select
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

import trio

from ..errors import ChannelClosed

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from types import TracebackType

    from outcome import Outcome

    from .streams import Connection

Result = TypeVar("Result")

# With more threads than this, the switches between them cost what further CPUs win.
_MOST_THREADS: Final = 16
# Of so few CPUs the guest has its part, and perhaps the other side: threads win less there.
_FEW_CPUS: Final = 2
# What poll(2) takes: an int.
_LONGEST_POLL_MS: Final = 2**31 - 1


class Carrier(Protocol):
    """Does `work`, which uses `connection`, and returns or raises what it does. A cancel ends the work as well."""

    async def __call__(
        self, connection: Connection, work: Callable[[], Coroutine[object, object, Result]], /
    ) -> Result: ...


def most_threads(cpus: int, on_few_cpus: int) -> int:
    """Up to how many channels have threads where nobody chose: `on_few_cpus` of one or two CPUs, 16 of more."""
    return on_few_cpus if cpus <= _FEW_CPUS else _MOST_THREADS


def carrier(channels: int, most_threads: int) -> Carrier:
    """What carries each of `channels` channels: threads, or the event loop where they are more than `most_threads`."""
    return in_thread if channels <= most_threads else in_loop


async def in_loop(_connection: Connection, work: Callable[[], Coroutine[object, object, Result]]) -> Result:
    """Here, in the caller's task."""
    return await work()


async def in_thread(connection: Connection, work: Callable[[], Coroutine[object, object, Result]]) -> Result:
    """In a thread of its own, which has the connection and whatever else `work` uses to itself until it is done.

    A cancel that comes while `work` does what cannot be undone, such as a command to the SVSM, and ends before it waits for
    the peer again, changes nothing: what it did counts, and the cancel takes effect at the caller's next wait.

    Where the system has no thread, or no file to wake it by, the work is done here: another connection would not help.
    """
    await trio.lowlevel.checkpoint_if_cancelled()
    try:
        interrupt = Interrupt()
    except OSError:
        return await work()
    home = trio.lowlevel.current_trio_token()
    done = trio.Event()
    outcomes: list[Outcome[Result]] = []

    def deliver(outcome: Outcome[Result]) -> None:
        outcomes.append(outcome)
        home.run_sync_soon(done.set)

    with interrupt, connection.lent_to(interrupt):
        if _has_started(partial(_drive, work), deliver):
            try:
                await done.wait()
            except BaseException as reason:
                interrupt.set()
                # Whatever it holds, a slot's buffer or the connection, is its own until it is done.
                with trio.CancelScope(shield=True):
                    await done.wait()
                if interrupt.was_heard or not isinstance(reason, trio.Cancelled):
                    raise
    return outcomes[0].unwrap() if outcomes else await work()


class Interrupt:
    """How a thread without an event loop waits, and how the loop ends that wait: what it waits for then is "closed"."""

    def __init__(self) -> None:
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._polls: dict[int, select.poll] = {}
        self._is_set = False
        self.was_heard = False

    def __enter__(self) -> Interrupt:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        os.close(self._bell)

    def set(self) -> None:
        """End every wait, this one and later ones. For the loop."""
        self._is_set = True
        os.eventfd_write(self._bell, 1)

    def check(self) -> None:
        """Raise ChannelClosed once the work is to end."""
        if self._is_set:
            self.was_heard = True
            raise ChannelClosed("this side gave the work up")

    def wait(self, fd: int, event: int, timeout_s: float) -> bool:
        """Until `fd`, always the same one, has `event` (POLLIN or POLLOUT), or False after `timeout_s`.

        Raises ChannelClosed once the work is to end, or where `fd` is none any more.
        """
        if fd < 0:
            raise ChannelClosed("this side closed the connection")
        poll = self._polls.get(event)
        if poll is None:
            poll = self._polls[event] = select.poll()
            poll.register(self._bell, select.POLLIN)
            poll.register(fd, event)
        ready = poll.poll(min(1000 * timeout_s, _LONGEST_POLL_MS))
        self.check()
        return bool(ready)


def _has_started(work: Callable[[], Result], deliver: Callable[[Outcome[Result]], None]) -> bool:
    """Have a thread do `work`; False where there is none to be had."""
    try:
        trio.lowlevel.start_thread_soon(work, deliver)
    except RuntimeError:
        return False
    return True


def _drive(work: Callable[[], Coroutine[object, object, Result]]) -> Result:
    """Run a coroutine to its end without a loop."""
    coroutine = work()
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: Result = end.value
        return result
    coroutine.close()
    raise RuntimeError("the work of a channel's thread waited for an event loop")
