"""Where the CPU seconds of a migration go, by kind of work: python -m bench profile [--json FILE] [--quick]

An idle guest moves between two processes over loopback, with the engine in the guest's process. Inside each side the few
calls that a bundle needs are timed: send and receive of the socket, seal and open, gather, the look at the pages (which are
zero?) with their entries, writing to RAM, and the wait for the kernel, which costs CPU when it sleeps and wakes. The look
and the write are calls of the SVSM's Python, timed as a whole: what it does there around the kernel's and numpy's work is
in their rows. What is left of the side's CPU seconds is "Python": trio where it carries channels, the engine, the rest of
the SVSM. Taking the time costs about a microsecond a call, which is measured and subtracted. Page faults are in the call
that meets them; "provide RAM" is what the destination did before the first page came, so that writing meets none.

"alone" is what the part costs by itself in the same round: AES-GCM with 1 MiB records, a copy, and plain TCP over as many
connections. "x alone" is the median of the ratios to that, for all of RAM. Every round does the parts alone and each move,
and begins with another of them.
"""

from __future__ import annotations

import socket
from dataclasses import asdict, dataclass
from time import thread_time
from types import ModuleType
from typing import TYPE_CHECKING, Final

import numpy as np
import trio
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from pagexfer.engine.threads import Interrupt
from pagexfer.svsm import export, sealing
from pagexfer.svsm.export import Packager
from pagexfer.svsm.memory import GuestMemory

from . import sealed
from .channels import CONTENTS, QUICK_CONTENTS
from .limits import parts
from .measure import Spread, rotated
from .options import channel_number, finish, parse, parser, progress, ram
from .pair import Side, run_pair
from .sealed import Move, Moved
from .stopwatch import Stopwatch, Timed
from .table import Table
from .tcp import Plain, run_plain
from .units import GIB

if TYPE_CHECKING:
    from collections.abc import Callable

    from .measure import Case

CHANNELS: Final = 4

SEND: Final = "TCP send"
RECEIVE: Final = "TCP receive"
SEAL: Final = "seal"
OPEN: Final = "open"
GATHER: Final = "gather"
LOOK: Final = "zero test, entries"
WRITE: Final = "write to RAM"
WAIT: Final = "wait"
PYTHON: Final = "Python"
PROVIDE: Final = "provide RAM"
ALL: Final = "all"
KINDS: Final = (SEND, RECEIVE, SEAL, OPEN, GATHER, LOOK, WRITE, WAIT, PYTHON)
# The parts by themselves, by their names in bench.limits; TCP is measured apart.
ALONE: Final = {
    "seal, one core": SEAL,
    "open, one core": OPEN,
    "gather": GATHER,
    "copy": WRITE,
    "read": LOOK,
}
# What a sealed move cannot do without.
LIMIT: Final = (SEND, RECEIVE, SEAL, OPEN, WRITE)
TARGET_US: Final = 60.0


@dataclass(frozen=True, slots=True)
class Profile:
    """One side of one migration. `before` is what was timed until the first page."""

    side: Side
    timed: dict[str, Timed]
    before: dict[str, Timed]
    overhead_seconds: float

    @property
    def cpu_seconds(self) -> float:
        """Without the timing."""
        return self.side.cpu_seconds - self.overhead_seconds

    def seconds(self, kind: str) -> float:
        if kind == PYTHON:
            return self.cpu_seconds - sum(timed.cpu_seconds for timed in self.timed.values())
        return self.timed[kind].cpu_seconds if kind in self.timed else 0.0


@dataclass(frozen=True, slots=True)
class Figure:
    """One content, source and destination: CPU seconds per GiB by kind, and microseconds of Python for each bundle.

    `times_alone` has the kinds that can be measured by themselves, and `ALL`: both sides against that in the same round.
    """

    s_per_gib: dict[str, tuple[Spread, Spread]]
    times_alone: dict[str, Spread]
    total_s_per_gib: tuple[Spread, Spread]
    python_us_per_bundle: tuple[Spread, Spread]
    wait_us_per_bundle: tuple[Spread, Spread]
    faults_per_gib: tuple[Spread, Spread]
    provide_s_per_gib: Spread
    overhead: Spread


_Run = tuple[Moved, Profile, Profile]


