"""The QMP client against real UNIX sockets, and against a real QEMU."""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING

import pytest
import trio

from pagexfer.errors import GuestError, MalformedData
from pagexfer.guests.qemu.messages import MAX_LINE_BYTES, QmpEvent, Refusal, Reply, parse_message_untrusted
from pagexfer.guests.qemu.qmp import QmpBroken, QmpClient, QmpRefused

from .qemu_guests import needs_qemu, qemu

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

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
