"""Main of the engine's process: an engine over slots whose SVSM is another process.

It gets mailbox memory, doorbells and a monitor connection, and opens TCP sockets. It never maps guest RAM and never has a
key.
"""

from __future__ import annotations

import mmap
import os
import socket
import sys
from typing import TYPE_CHECKING, Final, NoReturn

import trio

from ..dirty import DirtyBitmap
from ..engine.destination import DestinationEngine
from ..engine.doorbell import Doorbells
from ..engine.slots import Slot
from ..engine.source import SourceEngine
from ..engine.steering import MigrationParameters, Steering
from ..engine.streams import allow_most_descriptors, listen
from ..errors import ChannelBroken, GuestError, MalformedData, Outcome, TransferAborted, UsageError
from ..wire.monitor import Fields, as_fields, from_fields_untrusted
from ..wire.slot import SlotMemory
from .link import Link
from .task import Task

if TYPE_CHECKING:
    from ..engine.progress import MigrationInfo

ALIVE_PERIOD_S: Final = 0.5
_LOST_GRACE_S: Final = 1.0


class Engine:
    """What the process has: the link, its slots, and the calls of the monitor that are under way."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._calls: dict[int, trio.MemorySendChannel[tuple[Fields, bytes]]] = {}
        self._number = 0
        self._memory: mmap.mmap | None = None
        self._mailbox = -1
        self._doorbells: list[Doorbells] = []
        self._news, self._reports = trio.open_memory_channel[Fields](1 << 12)
        self._told = trio.Event()
        self._steering = Steering()
        self.disturbed = trio.Event()  # why the other side ends the migration is in `disturbance`
        self.disturbance = TransferAborted(Outcome.ENDED, "internal", "nothing happened")
        self.work = trio.CancelScope()

    # Calls of the monitor

    async def call(self, name: str, payload: bytes = b"", **arguments: object) -> tuple[Fields, bytes]:
        """Have the other side do something. Raises GuestError with its reason, ChannelBroken where it is gone."""
        self._number += 1
        number = self._number
        send, receive = trio.open_memory_channel[tuple[Fields, bytes]](1)
        self._calls[number] = send
        try:
            await self._link.send({"type": "call", "id": number, "name": name, **arguments}, payload)
            fields, answer = await receive.receive()
        except trio.EndOfChannel:
            raise ChannelBroken("the SVSM's process is gone") from None
        finally:
            del self._calls[number]
        if fields.get("type") != "done":
            raise GuestError(str(fields.get("message")))
        return fields, answer

    async def slots(self, first: int, count: int, timeout_s: float) -> list[Slot]:
        """Slots `first` to `first + count - 1` of the mailbox, whose doorbells have come."""
        size = os.fstat(self._mailbox).st_size
        memory = memoryview(mmap.mmap(self._mailbox, size))
        slots = []
        for index in range(first, first + count):
            # All slots of a mailbox have one geometry: the first one says how long it is.
            slot_bytes = SlotMemory(memory).geometry.slot_bytes
            slot = SlotMemory(memory[index * slot_bytes : (index + 1) * slot_bytes])
            to_svsm, to_host = self._link.descriptors.popleft(), self._link.descriptors.popleft()
            doorbells = Doorbells(slot, to_svsm, to_host, timeout_s)
            self._doorbells.append(doorbells)
            slots.append(Slot(slot, doorbells.ring))
        return slots

    # The task

    async def run(self) -> None:
        """Do the one task that comes over the link."""
        fields, _ = await self._receive()
        task = from_fields_untrusted(Task, fields.get("task"))
        self._steering.parameters = task.parameters
        if task.cpus:
            os.sched_setaffinity(0, task.cpus)
        self._mailbox = self._link.descriptors.popleft()
        (control,) = await self.slots(0, 1, task.stall_timeout_s)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._listen)
            nursery.start_soon(self._tell)
            nursery.start_soon(self._live)
            end = await self._work(task, control)
            await self._news.send(end)  # behind all that was said before
            await self._told.wait()
            nursery.cancel_scope.cancel()

    async def _work(self, task: Task, control: Slot) -> Fields:
        info: MigrationInfo | None = None
        try:
            with self.work:
                info = await (
                    self._send(task, control) if task.source else self._receive_guest(task, control)
                )
        except TransferAborted as aborted:
            return {
                "type": "aborted",
                "outcome": int(aborted.outcome),
                "reason": aborted.reason,
                "message": str(aborted),
            }
        except UsageError as error:
            return {"type": "unusable", "message": str(error)}
        except (
            MalformedData
        ) as error:  # of slots as they were found; what comes over TCP is the engine's to judge
            return {
                "type": "aborted",
                "outcome": int(Outcome.ENDED),
                "reason": "svsm",
                "message": f"the SVSM's mailbox makes no sense: {error}",
            }
        if info is None:
            return {"type": "cancelled"}
        return {"type": "completed", "info": as_fields(info)}

    async def _send(self, task: Task, control: Slot) -> MigrationInfo:
        hypervisor = (RemoteThrottlingHypervisor if task.can_throttle else RemoteHypervisor)(self, task)
        slots = await self.slots(1, task.options.channels, task.stall_timeout_s)
        engine = SourceEngine(
            control,
            slots,
            hypervisor,
            task.ram_pages,
            task.vcpus,
            task.options,
            self._steering,
            self._on_progress,
        )
        return await engine.run(task.host, task.port)

    async def _receive_guest(self, task: Task, control: Slot) -> MigrationInfo:
        async def make_slots(count: int) -> list[Slot]:
            await self.call("slots")
            return await self.slots(1, count, task.stall_timeout_s)

        engine = DestinationEngine(
            control,
            make_slots,
            RemoteHypervisor(self, task),
            task.ram_pages,
            self._on_progress,
            lambda line: self._note({"type": "stranger", "line": line}),
            task.stall_timeout_s,
            task.most_threads,
        )
        listener = await listen(task.host, task.port, task.stall_timeout_s)
        self._note({"type": "listening", "port": listener.port})
        try:
            return await engine.run(listener)
        finally:
            listener.close()

    def _on_progress(self, info: MigrationInfo) -> None:
        self._note({"type": "progress", "info": as_fields(info)})

    def _note(self, fields: Fields) -> None:
        try:
            self._news.send_nowait(fields)
        except trio.WouldBlock:
            return  # a reader that slow misses a line

    async def _tell(self) -> None:
        async for fields in self._reports:
            is_end = fields["type"] in ("completed", "aborted", "cancelled", "unusable")
            try:
                await self._link.send(fields)
            except ChannelBroken:
                if is_end:
                    print(f"pagexfer: engine: {fields.get('message', 'the SVSM is gone')}", file=sys.stderr)
            if is_end:
                break
        self._told.set()

    async def _live(self) -> None:
        while True:
            self._note({"type": "alive"})
            await trio.sleep(ALIVE_PERIOD_S)

    async def _listen(self) -> None:
        """Take what comes over the link, until its end."""
        try:
            while True:
                fields, payload = await self._receive()
                number = fields.get("id")
                if fields.get("type") == "cancel":
                    self.work.cancel()
                elif fields.get("type") == "end":
                    self._steering.cancel()
                elif fields.get("type") == "disturbed":
                    reason, message = str(fields.get("reason")), str(fields.get("message"))
                    self.disturbance = TransferAborted(Outcome.ENDED, reason, message)
                    self.disturbed.set()
                elif fields.get("type") == "parameters":
                    parameters = from_fields_untrusted(MigrationParameters, fields.get("parameters"))
                    self._steering.parameters = parameters
                elif isinstance(number, int) and number in self._calls:
                    self._calls[number].send_nowait((fields, payload))
        except (ChannelBroken, MalformedData):
            # The SVSM went with its process: nobody waits for it any longer, and nothing goes on without it.
            for doorbells in self._doorbells:
                doorbells.give_up()
            for waiting in self._calls.values():
                waiting.close()
            # Whoever gives a command now ends for that reason and tells the peer; who waits for the peer is cancelled.
            await trio.sleep(_LOST_GRACE_S)
            self.work.cancel()

    async def _receive(self) -> tuple[Fields, bytes]:
        while True:
            fields, payload = await self._link.receive()
            if fields.get("type") != "descriptors":
                return fields, payload


class RemoteHypervisor:
    """`engine.hypervisor.Hypervisor` at the other end of the monitor."""

    def __init__(self, engine: Engine, task: Task) -> None:
        self._engine = engine
        self.dirty_log = RemoteDirtyLog(engine, task.ram_pages) if task.has_dirty_log else None

    async def stop(self) -> None:
        await self._engine.call("stop")

    async def resume(self) -> None:
        await self._engine.call("resume")

    async def save_device_state(self) -> bytes:
        _, state = await self._engine.call("save_device_state")
        return state

    async def load_device_state(self, state: bytes) -> None:
        await self._engine.call("load_device_state", state)

    async def platform(self) -> bytes:
        """`engine.hypervisor.DescribedHypervisor`; one that says nothing gives no bytes, and refuses none."""
        _, platform = await self._engine.call("describe_platform")
        return platform

    async def check_platform(self, platform: bytes) -> None:
        await self._engine.call("check_platform", platform)

    async def watch(self) -> NoReturn:
        """`engine.hypervisor.WatchedHypervisor`: of the machine, and of callbacks that fail."""
        await self._engine.disturbed.wait()
        raise self._engine.disturbance


class RemoteThrottlingHypervisor(RemoteHypervisor):
    """`engine.hypervisor.ThrottlingHypervisor` at the other end of the monitor."""

    async def throttle(self, percentage: int) -> None:
        await self._engine.call("throttle", bytes([percentage]))


class RemoteDirtyLog:
    """The hypervisor's dirty log at the other end of the monitor. The engine calls it in threads of its own loop."""

    def __init__(self, engine: Engine, pages: int) -> None:
        self._engine = engine
        self._pages = pages

    def start(self) -> None:
        trio.from_thread.run(self._engine.call, "start_dirty_log")

    def collect(self) -> DirtyBitmap:
        _, words = trio.from_thread.run(self._engine.call, "collect_dirty_log")
        return DirtyBitmap.from_words(words, self._pages)

    def stop(self) -> None:
        trio.from_thread.run(self._engine.call, "stop_dirty_log")


async def main(link_fd: int) -> None:
    """Serve the link that stands at descriptor `link_fd`."""
    allow_most_descriptors()
    await Engine(Link(socket.socket(fileno=link_fd), takes_descriptors=True)).run()


if __name__ == "__main__":
    trio.run(main, int(sys.argv[1]))
