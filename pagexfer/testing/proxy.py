"""A TCP proxy between source and destination that does one thing wrong at one point of a migration.

It sees what any network sees: frame headers and bundle headers, which travel in clear. So a fault can be put at a named
frame (the first barrier, the start token, ...) instead of at a moment, and happens there in every run.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import trio

from ..errors import MalformedData
from ..wire.bundle import HEADER_BYTES, BundleKind, Direction, parse_header_untrusted
from ..wire.framing import (
    FRAME_HEADER_BYTES,
    FrameType,
    Purpose,
    parse_connection_hello_untrusted,
    parse_frame_header_untrusted,
)

if TYPE_CHECKING:
    from collections.abc import Callable

_DELAY_S: Final = 0.05


class Action(enum.Enum):
    """What happens to the frame at the point of the fault, and to what comes after it."""

    PASS = "pass"  # nothing: the point itself is of interest
    CUT = "cut"  # its connection ends at both sides
    CUT_ALL = "cut all"  # every connection ends at both sides
    STALL = "stall"  # its connection stays open and carries nothing any more
    STALL_ALL = "stall all"  # no connection carries anything any more
    HALF_CLOSE = "half-close"  # it arrives, then its direction of the connection ends
    TRUNCATE = "truncate"  # half of it arrives, then its connection ends at both sides
    FLIP = "flip"  # it arrives with one bit of its payload flipped
    DELAY = "delay"  # it arrives 50 ms after what other connections carry
    DROP = "drop"  # it does not arrive, all others do
    DUPLICATE = "duplicate"  # it arrives twice
    SWAP = "swap"  # it changes places with the next bundle of another channel


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame on its way. `channel` is None on the control connection, `kind` for anything but a bundle."""

    channel: int | None
    direction: Direction
    type: FrameType
    kind: BundleKind | None
    end: int  # bytes of this connection in this direction up to the frame's end
    data: bytes


def at_bundle(kind: BundleKind, number: int = 1) -> Callable[[Frame], bool]:
    """The `number`th bundle of this kind, over all channels."""
    return _nth(lambda frame: frame.kind is kind, number)


def at_frame(
    frame_type: FrameType, number: int = 1, *, channel: int | None = None
) -> Callable[[Frame], bool]:
    """The `number`th frame of this type on a connection, by default the control connection; both directions count."""
    return _nth(lambda frame: frame.type is frame_type and frame.channel == channel, number)


class _Link:
    """One connection of the migration: the two TCP connections that the proxy joins."""

    def __init__(self, source: trio.SocketStream, destination: trio.SocketStream) -> None:
        self.source = source
        self.destination = destination
        self.channel: int | None = None
        self.stalled = False

    def ends(self, direction: Direction) -> tuple[trio.SocketStream, trio.SocketStream]:
        """Where frames of this direction come from, and where they go."""
        if direction is Direction.FORWARD:
            return self.source, self.destination
        return self.destination, self.source

    def cut(self) -> None:
        self.source.socket.close()
        self.destination.socket.close()


