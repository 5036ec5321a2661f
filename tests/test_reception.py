"""Strangers at the destination's port: each costs one line and nothing else, and the real source is served."""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Final

import pytest
import trio
import trio.testing

from pagexfer.engine.reception import MAX_STRANGERS, Reception
from pagexfer.engine.slots import Slot
from pagexfer.engine.streams import connect, listen
from pagexfer.errors import Outcome, RefusalCode, SvsmRefused, TransferAborted
from pagexfer.migration import _local_slot, receive_guest, send_guest
from pagexfer.svsm.commands import destination_channel, destination_control, source_control
from pagexfer.svsm.handshake import MAX_ATTEMPTS
from pagexfer.testing.proxy import FaultProxy
from pagexfer.wire.bundle import BundleHeader, BundleKind, Direction, parse_header_untrusted
from pagexfer.wire.constants import PROTOCOL_VERSION
from pagexfer.wire.control import Prepare, pack_control
from pagexfer.wire.framing import (
    FRAME_HEADER_BYTES,
    ConnectionHello,
    FrameHeader,
    FrameType,
    Purpose,
    parse_connection_hello_untrusted,
)
from pagexfer.wire.slot import CONTROL_SLOT, Command

from .engine_guests import SmallMachine
from .handshakes import source_handshake
from .loopback import HOST
from .small_guests import ATTESTOR

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from pagexfer.engine.streams import Connection
    from pagexfer.svsm.service import SlotService
    from pagexfer.testing.proxy import Frame, _Link
    from pagexfer.wire.slot import SlotMemory

_SHORT_S: Final = 0.4
_CONTROL: Final = ConnectionHello(Purpose.CONTROL, 0, bytes(16)).pack()
_CHANNEL: Final = ConnectionHello(Purpose.CHANNEL, 1, bytes(range(16))).pack()
_HELLO: Final = FrameHeader(FrameType.HELLO, len(_CONTROL)).pack()
_OTHER_VERSION: Final = _CONTROL[:8] + (PROTOCOL_VERSION + 1).to_bytes(2, "little") + _CONTROL[10:]

# What a stranger sends, and what its line says.
_STRANGERS: Final = {
    "garbage": (b"\xde\xad\xbe\xef" * 8, "not a frame of this protocol"),
    "http": (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", "not a frame of this protocol"),
    "tls": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500), "not a frame of this protocol"),
    "huge length": (FrameHeader(FrameType.HELLO, 2**32 - 1).pack(), "over the cap"),
    "another frame": (FrameHeader(FrameType.CONTROL, 0).pack(), "CONTROL frame where HELLO is due"),
    "zeros as hello": (_HELLO + bytes(32), "without the protocol's magic"),
    "other version": (_HELLO + _OTHER_VERSION, f"protocol version {PROTOCOL_VERSION + 1}"),
    "half a hello": (_HELLO + _CONTROL[:7], "did not introduce itself within"),
    "silence": (b"", "did not introduce itself within"),
    "a control connection and no more": (_HELLO + _CONTROL, "did not introduce itself within"),
    "a channel of another session": (_HELLO + _CHANNEL, "it names no channel of this migration"),
    "a control message that is none": (
        _HELLO + _CONTROL + FrameHeader(FrameType.CONTROL, 3).pack() + b"\xff\xff\xff",
        "not one msgpack map",
    ),
    "a handshake that is none": (
        _HELLO
        + _CONTROL
        + FrameHeader(FrameType.CONTROL, len(pack_control(Prepare(b"hello")))).pack()
        + pack_control(Prepare(b"hello")),
        "did not prove that it belongs to this migration",
    ),
}


@asynccontextmanager
async def _destination(
    machine: SmallMachine, lines: list[str], stall_timeout_s: float = _SHORT_S
) -> AsyncIterator[int]:
    """A destination that waits for its source; yields the port and expects the migration to complete."""
    async with trio.open_nursery() as nursery:

        async def receive(task_status: trio.TaskStatus[int]) -> None:
            await receive_guest(
                machine.destination,
                HOST,
                0,
                ATTESTOR,
                stall_timeout_s=stall_timeout_s,
                on_listening=task_status.started,
                on_stranger=lines.append,
                channel_threads=False,
            )

        yield await nursery.start(receive)


async def _migrate(machine: SmallMachine, port: int, *, channel_threads: bool | None = None) -> None:
    await send_guest(machine.source, HOST, port, ATTESTOR, channels=2, channel_threads=channel_threads)
    assert machine.moved()