class _Waits(trio.abc.Instrument):
    """CPU time that the event loop spends in the kernel to wait; a channel's thread does so in `Interrupt.wait`."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self._stopwatch = stopwatch
        self._began = 0.0

    def before_io_wait(self, timeout: float) -> None:
        self._began = thread_time()

    def after_io_wait(self, timeout: float) -> None:
        self._stopwatch.add(WAIT, thread_time() - self._began)


class _Cipher:
    """AESGCM with a stopwatch."""

    def __init__(self, stopwatch: Stopwatch, key: bytes) -> None:
        cipher = AESGCM(key)
        self.encrypt_into = stopwatch.timed(SEAL, cipher.encrypt_into)
        self.decrypt_into = stopwatch.timed(OPEN, cipher.decrypt_into)


def _numpy(stopwatch: Stopwatch) -> ModuleType:
    """numpy as the module `export` uses it, with a stopwatch at what gathers."""
    timed = ModuleType("numpy")
    vars(timed).update(vars(np))
    vars(timed)["take"] = stopwatch.timed(GATHER, np.take)
    return timed


def instrument() -> Stopwatch:
    """Time this process's calls from here on. Only for a process that ends with the measurement."""
    stopwatch = Stopwatch()
    calls: list[tuple[type, str, str]] = [
        (socket.socket, "send", SEND),
        (socket.socket, "recv_into", RECEIVE),
        (Interrupt, "wait", WAIT),
        (Packager, "package", LOOK),
        (GuestMemory, "write", WRITE),
        (GuestMemory, "zero", WRITE),
        (GuestMemory, "prefault", PROVIDE),
    ]
    replaced: list[tuple[object, str, object]] = [
        (owner, name, stopwatch.timed(kind, getattr(owner, name))) for owner, name, kind in calls
    ]
    replaced.append((sealing, "AESGCM", lambda key: _Cipher(stopwatch, key)))
    replaced.append((export, "np", _numpy(stopwatch)))
    for owner, name, value in replaced:
        setattr(owner, name, value)
    return stopwatch


class _Course:
    """The stopwatch of one side, which begins anew with the first page."""

    def __init__(self) -> None:
        self._stopwatch = instrument()
        self._before: dict[str, Timed] = {}

    def first_page(self) -> None:
        self._before = self._stopwatch.lap()
        trio.lowlevel.add_instrument(_Waits(self._stopwatch))

    def profile(self, side: Side) -> Profile:
        overhead = self._stopwatch.overhead_seconds
        return Profile(side, self._stopwatch.lap(), self._before, overhead)


def receive(move: Move, host: str, on_listening: Callable[[int], None]) -> Profile:
    """The destination, in a process of its own."""
    course = _Course()
    side, _ = sealed.receive(move, host, on_listening, course.first_page)
    assert side is not None  # an idle guest converges
    return course.profile(side)


def send(move: Move, host: str, port: int) -> tuple[Moved, Profile]:
    """The source, in a process of its own."""
    course = _Course()
    moved = sealed.send(move, host, port, course.first_page)
    return moved, course.profile(moved.side)


def measure(moves: dict[str, Move], repeats: int) -> tuple[dict[str, Figure], dict[str, Spread]]:
    """In every round each migration and the parts alone; the figures, and CPU seconds per GiB of the parts."""
    usual = next(iter(moves.values()))
    cases = {ALONE[name]: case for name, case in parts(usual.ram_bytes, usual.seed).items() if name in ALONE}
    for case in cases.values():
        case.seconds()  # warms up
    runs: dict[str, list[_Run]] = {name: [] for name in moves}
    limits: list[dict[str, float]] = []
    for number in range(repeats):
        for name in rotated([None, *moves], number):
            progress(f"profile: round {number + 1} of {repeats}, {name or 'the parts alone'}")
            if name is None:
                limits.append(_alone(cases, usual))
            else:
                (moved, source), destination = run_pair(receive, send, moves[name])
                runs[name].append((moved, source, destination))
    return (
        {name: _figure(usual.ram_bytes, runs[name], limits) for name in moves},
        {kind: Spread.of([limit[kind] for limit in limits]) for kind in limits[0]},
    )


def _alone(cases: dict[str, Case], usual: Move) -> dict[str, float]:
    """CPU seconds per GiB of the parts by themselves, once."""
    gib = usual.ram_bytes / GIB
    found: dict[str, float] = {}
    for kind, case in cases.items():
        began = thread_time()
        case.run()
        found[kind] = (thread_time() - began) / gib
    sender, receiver = run_plain(Plain(usual.ram_bytes, usual.channels))
    found[SEND], found[RECEIVE] = sender.cpu_seconds / gib, receiver.cpu_seconds / gib
    return found | {ALL: sum(found[kind] for kind in LIMIT)}


