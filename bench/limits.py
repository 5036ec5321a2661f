"""What this machine can do, in one run: python -m bench limits [--json FILE] [--quick]

The parts that a sealed migration is made of, each alone and in turn: AES-256-GCM into a buffer of its own (1 MiB records;
sealing with one core and with all, opening with one), one copy, gathering scattered pages, the test for zero pages and a
plain read, which is a sum; then a ring and its answer over two eventfds, and plain TCP, each between two processes. Seconds
per GiB are wall time of the part; for TCP they are CPU seconds of both ends.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from .doorbell import ping_pong
from .measure import Case, Spread, alternate
from .options import finish, numbers, parse, parser, progress, ram
from .table import Table
from .tcp import BUFFER_BYTES, Plain, run_plain

if TYPE_CHECKING:
    from collections.abc import Callable

GIB: Final = 1 << 30
TAG_BYTES: Final = 16
NONCE: Final = bytes(12)  # one key and no secret: only time is taken here
WORDS_PER_PAGE: Final = 512
BUNDLE_PAGES: Final = BUFFER_BYTES // 4096
RINGS: Final = 20_000


def parts(ram_bytes: int, seed: int) -> dict[str, Case]:
    """Each part, over `ram_bytes` of memory."""
    rng = np.random.default_rng(seed)
    pages = ram_bytes // 4096
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
    """Open one sealed record again and again into other memory, as the destination's staging and buffers do."""
    cipher = AESGCM(bytes(32))
    record = memoryview(words.reshape(-1).view(np.uint8).data)[:BUFFER_BYTES]
    times = max(words.nbytes // BUFFER_BYTES, 1)
    sealed = cipher.encrypt(NONCE, bytes(record), None)
    out = memoryview(bytearray(len(record)))

    def open_() -> None:
        for _ in range(times):
            cipher.decrypt_into(NONCE, sealed, None, out)

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
        for number in streams:
            progress(f"limits: TCP, round {round_ + 1} of {repeats}, {number} streams")
            sender, receiver = run_plain(Plain(ram_bytes, number))
            rates[number].append(ram_bytes / 1e9 / sender.seconds)
            cpu[number].append((sender.cpu_seconds + receiver.cpu_seconds) * GIB / ram_bytes)
    return {number: (Spread.of(rates[number]), Spread.of(cpu[number])) for number in streams}


def main(argv: list[str] | None = None) -> None:
    made = parser("limits", __doc__, repeats=7)
    made.add_argument("--ram", type=ram, help="bytes of each part (default: 1GiB, quick 256MiB)")
    made.add_argument("--streams", type=numbers, metavar="N,N", help="TCP connections (default: 1 to 64)")
    options = parse(made, argv)
    ram_bytes = options.ram or (GIB // 4 if options.quick else GIB)
    streams = options.streams or ([1, 4] if options.quick else [1, 2, 4, 8, 16, 32, 64])
    alone = alternate(parts(ram_bytes, options.seed), options.repeats)
    rung = ping_pong(RINGS // 10 if options.quick else RINGS)
    sent = tcp(ram_bytes, streams, options.repeats)
    rows = [
        (
            name,
            f"{ram_bytes / 1e9 / spread.median:.2f}",
            f"{ram_bytes / 1e9 / spread.maximum:.2f}",
            f"{ram_bytes / 1e9 / spread.minimum:.2f}",
            f"{spread.median * GIB / ram_bytes:.3f}",
        )
        for name, spread in alone.items()
    ] + [
        (f"TCP, {n} streams", f"{r.median:.2f}", f"{r.minimum:.2f}", f"{r.maximum:.2f}", f"{c.median:.3f}")
        for n, (r, c) in sent.items()
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
            Table.of("What this machine can do", ("", "GB/s", "min", "max", "s/GiB"), rows),
            Table.of(
                "Doorbell and answer between two processes",
                ("", "p50 us", "p99 us"),
                [("two eventfds", f"{rung.p50_us:.1f}", f"{rung.p99_us:.1f}")],
            ),
        ],
    )


if __name__ == "__main__":
    main()