@pytest.mark.parametrize("stranger", _STRANGERS)
async def test_a_stranger_costs_one_line(stranger: str) -> None:
    sent, reason = _STRANGERS[stranger]
    lines: list[str] = []
    machine = SmallMachine()
    with trio.fail_after(10):
        async with _destination(machine, lines) as port:
            async with await trio.open_tcp_stream(HOST, port) as stream:
                await stream.send_all(sent)
                # Dropped by the destination: an end or a reset, after what it may have answered.
                try:
                    while await stream.receive_some(1000):
                        pass
                except trio.BrokenResourceError:
                    pass
                name = "{}:{}".format(*stream.socket.getsockname())
            await _migrate(machine, port)
    assert len(lines) == 1
    assert lines[0].startswith(f"dropped connection from {name}: ")
    assert reason in lines[0]
    assert lines[0].isprintable()


@pytest.mark.parametrize("sent", [b"", _HELLO, _HELLO + _CONTROL])
async def test_a_stranger_that_goes_costs_one_line(sent: bytes) -> None:
    lines: list[str] = []
    machine = SmallMachine()
    with trio.fail_after(10):
        async with _destination(machine, lines) as port:
            async with await trio.open_tcp_stream(HOST, port) as stream:
                await stream.send_all(sent)
            await _migrate(machine, port)
    assert len(lines) == 1
    assert lines[0].endswith("closed the connection")


async def test_more_strangers_than_are_heard_at_a_time() -> None:
    """Who has said a word is heard out, so the source waits; those that say nothing make room (below)."""
    lines: list[str] = []
    machine = SmallMachine()
    strangers = MAX_STRANGERS + 8
    with trio.fail_after(20):
        async with _destination(machine, lines) as port, AsyncExitStack() as stack:
            for _ in range(strangers):
                stranger = await stack.enter_async_context(await trio.open_tcp_stream(HOST, port))
                await stranger.send_all(_HELLO + _CONTROL)
            await _migrate(machine, port)
    # The source was heard once enough of those before it had been given up.
    assert len(lines) > strangers - MAX_STRANGERS
    # Those whose word was on its way yet were taken for silent.
    assert all("did not introduce itself" in line or "it was silent" in line for line in lines)


class _Eavesdropper:
    """Reads the session's name, which is no secret, from a channel's hello on its way through a proxy."""

    def __init__(self) -> None:
        self.session = b""
        self.heard = trio.Event()

    def listen(self, frame: Frame) -> bool:
        if frame.type is FrameType.HELLO and frame.channel == 1:
            self.session = parse_connection_hello_untrusted(frame.data[FRAME_HEADER_BYTES:]).session
            self.heard.set()
        return False


async def _migrate_beside(
    machine: SmallMachine, port: int, disturb: Callable[[bytes], Awaitable[None]]
) -> None:
    """Migrate, and let `disturb` run with the session's name while the migration is under way."""
    eavesdropper = _Eavesdropper()
    done = trio.Event()
    machine.source.hypervisor.before_stop = done.wait

    async def disturbance() -> None:
        await eavesdropper.heard.wait()
        await disturb(eavesdropper.session)
        done.set()

    async with trio.open_nursery() as nursery:
        proxy_port = await nursery.start(FaultProxy(HOST, port, eavesdropper.listen).serve)
        nursery.start_soon(disturbance)
        await _migrate(machine, proxy_port)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("channel", [0, 1])
async def test_who_only_names_the_session_is_a_stranger(channel: int) -> None:
    lines: list[str] = []
    machine = SmallMachine()

    async def disturb(session: bytes) -> None:
        async with await trio.open_tcp_stream(HOST, port) as stream:
            await stream.send_all(_HELLO + ConnectionHello(Purpose.CHANNEL, channel, session).pack())
            await stream.send_all(FrameHeader(FrameType.BUNDLE, 80).pack() + bytes(80))
            assert await stream.receive_some(1) == b""

    with trio.fail_after(10):
        async with _destination(machine, lines, 5) as port:
            await _migrate_beside(machine, port, disturb)
    assert len(lines) == 1
    assert "not a bundle" in lines[0]


class _SlowSlots:
    """Makes a destination's slots of one kind answer later, as another process's do, and `held` not before `go_on`."""

    def __init__(self, kind: Callable[..., SlotService], held: int) -> None:
        self.go_on = trio.Event()
        self.asked = trio.Event()  # the slot that is held
        self.overlapping: list[int] = []
        self._kind = kind
        self._held = held
        self._busy: set[int] = set()

    def make(self, slot_id: int, serve: Callable[[SlotMemory], SlotService], *rest: int) -> Slot:
        slot = _local_slot(slot_id, serve, *rest)
        if isinstance(serve, partial) and serve.func is self._kind:
            slot._ring = partial(self._answer, slot_id, slot._ring)
        return slot

    async def _answer(self, slot_id: int, ring: Callable[[], Awaitable[None]]) -> None:
        if slot_id in self._busy:
            self.overlapping.append(slot_id)
        self._busy.add(slot_id)
        with trio.CancelScope(shield=True):
            if slot_id == self._held:
                self.asked.set()
                await self.go_on.wait()
            await trio.sleep(0.001)
        await ring()
        self._busy.discard(slot_id)


