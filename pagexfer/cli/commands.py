"""`pagexfer send`, `pagexfer receive` and `pagexfer demo`.

Exit codes: 0 completed; 1 ended, the guest goes on at the source; 2 bad usage; 3 refused (authentication, policy);
4 undecided after the start token.
"""

from __future__ import annotations

import signal
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Final, get_args

import click
import trio

from ..engine.progress import MigrationInfo, Status
from ..engine.steering import MigrationParameters, Steering
from ..errors import GuestError, Outcome, TransferAborted, UsageError
from ..guests.checked import boot_guest, empty_guest, prove, start
from ..guests.pattern import Layout
from ..migration import FreshnessChoice, receive_guest, send_guest
from ..wire.constants import MAX_CHANNELS
from ..wire.handshake import AttestorKind, Role
from .attest import attest as attest_commands
from .attestor import attest_option, attestor_options, describe_peer, make_attestor
from .demo import run_demo
from .ledger import check_writable, ledger_commands, ledger_option, read_ledger, write_ledger
from .output import ProgressLine, note, print_json, print_table
from .recover import recover
from .steering import ControlSocket, control, steering_arguments, steering_options
from .values import Address, Cpus, Seconds, Size

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import Any

    from ..attestation import Attestor
    from ..guests.checked import CheckedGuest, GuestKind, Proof
from ..migration import MigrationReport

# How long a guest that goes on at the source after a failure is watched before it is checked.
_AFTERMATH_S: Final = 0.2


def main() -> int:
    """Run the command line; returns the exit code."""
    try:
        code = cli.main(standalone_mode=False)
    except click.Abort:
        note("interrupted")
        return Outcome.ENDED
    except click.ClickException as error:
        note(error.format_message())
        return Outcome.USAGE
    except (UsageError, GuestError) as error:
        note(str(error))
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


def _guest_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output."),
        click.option("--vcpus", type=click.IntRange(1, 32), default=2, show_default=True),
        click.option("--ram", type=Size(), default="512MiB", show_default=True, help="Guest RAM."),
        click.option(
            "--guest",
            "kind",
            type=click.Choice(["auto", "kvm", "simulated"]),
            default="auto",
            show_default=True,
            help="What is migrated; auto is kvm where /dev/kvm can be used.",
        ),
    ):
        command = option(command)
    return command


def _isolation_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--cpus", type=Cpus(), default="", help="Pin an isolated engine and its slots: 0,2-3."),
        click.option("--isolated", is_flag=True, help="Run the engine as a process of its own."),
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
            help="What the guest writes a second; 0 for an idle one.",
        ),
        click.option(
            "--channels",
            type=click.IntRange(1, MAX_CHANNELS),
            default=4,
            show_default=True,
            help="TCP channels.",
        ),
        click.option(
            "--freshness",
            type=click.Choice(get_args(FreshnessChoice)),
            default="auto",
            show_default=True,
            help="digest-audit re-hashes all RAM in black-out; auto believes tracker or dirty log.",
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
@_isolation_options
@_guest_options
def send(
    address: tuple[str, int],
    attest: str,
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
    kind: GuestKind,
    ram: int,
    vcpus: int,
    cpus: tuple[int, ...],
    *,
    auto_converge: bool,
    pause_before_switchover: bool,
    isolated: bool,
    as_json: bool,
    **files: Path | None,
) -> int:
    """Boot a test guest and migrate it to a destination."""
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
    attestor = make_attestor(Role.SOURCE, attest, files)
    moves = read_ledger(ledger)
    opened = nullcontext() if control_socket is None else ControlSocket(control_socket, steering)
    with opened as listening, boot_guest(kind, ram, vcpus, write_rate) as guest:
        return trio.run(
            _send,
            guest,
            address,
            attestor,
            moves,
            journal,
            channels,
            steering,
            listening,
            freshness,
            isolated,
            cpus,
            as_json,
        )


@cli.command()
@click.option("--listen", "address", type=Address(), required=True, help="Port 0 lets the kernel choose.")
@attestor_options
@ledger_option("Where to write the guest's ledger, with the record of this move.")
@click.option(
    "--run-for",
    type=Seconds(),
    default="1s",
    show_default=True,
    help="Let the guest run this long, then check it.",
)
@_journal_option
@_isolation_options
@_guest_options
def receive(
    address: tuple[str, int],
    attest: str,
    journal: Path | None,
    ledger: Path | None,
    run_for: float,
    kind: GuestKind,
    ram: int,
    vcpus: int,
    cpus: tuple[int, ...],
    *,
    isolated: bool,
    as_json: bool,
    **files: Path | None,
) -> int:
    """Receive one test guest, let it run on, and check its whole RAM."""
    attestor = make_attestor(Role.DESTINATION, attest, files)
    check_writable(ledger)
    Layout.plan(ram, vcpus)
    with empty_guest(kind, ram, vcpus) as guest:
        return trio.run(_receive, guest, address, attestor, ledger, journal, run_for, isolated, cpus, as_json)


@cli.command()
@attest_option(AttestorKind.PSK, AttestorKind.EMULATED)
@steering_options
@_source_options
@_isolation_options
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
    kind: GuestKind,
    ram: int,
    vcpus: int,
    cpus: tuple[int, ...],
    *,
    auto_converge: bool,
    isolated: bool,
    as_json: bool,
) -> int:
    """Migrate a busy guest between two processes on this machine, and check that it goes on."""
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
    Layout.plan(ram, vcpus)  # what cannot be a guest is said here, once, and not by both sides
    both = ["--isolated"] if isolated else []
    both += ["--cpus", ",".join(map(str, cpus))] if cpus else []
    return run_demo(AttestorKind[attest.upper()], options, kind, ram, vcpus, both, as_json=as_json)


