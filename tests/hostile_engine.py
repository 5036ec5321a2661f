"""An engine's process that says what it should not; a test starts this file in place of the real one.

Arguments: what it does, the words that it says as JSON texts, and last of all, as the real one has it, its descriptor.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

import trio

from pagexfer.engine.source import SourceEngine
from pagexfer.errors import GuestError
from pagexfer.isolation import engine_process
from pagexfer.isolation.engine_process import Engine
from pagexfer.wire.bundle import BundleKind

if TYPE_CHECKING:
    from pagexfer.engine.channel import SourceChannel
    from pagexfer.engine.slots import Slot
    from pagexfer.isolation.link import Link
    from pagexfer.isolation.task import Task
    from pagexfer.wire.monitor import Fields


def say(link_fd: int, words: list[str]) -> None:
    """Nothing but these words, until the other side has had enough."""
    with socket.socket(fileno=link_fd) as link, suppress(ConnectionResetError):
        for word in words:
            text = word.encode()
            link.sendall(len(text).to_bytes(4, "little") + bytes(4) + text)
        while link.recv(1 << 16):
            pass


def say_at_last(word: str) -> None:
    """Migrate as one should, and then say another last word."""
    work = Engine._work

    async def lies(self: Engine, task: Task, control: Slot) -> Fields:
        await work(self, task, control)
        fields: Fields = json.loads(word)
        return fields

    Engine._work = lies  # type: ignore[method-assign]


def say_cancelled_once_started() -> None:
    """Keep the destination's answer to the start token from the SVSM, and agree to the cancel that comes."""
    engines: list[Engine] = []
    begin, await_answer = Engine.__init__, SourceEngine._await_answer

    def noted(self: Engine, link: Link) -> None:
        begin(self, link)
        engines.append(self)

    async def keeps(self: SourceEngine, channel: SourceChannel, kind: BundleKind, timeout: float) -> None:
        if kind is BundleKind.RUNNING:
            with trio.CancelScope(shield=True):
                while not engines[0].work.cancel_called:  # noqa: ASYNC110 (it has no event)
                    await trio.sleep(0.005)
                await engines[0]._link.send({"type": "cancelled"})
                await trio.sleep_forever()
        await await_answer(self, channel, kind, timeout)

    Engine.__init__ = noted  # type: ignore[method-assign]
    SourceEngine._await_answer = keeps  # type: ignore[method-assign]


def ask_for_slots_twice() -> None:
    """And take no notice of the refusal."""
    call = Engine.call

    async def calls(
        self: Engine, name: str, payload: bytes = b"", **arguments: object
    ) -> tuple[Fields, bytes]:
        answer = await call(self, name, payload, **arguments)
        if name == "slots":
            try:
                await call(self, name)
            except GuestError:
                return answer
            os._exit(1)
        return answer

    Engine.call = calls  # type: ignore[method-assign]


def main() -> None:
    what, *words = sys.argv[1:]
    link_fd = int(words.pop())
    words = words[: words.index("-m")]
    match what:
        case "say":
            say(link_fd, words)
            return
        case "last":
            say_at_last(words[0])
        case "started-cancelled":
            say_cancelled_once_started()
        case "slots-twice":
            ask_for_slots_twice()
    trio.run(engine_process.main, link_fd)


if __name__ == "__main__":
    main()
