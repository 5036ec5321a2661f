"""Sealed migration against plain TCP: the same bytes over the same number of connections, in the same run.

Both variants move RAM-size bytes between two trio processes over loopback, in turn: plain TCP with 1 MiB buffers and
nothing else, and pagexfer with an idle guest whose RAM cannot be compressed. Prints medians, the ratio of each pair of
neighbouring runs, and the CPU seconds per GiB of each side.

    python -m bench.transfer [--ram 1GiB] [--channels 1,4,16] [--repeats 5] [--json FILE] [--quick]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import trio

import pagexfer
from pagexfer.cli.values import Size
from pagexfer.guests.simulated import SimulatedGuest

from .measure import Spread, environment, write_json

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

BUFFER_BYTES: Final = 1 << 20
_PSK: Final = bytes(range(32))
_GIB: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class Side:
    """What one process spent."""

    seconds: float
    cpu_seconds: float
    peak_extra_mib: float


@dataclass(frozen=True, slots=True)
class Run:
    """One transfer: what the sender and the receiver spent."""

    sender: Side
    receiver: Side


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ram", type=_size, default=_GIB)
    parser.add_argument("--channels", type=_numbers, default=[1, 2, 4, 8, 16])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="256 MiB, 1 and 4 channels, 3 repeats")
    options = parser.parse_args()
    if options.quick:
        options.ram, options.channels, options.repeats = _GIB // 4, [1, 4], 3
    print(f"{options.ram >> 20} MiB, {options.repeats} repeats; CPU seconds per GiB")
    print(
        "channels   plain GB/s  pagexfer GB/s   ratio (min - max)    CPU plain s+r   CPU pagexfer s+r   extra MiB s/r"
    )
    results = [compare(options.ram, channels, options.repeats) for channels in options.channels]
    if options.json:
        write_json(
            options.json,
            {"environment": environment(), "ram_bytes": options.ram, "results": results},
        )


def compare(ram_bytes: int, channels: int, repeats: int) -> dict[str, object]:
    """Alternate both variants and print one line; returns the figures."""
    plain: list[Run] = []
    sealed: list[Run] = []
    for _ in range(repeats):
        plain.append(measure(_plain_receiver, _plain_sender, ram_bytes, channels))
        sealed.append(measure(_sealed_receiver, _sealed_sender, ram_bytes, channels))
    gib = ram_bytes / _GIB
    rates = {
        name: Spread.of([ram_bytes / 1e9 / run.sender.seconds for run in runs])
        for name, runs in (("plain", plain), ("pagexfer", sealed))
    }
    ratio = Spread.of([p.sender.seconds / s.sender.seconds for p, s in zip(plain, sealed, strict=True)])
    cpu = {
        f"{name} {side}": Spread.of([getattr(run, side).cpu_seconds / gib for run in runs])
        for name, runs in (("plain", plain), ("pagexfer", sealed))
        for side in ("sender", "receiver")
    }
    extra = {
        side: Spread.of([getattr(run, side).peak_extra_mib for run in sealed])
        for side in ("sender", "receiver")
    }
    print(
        f"{channels:8} {rates['plain'].median:12.2f} {rates['pagexfer'].median:14.2f} "
        f"{ratio.median:7.2f} ({ratio.minimum:.2f} - {ratio.maximum:.2f})"
        f"{cpu['plain sender'].median:11.2f} + {cpu['plain receiver'].median:.2f}"
        f"{cpu['pagexfer sender'].median:13.2f} + {cpu['pagexfer receiver'].median:.2f}"
        f"{extra['sender'].median:14.0f} / {extra['receiver'].median:.0f}",
        flush=True,
    )
    return {
        "channels": channels,
        "gb_per_s": rates,
        "ratio": ratio,
        "cpu_s_per_gib": cpu,
        "extra_mib": extra,
    }


def measure(
    receive: Callable[[Connection, int, int], None],
    send: Callable[[Connection, int, int, int], None],
    ram_bytes: int,
    channels: int,
) -> Run:
    """One transfer between two fresh processes."""
    context = multiprocessing.get_context("spawn")
    (receiver_end, receiver_child), (sender_end, sender_child) = context.Pipe(), context.Pipe()
    receiver = context.Process(target=receive, args=(receiver_child, ram_bytes, channels))
    receiver.start()
    receiver_child.close()  # so that a receiver that dies ends the wait below
    port = receiver_end.recv()
    sender = context.Process(target=send, args=(sender_child, port, ram_bytes, channels))
    sender.start()
    sender_child.close()
    run = Run(sender_end.recv(), receiver_end.recv())
    sender.join()
    receiver.join()
    return run


# Plain TCP


def _plain_receiver(pipe: Connection, ram_bytes: int, channels: int) -> None:
    async def main() -> None:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        pipe.send(listeners[0].socket.getsockname()[1])
        streams = [await listeners[0].accept() for _ in range(channels)]
        watch = _Watch()
        async with trio.open_nursery() as nursery:
            for stream in streams:
                nursery.start_soon(drain, stream)
        pipe.send(watch.side(0))

    async def drain(stream: trio.SocketStream) -> None:
        buffer = memoryview(bytearray(BUFFER_BYTES))
        while await stream.socket.recv_into(buffer):
            pass
        await stream.send_all(b"!")

    trio.run(main)


def _plain_sender(pipe: Connection, port: int, ram_bytes: int, channels: int) -> None:
    async def main() -> None:
        streams = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(channels)]
        watch = _Watch()
        async with trio.open_nursery() as nursery:
            for stream in streams:
                nursery.start_soon(pour, stream, ram_bytes // channels)
        pipe.send(watch.side(0))

    async def pour(stream: trio.SocketStream, size: int) -> None:
        buffer = os.urandom(BUFFER_BYTES)  # not zeros, which the kernel would all keep in one page
        for _ in range(size // BUFFER_BYTES):
            await stream.send_all(buffer)
        await stream.send_eof()
        await stream.receive_some(1)

    trio.run(main)


# pagexfer


def _sealed_receiver(pipe: Connection, ram_bytes: int, channels: int) -> None:
    async def main(guest: SimulatedGuest) -> None:
        watch: list[_Watch] = []

        def watch_from_setup(info: pagexfer.MigrationInfo) -> None:
            if info.status is not pagexfer.Status.SETUP and not watch:
                watch.append(_Watch())

        await pagexfer.receive_guest(
            guest,
            "127.0.0.1",
            0,
            pagexfer.PskAttestor(_PSK),
            on_listening=pipe.send,
            on_progress=watch_from_setup,
        )
        pipe.send(watch[0].side(ram_bytes))

    with SimulatedGuest.empty(ram_bytes, 1) as guest:
        trio.run(main, guest)


def _sealed_sender(pipe: Connection, port: int, ram_bytes: int, channels: int) -> None:
    async def main(guest: SimulatedGuest) -> None:
        await guest.hypervisor.resume()
        guest.gate.release()
        watch = _Watch()
        report = await pagexfer.send_guest(
            guest, "127.0.0.1", port, pagexfer.PskAttestor(_PSK), channels=channels
        )
        spent = watch.side(ram_bytes)
        moving_s = (report.info.total_time - report.info.setup_time) / 1000
        pipe.send(Side(moving_s, spent.cpu_seconds, spent.peak_extra_mib))

    with SimulatedGuest.boot(ram_bytes, 1, write_rate_bytes=0, free=0) as guest:
        trio.run(main, guest)


class _Watch:
    """What this process spends from here on."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._cpu = time.process_time()

    def side(self, guest_bytes: int) -> Side:
        """Seconds, CPU seconds, and the largest resident memory beyond guest RAM that this process ever had."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - guest_bytes / 2**20
        return Side(time.monotonic() - self._began, time.process_time() - self._cpu, peak)


def _size(text: str) -> int:
    return Size().convert(text, None, None)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
