"""Where the CPU seconds of a migration go, by kind of work: python -m bench profile [--json FILE] [--quick]

An idle guest moves between two processes over loopback, with the engine in the guest's process. Inside each side the few
calls that a bundle needs are timed: send and receive of the socket, seal and open, gather, the look at the pages (which are
zero?) with their entries, writing to RAM, and the wait for the kernel (epoll), which costs CPU when it sleeps and wakes.
What is left of the side's CPU seconds is Python: trio, the engine, the SVSM. Taking the time costs about a microsecond a
call, which is measured and subtracted. Page faults are in the call that meets them; "provide RAM" is what the destination
did before the first page came, so that writing meets none.

"alone" is what the part costs by itself in this run: AES-GCM with 1 MiB records, a copy, and plain TCP over as many
connections. "x alone" is against that, for all of RAM.
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

from pagexfer.svsm import export, sealing
from pagexfer.svsm.export import Packager
from pagexfer.svsm.memory import GuestMemory

from . import sealed
from .channels import CONTENTS
from .limits import parts
from .measure import Spread, alternate
from .options import channel_number, finish, parse, parser, progress, ram
from .pair import Side, run_pair
from .sealed import Move, Moved
from .stopwatch import Stopwatch, Timed
from .table import Table
from .tcp import Plain, run_plain

if TYPE_CHECKING:
    from collections.abc import Callable

GIB: Final = 1 << 30
CHANNELS: Final = 4

SEND: Final = "TCP send"
RECEIVE: Final = "TCP receive"
SEAL: Final = "seal"
OPEN: Final = "open"
GATHER: Final = "gather"
LOOK: Final = "zero test, entries"
WRITE: Final = "write to RAM"
WAIT: Final = "wait (epoll)"
PYTHON: Final = "Python, trio"
PROVIDE: Final = "provide RAM"
KINDS: Final = (SEND, RECEIVE, SEAL, OPEN, GATHER, LOOK, WRITE, WAIT, PYTHON)
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
    """One content, source and destination: CPU seconds per GiB by kind, and microseconds of Python for each bundle."""

    s_per_gib: dict[str, tuple[Spread, Spread]]
    total_s_per_gib: tuple[Spread, Spread]
    python_us_per_bundle: tuple[Spread, Spread]
    wait_us_per_bundle: tuple[Spread, Spread]
    faults_per_gib: tuple[Spread, Spread]
    provide_s_per_gib: Spread
    overhead: Spread


class _Waits(trio.abc.Instrument):
    """CPU time that the event loop spends in the kernel to wait."""

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


def measure(moves: dict[str, Move], repeats: int) -> dict[str, Figure]:
    """Every migration in turn, `repeats` times."""
    runs: dict[str, list[tuple[Moved, Profile, Profile]]] = {name: [] for name in moves}
    for number in range(repeats):
        for name, move in moves.items():
            progress(f"profile: round {number + 1} of {repeats}, {name}")
            (moved, source), destination = run_pair(receive, send, move)
            runs[name].append((moved, source, destination))
    return {name: _figure(moves[name].ram_bytes, runs[name]) for name in moves}


def _figure(ram_bytes: int, runs: list[tuple[Moved, Profile, Profile]]) -> Figure:
    gib = ram_bytes / GIB

    def sides(figure: Callable[[Profile, Moved], float]) -> tuple[Spread, Spread]:
        return (
            Spread.of([figure(source, moved) for moved, source, _ in runs]),
            Spread.of([figure(destination, moved) for moved, _, destination in runs]),
        )

    return Figure(
        {kind: sides(lambda profile, _: profile.seconds(kind) / gib) for kind in KINDS},  # noqa: B023 (called at once)
        sides(lambda profile, _: profile.cpu_seconds / gib),
        sides(lambda profile, moved: profile.seconds(PYTHON) * 1e6 / moved.bundles),
        sides(lambda profile, moved: profile.seconds(WAIT) * 1e6 / moved.bundles),
        sides(lambda profile, _: profile.side.page_faults / gib),
        Spread.of([d.before[PROVIDE].cpu_seconds / gib if PROVIDE in d.before else 0.0 for _, _, d in runs]),
        Spread.of([s.overhead_seconds / s.side.cpu_seconds for _, s, _ in runs]),
    )


def alone(ram_bytes: int, channels: int, repeats: int, seed: int) -> dict[str, float]:
    """Seconds per GiB of the parts by themselves."""
    wanted = {"seal, one core": SEAL, "open, one core": OPEN, "gather": GATHER, "copy": WRITE, "read": LOOK}
    cases = {name: case for name, case in parts(ram_bytes, seed).items() if name in wanted}
    found = {
        wanted[name]: spread.median * GIB / ram_bytes for name, spread in alternate(cases, repeats).items()
    }
    plain = [run_plain(Plain(ram_bytes, channels)) for _ in range(repeats)]
    for kind, end in ((SEND, 0), (RECEIVE, 1)):
        found[kind] = Spread.of([pair[end].cpu_seconds for pair in plain]).median * GIB / ram_bytes
    return found


def table(title: str, figure: Figure, limits: dict[str, float]) -> Table:
    """One content by kind."""
    rows: list[tuple[str, ...]] = []
    for kind, (source, destination) in figure.s_per_gib.items():
        limit = limits.get(kind)
        spent = source.median + destination.median
        against = ("", "") if limit is None else (f"{limit:.3f}", f"{spent / limit:.2f}")
        rows.append((kind, f"{source.median:.3f}", f"{destination.median:.3f}", *against))
    totals = [spread.median for spread in figure.total_s_per_gib]
    limit = sum(limits[kind] for kind in (SEND, RECEIVE, SEAL, OPEN, WRITE))
    rows.append(("all", *(f"{total:.3f}" for total in totals), f"{limit:.3f}", f"{sum(totals) / limit:.2f}"))
    python, wait, faults = (
        [spread.median for spread in pair]
        for pair in (figure.python_us_per_bundle, figure.wait_us_per_bundle, figure.faults_per_gib)
    )
    note = (
        f"Python for each bundle: {python[0]:.0f} us at the source, {python[1]:.0f} at the destination; the target is "
        f"under {TARGET_US:.0f} a side. The wait: {wait[0]:.0f} and {wait[1]:.0f} us a bundle. Page faults per GiB: "
        f"{faults[0]:.0f} and {faults[1]:.0f}. Providing the destination's RAM took "
        f"{figure.provide_s_per_gib.median:.2f} CPU s/GiB before the first page. Taking the time took "
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
        for name, free in CONTENTS.items()
    }
    limits = alone(ram_bytes, options.channels, options.repeats, options.seed)
    figures = measure(moves, options.repeats)
    finish(
        options,
        {
            "ram_bytes": ram_bytes,
            "channels": options.channels,
            "alone_s_per_gib": limits,
            "figures": {name: asdict(figure) for name, figure in figures.items()},
        },
        [
            table(f"{ram_bytes >> 20} MiB, {options.channels} channels, {name}", figure, limits)
            for name, figure in figures.items()
        ],
    )


if __name__ == "__main__":
    main()
