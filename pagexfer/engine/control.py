"""The control connection: msgpack messages between the two engines."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, TypeVar

import trio

from ..errors import ChannelBroken, MalformedData, Outcome, PagexferError, TransferAborted
from ..wire.control import ControlMessage, Failed, name_of, pack_control, parse_control_untrusted
from ..wire.framing import FrameType

if TYPE_CHECKING:
    from ..wire.framing import FrameHeader
    from ..wire.handshake import Role
    from .streams import Connection

MessageT = TypeVar("MessageT", bound=ControlMessage)

# Messages that wait to be taken; beyond that the peer waits in TCP.
_INBOX: Final = 64
_LAST_WORDS_S: Final = 1.0
# Reasons with which a peer refuses for good, rather than fails.
_REFUSALS: Final = ("authentication", "policy")


class PeerFailed(TransferAborted):
    """What the peer said of its own end: it is told back to nobody."""


class Control:
    """One side of the control connection, at whose other end is `peer`.

    `listen` runs in a task of its own, so that the peer's end is seen at once.
    """

    def __init__(self, connection: Connection, peer: Role) -> None:
        self.connection = connection
        self._peer = peer
        self._send_inbox, self._inbox = trio.open_memory_channel[ControlMessage](_INBOX)

    async def send(self, message: ControlMessage) -> None:
        """Send one message."""
        await self.connection.send_frame(FrameType.CONTROL, pack_control(message))

    async def receive_first(self, message_type: type[MessageT]) -> MessageT:
        """Receive a message before `listen` runs."""
        message = parse_control_untrusted(await self.connection.receive_frame(FrameType.CONTROL))
        return self._expect(message, message_type)

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
                f"{self.connection.peer} sent no {name_of(message_type)} within {timeout:g} s"
            ) from None
        return self._expect(message, message_type)

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
            raise self._failed(message)
        return message

    def _expect(self, message: ControlMessage, message_type: type[MessageT]) -> MessageT:
        if isinstance(message, Failed) and message_type is not Failed:
            raise self._failed(message)
        if not isinstance(message, message_type):
            raise MalformedData(
                f"control message {name_of(type(message))} where {name_of(message_type)} is due"
            )
        return message

    def _failed(self, message: Failed) -> TransferAborted:
        """The peer's own account of its failure, as our error. Whoever is on the way can have written it."""
        outcome = Outcome.REFUSED if message.reason in _REFUSALS else Outcome.ENDED
        return PeerFailed(outcome, message.reason, f"the {self._peer.name.lower()} says: {message.message}")
