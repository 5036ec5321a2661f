"""Guests that write more than the link carries: which policy makes them converge, at what price, and how well foreseen.

The link is a bandwidth limit, so that the policies differ on any machine. Each write rate meets each policy in turn: plain
pre-copy, throttled vCPUs, a downtime limit that is raised. Source and destination are two processes. Prints for each
whether it converged, epochs, seconds, downtime and the guest's slowdown, and for all the error of the expected downtime.

    python -m bench.convergence [--ram 64MiB] [--link 64MiB] [--rates 16MiB,48MiB,96MiB] [--guest auto] [--repeats 3]
                                [--downtime-limit 100ms] [--json FILE] [--plot FILE.png] [--quick]
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

import pagexfer
from pagexfer.cli.values import Seconds, Size
from pagexfer.guests.checked import boot_guest, empty_guest, resolve_kind, start

from .measure import write_json

if TYPE_CHECKING:
    from collections.abc import Iterable
    from multiprocessing.connection import Connection

    from pagexfer.guests.checked import CheckedGuest, GuestKind

_PSK: Final = bytes(range(32))
_CHANNELS: Final = 4
_RAMP: Final = 20  # the ramp's maximum, in downtime limits
_TIMEOUT_S: Final = 60.0
_MIB: Final = 1 << 20
# The part of the actual downtime that the expected one may be off.
_GOOD_ERROR: Final = 0.25
_POLICIES: Final = ("plain", "throttle", "ramp")


@dataclass(frozen=True, slots=True)
class Run:
    """One migration; `reason` says why it did not complete, and is empty where it did. Times in milliseconds."""

    policy: str
    rate_bytes: int
    reason: str
    epochs: int
    seconds: float
    downtime_ms: float
    expected_ms: float
    slowdown_percent: float

    @property
    def completed(self) -> bool:
        return not self.reason

    @property
    def error(self) -> float:
        """Expected downtime against the actual one: 0.1 is ten per cent too long."""
        return self.expected_ms / self.downtime_ms - 1


def main(argv: list[str] | None = None) -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ram", type=_size, default=64 * _MIB)
    parser.add_argument("--link", type=_size, default=64 * _MIB, help="bytes a second of all channels")
    parser.add_argument("--rates", type=_sizes, default=[rate * _MIB for rate in (16, 32, 48, 64, 96)])
    parser.add_argument("--downtime-limit", type=_seconds, default=0.1)
    parser.add_argument("--guest", choices=("auto", "kvm", "simulated"), default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", metavar="FILE", type=Path)
    parser.add_argument("--plot", metavar="FILE", type=Path)
    parser.add_argument("--quick", action="store_true", help="32 MiB, three rates, 2 repeats")
    options = parser.parse_args(argv)
    if options.quick:
        options.ram, options.repeats = 32 * _MIB, 2
        options.rates = [rate * _MIB for rate in (16, 48, 96)]
    kind = resolve_kind(options.guest)
    most_ms = 1000 * _RAMP * options.downtime_limit
    print(
        f"{kind} guest of {options.ram >> 20} MiB, link {options.link >> 20} MiB/s, downtime limit "
        f"{1000 * options.downtime_limit:.0f} ms (ramp: up to {most_ms:.0f}), medians of {options.repeats}"
    )
    print("MiB/s written  policy    converged  epochs  seconds  downtime  expected  slowdown")
    runs: list[Run] = []
    for rate in options.rates:
        for _ in range(options.repeats):
            for policy in _POLICIES:
                parameters = _parameters(policy, options.link, options.downtime_limit)
                runs.append(measure(kind, options.ram, rate, policy, parameters))
        _print_rate(rate, runs)
    foreseen = prediction(runs)
    print(
        f"expected downtime: within {100 * _GOOD_ERROR:.0f} % of the actual one in {foreseen['within']} of "
        f"{foreseen['completed']} moves, median error {100 * foreseen['median_error']:.0f} %, "
        f"largest {100 * foreseen['largest_error']:.0f} %"
    )
    if options.json:
        figures = {"guest": kind, "ram_bytes": options.ram, "link_bytes_per_s": options.link}
        figures["downtime_limit_s"] = options.downtime_limit
        write_json(options.json, {**figures, "runs": [asdict(run) for run in runs], "prediction": foreseen})
    if options.plot:
        _plot(runs, options.link, options.plot)


def measure(
    kind: GuestKind, ram_bytes: int, rate_bytes: int, policy: str, parameters: pagexfer.MigrationParameters
) -> Run:
    """One migration between this process and a fresh one."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    receiver = context.Process(target=_receive, args=(theirs, kind, ram_bytes))
    receiver.start()
    theirs.close()  # so that a receiver that dies ends the wait below
    port = ours.recv()
    with boot_guest(kind, ram_bytes, 1, rate_bytes) as guest:
        info, reason = trio.run(_send, guest, port, parameters)
    receiver.join()
    return Run(
        policy,
        rate_bytes,
        reason,
        info.ram.dirty_sync_count,
        (info.total_time - info.setup_time) / 1000,
        info.downtime,
        info.expected_downtime,
        info.throttle.slowdown if info.throttle is not None else 0.0,
    )