def _figure(ram_bytes: int, runs: list[_Run], limits: list[dict[str, float]]) -> Figure:
    gib = ram_bytes / GIB

    def sides(figure: Callable[[Profile, Moved], float]) -> tuple[Spread, Spread]:
        return (
            Spread.of([figure(source, moved) for moved, source, _ in runs]),
            Spread.of([figure(destination, moved) for moved, _, destination in runs]),
        )

    def times_alone(kind: str) -> Spread:
        spent = [
            sum(side.cpu_seconds if kind == ALL else side.seconds(kind) for side in (source, destination))
            for _, source, destination in runs
        ]
        return Spread.of([took / gib / limit[kind] for took, limit in zip(spent, limits, strict=True)])

    return Figure(
        {kind: sides(lambda profile, _: profile.seconds(kind) / gib) for kind in KINDS},  # noqa: B023 (called at once)
        {kind: times_alone(kind) for kind in limits[0]},
        sides(lambda profile, _: profile.cpu_seconds / gib),
        sides(lambda profile, moved: profile.seconds(PYTHON) * 1e6 / moved.bundles),
        sides(lambda profile, moved: profile.seconds(WAIT) * 1e6 / moved.bundles),
        sides(lambda profile, _: profile.side.page_faults / gib),
        Spread.of([d.before[PROVIDE].cpu_seconds / gib if PROVIDE in d.before else 0.0 for _, _, d in runs]),
        Spread.of([s.overhead_seconds / s.side.cpu_seconds for _, s, _ in runs]),
    )


def table(title: str, figure: Figure, limits: dict[str, Spread]) -> Table:
    """One content by kind."""
    rows: list[tuple[str, ...]] = []
    for kind, spent in (*figure.s_per_gib.items(), (ALL, figure.total_s_per_gib)):
        against = ("", "")
        if kind in limits:
            against = f"{limits[kind].median:.3f}", f"{figure.times_alone[kind].median:.2f}"
        rows.append((kind, *(f"{side.median:.3f}" for side in spent), *against))
    python, wait, faults = (
        [spread.median for spread in pair]
        for pair in (figure.python_us_per_bundle, figure.wait_us_per_bundle, figure.faults_per_gib)
    )
    note = (
        f"Python for each bundle, without what is in the rows {LOOK} and {WRITE}: {python[0]:.0f} us at the source, "
        f"{python[1]:.0f} at the destination; the target is under {TARGET_US:.0f} a side. The wait: {wait[0]:.0f} and "
        f"{wait[1]:.0f} us a bundle. Page faults per GiB: {faults[0]:.0f} and {faults[1]:.0f}. Providing the destination's "
        f"RAM took {figure.provide_s_per_gib.median:.2f} CPU s/GiB before the first page. Taking the time took "
        f"{figure.overhead.median:.1%}, which is subtracted. All, alone: TCP, seal, open and one copy."
    )
    return Table.of(title, ("CPU s/GiB", "source", "destination", "alone", "x alone"), rows, note)


def main(argv: list[str] | None = None) -> None:
    made = parser("profile", __doc__, repeats=5, quick_repeats=2)
    made.add_argument("--ram", type=ram, help="of the guest (default: 1GiB, quick 512MiB)")
    made.add_argument(
        "--channels", type=channel_number, metavar="N", default=CHANNELS, help="default: %(default)s"
    )
    options = parse(made, argv)
    ram_bytes = options.ram or (GIB // 2 if options.quick else GIB)
    moves = {
        name: Move(ram_bytes, options.channels, free=free, seed=options.seed)
        for name, free in (QUICK_CONTENTS if options.quick else CONTENTS).items()
    }
    figures, limits = measure(moves, options.repeats)
    finish(
        options,
        {
            "ram_bytes": ram_bytes,
            "channels": options.channels,
            "alone_s_per_gib": {kind: asdict(spread) for kind, spread in limits.items()},
            "figures": {name: asdict(figure) for name, figure in figures.items()},
        },
        [
            table(f"{ram_bytes >> 20} MiB, {options.channels} channels, {name}", figure, limits)
            for name, figure in figures.items()
        ],
    )


if __name__ == "__main__":
    main()
