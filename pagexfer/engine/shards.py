"""Event loops in threads of their own, which carry some of a migration's channels where one core cannot fill the link.

The engine's own loop decides everything and carries channels, too; a shard's loop does only what it is called for and
knows nothing of the migration. Sealing, opening, copying and the kernel's part of TCP, which are nearly all of the work,
run without the interpreter's lock, so threads are enough.
"""

from __future__ import annotations

from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Final, Generic, TypeVar

import trio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

Result = TypeVar("Result")

# Each is a thread, and trio lends a process forty.
MAX_SHARDS: Final = 32


class Shards:
    """Which loop carries which channel: that of the engine is the first, and channels go round."""

    def __init__(self, others: Sequence[_Loop]) -> None:
        self._others = others

    async def run(self, channel: int, work: Callable[[], Awaitable[Result]]) -> Result:
        """Do `work` in the loop of `channel`, and return or raise what it does. A cancel here is one there."""
        index = channel % (1 + len(self._others))
        return await (self._others[index - 1].run(work) if index else work())


@asynccontextmanager
async def open_shards(count: int) -> AsyncIterator[Shards]:
    """`count` shards, this loop among them, for the time of the block."""
    async with trio.open_nursery() as nursery:
        others = [_Loop() for _ in range(count - 1)]
        try:
            for loop in others:
                await nursery.start(loop.serve)
            yield Shards(others)
        finally:
            for loop in others:
                loop.end()


class _Call(Generic[Result]):
    """One piece of work that a loop does for another."""

    def __init__(self, work: Callable[[], Awaitable[Result]]) -> None:
        self._work = work
        self._caller = trio.lowlevel.current_trio_token()
        self._scope = trio.CancelScope()
        self._result: list[Result] = []
        self._error: Exception | None = None
        self.done = trio.Event()

    async def serve(self) -> None:
        """Do it; in the loop that does."""
        try:
            with self._scope:
                self._result.append(await self._work())
        except Exception as error:
            self._error = error
        finally:
            self._caller.run_sync_soon(self.done.set)

    def cancel(self) -> None:
        """Cancel it; in the loop that does it."""
        self._scope.cancel()

    def result(self) -> Result:
        """What came of it, once it is done and was not cancelled. Raises what it raised."""
        if self._error is not None:
            raise self._error
        return self._result[0]


class _Loop:
    """An event loop in a thread of its own, from `serve` to `end`."""

    def __init__(self) -> None:
        self._token: trio.lowlevel.TrioToken | None = None
        self._nursery: trio.Nursery | None = None
        self._scope = trio.CancelScope()
        self._ended = False

    async def serve(self, task_status: trio.TaskStatus[None]) -> None:
        """Run the loop until `end`. A cancel does not end it: what it does is cancelled by those who asked for it."""
        home = trio.lowlevel.current_trio_token()

        async def main() -> None:
            self._token = trio.lowlevel.current_trio_token()
            if self._ended:
                return
            with self._scope:
                async with trio.open_nursery() as self._nursery:
                    home.run_sync_soon(task_status.started)
                    await trio.sleep_forever()

        await trio.to_thread.run_sync(trio.run, main)

    def end(self) -> None:
        """End the loop, also one that has not begun."""
        self._ended = True
        if self._token is not None:
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._scope.cancel)

    async def run(self, work: Callable[[], Awaitable[Result]]) -> Result:
        """Do `work` there, while the task that asks waits here."""
        token, nursery = self._token, self._nursery
        assert token is not None
        assert nursery is not None
        call = _Call(work)
        token.run_sync_soon(nursery.start_soon, call.serve)
        try:
            await call.done.wait()
        except trio.Cancelled:
            token.run_sync_soon(call.cancel)
            # Whatever it holds, a slot's buffer or a socket, is its own until it is done.
            with trio.CancelScope(shield=True):
                await call.done.wait()
            raise
        return call.result()
