"""QMP client: commands to a QEMU over its monitor's UNIX socket, and the events that come between.

Every command has an id and a timeout; answers may come in any order, as out-of-band ones do. A connection that breaks, or
whose server says what is no QMP, is closed and made again; commands that were under way then fail, and are never repeated,
as nobody knows whether they were done.
"""

from __future__ import annotations

import array
import json
import socket
from typing import TYPE_CHECKING, Final, Self

import trio

from ...errors import GuestError, MalformedData
from .messages import MAX_LINE_BYTES, Greeting, QmpEvent, Refusal, Reply, parse_message_untrusted

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

COMMAND_TIMEOUT_S: Final = 10.0
GREETING_TIMEOUT_S: Final = 5.0
_RECONNECT_TRIES: Final = 5
_RECONNECT_PERIOD_S: Final = 0.1
_RECEIVE_BYTES: Final = 1 << 16


class QmpRefused(GuestError):
    """QEMU refused a command; `kind` is the class of its error."""

    def __init__(self, command: str, kind: str, description: str) -> None:
        super().__init__(f"QEMU refused {command}: {description}")
        self.kind = kind


class QmpBroken(GuestError):
    """The connection to QEMU's monitor ended; what was under way may or may not have been done."""


class _Call:
    """A command that waits for its answer."""

    def __init__(self, command: str) -> None:
        self.command = command
        self.done = trio.Event()
        self.answer: Reply | GuestError | None = None

    def end(self, answer: Reply | GuestError) -> None:
        self.answer = answer
        self.done.set()