class _Crowd(FaultProxy):
    """Has strangers open channel 1, some before its source and more after it, all while the first one is looked at."""

    def __init__(self, port: int, slots: _SlowSlots) -> None:
        super().__init__(HOST, port)
        self._slots = slots
        self.streams: list[trio.SocketStream] = []

    async def _pass(self, link: _Link, frame: Frame, target: trio.SocketStream) -> None:
        if frame.kind is not BundleKind.CHANNEL_OPEN or frame.channel != 1:
            await super()._pass(link, frame, target)
            return
        session = parse_header_untrusted(frame.data[FRAME_HEADER_BYTES:], 80).session
        await self._push_in(session, 5)
        await super()._pass(link, frame, target)
        await self._push_in(session, 15)
        self._slots.go_on.set()

    async def _push_in(self, session: bytes, count: int) -> None:
        hello = ConnectionHello(Purpose.CHANNEL, 1, session).pack()
        kind, incarnations = BundleKind.CHANNEL_OPEN, (0, 0, 0, 0, 1)
        await trio.testing.wait_all_tasks_blocked(0.01)
        for number in range(count):
            header = BundleHeader(kind, Direction.FORWARD, session, 1, incarnations[number % 5], 1, 0, 0, 0)
            bogus = header.pack() + bytes(16)
            stream = await trio.open_tcp_stream(*self._target)
            self.streams.append(stream)
            await stream.send_all(_HELLO + hello + FrameHeader(FrameType.BUNDLE, len(bogus)).pack() + bogus)
        await trio.testing.wait_all_tasks_blocked(0.01)


async def test_who_asks_for_a_channel_that_opens_meanwhile_neither_uses_its_slot_nor_keeps_its_source_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slots = _SlowSlots(destination_channel, held=1)
    monkeypatch.setattr("pagexfer.migration._local_slot", slots.make)
    lines: list[str] = []
    machine = SmallMachine()
    with trio.fail_after(20):
        async with _destination(machine, lines, 5) as port, trio.open_nursery() as nursery:
            crowd = _Crowd(port, slots)
            await _migrate(machine, await nursery.start(crowd.serve), channel_threads=False)
            nursery.cancel_scope.cancel()
    for stream in crowd.streams:
        await stream.aclose()
    assert slots.overlapping == []
    assert len(lines) == 20
    assert sum("is open already" in line for line in lines) == 12
    assert sum("did not prove" in line for line in lines) == 8


