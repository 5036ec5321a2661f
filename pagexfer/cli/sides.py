"""One side of a migration on the command line, from its guest to the report and the exit code."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Final

import trio

from ..engine.progress import Status
from ..errors import Outcome, TransferAborted, UsageError
from ..guests.checked import prove, start
from ..guests.qemu import QemuGuest
from ..migration import receive_guest, send_guest
from .attestor import describe_peer
from .kept_ledger import KeptLedger
from .output import ProgressLine, note, print_report

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from ..attestation import Attestor
    from ..engine.progress import MigrationInfo
    from ..engine.steering import Steering
    from ..guests.checked import CheckedGuest, Proof
    from ..migration import FreshnessChoice, MigrationReport
    from .steering import ControlSocket

# How long a guest that goes on at the source after a failure is watched before it is checked.
_AFTERMATH_S: Final = 0.2


async def send_side(
    guest: CheckedGuest | QemuGuest,
    address: tuple[str, int],
    attestor: Attestor,
    moves: bytes,
    journal: Path | None,
    channels: int,
    steering: Steering,
    listening: ControlSocket | None,
    freshness: FreshnessChoice,
    compression_level: int | None,
    isolated: bool,
    cpus: tuple[int, ...],
    channel_threads: bool | None,
    as_json: bool,
) -> int:
    """Start a test guest, or take a QEMU's as it runs, and migrate it; prints the report and returns the exit code."""

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
            compression_level=compression_level,
            isolated=isolated,
            cpus=cpus,
            channel_threads=channel_threads,
            on_progress=see,
        )

    async def aftermath(outcome: Outcome) -> Proof | None:
        # Here the guest goes on only where the migration failed before the start token.
        if isinstance(guest, QemuGuest) or outcome not in (Outcome.ENDED, Outcome.REFUSED):
            return None
        return await prove(guest, _AFTERMATH_S)

    if not isinstance(guest, QemuGuest):
        await start(guest)
    beside = listening.serve if listening is not None else trio.sleep_forever
    return await _run(guest, work, aftermath, beside, line=ProgressLine(), as_json=as_json)


async def receive_side(
    guest: CheckedGuest | QemuGuest,
    address: tuple[str, int],
    attestor: Attestor,
    ledger: Path | None,
    journal: Path | None,
    run_for: float,
    accept_compression: bool,
    isolated: bool,
    cpus: tuple[int, ...],
    channel_threads: bool | None,
    as_json: bool,
) -> int:
    """Receive one guest, let it run, and check a test guest; prints the report and returns the exit code."""
    kept = None if ledger is None else KeptLedger(ledger)

    async def work(show: Callable[[MigrationInfo], None]) -> MigrationReport:
        try:
            report = await receive_guest(
                guest,
                *address,
                attestor,
                accept_compression=accept_compression,
                journal=journal,
                ledger_store=kept,
                isolated=isolated,
                cpus=cpus,
                channel_threads=channel_threads,
                on_listening=lambda port: note(f"listening at {address[0]}:{port}"),
                on_progress=show,
                on_stranger=note,
            )
        except BaseException:
            if kept is not None:
                kept.leave()
            raise
        if kept is not None:
            kept.finish()
        return report

    async def aftermath(outcome: Outcome) -> Proof | None:
        if isinstance(guest, QemuGuest) or outcome is not Outcome.COMPLETED:
            return None
        return await prove(guest, run_for)

    # The source tells how an epoch goes; a destination does so only to somebody who watches.
    return await _run(guest, work, aftermath, line=ProgressLine(terminal_only=True), as_json=as_json)


async def _run(
    guest: CheckedGuest | QemuGuest,
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
    guest_report: dict[str, object] = proof.as_dict() if proof is not None else {"kind": guest.kind}
    if isinstance(guest, QemuGuest):
        guest_report["run-state"] = guest.run_state
    print_report({**figures, **report, "guest": guest_report}, as_json=as_json)
    why = report.get("error")
    if isinstance(why, dict):
        note(str(why["message"]))
    return outcome


async def _cancel_on_signal(scope: trio.CancelScope) -> None:
    hangup = (
        () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
    )  # nohup(1) stays in force
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, *hangup) as signals:
        async for _ in signals:
            scope.cancel()