async def _send(
    guest: CheckedGuest,
    address: tuple[str, int],
    attestor: Attestor,
    moves: bytes,
    journal: Path | None,
    channels: int,
    steering: Steering,
    listening: ControlSocket | None,
    freshness: FreshnessChoice,
    isolated: bool,
    cpus: tuple[int, ...],
    as_json: bool,
) -> int:
    async def work(show: Callable[[MigrationInfo], None]) -> MigrationReport:
        def see(info: MigrationInfo) -> None:
            if listening is not None:
                listening.see(info)
            show(info)

        return await send_guest(
            guest,
            *address,
            attestor,
            ledger=moves,
            channels=channels,
            steering=steering,
            journal=journal,
            freshness=freshness,
            isolated=isolated,
            cpus=cpus,
            on_progress=see,
        )

    async def aftermath(outcome: Outcome) -> Proof | None:
        # Here the guest goes on only where the migration failed before the start token.
        return await prove(guest, _AFTERMATH_S) if outcome in (Outcome.ENDED, Outcome.REFUSED) else None

    await start(guest)
    beside = listening.serve if listening is not None else trio.sleep_forever
    return await _run(guest, work, aftermath, beside, line=ProgressLine(), as_json=as_json)


async def _receive(
    guest: CheckedGuest,
    address: tuple[str, int],
    attestor: Attestor,
    ledger: Path | None,
    journal: Path | None,
    run_for: float,
    isolated: bool,
    cpus: tuple[int, ...],
    as_json: bool,
) -> int:
    async def work(show: Callable[[MigrationInfo], None]) -> MigrationReport:
        done = await receive_guest(
            guest,
            *address,
            attestor,
            journal=journal,
            isolated=isolated,
            cpus=cpus,
            on_listening=lambda port: note(f"listening at {address[0]}:{port}"),
            on_progress=show,
            on_stranger=note,
        )
        if ledger is not None:
            _keep(done.ledger, ledger)
        return done

    async def aftermath(outcome: Outcome) -> Proof | None:
        return await prove(guest, run_for) if outcome is Outcome.COMPLETED else None

    # The source tells how an epoch goes; a destination does so only to somebody who watches.
    return await _run(guest, work, aftermath, line=ProgressLine(terminal_only=True), as_json=as_json)


async def _run(
    guest: CheckedGuest,
    work: Callable[[Callable[[MigrationInfo], None]], Awaitable[MigrationReport]],
    aftermath: Callable[[Outcome], Awaitable[Proof | None]],
    beside: Callable[[], Awaitable[None]] = trio.sleep_forever,
    *,
    line: ProgressLine,
    as_json: bool,
) -> int:
    """One side's migration from start to report; returns the exit code."""
    latest: list[MigrationInfo] = []

    def show(info: MigrationInfo) -> None:
        latest[:] = [info]
        line.show(info)

    outcome = Outcome.COMPLETED
    report: dict[str, object] = {}
    unusable: UsageError | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_cancel_on_signal, nursery.cancel_scope)
        nursery.start_soon(beside)
        try:
            done = await work(show)
            report = {"freshness": done.freshness.label, "attestation": describe_peer(done.peer)}
        except TransferAborted as aborted:
            outcome = aborted.outcome
            report = {"error": {"reason": aborted.reason, "message": str(aborted)}}
        except UsageError as error:
            unusable = error  # raised outside of the nursery, which would wrap it into a group
        nursery.cancel_scope.cancel()
    if unusable is not None:
        raise unusable
    if not report:
        outcome = Outcome.ENDED
        report = {"error": {"reason": "cancelled", "message": "cancelled by a signal"}}
    proof = await aftermath(outcome)
    if proof is not None and not (proof.consistent and proof.progressed) and outcome is Outcome.COMPLETED:
        outcome = Outcome.UNDECIDED
        report["error"] = {"reason": "guest", "message": "the guest does not go on as it should"}
    figures = latest[0].as_dict() if latest else {"status": Status.FAILED.value}
    guest_report = proof.as_dict() if proof is not None else {"kind": guest.kind}
    _print_report({**figures, **report, "guest": guest_report}, as_json=as_json)
    return outcome


def _print_report(report: dict[str, object], *, as_json: bool) -> None:
    if as_json:
        print_json(report)
    else:
        print_table(report)
    error = report.get("error")
    if isinstance(error, dict):
        note(str(error["message"]))


def _keep(moves: bytes, path: Path) -> None:
    try:
        write_ledger(path, moves)
    except OSError as error:
        # The guest runs here, whatever becomes of the file: that is what the exit code says.
        note(f"the guest runs here, but its ledger is lost: cannot write {path}: {error.strerror}")


async def _cancel_on_signal(scope: trio.CancelScope) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            scope.cancel()
