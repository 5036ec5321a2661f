"""The control connection: msgpack messages between the two engines."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, TypeVar

import trio

from ..errors import ChannelBroken, MalformedData, Outcome, PagexferError, TransferAborted
from ..wire.control import ControlMessage, Failed, pack_control, parse_control_untrusted
from ..wire.framing import FrameType

if TYPE_CHECKING:
    from ..wire.framing import FrameHeader
    from .streams import Connection

MessageT = TypeVar("MessageT", bound=ControlMessage)

# Messages that wait to be taken; beyond that the peer waits in TCP.
_INBOX: Final = 64
_LAST_WORDS_S: Final = 1.0
# Reasons with which a peer refuses for good, rather than fails.
_REFUSALS: Final = ("authentication", "policy")


class Control:
    """One side of the control connection. `listen` runs in a task of its own, so that the peer's end is seen at once."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._send_inbox, self._inbox = trio.open_memory_channel[ControlMessage](_INBOX)

    async def send(self, message: ControlMessage) -> None:
        """Send one message."""
        await self.connection.send_frame(FrameType.CONTROL, pack_control(message))

    async def receive_first(self, message_type: type[MessageT]) -> MessageT:
        """Receive a message before `listen` runs."""
        return _expect(
            parse_control_untrusted(await self.connection.receive_frame(FrameType.CONTROL)), message_type
        )

    async def listen(self) -> None:
        """Take in what the peer sends, for ever. Raises TransferAborted when it says that it failed, ChannelBroken when
        it is gone.
        """
        while True:
            header = await self.connection.receive_header(math.inf)
            await self._send_inbox.send(await self._take_message(header))

    async def receive(self, message_type: type[MessageT], timeout: float) -> MessageT:
        """The next message, which must be of this type; for use while `listen` runs."""
        try:
            with trio.fail_after(timeout):
                message = await self._inbox.receive()
        except trio.TooSlowError:
            raise ChannelBroken(
                f"{self.connection.peer} sent no {message_type.__name__} within {timeout:g} s"
            ) from None
        return _expect(message, message_type)

    async def last_words(self) -> TransferAborted | None:
        """What the peer still said of its failure before it went, if anything; for use after `listen` ended."""
        with trio.move_on_after(min(_LAST_WORDS_S, self.connection.stall_timeout)):
            try:
                await self.listen()
            except TransferAborted as words:
                return words
            except PagexferError:
                return None
        return None

    async def _take_message(self, header: FrameHeader) -> ControlMessage:
        if header.type is not FrameType.CONTROL:
            raise MalformedData(f"{header.type.name} frame on the control connection")
        message = parse_control_untrusted(await self.connection.receive_payload(header))
        if isinstance(message, Failed):
            raise peer_failed(message)
        return message


def peer_failed(message: Failed) -> TransferAborted:
    """The peer's own account of its failure, as our error."""
    outcome = Outcome.REFUSED if message.reason in _REFUSALS else Outcome.ENDED
    return TransferAborted(outcome, message.reason, message.message)


def _expect(message: ControlMessage, message_type: type[MessageT]) -> MessageT:
    if isinstance(message, Failed) and message_type is not Failed:
        raise peer_failed(message)
    if not isinstance(message, message_type):
        raise MalformedData(f"{type(message).__name__} message where {message_type.__name__} is due")
    return message