def _parameters(policy: str, link_bytes: int, limit_s: float) -> pagexfer.MigrationParameters:
    return pagexfer.MigrationParameters(
        downtime_limit_s=limit_s,
        max_bandwidth_bytes=link_bytes,
        max_downtime_limit_s=_RAMP * limit_s if policy == "ramp" else None,
        auto_converge=policy == "throttle",
        timeout_s=_TIMEOUT_S,
    )


def prediction(runs: Iterable[Run]) -> dict[str, float]:
    """How well downtimes were foreseen, over all moves that completed."""
    errors = [abs(run.error) for run in runs if run.completed]
    return {
        "completed": len(errors),
        "within": sum(error <= _GOOD_ERROR for error in errors),
        "median_error": statistics.median(errors) if errors else 0.0,
        "largest_error": max(errors, default=0.0),
    }


async def _send(
    guest: CheckedGuest, port: int, parameters: pagexfer.MigrationParameters
) -> tuple[pagexfer.MigrationInfo, str]:
    infos: list[pagexfer.MigrationInfo] = []
    await start(guest)
    try:
        report = await pagexfer.send_guest(
            guest,
            "127.0.0.1",
            port,
            pagexfer.PskAttestor(_PSK),
            channels=_CHANNELS,
            steering=pagexfer.Steering(parameters),
            on_progress=infos.append,
        )
    except pagexfer.TransferAborted as aborted:
        return infos[-1], aborted.reason
    return report.info, ""


def _receive(pipe: Connection, kind: GuestKind, ram_bytes: int) -> None:
    async def serve(guest: CheckedGuest) -> None:
        try:
            await pagexfer.receive_guest(
                guest, "127.0.0.1", 0, pagexfer.PskAttestor(_PSK), on_listening=pipe.send
            )
        except pagexfer.TransferAborted:
            return  # the source says why

    with empty_guest(kind, ram_bytes, 1) as guest:
        trio.run(serve, guest)


def _print_rate(rate: int, runs: list[Run]) -> None:
    for policy in _POLICIES:
        same = [run for run in runs if (run.policy, run.rate_bytes) == (policy, rate)]
        done = [run for run in same if run.completed]
        shown = done or same
        seconds, epochs, slowdown = (
            statistics.median(getattr(run, name) for run in shown)
            for name in ("seconds", "epochs", "slowdown_percent")
        )
        times = "       -         -"
        if done:
            downtime, expected = (
                statistics.median(getattr(run, name) for run in done)
                for name in ("downtime_ms", "expected_ms")
            )
            times = f"{downtime:6.0f}ms  {expected:6.0f}ms"
        print(
            f"{rate / _MIB:13.0f}  {policy:<8}  {len(done):4}/{len(same):<4}  {epochs:6.0f}  {seconds:7.1f}  {times}  "
            f"{slowdown:6.0f} %",
            flush=True,
        )


def _plot(runs: list[Run], link_bytes: int, path: Path) -> None:
    import matplotlib.pyplot as plt  # heavy, and for a picture alone

    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    for policy in _POLICIES:
        done = [run for run in runs if run.policy == policy and run.completed]
        rates = sorted({run.rate_bytes for run in done})
        for axis, name in zip(axes, ("seconds", "downtime_ms"), strict=True):
            medians = [
                statistics.median(getattr(run, name) for run in done if run.rate_bytes == rate)
                for rate in rates
            ]
            axis.plot([rate / _MIB for rate in rates], medians, "o-", label=policy)
    for axis, label in zip(axes, ("seconds to completion", "downtime, ms"), strict=True):
        axis.axvline(link_bytes / _MIB, linestyle=":", color="grey")
        axis.set_xlabel("MiB/s written by the guest (dotted: the link)")
        axis.set_ylabel(label)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _size(text: str) -> int:
    return Size().convert(text, None, None)


def _seconds(text: str) -> float:
    return Seconds().convert(text, None, None)


def _sizes(text: str) -> list[int]:
    return [_size(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
