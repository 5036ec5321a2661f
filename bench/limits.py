"""What this machine can do, in one run: python -m bench limits [--json FILE] [--quick]

The parts that a sealed migration is made of, each alone and in turn: AES-256-GCM into a buffer of its own (all of the RAM
in 1 MiB records; sealing with one core and with all, opening with one), one copy, gathering scattered pages, the test for
zero pages and a plain read, which is a sum; then a ring and its answer over two eventfds, and plain TCP, each between two
processes. "s/GiB" is time by the clock; for TCP, which works at two ends at once, "CPU s/GiB" has what both of them spent.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from pagexfer.svsm.export import BUNDLE_PAGES
from pagexfer.wire.constants import PAGE_SIZE, TAG_BYTES, WORDS_PER_PAGE

from .doorbell import ping_pong
from .measure import Case, Spread, alternate, rotated
from .options import finish, numbers, parse, parser, progress, ram
from .table import Table
from .tcp import BUFFER_BYTES, Plain, run_plain
from .units import GIB

if TYPE_CHECKING:
    from collections.abc import Callable

NONCE: Final = bytes(12)  # one key and no secret: only time is taken here
RINGS: Final = 20_000
STREAMS: Final = (1, 2, 4, 8, 16, 32, 64)
QUICK_STREAMS: Final = (1, 4)


def parts(ram_bytes: int, seed: int) -> dict[str, Case]:
    """Each part, over `ram_bytes` of memory."""
    rng = np.random.default_rng(seed)
    pages = ram_bytes // PAGE_SIZE
    words = rng.integers(1, 2**63, (pages, WORDS_PER_PAGE), dtype=np.uint64)
    target = np.ones_like(words)
    zeros = np.zeros_like(words)
    zeros[:] = 0  # written, so that it is memory and not the kernel's one zero page
    scattered = rng.permutation(pages)
    cores = len(os.sched_getaffinity(0))
    return {
        "seal, one core": Case(_seal(words)),
        "open, one core": Case(_open(words)),
        f"seal, {cores} cores": Case(_on_all([_seal(part) for part in np.array_split(words, cores)])),
        "copy": Case(lambda: np.copyto(target, words)),
        "gather": Case(lambda: _gather(words, scattered, target)),
        "zero test": Case(lambda: np.bitwise_or.reduce(zeros, axis=1)),
        "read": Case(lambda: np.add.reduce(words.reshape(-1))),
    }


def _seal(words: np.ndarray[tuple[int, int], np.dtype[np.uint64]]) -> Callable[[], None]:
    cipher = AESGCM(bytes(32))
    plaintext = memoryview(words.reshape(-1).view(np.uint8).data)
    out = memoryview(bytearray(BUFFER_BYTES + TAG_BYTES))

    def seal() -> None:
        for start in range(0, len(plaintext), BUFFER_BYTES):
            record = plaintext[start : start + BUFFER_BYTES]
            cipher.encrypt_into(NONCE, record, None, out[: len(record) + TAG_BYTES])

    return seal


def _open(words: np.ndarray[tuple[int, int], np.dtype[np.uint64]]) -> Callable[[], None]:
    """Open as many records as `_seal` seals, none of them in a cache, as none is that came from a network."""
    cipher = AESGCM(bytes(32))
    plaintext = words.reshape(-1).view(np.uint8).data
    records = [
        cipher.encrypt(NONCE, plaintext[start : start + BUFFER_BYTES], None)
        for start in range(0, len(plaintext), BUFFER_BYTES)
    ]
    out = memoryview(bytearray(BUFFER_BYTES))

    def open_() -> None:
        for record in records:
            cipher.decrypt_into(NONCE, record, None, out[: len(record) - TAG_BYTES])

    return open_


def _on_all(work: list[Callable[[], None]]) -> Callable[[], None]:
    def run() -> None:
        with ThreadPoolExecutor(len(work)) as pool:
            for done in [pool.submit(part) for part in work]:
                done.result()

    return run


def _gather(
    words: np.ndarray[tuple[int, int], np.dtype[np.uint64]],
    gfns: np.ndarray[tuple[int], np.dtype[np.int64]],
    target: np.ndarray[tuple[int, int], np.dtype[np.uint64]],
) -> None:
    for start in range(0, len(gfns), BUNDLE_PAGES):
        chosen = gfns[start : start + BUNDLE_PAGES]
        np.take(words, chosen, axis=0, out=target[: len(chosen)], mode="clip")


def tcp(ram_bytes: int, streams: list[int], repeats: int) -> dict[int, tuple[Spread, Spread]]:
    """GB/s and CPU seconds per GiB of both ends, for each number of streams."""
    rates: dict[int, list[float]] = {number: [] for number in streams}
    cpu: dict[int, list[float]] = {number: [] for number in streams}
    for round_ in range(repeats):
        for number in rotated(streams, round_):
            progress(f"limits: TCP, round {round_ + 1} of {repeats}, {number} streams")
            sender, receiver = run_plain(Plain(ram_bytes, number))
            rates[number].append(ram_bytes / 1e9 / sender.seconds)
            cpu[number].append((sender.cpu_seconds + receiver.cpu_seconds) * GIB / ram_bytes)
    return {number: (Spread.of(rates[number]), Spread.of(cpu[number])) for number in streams}


def main(argv: list[str] | None = None) -> None:
    made = parser("limits", __doc__, repeats=7)
    made.add_argument("--ram", type=ram, help="bytes of each part (default: 1GiB, quick 256MiB)")
    made.add_argument(
        "--streams", type=numbers, metavar="N,N", help="TCP connections (default: 1 to 64, quick 1,4)"
    )
    options = parse(made, argv)
    ram_bytes = options.ram or (GIB // 4 if options.quick else GIB)
    streams = options.streams or list(QUICK_STREAMS if options.quick else STREAMS)
    alone = alternate(parts(ram_bytes, options.seed), options.repeats)
    rung = ping_pong(RINGS // 10 if options.quick else RINGS)
    sent = tcp(ram_bytes, streams, options.repeats)
    rows = [(name, *_rates(spread.rate(ram_bytes / 1e9)), "") for name, spread in alone.items()]
    rows += [
        (f"TCP, {number} {'stream' if number == 1 else 'streams'}", *_rates(rate), f"{cpu.median:.3f}")
        for number, (rate, cpu) in sent.items()
    ]
    finish(
        options,
        {
            "ram_bytes": ram_bytes,
            "seconds": {name: asdict(spread) for name, spread in alone.items()},
            "doorbell": asdict(rung),
            "tcp": {n: {"gb_per_s": asdict(r), "cpu_s_per_gib": asdict(c)} for n, (r, c) in sent.items()},
        },
        [
            Table.of("What this machine can do", ("", "GB/s", "min", "max", "s/GiB", "CPU s/GiB"), rows),
            Table.of(
                "Doorbell and answer between two processes",
                ("", "p50 us", "p99 us"),
                [("two eventfds", f"{rung.p50_us:.1f}", f"{rung.p99_us:.1f}")],
            ),
        ],
    )


def _rates(gb_per_s: Spread) -> tuple[str, ...]:
    """GB/s with its range, and seconds per GiB."""
    return (
        *gb_per_s.cells(2),
        f"{GIB / 1e9 / gb_per_s.median:.3f}",
    )


if __name__ == "__main__":
    main()
