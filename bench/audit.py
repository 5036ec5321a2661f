"""What trust costs in black-out: the digest audit against memory bandwidth, and tokens and manifest against the move.

    python -m bench audit [--ram 1GiB] [--repeats 7] [--json FILE] [--quick]

First, hashing RAM against what was sent, in turn with a plain copy (np.copyto) of the same RAM, both with one thread and
with one for each core. "of a copy" is bytes per second against the copy with one thread, for each thread, "of copies"
against the copy with as many threads. Then the digests that export takes, per bundle of as many pages as is usual, against
its staging copy. Then a whole move in memory, without a network: what tokens and manifest of both sides take of it. Every
round moves without a digest audit and with one, and seals, opens and copies all of RAM alone; "x alone" is the median of
the ratios to that in the same round. Last, the manifest of a larger guest, as tables alone, against a read of those tables.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Final

import numpy as np

from pagexfer.attestation import PskAttestor
from pagexfer.dirty import DirtyBitmap
from pagexfer.svsm.audit import PageDigests
from pagexfer.svsm.content import ContentTable
from pagexfer.svsm.destination import DestinationSvsm
from pagexfer.svsm.export import BUNDLE_PAGES
from pagexfer.svsm.memory import GuestMemory
from pagexfer.svsm.source import SourceSvsm
from pagexfer.testing import BytesGate
from pagexfer.wire.bundle import DATA, MAX_BUNDLE_BYTES, BundleKind
from pagexfer.wire.constants import PAGE_SIZE, WORDS_PER_PAGE

from .limits import parts
from .measure import Case, Spread, alternate, rotated
from .options import CannotRun, finish, parse, parser, positive, progress, ram
from .scale import available_memory
from .table import Table
from .units import GIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

PENDING: Final = 0.05
LAST_PAGES: Final = 2000
TABLE_GIB: Final = 1024
QUICK_TABLE_GIB: Final = 64
PAGES_PER_GIB: Final = GIB // PAGE_SIZE
# A table has eight bytes for the carrier of a page and four for its state, and is read beside one of the same size.
TABLE_BYTES_PER_PAGE: Final = 2 * (8 + 4)
# Whether a move ends with a digest audit.
MODES: Final = {"host-reported": False, "digest-audit": True}
ALONE: Final = "alone"
STAGING: Final = "staging copy"
READ: Final = "a read of both tables"


@dataclass(frozen=True, slots=True)
class Rate:
    """One row: what was done to RAM, with how many threads, and its ratios to plain copies of the same run."""

    operation: str
    threads: int
    gb_per_s: Spread
    of_a_copy_per_thread: float
    of_copies: float


@dataclass(frozen=True, slots=True)
class Share:
    """One step of a move: seconds of both sides, its part of all, and against all RAM sealed, opened and copied once."""

    step: str
    seconds: Spread
    part: float
    times_alone: Spread


def audit_rates(memory: GuestMemory, repeats: int, seed: int) -> Iterator[Rate]:
    """Hash all of RAM with one thread and with all, with nothing and with some pages pending."""
    nothing, some = DirtyBitmap(memory.pages), DirtyBitmap(memory.pages)
    some.set_gfns(np.random.default_rng(seed).integers(0, memory.pages, round(memory.pages * PENDING)))
    cores = len(os.sched_getaffinity(0))
    target = np.ones_like(memory.words)
    cases: dict[tuple[str, int], Case] = {}
    for threads in sorted({1, cores}):
        digests = PageDigests(memory, threads)
        for first in range(0, memory.pages, BUNDLE_PAGES):
            digests.record(*_bundle(memory, first))
        assert not digests.changed(0, memory.pages, nothing).size
        cases["copy", threads] = Case(lambda threads=threads: _copy(target, memory.words, threads))  # type: ignore[misc]
        for name, pending in (("audit", nothing), (f"audit, {PENDING:.0%} pending", some)):
            cases[name, threads] = Case(
                lambda digests=digests, pending=pending: digests.changed(0, memory.pages, pending)  # type: ignore[misc]
            )
    spreads = alternate({f"{name}/{threads}": case for (name, threads), case in cases.items()}, repeats)
    for name, threads in cases:
        spread = spreads[f"{name}/{threads}"]
        yield Rate(
            name,
            threads,
            spread.rate(memory.ram_bytes / 1e9),
            spreads["copy/1"].median / spread.median / threads,
            spreads[f"copy/{threads}"].median / spread.median,
        )


def export_digests(memory: GuestMemory, repeats: int) -> dict[str, Spread]:
    """Seconds per bundle of DATA pages: the digests, and the copy that they are made of."""
    digests = PageDigests(memory, 1)
    bundle = _bundle(memory, 0)
    staging = np.ones((len(bundle[0]), WORDS_PER_PAGE), dtype=np.uint64)
    starts = iter(range(0, 1 << 62, BUNDLE_PAGES))

    def stage() -> None:
        start = next(starts) % (memory.pages - len(staging) + 1)
        np.copyto(staging, memory.words[start : start + len(staging)])

    cases = {
        "digests": Case(lambda: digests.record(*bundle), calls=100),
        STAGING: Case(stage, calls=100),
    }
    return alternate(cases, repeats)


def move_shares(memory: GuestMemory, repeats: int, seed: int) -> tuple[dict[str, list[Share]], Spread]:
    """A whole move from SVSM to SVSM in this thread in each mode, and what it cannot do without, in turn.

    A move has `LAST_PAGES` scattered pages in its last epoch. The second result is what all of RAM sealed, opened and
    copied once takes.
    """
    needed = _needed(memory.ram_bytes, seed)
    for case in needed:
        case.seconds()  # warms up
    rounds: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
    alone: list[float] = []
    for number in range(repeats):
        for mode in rotated([ALONE, *MODES], number):
            progress(f"audit: round {number + 1} of {repeats}, {mode}")
            if mode == ALONE:
                alone.append(sum(case.seconds() for case in needed))
            else:
                rounds[mode].append(_Move(memory, seed, audit=MODES[mode]).run())
    return {mode: _shares(taken, alone) for mode, taken in rounds.items()}, Spread.of(alone)


def _needed(ram_bytes: int, seed: int) -> list[Case]:
    """What a move in memory cannot do without: all of RAM sealed, opened and copied once."""
    cases = parts(ram_bytes, seed)
    return [cases[name] for name in ("seal, one core", "open, one core", "copy")]


def _shares(rounds: list[dict[str, float]], alone: list[float]) -> list[Share]:
    seconds = {step: Spread.of([taken[step] for taken in rounds]) for step in rounds[0]}
    total = sum(spread.median for spread in seconds.values())
    return [
        Share(
            step,
            spread,
            spread.median / total,
            Spread.of([taken[step] / other for taken, other in zip(rounds, alone, strict=True)]),
        )
        for step, spread in seconds.items()
    ]


class _Move:
    """One move; every step's seconds are both sides' together."""

    def __init__(self, memory: GuestMemory, seed: int, *, audit: bool) -> None:
        self._memory = memory
        self._seed = seed
        self._target = GuestMemory.allocate(memory.ram_bytes)
        self._target.prefault(0, memory.ram_bytes)
        gate = BytesGate([b"state"], running=True)
        attestor = PskAttestor(bytes(range(32)))
        self._source = SourceSvsm(memory, gate, None, attestor, bytes(16), audit=audit)
        self._destination = DestinationSvsm(self._target, BytesGate.waiting(1), attestor)
        self._buffer = memoryview(bytearray(MAX_BUNDLE_BYTES))
        self._seconds: dict[str, float] = {}

    def run(self) -> dict[str, float]:
        reply = self._destination.answer(1, self._source.prepare(1))
        self._source.confirm(self._destination.establish(1, self._source.establish(reply)))
        package = self._buffer[: self._source.open_channel(0, self._buffer)]
        self._destination.open_channel_untrusted(0, package)
        self._carry(self._source.ledger)
        self._source.begin_epoch()
        self._timed("pages", self._pages)
        self._timed("epoch tokens", lambda: self._carry(self._source.epoch_token))
        self._source.park()
        if self._source.freshness.label == "digest-audit":
            self._timed("audit", self._audit)
        last = np.zeros(-(-self._memory.pages // 64), dtype=np.uint64)
        gfns = np.random.default_rng(self._seed).integers(0, self._memory.pages, LAST_PAGES)
        np.bitwise_or.at(last, gfns // 64, np.uint64(1) << (gfns % 64).astype(np.uint64))
        self._source.hint(0, last.tobytes())
        self._source.begin_epoch()
        self._timed("pages", self._pages)
        self._timed("epoch tokens", lambda: self._carry(self._source.epoch_token))
        self._carry(lambda out: self._source.export_vcpu(0, out))
        self._timed("manifest", lambda: self._carry(self._source.manifest))
        ready = self._buffer[: self._destination.seal_answer(BundleKind.READY, self._buffer)]
        self._source.accept_untrusted(ready)
        self._timed("start token", lambda: self._carry(self._source.start_token))
        # The next repeat moves the same guest once more, which no SVSM would.
        self._memory.disclaim()
        self._target.close()
        return self._seconds

    def _pages(self) -> None:
        while (length := self._source.export(0, 0, self._memory.pages, self._buffer).length) > 0:
            self._destination.import_untrusted(0, self._buffer[:length])

    def _audit(self) -> None:
        while self._source.audit().more:
            pass

    def _carry(self, seal: Callable[[memoryview], int]) -> None:
        self._destination.import_untrusted(0, self._buffer[: seal(self._buffer)])

    def _timed(self, step: str, work: Callable[[], None]) -> None:
        began = perf_counter()
        work()
        self._seconds[step] = self._seconds.get(step, 0.0) + perf_counter() - began


def manifest_seconds(gib: int, repeats: int, seed: int) -> dict[str, Spread]:
    """Seconds that the digests of one side take for a guest of `gib`, by what the last epoch brought."""
    pages = gib * PAGES_PER_GIB
    table = ContentTable(np.full(pages, 0xF2, dtype=np.uint32))
    for counter, first in enumerate(range(0, pages, BUNDLE_PAGES)):
        table.record(np.arange(first, min(first + BUNDLE_PAGES, pages)), 0, 0, counter)
    began = perf_counter()
    table.refresh()
    after_all = perf_counter() - began
    rng = np.random.default_rng(seed)
    scattered = np.unique(rng.integers(0, pages, 20000))
    starts = np.unique(rng.integers(0, pages // 64, 20000 // 64)) * 64
    in_runs = (starts[:, None] + np.arange(64)).reshape(-1)

    def after(gfns: NDArray[np.int64]) -> Case:
        return Case(lambda: _digests(table), lambda: table.record(gfns, 0, 0, 1))

    # What a digest looks at: a word for the carrier of each page, and one for its state.
    carriers, states = np.ones(pages, dtype=np.uint64), np.ones(pages, dtype=np.uint32)
    cases = {
        READ: Case(lambda: (np.add.reduce(carriers), np.add.reduce(states))),
        "nothing": Case(lambda: _digests(table)),
        "20000 pages in runs of 64": after(in_runs),
        "20000 scattered pages": after(scattered),
    }
    return {"all pages, once": Spread.of([after_all])} | alternate(cases, repeats)


def _digests(table: ContentTable) -> None:
    assert table.complete()
    table.content_digest()
    table.state_digest()


def _bundle(memory: GuestMemory, first: int) -> tuple[NDArray[np.int64], NDArray[np.uint8], memoryview]:
    gfns = np.arange(first, min(first + BUNDLE_PAGES, memory.pages))
    payload = memory.words[gfns].reshape(-1).view(np.uint8).data
    return gfns, np.full(len(gfns), DATA, dtype=np.uint8), payload


def _copy(target: NDArray[np.uint64], source: NDArray[np.uint64], threads: int) -> None:
    if threads == 1:
        np.copyto(target, source)
        return
    with ThreadPoolExecutor(threads) as pool:
        parts = zip(np.array_split(target, threads), np.array_split(source, threads), strict=True)
        list(pool.map(lambda part: np.copyto(*part), parts))


def _guest(ram_bytes: int, seed: int) -> GuestMemory:
    memory = GuestMemory.allocate(ram_bytes)
    memory.launch()
    rng = np.random.default_rng(seed)
    for first in range(0, memory.pages, 1 << 12):
        part = memory.words[first : first + (1 << 12)]
        part[:] = rng.integers(1, 2**63, part.shape, dtype=np.uint64)
    return memory


def main(argv: list[str] | None = None) -> None:
    made = parser("audit", __doc__, repeats=7)
    made.add_argument("--ram", type=ram, help="of the guest (default: 1GiB, quick 256MiB)")
    made.add_argument(
        "--table",
        type=positive,
        metavar="GIB",
        help=f"size of the larger guest (default: {TABLE_GIB}, quick {QUICK_TABLE_GIB})",
    )
    options = parse(made, argv)
    ram_bytes = options.ram or (GIB // 4 if options.quick else GIB)
    larger = options.table or (QUICK_TABLE_GIB if options.quick else TABLE_GIB)
    if larger * PAGES_PER_GIB * TABLE_BYTES_PER_PAGE > available_memory():
        raise CannotRun(f"there is no memory for the tables of a guest of {larger} GiB")
    memory = _guest(ram_bytes, options.seed)
    rates = list(audit_rates(memory, options.repeats, options.seed))
    per_bundle = export_digests(memory, options.repeats)
    shares, alone = move_shares(memory, options.repeats, options.seed)
    manifests = {gib: manifest_seconds(gib, options.repeats, options.seed) for gib in sorted({1, larger})}
    figures = {
        "ram_bytes": ram_bytes,
        "rates": [asdict(rate) for rate in rates],
        "per_bundle": {name: asdict(spread) for name, spread in per_bundle.items()},
        "alone_seconds": asdict(alone),
        "move": {mode: [asdict(share) for share in steps] for mode, steps in shares.items()},
        "manifest": {
            gib: {name: asdict(spread) for name, spread in cases.items()} for gib, cases in manifests.items()
        },
    }
    tables = [
        _rate_table(ram_bytes, rates),
        _table(
            "Digests that export takes, per bundle",
            "us",
            {name: spread.scaled(1e6) for name, spread in per_bundle.items()},
            STAGING,
        ),
        *(_share_table(mode, steps, alone) for mode, steps in shares.items()),
        *(
            _table(
                f"Digests of a manifest, {gib} GiB, one side, by what the last epoch brought",
                "ms",
                {name: spread.scaled(1e3) for name, spread in cases.items()},
                READ,
            )
            for gib, cases in manifests.items()
        ),
    ]
    finish(options, figures, tables)


def _rate_table(ram_bytes: int, rates: list[Rate]) -> Table:
    return Table.of(
        f"All of {ram_bytes >> 20} MiB hashed, against plain copies",
        ("", "threads", "GB/s", "min", "max", "of a copy, per thread", "of copies"),
        [
            (
                rate.operation,
                rate.threads,
                *rate.gb_per_s.cells(2),
                f"{rate.of_a_copy_per_thread:.2f}",
                f"{rate.of_copies:.2f}",
            )
            for rate in rates
        ],
    )


def _share_table(mode: str, steps: list[Share], alone: Spread) -> Table:
    return Table.of(
        f"A move in memory, {mode}",
        ("", "median ms", "min", "max", "share", "x alone"),
        [
            (
                share.step,
                *share.seconds.scaled(1e3).cells(2),
                f"{share.part:.2%}",
                f"{share.times_alone.median:.3f}",
            )
            for share in steps
        ],
        f"All of RAM sealed, opened and copied once takes {alone.median * 1e3:.1f} ms in this run.",
    )


def _table(title: str, unit: str, spreads: dict[str, Spread], limit: str) -> Table:
    return Table.of(
        title,
        ("", f"median {unit}", "min", "max", f"x {limit}"),
        [
            (name, *spread.cells(2), f"{spread.median / spreads[limit].median:.2f}")
            for name, spread in spreads.items()
        ],
    )


if __name__ == "__main__":
    main()