async def test_sixteen_and_more_strangers_push_no_source_out_of_its_handshake(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before the source, and between its hello and its proof, more strangers say hello than are heard, and go."""
    lines: list[str] = []
    machine = SmallMachine()

    async def crowded(slot: Slot, command: Command, argument: int = 0, package: bytes = b"") -> object:
        if command is Command.SETUP and slot is machine_slots[0]:
            for _ in range(MAX_ATTEMPTS + 1):
                await _say_hello_and_go(port)
        return await exchange(slot, command, argument, package)

    machine_slots: list[Slot] = []
    exchange = Slot.exchange
    make = _local_slot

    def noted(slot_id: int, serve: Callable[[SlotMemory], SlotService], *rest: int) -> Slot:
        slot = make(slot_id, serve, *rest)
        if isinstance(serve, partial) and serve.func is source_control:
            machine_slots.append(slot)
        return slot

    monkeypatch.setattr("pagexfer.migration._local_slot", noted)
    monkeypatch.setattr(Slot, "exchange", crowded)
    with trio.fail_after(60):
        async with _destination(machine, lines, 5) as port:
            for _ in range(MAX_ATTEMPTS + 1):
                await _say_hello_and_go(port)
            await _migrate(machine, port)
    assert machine.moved()
    assert len(lines) == 2 * (MAX_ATTEMPTS + 1)


async def _say_hello_and_go(port: int) -> None:
    hello = pack_control(Prepare(source_handshake().hello()))
    async with await trio.open_tcp_stream(HOST, port) as stranger:
        await stranger.send_all(_HELLO + _CONTROL + FrameHeader(FrameType.CONTROL, len(hello)).pack() + hello)
        assert await stranger.receive_some(1)  # it was answered


@pytest.mark.parametrize("said", [b"", _HELLO, _HELLO + _CONTROL], ids=["nothing", "half a hello", "hello"])
async def test_those_that_say_no_more_keep_nobody_waiting(said: bytes) -> None:
    lines: list[str] = []
    machine = SmallMachine()
    with trio.fail_after(60):
        async with _destination(machine, lines, 50) as port:
            silent = [await trio.open_tcp_stream(HOST, port) for _ in range(3 * MAX_STRANGERS)]
            for stream in silent:
                with suppress(trio.BrokenResourceError):
                    await stream.send_all(said)
            with trio.fail_after(9):  # less than a stranger's time to introduce itself
                await _migrate(machine, port)
    for stream in silent:
        await stream.aclose()
    assert machine.moved()
    assert sum("silent while others waited" in line for line in lines) > MAX_STRANGERS


async def test_the_last_command_waits_for_the_hello_of_a_stranger(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = _SlowSlots(destination_control, held=CONTROL_SLOT)
    slots.go_on.set()
    monkeypatch.setattr("pagexfer.migration._local_slot", slots.make)
    lines: list[str] = []
    machine = SmallMachine()

    async def push_in() -> None:
        slots.go_on, slots.asked = trio.Event(), trio.Event()
        await stranger.send_all(_STRANGERS["a handshake that is none"][0])
        await slots.asked.wait()

    machine.destination.hypervisor.before_resume = push_in
    with trio.fail_after(20):
        async with (
            _destination(machine, lines, 5) as port,
            await trio.open_tcp_stream(HOST, port) as stranger,
        ):
            await _migrate(machine, port)
            await trio.testing.wait_all_tasks_blocked()
            slots.go_on.set()
    assert slots.overlapping == []
    assert machine.destination.gate.running


async def test_a_second_source_is_told_that_it_came_too_late() -> None:
    lines: list[str] = []
    first, second = SmallMachine(), SmallMachine()

    async def disturb(_session: bytes) -> None:
        with pytest.raises(TransferAborted, match="receives another guest already") as caught:
            await send_guest(second.source, HOST, port, ATTESTOR, channels=2)
        assert (caught.value.outcome, caught.value.reason) == (Outcome.ENDED, "busy")

    with trio.fail_after(10):
        async with _destination(first, lines, 5) as port:
            await _migrate_beside(first, port, disturb)
    assert second.stayed()
    assert len(lines) == 1


async def test_of_two_sources_at_once_one_wins() -> None:
    first, second = SmallMachine(), SmallMachine()
    ends: list[str] = []

    async def send(machine: SmallMachine, port: int) -> None:
        try:
            await send_guest(machine.source, HOST, port, ATTESTOR, channels=2)
        except TransferAborted as aborted:
            ends.append(aborted.reason)
        else:
            ends.append("completed")

    with trio.fail_after(10):
        async with _destination(first, [], 5) as port, trio.open_nursery() as nursery:
            nursery.start_soon(send, first, port)
            nursery.start_soon(send, second, port)
    assert sorted(ends) == ["busy", "completed"]
    assert [first.source.gate.running, second.source.gate.running].count(True) == 1
    assert first.destination.gate.running


# Reception alone


async def test_who_is_kept_stays_open_and_who_is_not_is_closed() -> None:
    listener = await listen(HOST, 0)
    kept: list[Connection] = []

    async def control(connection: Connection) -> bool:
        kept.append(connection)
        return True

    async def channel(_connection: Connection, hello: ConnectionHello) -> bool:
        if hello.channel == 1:
            raise SvsmRefused(RefusalCode.INTEGRITY, "SETUP")
        return False

    lines: list[str] = []
    reception = Reception(listener, control, channel, lines.append)
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reception.serve)
            welcome, refused, let_go = [await connect(HOST, listener.port) for _ in range(3)]
            await refused.send_frame(FrameType.HELLO, _CHANNEL)
            await let_go.send_frame(
                FrameType.HELLO, ConnectionHello(Purpose.CHANNEL, 2, bytes(range(16))).pack()
            )
            await welcome.send_frame(FrameType.HELLO, _CONTROL)
            for dropped in (refused, let_go):
                with pytest.raises(Exception, match="closed the connection"):
                    await dropped.receive_header()
            await trio.testing.wait_all_tasks_blocked()
            await kept[0].send_frame(FrameType.CONTROL, b"")
            assert (await welcome.receive_header()).type is FrameType.CONTROL
            nursery.cancel_scope.cancel()
    assert len(lines) == 1
    for connection in (welcome, refused, let_go, kept[0]):
        connection.close()
    listener.close()
