"""One side of one run of `hosts`, in a process of its own that ends with the run or with the process that wanted it.

The process says first at which port it listens, where it does, and at last what it found: `Failed` where something went
wrong that can go wrong. Nothing is left of a run in the process that waits for it, neither memory nor threads.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from contextlib import contextmanager
from multiprocessing import forkserver
from typing import TYPE_CHECKING, Final

import trio

import pagexfer
from pagexfer.guests.simulated import SimulatedGuest

from . import sealed, tcp
from .hosts_line import Done, Failed, printable
from .pair import Side, Watch, children

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection
    from pathlib import Path

    from .hosts_line import Run
    from .sealed import Move, Moved

_VCPUS: Final = 1
_END_S: Final = 10.0


@contextmanager
def side_process(side: Callable[..., object], *arguments: object) -> Iterator[Connection]:
    """A process that runs one of the functions below; what it says comes out of the pipe. It ends with the block."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__])
    # From its first moment on, what is started here ignores a terminal's Ctrl-C: it is for the process that waits.
    usual = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, usual)
    ours, theirs = context.Pipe()
    process = context.Process(target=_run_side, args=(theirs, side, *arguments))
    process.start()
    theirs.close()  # so that a process that dies ends the wait for it
    try:
        yield ours
        process.join(_END_S)
    finally:
        process.kill()
        process.join()
        ours.close()


def receive_plain(tell: Callable[[int], None], run: Run, host: str, port: int, source: str) -> Done:
    """The destination of plain TCP: everything that the host `source` sends over its connections, discarded."""

    async def main() -> Side:
        (listener,) = await trio.open_tcp_listeners(port, host=host)
        tell(listener.socket.getsockname()[1])
        streams: list[trio.SocketStream] = []
        while len(streams) < run.channels:
            stream = await listener.accept()
            if _peer(stream) == source:
                streams.append(stream)
            else:
                await stream.aclose()
        buffers = [memoryview(bytearray(tcp.BUFFER_BYTES)) for _ in streams]
        watch = Watch()
        async with trio.open_nursery() as nursery:
            for stream, buffer in zip(streams, buffers, strict=True):
                nursery.start_soon(drain, stream, buffer)
        return watch.side(0)

    async def drain(stream: trio.SocketStream, buffer: memoryview) -> None:
        received = 0
        while count := await stream.socket.recv_into(buffer):
            received += count
        if received != run.ram_bytes // run.channels:
            raise ConnectionError("not all bytes of plain TCP came")
        await stream.send_all(b"!")

    return Done(trio.run(main).cpu_seconds)


def send_plain(tell: Callable[[int], None], run: Run, host: str, port: int) -> Side:
    """The source of it."""
    return tcp.send(tcp.Plain(run.ram_bytes, run.channels), host, port)


def receive_move(tell: Callable[[int], None], run: Run, host: str, port: int, psk_file: Path) -> Done:
    """The destination of a move. All of its RAM is there before it listens, as with the other benches."""
    watch: list[Watch] = []

    def see(info: pagexfer.MigrationInfo) -> None:
        if watch:
            watch[0].look()
        elif info.status is not pagexfer.Status.SETUP:
            watch.append(Watch(spared))

    async def main(guest: SimulatedGuest) -> Done:
        attestor = pagexfer.PskAttestor.from_file(psk_file)
        failure = ""
        try:
            await pagexfer.receive_guest(
                guest, host, port, attestor, isolated=run.isolated, on_listening=tell, on_progress=see
            )
        except pagexfer.TransferAborted as aborted:
            failure = printable(str(aborted))
        return Done(watch[0].side(0).cpu_seconds if watch else 0.0, failure)

    with SimulatedGuest.empty(run.ram_bytes, _VCPUS) as guest:
        guest.memory.prefault(0, run.ram_bytes)
        spared = children()
        return trio.run(main, guest)


def send_move(tell: Callable[[int], None], move: Move, host: str, port: int, psk_file: Path) -> Moved:
    """The source of a move. Raises TransferAborted for any other end than the two in `Moved`."""
    return sealed.send(move, host, port, attestor=pagexfer.PskAttestor.from_file(psk_file))


def _run_side(pipe: Connection, side: Callable[..., object], *arguments: object) -> None:
    threading.Thread(target=_end_with_parent, args=(pipe,), daemon=True).start()
    try:
        result = side(pipe.send, *arguments)
    except* (pagexfer.PagexferError, OSError, trio.BrokenResourceError) as errors:
        result = Failed(printable(_first(errors)))
    pipe.send(result)


def _end_with_parent(pipe: Connection) -> None:
    """The parent says nothing through the pipe: what comes is its end, however it went. vCPUs end with this process."""
    pipe.poll(None)
    os._exit(1)


def _first(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error.__cause__ or error)


def _peer(stream: trio.SocketStream) -> str:
    try:
        return str(stream.socket.getpeername()[0])
    except OSError:  # gone already
        return ""
