"""Guests that write more than the link carries: python -m bench convergence [--guest auto] [--json FILE] [--plot FILE.png]

Which policy makes them converge, at what price, and how well the downtime is foreseen. The link is a bandwidth limit, so
that the policies differ on any machine. Each write rate meets each policy in turn, and each round begins with another of
them: plain pre-copy, throttled vCPUs, and a downtime limit that is raised. Source and destination are two processes. A row
has medians of the moves that completed; where none did, of those that ended. "link used" is what was sent a second against
the link, black-out and all.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final

import trio

import pagexfer
from pagexfer.guests.checked import empty_guest, resolve_kind, start
from pagexfer.guests.kvm import KvmGuest
from pagexfer.guests.simulated import SimulatedGuest

from .measure import rotated
from .options import finish, numbers, parse, parser, positive, progress, ram, seconds
from .pair import run_pair
from .sealed import PSK
from .table import Table
from .units import MB, MIB

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from pagexfer.guests.checked import CheckedGuest, GuestKind

_CHANNELS: Final = 4
_RAMP: Final = 20  # the ramp's maximum, in downtime limits
_TIMEOUT_S: Final = 60.0
_LINK_MB: Final = 64
_RATES_MB: Final = (16, 32, 48, 64, 96)
_QUICK_RATES_MB: Final = (16, 48, 96)
_DOWNTIME_LIMIT_S: Final = 0.1
# The part of the actual downtime that the expected one may be off.
_GOOD_ERROR: Final = 0.25
_POLICIES: Final = ("plain", "throttle", "ramp")


@dataclass(frozen=True, slots=True)
class Run:
    """One migration; `reason` says why it did not complete, and is empty where it did. Times in milliseconds."""

    policy: str
    rate_mb_per_s: int
    reason: str
    epochs: int
    seconds: float
    downtime_ms: float
    expected_ms: float
    slowdown_percent: float
    sent_bytes: int = 0

    @property
    def completed(self) -> bool:
        return not self.reason

    @property
    def error(self) -> float:
        """Expected downtime against the actual one: 0.1 is ten per cent too long."""
        return self.expected_ms / self.downtime_ms - 1


@dataclass(frozen=True, slots=True)
class Job:
    """One move: the guest, what it writes, and what its operator allows."""

    kind: GuestKind
    ram_bytes: int
    rate_mb_per_s: int
    policy: str
    parameters: pagexfer.MigrationParameters
    seed: int


def main(argv: list[str] | None = None) -> None:
    options = _parse(argv)
    kind = resolve_kind(options.guest)
    runs: list[Run] = []
    for rate in options.rates:
        progress(f"convergence: {rate} MB/s written")
        for round_ in range(options.repeats):
            for policy in rotated(_POLICIES, round_):
                parameters = _parameters(policy, options.link * MB, options.downtime_limit)
                job = Job(kind, options.ram, rate, policy, parameters, options.seed)
                run, _ = run_pair(_receive, _send, job)
                runs.append(run)
    foreseen = prediction(runs)
    limit_ms = 1000 * options.downtime_limit
    table = Table.of(
        f"A {kind} guest of {options.ram >> 20} MiB over a link of {options.link} MB/s, downtime limit "
        f"{limit_ms:.0f} ms (ramp: up to {_RAMP * limit_ms:.0f} ms)",
        (
            "MB/s written",
            "policy",
            "converged",
            "epochs",
            "seconds",
            "downtime ms",
            "expected ms",
            "slowdown %",
            "link used",
        ),
        [_row(rate, policy, options.link, runs) for rate in options.rates for policy in _POLICIES],
        f"Expected downtime within {100 * _GOOD_ERROR:.0f} % of the actual one in {foreseen['within']} of "
        f"{foreseen['completed']} moves; median error {100 * foreseen['median_error']:.0f} %, largest "
        f"{100 * foreseen['largest_error']:.0f} %.",
    )
    figures = {
        "guest": kind,
        "ram_bytes": options.ram,
        "link_mb_per_s": options.link,
        "downtime_limit_s": options.downtime_limit,
        "runs": [asdict(run) for run in runs],
        "prediction": foreseen,
    }
    finish(options, figures, [table], lambda path: _plot(runs, options.link, path))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    made = parser("convergence", __doc__, repeats=3, quick_repeats=1, plots=True)
    made.add_argument("--ram", type=ram, help="of the guest (default: 64MiB, quick 32MiB)")
    made.add_argument(
        "--link",
        type=positive,
        metavar="MB",
        default=_LINK_MB,
        help="MB/s of all channels together (default: %(default)s)",
    )
    made.add_argument(
        "--rates",
        type=numbers,
        metavar="MB,MB",
        help="MB/s that the guest writes (default: 16,32,48,64,96, quick 16,48,96)",
    )
    made.add_argument(
        "--downtime-limit",
        type=seconds,
        metavar="TIME",
        default=_DOWNTIME_LIMIT_S,
        help=f"default: {_DOWNTIME_LIMIT_S * 1000:.0f}ms",
    )
    made.add_argument(
        "--guest", choices=("auto", "kvm", "simulated"), default="auto", help="default: %(default)s"
    )
    options = parse(made, argv)
    options.ram = options.ram or (32 if options.quick else 64) * MIB
    options.rates = options.rates or list(_QUICK_RATES_MB if options.quick else _RATES_MB)
    return options


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


def _send(job: Job, host: str, port: int) -> Run:
    with _boot(job) as guest:
        info, reason = trio.run(_migrate, guest, host, port, job.parameters)
    return Run(
        job.policy,
        job.rate_mb_per_s,
        reason,
        info.ram.dirty_sync_count,
        (info.total_time - info.setup_time) / 1000,
        info.downtime or 0.0,
        info.expected_downtime or 0.0,
        info.throttle.slowdown if info.throttle is not None else 0.0,
        info.ram.transferred,
    )


def _boot(job: Job) -> CheckedGuest:
    guest_type = KvmGuest if job.kind == "kvm" else SimulatedGuest
    return guest_type.boot(job.ram_bytes, 1, write_rate_bytes=job.rate_mb_per_s * MB, seed=job.seed)


async def _migrate(
    guest: CheckedGuest, host: str, port: int, parameters: pagexfer.MigrationParameters
) -> tuple[pagexfer.MigrationInfo, str]:
    infos: list[pagexfer.MigrationInfo] = []
    await start(guest)
    try:
        report = await pagexfer.send_guest(
            guest,
            host,
            port,
            pagexfer.PskAttestor(PSK),
            channels=_CHANNELS,
            steering=pagexfer.Steering(parameters),
            on_progress=infos.append,
        )
    except pagexfer.TransferAborted as aborted:
        return infos[-1], aborted.reason
    return report.info, ""


def _receive(job: Job, host: str, on_listening: Callable[[int], None]) -> None:
    async def serve(guest: CheckedGuest) -> None:
        try:
            await pagexfer.receive_guest(guest, host, 0, pagexfer.PskAttestor(PSK), on_listening=on_listening)
        except pagexfer.TransferAborted:
            return  # the source says why

    with empty_guest(job.kind, job.ram_bytes, 1) as guest:
        trio.run(serve, guest)


def _row(rate_mb: int, policy: str, link_mb: int, runs: list[Run]) -> tuple[str, ...]:
    same = [run for run in runs if (run.policy, run.rate_mb_per_s) == (policy, rate_mb)]
    done = [run for run in same if run.completed]

    def median(name: str) -> float:
        values: list[float] = [getattr(run, name) for run in done or same]
        return statistics.median(values)

    return (
        f"{rate_mb}",
        policy,
        f"{len(done)} of {len(same)}",
        f"{median('epochs'):.0f}",
        f"{median('seconds'):.1f}",
        f"{median('downtime_ms'):.0f}" if done else "-",
        f"{median('expected_ms'):.0f}" if done else "-",
        f"{median('slowdown_percent'):.0f}",
        f"{statistics.median(run.sent_bytes / run.seconds / MB / link_mb for run in done or same):.2f}",
    )


def _plot(runs: list[Run], link_mb: int, path: Path) -> None:
    from .plots import new_figure, save

    figure, axes = new_figure(2)
    for policy in _POLICIES:
        done = [run for run in runs if run.policy == policy and run.completed]
        rates = sorted({run.rate_mb_per_s for run in done})
        for axis, name in zip(axes, ("seconds", "downtime_ms"), strict=True):
            medians = [
                statistics.median(getattr(run, name) for run in done if run.rate_mb_per_s == rate)
                for rate in rates
            ]
            axis.plot(rates, medians, "o-", label=policy)
    for axis, label in zip(axes, ("seconds to completion", "downtime, ms"), strict=True):
        axis.axvline(link_mb, linestyle=":", color="grey")
        axis.set_xlabel("MB/s written by the guest (dotted: the link)")
        axis.set_ylabel(label)
    save(figure, path)


if __name__ == "__main__":
    main()
