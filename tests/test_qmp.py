"""The QMP client against real UNIX sockets, and against a real QEMU."""

from __future__ import annotations

import asyncio
import json
import socket
from functools import partial
from typing import TYPE_CHECKING

import pytest
import qemu.qmp as reference
import trio
import trio.testing

from pagexfer.errors import GuestError, MalformedData
from pagexfer.guests.qemu.messages import MAX_LINE_BYTES, QmpEvent, Refusal, Reply, parse_message_untrusted
from pagexfer.guests.qemu.qmp import QmpBroken, QmpClient, QmpRefused

from .qemu_guests import needs_qemu, qemu

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from trio.socket import SocketType

GREETING = b'{"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}}, "capabilities": []}}\n'


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"x",
        b"[]",
        b"{}",
        b'{"return": 1}',
        b'{"return": 1, "id": true}',
        b'{"event": 1}',
        b"[" * 9999,
        b"\xff",
    ],
)
def test_what_is_no_message_is_malformed(line: bytes) -> None:
    with pytest.raises(MalformedData):
        parse_message_untrusted(line)


def test_messages() -> None:
    assert parse_message_untrusted(b'{"return": {}, "id": 3}') == Reply(3, {})
    assert parse_message_untrusted(b'{"event": "STOP"}') == QmpEvent("STOP", {})
    refusal = parse_message_untrusted(b'{"error": {"class": "A", "desc": "b"}}')
    assert refusal == Refusal(None, "A", "b")


async def ask(path: Path, answer: Callable[[int], bytes], timeout_s: float = 5) -> object:
    """What a client gets whose server answers `answer(id)` to the first command after the negotiation."""
    server = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    await server.bind(str(path))
    server.listen()

    async def serve() -> None:
        link, _ = await server.accept()
        await link.send(GREETING)
        number = json.loads(await link.recv(4096))["id"]
        await link.send(b'{"return": {}, "id": %d}\n' % number)
        data = answer(json.loads(await link.recv(4096))["id"])
        server.close()
        while data:
            try:
                data = data[await link.send(data) :]
            except OSError:  # the client had enough of it
                break
        with link:
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        qmp = await QmpClient.connect(path)
        nursery.start_soon(qmp.run)
        try:
            result: object = await qmp.execute("x", timeout_s=timeout_s)
        except GuestError as error:
            result = error
        nursery.cancel_scope.cancel()
    qmp.close()
    server.close()
    return result


@pytest.mark.parametrize(
    ("answer", "kind", "says"),
    [
        (lambda n: b'{"error": {"class": "A", "desc": "no"}, "id": %d}\n' % n, QmpRefused, "refused x: no"),
        (lambda _n: b'{"error": {"class": "A", "desc": "no"}}\n', QmpBroken, "does not understand"),
        (lambda _n: b'{"return": 1, "id": 99}\n', QmpBroken, "never given"),
        (lambda _n: b"x" * (MAX_LINE_BYTES + (1 << 17)), QmpBroken, "longer than"),
        (lambda _n: b"nonsense\n", QmpBroken, "not JSON"),
    ],
)
async def test_bad_answers(
    tmp_path: Path, answer: Callable[[int], bytes], kind: type[GuestError], says: str
) -> None:
    error = await ask(tmp_path / "qmp", answer)
    assert isinstance(error, kind)
    assert says in str(error)


async def test_events_between_and_silence(tmp_path: Path) -> None:
    assert await ask(tmp_path / "a", lambda n: b'{"event": "E"}\n{"return": 7, "id": %d}\n' % n) == 7
    assert "did not answer" in str(await ask(tmp_path / "b", lambda _n: b"", 0.05))


@needs_qemu
async def test_a_real_monitor(tmp_path: Path) -> None:
    events: list[QmpEvent] = []
    with qemu(tmp_path / "s") as monitor:
        async with trio.open_nursery() as nursery:
            qmp = await QmpClient.connect(monitor, events.append)
            nursery.start_soon(qmp.run)
            await qmp.execute("stop")
            assert [event.name for event in events] == ["STOP"]
            with pytest.raises(QmpRefused) as caught:
                await qmp.execute("no-such-command")
            assert caught.value.kind == "CommandNotFound"
            nursery.cancel_scope.cancel()
        qmp.close()