class FaultProxy:
    """Relays connections to `host`:`port`; the first frame for which `point` is true meets `action`.

    `reached` is set then, and `on_fault` called before anything of that frame is passed on.
    """

    def __init__(
        self,
        host: str,
        port: int,
        point: Callable[[Frame], bool] = lambda _frame: False,
        action: Action = Action.PASS,
        on_fault: Callable[[], None] = lambda: None,
    ) -> None:
        self._target = (host, port)
        self._point = point
        self._action = action
        self._on_fault = on_fault
        self._links: list[_Link] = []
        self._stalled = False
        self._swap: tuple[trio.SocketStream, Frame, trio.Event] | None = None
        self.reached = trio.Event()

    async def serve(self, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED) -> None:
        """Relay for ever; reports the port on 127.0.0.1 where the source is to connect."""
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        task_status.started(listeners[0].socket.getsockname()[1])
        try:
            await trio.serve_listeners(self._join, listeners)
        finally:
            for link in self._links:
                link.cut()

    def cut(self, channel: int | None) -> None:
        """End the connection of a channel, or the control connection, at both sides."""
        for link in self._links:
            if link.channel == channel:
                link.cut()

    async def _join(self, source: trio.SocketStream) -> None:
        try:
            destination = await trio.open_tcp_stream(*self._target)
        except OSError:
            source.socket.close()
            return
        link = _Link(source, destination)
        self._links.append(link)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._relay, link, Direction.FORWARD)
            nursery.start_soon(self._relay, link, Direction.BACKWARD)

    async def _relay(self, link: _Link, direction: Direction) -> None:
        origin, target = link.ends(direction)
        passed = 0
        try:
            while data := await _receive_frame(origin):
                passed += len(data)
                frame = _look(link, direction, data, passed)
                await self._pass(link, frame, target)
            await self._unless_stalled(link)
            await target.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError, MalformedData):
            await self._unless_stalled(link)
            link.cut()

    async def _pass(self, link: _Link, frame: Frame, target: trio.SocketStream) -> None:
        if not self.reached.is_set() and self._point(frame):
            self.reached.set()
            self._on_fault()
            await self._harm(self._action, link, frame, target)
            return
        await self._unless_stalled(link)
        if self._swap is not None and _is_partner(self._swap[1], frame):
            held_target, held, swapped = self._swap
            self._swap = None
            await target.send_all(held.data)
            await held_target.send_all(frame.data)
            swapped.set()
            return
        await target.send_all(frame.data)

    async def _harm(self, action: Action, link: _Link, frame: Frame, target: trio.SocketStream) -> None:
        match action:
            case Action.PASS:
                await target.send_all(frame.data)
            case Action.DELAY:
                await trio.sleep(_DELAY_S)
                await target.send_all(frame.data)
            case Action.CUT:
                link.cut()
            case Action.CUT_ALL:
                for each in self._links:
                    each.cut()
            case Action.STALL:
                link.stalled = True
            case Action.STALL_ALL:
                self._stalled = True
            case Action.HALF_CLOSE:
                await target.send_all(frame.data)
                await target.send_eof()
                while await _receive_frame(link.ends(frame.direction)[0]):
                    pass
            case Action.TRUNCATE:
                await target.send_all(frame.data[: max(1, len(frame.data) // 2)])
                link.cut()
            case Action.FLIP:
                await target.send_all(_flipped(frame.data))
            case Action.DROP:
                pass
            case Action.DUPLICATE:
                await target.send_all(frame.data + frame.data)
            case Action.SWAP:
                swapped = trio.Event()
                self._swap = (target, frame, swapped)
                await swapped.wait()

    async def _unless_stalled(self, link: _Link) -> None:
        if link.stalled or self._stalled:
            await trio.sleep_forever()


def _nth(condition: Callable[[Frame], bool], number: int) -> Callable[[Frame], bool]:
    seen = 0

    def point(frame: Frame) -> bool:
        nonlocal seen
        seen += condition(frame)
        return seen >= number and condition(frame)

    return point


def _is_partner(held: Frame, frame: Frame) -> bool:
    return (
        frame.type is FrameType.BUNDLE
        and frame.direction is held.direction
        and frame.channel not in (None, held.channel)
    )


def _flipped(data: bytes) -> bytes:
    changed = bytearray(data)
    changed[FRAME_HEADER_BYTES + (len(data) - FRAME_HEADER_BYTES) // 2] ^= 1
    return bytes(changed)


def _look(link: _Link, direction: Direction, data: bytes, end: int) -> Frame:
    frame_type = parse_frame_header_untrusted(data[:FRAME_HEADER_BYTES]).type
    payload = data[FRAME_HEADER_BYTES:]
    kind = None
    if frame_type is FrameType.HELLO:
        hello = parse_connection_hello_untrusted(payload)
        link.channel = hello.channel if hello.purpose is Purpose.CHANNEL else None
    elif frame_type is FrameType.BUNDLE:
        kind = parse_header_untrusted(payload[:HEADER_BYTES], len(payload)).kind
    return Frame(link.channel, direction, frame_type, kind, end, data)


async def _receive_frame(stream: trio.SocketStream) -> bytes:
    """The next frame with its header; empty where the stream ends."""
    data = bytearray()
    wanted = FRAME_HEADER_BYTES
    while len(data) < wanted:
        part = await stream.receive_some(wanted - len(data))
        if not part:
            return b""
        data += part
        if len(data) == FRAME_HEADER_BYTES:
            wanted += parse_frame_header_untrusted(bytes(data)).payload_bytes
    return bytes(data)
