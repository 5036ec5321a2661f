"""The unix socket between an engine's process and the one that started it; both ends use this, each in its own loop."""

from __future__ import annotations

import array
from collections import deque
from typing import TYPE_CHECKING, Final

import trio

from ..errors import ChannelBroken
from ..wire.monitor import HEAD_BYTES, Fields, pack_message, parse_fields_untrusted, parse_head_untrusted

if TYPE_CHECKING:
    import socket

# The kernel passes at most 253 descriptors at a time.
MAX_DESCRIPTORS: Final = 240
_READ_BYTES: Final = 1 << 18
_DESCRIPTOR_BYTES: Final = array.array("i").itemsize


class Link:
    """Sends and receives monitor messages. Any task may send; one receives. `descriptors` are those that came so far.

    Only an end with `takes_descriptors` takes any: the other one cannot be given files that it did not ask for.
    """

    def __init__(self, sock: socket.socket, *, takes_descriptors: bool = False) -> None:
        self._socket = trio.socket.from_stdlib_socket(sock)
        self._sending = trio.Lock()
        self._received = bytearray()
        self._takes = takes_descriptors
        self.descriptors: deque[int] = deque()

    async def send(self, fields: Fields, payload: bytes = b"") -> None:
        """Send one message. Raises ChannelBroken where the other side is gone."""
        async with self._sending:
            try:
                rest = memoryview(pack_message(fields, payload))
                while rest:
                    rest = rest[await self._socket.send(rest) :]
            except (OSError, trio.ClosedResourceError):
                raise ChannelBroken("the process at the other end of the monitor is gone") from None

    async def send_descriptors(self, descriptors: list[int]) -> None:
        """Give the other side these files, in this order. Raises ChannelBroken where it cannot have them."""
        for start in range(0, len(descriptors), MAX_DESCRIPTORS):
            batch = array.array("i", descriptors[start : start + MAX_DESCRIPTORS])
            message = pack_message({"type": "descriptors"})
            async with self._sending:
                ancillary = [(trio.socket.SOL_SOCKET, trio.socket.SCM_RIGHTS, batch)]
                try:
                    sent = await self._socket.sendmsg([message], ancillary)
                    while sent < len(message):
                        sent += await self._socket.send(message[sent:])
                except (OSError, trio.ClosedResourceError) as error:
                    raise ChannelBroken(f"no files can be given to the engine's process: {error}") from None

    async def receive(self) -> tuple[Fields, bytes]:
        """The next message. Raises ChannelBroken at the other side's end, MalformedData where it is none."""
        text_bytes, payload_bytes = parse_head_untrusted(await self._take(HEAD_BYTES))
        fields = parse_fields_untrusted(await self._take(text_bytes))
        return fields, await self._take(payload_bytes)

    def close(self) -> None:
        """Close at once."""
        self._socket.close()

    async def _take(self, size: int) -> bytes:
        while len(self._received) < size:
            try:
                part = await self._read()
            except (OSError, trio.ClosedResourceError):
                part = b""
            if not part:
                raise ChannelBroken("the process at the other end of the monitor is gone")
            self._received += part
        taken = bytes(self._received[:size])
        del self._received[:size]
        return taken

    async def _read(self) -> bytes:
        if not self._takes:
            return await self._socket.recv(_READ_BYTES)
        room = trio.socket.CMSG_SPACE(MAX_DESCRIPTORS * _DESCRIPTOR_BYTES)
        data, ancillary, _, _ = await self._socket.recvmsg(_READ_BYTES, room, trio.socket.MSG_CMSG_CLOEXEC)
        for level, kind, content in ancillary:
            if (level, kind) == (trio.socket.SOL_SOCKET, trio.socket.SCM_RIGHTS):
                received = array.array("i")
                received.frombytes(content[: len(content) - len(content) % _DESCRIPTOR_BYTES])
                self.descriptors.extend(received)
        return data