class Server:
    """A QMP server that the test plays: `link` is the connection of the client that negotiated last."""

    def __init__(self, path: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        self.link: SocketType

    async def accept(self, greeting: bytes = GREETING) -> dict[str, object]:
        """Negotiate with the next client; returns what it asked for."""
        await self.arrival()
        return await self.negotiate(greeting)

    async def arrival(self) -> None:
        listener = trio.socket.from_stdlib_socket(self._listener)
        self.link, _ = await listener.accept()

    async def negotiate(self, greeting: bytes = GREETING) -> dict[str, object]:
        await self.link.send(greeting)
        request = await self.request()
        await self.say({"return": {}, "id": request["id"]})
        return request

    async def request(self) -> dict[str, object]:
        line = b""
        while not line.endswith(b"\n"):
            line += await self.link.recv(1)
        request: dict[str, object] = json.loads(line)
        return request

    async def say(self, message: dict[str, object]) -> None:
        await self.link.send(json.dumps(message).encode() + b"\n")

    def end(self) -> None:
        self.link.close()
        self._listener.close()


async def test_a_lost_connection_is_made_again_and_nothing_repeated(tmp_path: Path) -> None:
    server = Server(tmp_path / "qmp")
    reconnected = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.accept)
        qmp = await QmpClient.connect(tmp_path / "qmp", on_reconnect=reconnected.set)
        nursery.start_soon(qmp.run)
        asked = []

        async def lose() -> None:
            asked.append((await server.request())["execute"])
            server.link.close()
            await server.accept()

        nursery.start_soon(lose)
        with pytest.raises(QmpBroken, match="lost during cont"):
            await qmp.execute("cont")
        with trio.fail_after(5):
            await reconnected.wait()

        async def serve() -> None:
            request = await server.request()
            asked.append(request["execute"])
            await server.say({"return": 5, "id": request["id"]})

        nursery.start_soon(serve)
        assert await qmp.execute("query") == 5
        assert asked == ["cont", "query"]
        # Where nobody answers any more, the client says so instead of trying for ever.
        server.end()
        with trio.fail_after(10):
            while not qmp.gone:  # noqa: ASYNC110 - it tells nobody
                await trio.sleep(0.01)
        with pytest.raises(QmpBroken, match="QEMU has ended"):
            await qmp.execute("query")
        nursery.cancel_scope.cancel()
    qmp.close()


async def test_what_is_asked_before_a_new_connection_has_negotiated_is_refused_at_once(
    tmp_path: Path,
) -> None:
    """QEMU's answer to it would be taken for one to the negotiation, and the command wait for its timeout."""
    server = Server(tmp_path / "qmp")
    reconnected = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.accept)
        qmp = await QmpClient.connect(tmp_path / "qmp", on_reconnect=reconnected.set)
        nursery.start_soon(qmp.run)
        server.link.close()
        with trio.fail_after(5):
            await server.arrival()
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(QmpBroken, match="no connection"):
                await qmp.execute("query-status")
            assert (await server.negotiate())["execute"] == "qmp_capabilities"
            await reconnected.wait()
        nursery.cancel_scope.cancel()
    qmp.close()
    server.end()


@pytest.mark.parametrize("able", [True, False])
async def test_out_of_band_commands_overtake(tmp_path: Path, able: bool) -> None:
    server = Server(tmp_path / "qmp")
    greeting = GREETING.replace(b"[]", b'["oob"]') if able else GREETING
    order = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.accept, greeting)
        qmp = await QmpClient.connect(tmp_path / "qmp")
        nursery.start_soon(qmp.run)

        async def ask(command: str, *, out_of_band: bool) -> None:
            order.append(await qmp.execute(command, out_of_band=out_of_band))

        async with trio.open_nursery() as asking:
            asking.start_soon(partial(ask, "slow", out_of_band=False))
            slow = await server.request()
            asking.start_soon(partial(ask, "quick", out_of_band=True))
            quick = await server.request()
            assert (slow["execute"], quick["exec-oob" if able else "execute"]) == ("slow", "quick")
            await server.say({"return": "quick", "id": quick["id"]})
            await trio.testing.wait_all_tasks_blocked(0.05)
            await server.say({"return": "slow", "id": slow["id"]})
        nursery.cancel_scope.cancel()
    assert order == ["quick", "slow"]
    qmp.close()
    server.end()


@needs_qemu
def test_it_hears_what_qemus_own_client_hears(tmp_path: Path) -> None:
    commands: list[tuple[str, dict[str, object]]] = [
        ("query-version", {}),
        ("query-memdev", {}),
        ("query-cpus-fast", {}),
        ("query-memory-size-summary", {}),
        ("qom-get", {"path": "/machine", "property": "type"}),
        ("query-migrate-parameters", {}),
        ("query-qmp-schema", {}),
        ("qom-get", {"path": "/nowhere", "property": "type"}),
        ("stop", {}),
        ("query-status", {}),
        ("cont", {}),
    ]

    async def theirs(path: Path) -> list[object]:
        client = reference.QMPClient()
        await client.connect(str(path))
        heard: list[object] = []
        for command, arguments in commands:
            try:
                heard.append(await client.execute(command, arguments))
            except reference.ExecuteError as refused:
                heard.append((refused.error_class, str(refused)))
        await client.disconnect()
        return [heard, [event["event"] for event in client.events.history]]

    async def ours(path: Path) -> list[object]:
        events: list[QmpEvent] = []
        heard: list[object] = []
        async with trio.open_nursery() as nursery:
            qmp = await QmpClient.connect(path, events.append)
            nursery.start_soon(qmp.run)
            for command, arguments in commands:
                try:
                    heard.append(await qmp.execute(command, arguments))
                except QmpRefused as refused:
                    heard.append((refused.kind, str(refused).partition(": ")[2]))
            with pytest.raises(QmpRefused, match="migrate-pause"):
                await qmp.execute("migrate-pause", out_of_band=True)
            nursery.cancel_scope.cancel()
        qmp.close()
        return [heard, [event.name for event in events]]

    with qemu(tmp_path / "s") as monitor:
        expected = asyncio.run(theirs(monitor))
        assert trio.run(ours, monitor) == expected