class QmpClient:
    """A monitor's client. `connect` gives one whose `run` must then be started in a nursery."""

    def __init__(
        self,
        path: Path,
        on_event: Callable[[QmpEvent], None],
        on_reconnect: Callable[[], None],
    ) -> None:
        self._path = path
        self._on_event = on_event
        self._on_reconnect = on_reconnect
        self._socket: trio.socket.SocketType | None = None
        self._negotiated = False
        self._received = bytearray()
        self._calls: dict[int, _Call] = {}
        self._last_id = 0
        self._sending = trio.Lock()
        self._out_of_band = False
        self.version = (0, 0, 0)
        self.gone = False

    @classmethod
    async def connect(
        cls,
        path: Path,
        on_event: Callable[[QmpEvent], None] = lambda _event: None,
        on_reconnect: Callable[[], None] = lambda: None,
    ) -> Self:
        """A client that has negotiated. Raises GuestError where nobody answers at `path`, or it is no QMP."""
        client = cls(path, on_event, on_reconnect)
        await client._open()
        return client

    @property
    def process_id(self) -> int:
        """Process that listens at the socket. Raises QmpBroken where there is no connection."""
        peer = self._connected().getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        return int.from_bytes(peer[:4], "little")

    async def run(self) -> None:
        """Read until cancelled, or until QEMU has gone for good: then `gone` is true and every command fails."""
        while True:
            why = await self._read()
            self._close(why)
            if not await self._reopen():
                self.gone = True
                return
            self._on_reconnect()

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        timeout_s: float = COMMAND_TIMEOUT_S,
        descriptors: tuple[int, ...] = (),
        out_of_band: bool = False,
    ) -> object:
        """Have QEMU run `command`; returns what it returned. `descriptors` go with it.

        Raises QmpRefused where QEMU refuses, QmpBroken where the connection ends, GuestError after `timeout_s`.
        """
        self._last_id += 1
        number = self._last_id
        request: dict[str, object] = {
            "exec-oob" if out_of_band and self._out_of_band else "execute": command,
            "id": number,
        }
        if arguments:
            request["arguments"] = dict(arguments)
        call = self._calls[number] = _Call(command)
        try:
            with trio.fail_after(timeout_s):
                await self._send(json.dumps(request).encode() + b"\n", descriptors)
                await call.done.wait()
        except trio.TooSlowError:
            raise GuestError(f"QEMU did not answer {command} within {timeout_s:g} s") from None
        finally:
            self._calls.pop(number, None)
        if isinstance(call.answer, Reply):
            return call.answer.value
        assert call.answer is not None
        raise call.answer

    def close(self) -> None:
        """End the connection."""
        self._close("it was closed here")

    # Connection

    async def _open(self) -> None:
        link = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with trio.fail_after(GREETING_TIMEOUT_S):
                await link.connect(str(self._path))
                self._socket, self._received = link, bytearray()
                await self._negotiate()
        except trio.TooSlowError:
            self._abandon(link)
            raise GuestError(
                f"no QMP greeting at {self._path} within {GREETING_TIMEOUT_S:g} s: a monitor takes one client at a time"
            ) from None
        except (OSError, MalformedData) as error:
            self._abandon(link)
            why = error.strerror if isinstance(error, OSError) else error
            raise GuestError(f"no QMP monitor at {self._path}: {why}") from None
        except BaseException:
            self._abandon(link)
            raise

    async def _negotiate(self) -> None:
        greeting = parse_message_untrusted(await self._line())
        if not isinstance(greeting, Greeting):
            raise MalformedData("it does not begin with a greeting")
        self.version = greeting.version
        self._out_of_band = "oob" in greeting.capabilities
        self._last_id += 1
        wanted = ["oob"] if self._out_of_band else []
        request = {"execute": "qmp_capabilities", "id": self._last_id, "arguments": {"enable": wanted}}
        await self._send(json.dumps(request).encode() + b"\n", (), negotiates=True)
        while True:
            answer = parse_message_untrusted(await self._line())
            if isinstance(answer, QmpEvent):
                self._on_event(answer)
            elif isinstance(answer, Reply) and answer.id == request["id"]:
                self._negotiated = True
                return
            else:
                raise MalformedData("it refuses to negotiate")

    async def _reopen(self) -> bool:
        for _ in range(_RECONNECT_TRIES):
            await trio.sleep(_RECONNECT_PERIOD_S)
            try:
                await self._open()
            except GuestError:
                continue
            return True
        return False

    async def _read(self) -> str:
        """Hand messages out until the connection is of no more use; returns why."""
        try:
            while True:
                self._dispatch(parse_message_untrusted(await self._line()))
        except MalformedData as error:
            return str(error)
        except OSError as error:
            return error.strerror or "closed"

    def _dispatch(self, message: object) -> None:
        match message:
            case QmpEvent():
                self._on_event(message)
            case Reply():
                self._answer(message.id, message)
            case Refusal(id=int(number)):
                self._answer(number, message)
            case Refusal():
                raise MalformedData(f"QEMU does not understand what it is told: {message.description}")
            case _:
                raise MalformedData("a second greeting")

    def _answer(self, number: int, answer: Reply | Refusal) -> None:
        if not 0 < number <= self._last_id:
            raise MalformedData("QEMU answers a command that was never given")
        call = self._calls.pop(number, None)  # answered, whatever becomes of the connection
        if call is None:  # its timeout was first
            return
        if isinstance(answer, Refusal):
            call.end(QmpRefused(call.command, answer.kind, answer.description))
        else:
            call.end(answer)

    async def _line(self) -> bytes:
        """The next line. Raises OSError where there is none, MalformedData where it is too long."""
        searched = 0
        while (end := self._received.find(b"\n", searched)) < 0:
            searched = len(self._received)
            if searched > MAX_LINE_BYTES:
                raise MalformedData(f"a QMP line is longer than {MAX_LINE_BYTES} bytes")
            link = self._socket
            data = await link.recv(_RECEIVE_BYTES) if link is not None else b""
            if not data:
                raise ConnectionResetError(0, "QEMU closed the connection")
            self._received += data
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        return line

    async def _send(self, data: bytes, descriptors: tuple[int, ...], *, negotiates: bool = False) -> None:
        rights = array.array("i", descriptors)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights.tobytes())] if descriptors else []
        async with self._sending:
            # Before the end of negotiations QEMU takes nothing else, and nobody would hear of its answer.
            link = self._socket if negotiates and self._socket is not None else self._connected()
            try:
                sent = await link.sendmsg([data], ancillary)
                while sent < len(data):
                    sent += await link.send(data[sent:])
            except OSError as error:
                raise QmpBroken(f"the connection to QEMU's monitor broke: {error.strerror}") from error

    def _connected(self) -> trio.socket.SocketType:
        if self._socket is None or not self._negotiated:
            raise QmpBroken(
                "QEMU has ended, or its monitor takes nobody" if self.gone else "no connection to QEMU"
            )
        return self._socket

    def _close(self, why: str) -> None:
        if self._socket is not None:
            self._abandon(self._socket)
        for call in self._calls.values():
            call.end(QmpBroken(f"QEMU's monitor was lost during {call.command}: {why}"))
        self._calls.clear()

    def _abandon(self, link: trio.socket.SocketType) -> None:
        link.close()
        self._socket, self._negotiated = None, False
