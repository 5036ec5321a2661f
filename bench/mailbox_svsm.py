"""An SVSM of a process of its own that seals from RAM into slots, and the host's end of it; nothing of a session around it.

python -m bench.mailbox_svsm LINK RAM SLOTS    the SVSM: hands mailbox and doorbells over LINK, serves until LINK ends

Its slots, handlers, registers and doorbells are the real ones. A handler is a thread of it; handlers as processes are
several such SVSMs with one slot each, over the same RAM. Without RAM (-1) it does nothing but answer: what is left is the
doorbells and those who wait for them.
"""

from __future__ import annotations

import mmap
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from pagexfer.engine.doorbell import Doorbells
from pagexfer.engine.slots import Slot
from pagexfer.isolation.mailbox import Mailbox
from pagexfer.svsm.service import Answer, SlotService
from pagexfer.svsm.staging import StagingPool
from pagexfer.wire.slot import NO_BUFFER, Command, SessionStatus, SlotGeometry, SlotMemory, SlotStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pagexfer.svsm.service import Call

BUFFERS: Final = 2
BUFFER_BYTES: Final = 1 << 21
_TIMEOUT_S: Final = 30.0
_TAG_BYTES: Final = 16
_NO_RAM: Final = -1


class Sealing:
    """`svsm.service.Session` of an SVSM that only seals."""

    def __init__(self) -> None:
        self.state = SessionStatus.PRECOPY
        self.staging = StagingPool()
        self.local_fault = ""
        self.lock = Lock()


def sealing_slot(memory: SlotMemory, sealing: Sealing, ram: memoryview) -> SlotService:
    """EPOCH does nothing, FINISH tells CPU nanoseconds, EXPORT seals: argument first byte, second argument bytes."""
    cipher = AESGCM(os.urandom(32))
    counter = 0

    def export(call: Call) -> Answer:
        nonlocal counter
        counter += 1
        plaintext = ram[call.argument : call.argument + call.registers.argument2]
        sealed = len(plaintext) + _TAG_BYTES
        cipher.encrypt_into(counter.to_bytes(12, "little"), plaintext, None, call.room()[:sealed])
        return Answer(sealed)

    commands = {
        Command.EPOCH: lambda _call: Answer(),
        Command.FINISH: lambda _call: Answer(result=time.process_time_ns()),
        Command.EXPORT: export,
    }
    return SlotService(memory, sealing, commands, shared=True)


def local_slot() -> Slot:
    """A slot whose SVSM is this process: its doorbell is a call."""
    geometry = SlotGeometry(0, BUFFERS, BUFFER_BYTES)
    memory = SlotMemory.format(mmap.mmap(-1, geometry.slot_bytes), geometry)
    service = sealing_slot(memory, Sealing(), memoryview(b""))

    async def ring() -> None:
        service.service()

    return Slot(memory, ring)


class Echo(SlotService):
    """Answers every command by its number alone: reads no register but that, checks nothing, does nothing."""

    def __init__(self, slot: SlotMemory, sealing: Sealing) -> None:
        super().__init__(slot, sealing, {}, shared=True)
        self._memory = slot

    def service(self) -> int:
        number = self._memory.command_sequence
        self._memory.write_status(number, SlotStatus.OK, None, SessionStatus.PRECOPY, NO_BUFFER, 0, 0, 0)
        return number


@contextmanager
def svsm(ram_fd: int, slots: int) -> Iterator[list[Slot]]:
    """The host's slots of an SVSM that is started for them, over the RAM in the file `ram_fd`."""
    with _mailbox(ram_fd, slots) as ends:
        yield [Slot(memory, doorbells.ring) for memory, doorbells in ends]


@contextmanager
def echo() -> Iterator[tuple[SlotMemory, Doorbells]]:
    """The host's end of one slot whose SVSM does nothing but answer."""
    with _mailbox(_NO_RAM, 1) as (end,):
        yield end


@contextmanager
def _mailbox(ram_fd: int, slots: int) -> Iterator[list[tuple[SlotMemory, Doorbells]]]:
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "bench.mailbox_svsm", str(theirs.fileno()), str(ram_fd), str(slots)]
    kept = (theirs.fileno(), *([] if ram_fd == _NO_RAM else [ram_fd]))
    with ours, subprocess.Popen(command, pass_fds=kept) as process:
        try:
            theirs.close()
            ours.settimeout(_TIMEOUT_S)
            _, descriptors, _, _ = socket.recv_fds(ours, 1, 1 + 2 * slots)
            mailbox, *bells = descriptors
            shared = memoryview(mmap.mmap(mailbox, os.fstat(mailbox).st_size))
            slot_bytes = SlotGeometry(0, BUFFERS, BUFFER_BYTES).slot_bytes
            made = []
            for index in range(slots):
                memory = SlotMemory(shared[index * slot_bytes : (index + 1) * slot_bytes])
                made.append((memory, Doorbells(memory, bells[2 * index], bells[2 * index + 1], _TIMEOUT_S)))
            yield made
            for descriptor in descriptors:
                os.close(descriptor)
        finally:
            process.kill()


def _serve(link: socket.socket, ram_fd: int, slots: int) -> None:
    sealing = Sealing()
    serve: Callable[[SlotMemory], SlotService]
    if ram_fd == _NO_RAM:
        serve = partial(Echo, sealing=sealing)
    else:
        ram = memoryview(mmap.mmap(ram_fd, os.fstat(ram_fd).st_size))
        serve = partial(sealing_slot, sealing=sealing, ram=ram)
    with Mailbox(slots, BUFFERS, BUFFER_BYTES, link.close) as mailbox:
        descriptors = [mailbox.memory_fd]
        for index in range(slots):
            descriptors += mailbox.open(index, serve)
        socket.send_fds(link, [b"!"], descriptors)
        link.recv(1)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3]))
