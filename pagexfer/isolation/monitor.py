"""The end of the monitor that has the guest: starts the engine's process and does what a hypervisor does."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from socket import socket, socketpair
from typing import TYPE_CHECKING, Final, TypeVar

import trio

from ..dirty import collected
from ..engine.failure import (
    RESUME,
    STOP_LOG,
    THROTTLE,
    HypervisorFailed,
    as_aborted,
    call_back,
    call_back_at_the_end,
    described,
    hypervisor_call,
    hypervisor_thread,
    one_line,
    watch,
)
from ..engine.hypervisor import (
    DescribedHypervisor,
    ThrottlingHypervisor,
    WatchedHypervisor,
    octets,
    saved_device_state,
)
from ..engine.progress import MigrationInfo, Status
from ..engine.streams import STALL_TIMEOUT_S
from ..errors import (
    ChannelBroken,
    GuestError,
    LocalProtocolError,
    MalformedData,
    Outcome,
    TransferAborted,
    UsageError,
)
from ..wire.monitor import Fields, as_fields, from_fields_untrusted
from .link import Link

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from ..engine.hypervisor import Hypervisor
    from ..engine.steering import Steering
    from .task import Task

Value = TypeVar("Value")

# An engine shows that it lives twice a second; its start takes longer, on a busy machine much longer.
START_TIMEOUT_S: Final = 60.0
_LAST_WORDS_S: Final = 5.0
_OVER: Final = (Status.COMPLETED, Status.FAILED, Status.CANCELLED)


class EngineProcess:
    """One engine in a process of its own; `run` once. What it says is not believed, only passed on."""

    def __init__(
        self,
        hypervisor: Hypervisor,
        descriptors: list[int],
        make_slots: Callable[[], list[int]],
        on_progress: Callable[[MigrationInfo], None],
        on_listening: Callable[[int], None],
        on_stranger: Callable[[str], None],
        steering: Steering,
    ) -> None:
        self._steering = steering
        self._hypervisor = hypervisor
        self._descriptors = descriptors
        self._make_slots = make_slots
        self._on_progress = on_progress
        self._on_listening = on_listening
        self._on_stranger = on_stranger
        self._patience_s = START_TIMEOUT_S
        self._stall_timeout_s = STALL_TIMEOUT_S
        self._ram_pages = 0
        self._begun = trio.Event()
        self._end: Fields | None = None
        self._has_said_its_end = False
        self._listens = False
        self._callback_failed = trio.Event()
        # What ended the migration on this side: a failed callback, and what this program's own code raised first.
        self._aborted: TransferAborted | None = None
        self._foreign: BaseException | None = None
        self.latest: MigrationInfo | None = None
        # What a source's engine had the hypervisor do and did not undo, by the calls that would.
        self.left: set[str] = set()

    async def run(self, task: Task) -> MigrationInfo:
        """Until the engine's end; returns its final figures.

        Raises TransferAborted or UsageError as the engine says, TransferAborted with reason "engine" where it died, said
        nothing for too long, or spoke nonsense. A cancel is passed on, and the engine's answer to it is awaited.
        """
        self._stall_timeout_s, self._ram_pages = task.stall_timeout_s, task.ram_pages
        process, ours = await self._start()
        with ours:
            link = Link(ours)
            try:
                await self._converse(link, task)
            finally:
                link.close()
                with trio.CancelScope(shield=True):
                    if self._has_said_its_end:
                        with trio.move_on_after(_LAST_WORDS_S):
                            await process.wait()
                    process.kill()
                    await process.wait()
        return self._result()

    async def _start(self) -> tuple[trio.Process, socket]:
        """The engine's process, and this end of the link. Raises UsageError where this process may have neither."""
        try:
            ours, theirs = socketpair()
            with theirs, ExitStack() as undo:
                undo.callback(ours.close)
                process = await trio.lowlevel.open_process(
                    [sys.executable, "-m", "pagexfer.isolation.engine_process", str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=sys.__stderr__,
                    pass_fds=(theirs.fileno(),),
                    process_group=0,  # Ctrl-C at a terminal is for this process, which cancels
                )
                undo.pop_all()
        except OSError as error:
            raise UsageError(f"the engine's process cannot be started: {error.strerror}") from None
        return process, ours

    async def _converse(self, link: Link, task: Task) -> None:
        ended = trio.Event()
        conversation = trio.CancelScope(shield=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._talk, link, task, conversation, ended)
            try:
                await ended.wait()
            except trio.Cancelled:
                with trio.move_on_after(task.stall_timeout_s, shield=True):
                    await self._cancel(link)
                    await ended.wait()
                conversation.cancel()
                # Where the cancel came too late, the engine's end stands; one that it never said is nobody's.
                if self._end is None or not self._has_said_its_end or self._end.get("type") == "cancelled":
                    raise

    async def _talk(self, link: Link, task: Task, conversation: trio.CancelScope, ended: trio.Event) -> None:
        with conversation:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._guide, link, task)
                await self._serve(link, task)
                nursery.cancel_scope.cancel()
        ended.set()

    async def _cancel(self, link: Link) -> None:
        await self._begun.wait()
        with suppress(ChannelBroken):
            await self._say(link, {"type": "cancel"})

    async def _guide(self, link: Link, task: Task) -> None:
        """Give the engine its task, which it hears of first, and then all that its operator wants of it, for ever."""
        try:
            await self._give(link, self._descriptors)
            await self._say(link, {"type": "task", "task": as_fields(task)})
        except ChannelBroken as error:
            # An engine that is gone is one thing; one that lives and has no task would be waited for.
            self._end = self._end or _failed(str(error))
            link.close()
        finally:
            self._begun.set()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._steer, link, task)
            nursery.start_soon(self._end_on_cancel, link)
            nursery.start_soon(self._end_on_failed_callback, link)
            if isinstance(self._hypervisor, WatchedHypervisor):
                nursery.start_soon(self._watch, self._hypervisor, link)

    async def _say(self, link: Link, fields: Fields, payload: bytes = b"") -> None:
        with self._in_time(link):
            await link.send(fields, payload)

    async def _give(self, link: Link, descriptors: list[int]) -> None:
        with self._in_time(link):
            await link.send_descriptors(descriptors)

    @contextmanager
    def _in_time(self, link: Link) -> Iterator[None]:
        """Around whatever is sent. An engine that does not take it is at its end: raises ChannelBroken.

        Half a message may have left, and others wait behind it: the link closes, and whoever uses it hears that.
        """
        try:
            with trio.fail_after(self._stall_timeout_s):
                yield
        except trio.TooSlowError:
            self._end = self._end or _failed(
                f"the engine's process took nothing for {self._stall_timeout_s:g} s"
            )
            link.close()
            raise ChannelBroken("the engine's process takes nothing") from None

    async def _steer(self, link: Link, task: Task) -> None:
        """Pass on what the operator changes, for ever."""
        passed_on = task.parameters
        while True:
            if self._steering.parameters == passed_on:
                await self._steering.wait_changed()
                continue
            passed_on = self._steering.parameters
            with suppress(ChannelBroken):
                await self._say(link, {"type": "parameters", "parameters": as_fields(passed_on)})

    async def _end_on_cancel(self, link: Link) -> None:
        await self._steering.wait_cancelled()
        with suppress(ChannelBroken):
            await self._say(link, {"type": "end"})

    async def _watch(self, hypervisor: WatchedHypervisor, link: Link) -> None:
        """Tell the engine what others do to the machine."""
        try:
            await watch(hypervisor)
        except GuestError as error:
            self._note_foreign(error)
            await self._disturb(link, as_aborted(error))

    async def _end_on_failed_callback(self, link: Link) -> None:
        await self._callback_failed.wait()
        if self._aborted is not None:
            await self._disturb(link, self._aborted)

    async def _disturb(self, link: Link, why: TransferAborted) -> None:
        """Have the engine end the migration, and tell its peer why."""
        with suppress(ChannelBroken):
            await self._say(link, {"type": "disturbed", "reason": why.reason, "message": why.coarse})

    async def _serve(self, link: Link, task: Task) -> None:
        try:
            while self._end is None:
                with trio.fail_after(self._patience_s):
                    fields, payload = await link.receive()
                self._patience_s = self._stall_timeout_s
                await self._take(link, fields, payload)
        except ChannelBroken:
            self._end = self._end or _failed("the engine's process ended without a word")
        except MalformedData as error:
            self._end = _failed(_nonsense(error))
        except trio.TooSlowError:
            self._end = _failed(f"the engine's process said nothing for {self._patience_s:g} s")

    async def _take(self, link: Link, fields: Fields, payload: bytes) -> None:
        match fields:
            case {"type": "alive"}:
                return
            case {"type": "progress", "info": info}:
                self.latest = from_fields_untrusted(MigrationInfo, info)
                self._steering.waits(paused=self.latest.status is Status.PRE_SWITCHOVER)
                if self.latest.status in _OVER:
                    call_back_at_the_end(self._on_progress, self.latest)
                else:
                    self._call_back(self._on_progress, self.latest)
            case {"type": "listening", "port": int(port)} if 0 < port < 1 << 16 and not self._listens:
                self._listens = True
                self._call_back(self._on_listening, port)
            case {"type": "stranger", "line": str(line)}:
                self._call_back(self._on_stranger, one_line(line))
            case {"type": "call", "id": int(number), "name": str(name)}:
                await self._answer(link, number, name, payload)
            case {"type": "completed" | "aborted" | "cancelled" | "unusable"}:
                self._end = fields
                self._has_said_its_end = True
            case _:
                raise MalformedData("a message of no known form")

    def _call_back(self, callback: Callable[[Value], None], value: Value) -> None:
        try:
            call_back(callback, value)
        except TransferAborted as aborted:
            self._aborted = self._aborted or aborted
            self._foreign = self._foreign or aborted.__cause__
            self._callback_failed.set()

    def _note_foreign(self, error: Exception) -> None:
        if isinstance(error, HypervisorFailed):
            self._foreign = self._foreign or error.__cause__

    async def _answer(self, link: Link, number: int, name: str, payload: bytes) -> None:
        calls: dict[str, Callable[[bytes], Awaitable[bytes]]] = {
            "stop": self._stop,
            RESUME: self._resume,
            THROTTLE: self._throttle,
            "describe_platform": self._platform,
            "check_platform": self._check_platform,
            "save_device_state": self._save,
            "load_device_state": self._load,
            "start_dirty_log": self._start_log,
            "collect_dirty_log": self._collect_log,
            STOP_LOG: self._stop_log,
        }
        fields: Fields
        try:
            if name == "slots":
                await self._give(link, self._make_slots())
                answer = b""
            elif name in calls:
                with hypervisor_call(name.replace("_", " ")):
                    answer = await calls[name](payload)
            else:
                raise MalformedData(f"a call that there is not: {name[:40]!r}")
        except (GuestError, LocalProtocolError, UsageError) as error:
            self._note_foreign(error)
            fields, answer = {"type": "refused", "id": number, "message": str(error)}, b""
        else:
            fields = {"type": "done", "id": number}
        with suppress(ChannelBroken):  # an engine that did not wait for it has left last words
            await self._say(link, fields, answer)

    async def _stop(self, _payload: bytes) -> bytes:
        self.left.add(RESUME)
        await self._hypervisor.stop()
        return b""

    async def _resume(self, _payload: bytes) -> bytes:
        await self._hypervisor.resume()
        self.left.discard(RESUME)
        return b""

    async def _throttle(self, payload: bytes) -> bytes:
        if not isinstance(self._hypervisor, ThrottlingHypervisor) or len(payload) != 1 or payload[0] > 99:
            raise MalformedData("a throttle was asked for that there is not")
        self.left.add(THROTTLE)
        await self._hypervisor.throttle(payload[0])
        if payload[0] == 0:
            self.left.discard(THROTTLE)
        return b""

    async def _platform(self, _payload: bytes) -> bytes:
        if not isinstance(self._hypervisor, DescribedHypervisor):
            return b""
        return octets("platform", await self._hypervisor.platform())

    async def _check_platform(self, payload: bytes) -> bytes:
        if isinstance(self._hypervisor, DescribedHypervisor):
            await self._hypervisor.check_platform(payload)
        return b""

    async def _save(self, _payload: bytes) -> bytes:
        return await saved_device_state(self._hypervisor)

    async def _load(self, payload: bytes) -> bytes:
        await self._hypervisor.load_device_state(payload)
        return b""

    async def _start_log(self, _payload: bytes) -> bytes:
        if self._hypervisor.dirty_log is not None:
            self.left.add(STOP_LOG)
            await hypervisor_thread("start its dirty log", self._hypervisor.dirty_log.start)
        return b""

    async def _collect_log(self, _payload: bytes) -> bytes:
        log = self._hypervisor.dirty_log
        if log is None:
            raise MalformedData("a dirty log was asked for where there is none")
        collect = partial(collected, log, self._ram_pages, "dirty log")
        bitmap = await hypervisor_thread("read its dirty log", collect)
        return bitmap.words.tobytes()

    async def _stop_log(self, _payload: bytes) -> bytes:
        if self._hypervisor.dirty_log is not None:
            await hypervisor_thread("stop its dirty log", self._hypervisor.dirty_log.stop)
            self.left.discard(STOP_LOG)
        return b""

    def _result(self) -> MigrationInfo:
        match self._end:
            case {"type": "completed", "info": info}:
                try:
                    return from_fields_untrusted(MigrationInfo, info)
                except MalformedData as error:
                    raise TransferAborted(Outcome.ENDED, "engine", _nonsense(error)) from None
            case {"type": "unusable", "message": str(message)}:
                raise UsageError(one_line(message))
            case {"type": "aborted", "outcome": int(outcome), "reason": str(reason), "message": str(message)}:
                known = outcome if outcome in (Outcome.REFUSED, Outcome.UNDECIDED) else Outcome.ENDED
                cause = described(self._foreign) if self._foreign is not None else ""
                raise TransferAborted(
                    Outcome(known), one_line(reason), one_line(message), cause
                ) from self._foreign
            case {"type": "cancelled"} if self._aborted is not None:
                raise self._aborted
        raise TransferAborted(Outcome.ENDED, "engine", "the engine's process said nothing that makes sense")


def _failed(message: str) -> Fields:
    return {"type": "aborted", "outcome": int(Outcome.ENDED), "reason": "engine", "message": message}


def _nonsense(error: MalformedData) -> str:
    return f"the engine's process spoke nonsense: {error}"
