"""`pagexfer send`, `pagexfer receive` and `pagexfer demo`.

Exit codes: 0 completed; 1 ended, the guest goes on at the source; 2 bad usage; 3 refused (authentication, policy);
4 undecided after the start token.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, get_args

import click
import trio

from ..engine.steering import MigrationParameters, Steering
from ..engine.streams import allow_most_descriptors
from ..errors import GuestError, Outcome, UsageError
from ..guests.checked import boot_guest, empty_guest
from ..guests.pattern import Layout
from ..migration import FreshnessChoice
from ..wire.constants import MAX_CHANNELS
from ..wire.handshake import AttestorKind, Role
from .attest import attest as attest_commands
from .attestor import attest_option, attestor_options, make_attestor
from .demo import run_demo
from .ledger import check_place, ledger_commands, ledger_option, read_ledger
from .output import note, output_failed, say
from .qemu import qemu_monitor, refuse_qemu, with_qemu
from .recover import recover
from .sides import receive_side, send_side
from .steering import ControlSocket, control, steering_arguments, steering_options
from .values import Address, Compression, Cpus, Ram, Seconds, Size

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from ..guests.checked import GuestKind


def main() -> int:
    """Run the command line; returns the exit code."""
    allow_most_descriptors()
    try:
        code = cli.main(standalone_mode=False)
    except click.Abort:
        note("interrupted")
        return Outcome.ENDED
    except click.exceptions.NoArgsIsHelpError as error:
        say(error.format_message())
        return Outcome.USAGE
    except click.ClickException as error:
        note(error.format_message())
        return Outcome.USAGE
    except (UsageError, GuestError) as error:
        note(str(error))
        return Outcome.USAGE
    except (OSError, SystemExit) as error:
        # Help and version, which click prints itself. It ends the process where they meet a pipe that nobody reads.
        if isinstance(error, OSError) and not output_failed():
            raise
        note("cannot write to standard output")
        return Outcome.USAGE
    return code if isinstance(code, int) else Outcome.COMPLETED


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="pagexfer")
def cli() -> None:
    """Live-migrate confidential guests over many sealed TCP channels."""


cli.add_command(attest_commands)
cli.add_command(recover)
cli.add_command(ledger_commands)
cli.add_command(control)


# A step is a page; the check looks twice, a second apart by default.
_MIN_WRITE_RATE_BYTES: Final = 64 << 10

_qmp_option = click.option(
    "--qmp",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Monitor of the QEMU to migrate, a UNIX socket; for --guest qemu.",
)


def _guest_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output."),
        click.option(
            "--vcpus", type=click.IntRange(1, 32), default=2, show_default=True, help="vCPUs of a test guest."
        ),
        click.option("--ram", type=Ram(), default="512MiB", show_default=True, help="RAM of a test guest."),
        click.option(
            "--guest",
            "kind",
            type=click.Choice(["auto", "kvm", "simulated", "qemu"]),
            default="auto",
            show_default=True,
            help="What is migrated; auto is kvm where /dev/kvm can be used, qemu (no demo) a QEMU that runs.",
        ),
    ):
        command = option(command)
    return command


def _engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option(
            "--cpus", type=Cpus(), default="", help="Pin the engine of --isolated and its slots: 0,2-3."
        ),
        click.option(
            "--isolated",
            is_flag=True,
            help="Run the engine as a process of its own, which has neither guest RAM nor keys.",
        ),
        click.option(
            "--channel-threads/--no-channel-threads",
            default=None,
            help="A thread for each channel. Default: up to 16; with 1 or 2 CPUs up to 1, at a destination 4, isolated 8.",
        ),
    ):
        command = option(command)
    return command


def _source_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option(
            "--write-rate",
            type=Size(),
            default="50MiB",
            show_default=True,
            help="What the guest writes a second, 64KiB or more for each vCPU; 0 for an idle one.",
        ),
        click.option(
            "--channels",
            type=click.IntRange(1, MAX_CHANNELS),
            default=4,
            show_default=True,
            help="TCP connections for RAM, each with its own slot and keys.",
        ),
        click.option(
            "--freshness",
            type=click.Choice(get_args(FreshnessChoice)),
            default="auto",
            show_default=True,
            help="digest-audit re-hashes all RAM in black-out; auto believes the guest's tracker, or the dirty log.",
        ),
        click.option(
            "--compress",
            type=Compression(),
            help="Compress pages before sealing, for slow links (extra zstd); sizes then tell of what is in them.",
        ),
    ):
        command = option(command)
    return command


_journal_option = click.option(
    "--journal",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File that says after a crash who may run the guest: see 'pagexfer recover'.",
)


@cli.command()
@click.option("--to", "address", type=Address(), required=True, help="Where the destination listens.")
@attestor_options
@_journal_option
@ledger_option("The guest's ledger so far; without the file, this is its first move.")
@click.option(
    "--control-socket",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Unix socket at which 'pagexfer control' steers this migration.",
)
@click.option("--pause-before-switchover", is_flag=True, help="Wait for 'pagexfer control PATH continue'.")
@steering_options
@_source_options
@_engine_options
@_qmp_option
@_guest_options
def send(
    address: tuple[str, int],
    attest: str,
    crl: tuple[Path, ...],
    journal: Path | None,
    ledger: Path | None,
    channels: int,
    write_rate: int,
    downtime_limit: float,
    max_downtime_limit: float | None,
    max_bandwidth: int | None,
    timeout: float | None,
    control_socket: Path | None,
    freshness: FreshnessChoice,
    compress: int | None,
    qmp: Path | None,
    kind: GuestKind,
    ram: int,
    vcpus: int,
    cpus: tuple[int, ...],
    channel_threads: bool | None,
    *,
    auto_converge: bool,
    pause_before_switchover: bool,
    isolated: bool,
    as_json: bool,
    **files: Path | None,
) -> int:
    """Migrate a test guest, or a running QEMU's, to a destination.

    Exit code 0: the guest runs there. 1: it goes on here. 2: bad usage. 3: authentication or policy refused, it goes
    on here. 4: undecided, it stays parked here; 'pagexfer recover' says what to do.
    """
    steering = Steering(
        MigrationParameters(
            downtime_limit_s=downtime_limit,
            max_downtime_limit_s=max_downtime_limit,
            max_bandwidth_bytes=max_bandwidth,
            timeout_s=timeout,
            auto_converge=auto_converge,
            pause_before_switchover=pause_before_switchover,
        )
    )
    _check_write_rate(write_rate, vcpus)
    attestor = make_attestor(Role.SOURCE, attest, crl, files)
    moves = read_ledger(ledger)
    monitor = qemu_monitor(kind, qmp)
    opened = (
        nullcontext()
        if control_socket is None
        else ControlSocket(control_socket, steering, can_throttle=monitor is None)
    )
    with opened as listening:
        work = partial(
            send_side,
            address=address,
            attestor=attestor,
            moves=moves,
            journal=journal,
            channels=channels,
            steering=steering,
            listening=listening,
            freshness=freshness,
            compression_level=compress,
            isolated=isolated,
            cpus=cpus,
            channel_threads=channel_threads,
            as_json=as_json,
        )
        if monitor is not None:
            return trio.run(with_qemu, monitor, work, False)
        with boot_guest(kind, ram, vcpus, write_rate) as guest:
            return trio.run(work, guest)


@cli.command()
@click.option(
    "--listen",
    "address",
    type=Address(),
    required=True,
    help="Where to listen; port 0 lets the kernel choose.",
)
@attestor_options
@ledger_option("Where to write the guest's ledger, with the record of this move.")
@click.option(
    "--run-for",
    type=Seconds(),
    default="1s",
    show_default=True,
    help="Let the guest run this long, then check it.",
)
@click.option("--accept-compression", is_flag=True, help="Let the source compress pages (extra zstd).")
@_journal_option
@_engine_options
@_qmp_option
@_guest_options
def receive(
    address: tuple[str, int],
    attest: str,
    crl: tuple[Path, ...],
    journal: Path | None,
    ledger: Path | None,
    run_for: float,
    qmp: Path | None,
    kind: GuestKind,
    ram: int,
    vcpus: int,
    cpus: tuple[int, ...],
    channel_threads: bool | None,
    *,
    accept_compression: bool,
    isolated: bool,
    as_json: bool,
    **files: Path | None,
) -> int:
    """Receive a test guest and check it, or one into a waiting QEMU.

    A test guest runs on for a while, then its whole RAM is checked.

    Exit code 0: the guest runs here. 1: it does not. 2: bad usage. 3: authentication or policy refused. 4: it came, and
    is not as it should be.
    """
    attestor = make_attestor(Role.DESTINATION, attest, crl, files)
    check_place(ledger)
    monitor = qemu_monitor(kind, qmp)
    work = partial(
        receive_side,
        address=address,
        attestor=attestor,
        ledger=ledger,
        journal=journal,
        run_for=run_for,
        accept_compression=accept_compression,
        isolated=isolated,
        cpus=cpus,
        channel_threads=channel_threads,
        as_json=as_json,
    )
    if monitor is not None:
        return trio.run(with_qemu, monitor, work, True)
    Layout.plan(ram, vcpus)
    with empty_guest(kind, ram, vcpus) as guest:
        return trio.run(work, guest)


@cli.command()
@attest_option(AttestorKind.PSK, AttestorKind.EMULATED)
@steering_options
@_source_options
@_engine_options
@_guest_options
def demo(
    attest: str,
    channels: int,
    write_rate: int,
    downtime_limit: float,
    max_downtime_limit: float | None,
    max_bandwidth: int | None,
    timeout: float | None,
    freshness: FreshnessChoice,
    compress: int | None,
    kind: GuestKind,
    ram: int,
    vcpus: int,
    cpus: tuple[int, ...],
    channel_threads: bool | None,
    *,
    auto_converge: bool,
    isolated: bool,
    as_json: bool,
) -> int:
    """Migrate a busy guest on this machine, and check that it goes on.

    Source and destination are two processes, joined by loopback.

    Exit code 0 only if it does. Otherwise that of the side that failed: see 'send --help' and 'receive --help'.
    """
    refuse_qemu(kind)
    _check_write_rate(write_rate, vcpus)
    parameters = MigrationParameters(
        downtime_limit_s=downtime_limit,
        max_downtime_limit_s=max_downtime_limit,
        max_bandwidth_bytes=max_bandwidth,
        timeout_s=timeout,
        auto_converge=auto_converge,
    )
    options = [
        f"--channels={channels}",
        f"--write-rate={write_rate}",
        f"--freshness={freshness}",
        *steering_arguments(parameters),
    ]
    if compress is not None:
        options.append(f"--compress=zstd:{compress}")
    Layout.plan(ram, vcpus)  # what cannot be a guest is said here, once, and not by both sides
    both = ["--isolated"] if isolated else []
    if channel_threads is not None:
        both.append("--channel-threads" if channel_threads else "--no-channel-threads")
    both += ["--cpus", ",".join(map(str, cpus))] if cpus else []
    accept = ["--accept-compression"] if compress is not None else []
    return run_demo(AttestorKind[attest.upper()], options, accept, kind, ram, vcpus, both, as_json=as_json)


def _check_write_rate(write_rate: int, vcpus: int) -> None:
    """Raises UsageError where a vCPU would write so seldom that the destination takes it for one that stands still."""
    if 0 < write_rate < vcpus * _MIN_WRITE_RATE_BYTES:
        raise UsageError(
            f"--write-rate {write_rate} is too slow to be seen: write 0 for an idle guest, or {vcpus * 64}KiB or more for "
            f"{vcpus} vCPU{'s' if vcpus > 1 else ''}"
        )
