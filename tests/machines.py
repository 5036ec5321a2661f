"""Two simulated guests that many migrations use one after the other, and proofs of who runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from pagexfer.attestation import PskAttestor
from pagexfer.errors import Outcome, TransferAborted
from pagexfer.guests.pattern import read_status
from pagexfer.guests.simulated import SimulatedGuest
from pagexfer.migration import MigrationReport, receive_guest, send_guest

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from pagexfer.engine.progress import MigrationInfo

RAM_BYTES: Final = 8 << 20
VCPUS: Final = 2
CHANNELS: Final = 3
HOST: Final = "127.0.0.1"
ATTESTOR: Final = PskAttestor(b"a pre-shared key of 32 bytes ...")
# Written while the first epoch is sent and until black-out, so that every epoch has pages; few enough to converge.
WRITE_RATE_BYTES: Final = 30 << 20
PATIENCE_S: Final = 40.0

End = MigrationReport | TransferAborted


@dataclass
class Side:
    """What one side of a migration did and said."""

    end: End | None = None
    strangers: list[str] = field(default_factory=list)
    progress: list[MigrationInfo] = field(default_factory=list)


class Machines:
    """A source guest, started anew for each migration, and a destination guest, replaced once it ran."""

    def __init__(self, write_rate_bytes: int = WRITE_RATE_BYTES) -> None:
        self._rate = write_rate_bytes
        self.source = SimulatedGuest.boot(RAM_BYTES, VCPUS, write_rate_bytes=write_rate_bytes)
        self.source_moved = False
        self.destination = SimulatedGuest.empty(RAM_BYTES, VCPUS)

    async def start(self) -> None:
        """Let the source guest run; whichever guest a migration has used up is a new one."""
        if self.source_moved:
            self.source.close()
            self.source = SimulatedGuest.boot(RAM_BYTES, VCPUS, write_rate_bytes=self._rate)
            self.source_moved = False
        if not never_ran(self.destination):
            self.destination.close()
            self.destination = SimulatedGuest.empty(RAM_BYTES, VCPUS)
        # One that never ran stands for a new guest, which takes too long to make for every fault.
        self.destination.memory.disclaim()
        self.destination.memory.states[:] = 0
        await self.source.hypervisor.resume()
        self.source.gate.release()

    async def send(
        self,
        port: int,
        stall_timeout_s: float,
        journal: Path | None = None,
        *,
        isolated: bool = False,
        channels: int = CHANNELS,
        channel_threads: bool | None = None,
    ) -> Side:
        """Migrate the source guest; returns how that ended."""
        side = Side()
        self.source_moved = True
        try:
            side.end = await send_guest(
                self.source,
                HOST,
                port,
                ATTESTOR,
                channels=channels,
                downtime_limit_s=1.0,
                stall_timeout_s=stall_timeout_s,
                journal=journal,
                isolated=isolated,
                channel_threads=channel_threads,
                on_progress=side.progress.append,
            )
        except TransferAborted as aborted:
            side.end = aborted
            self.source_moved = aborted.outcome is Outcome.UNDECIDED
        return side

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.source.close()
        self.destination.close()


async def receive(
    guest: SimulatedGuest,
    side: Side,
    stall_timeout_s: float,
    journal: Path | None = None,
    isolated: bool = False,
    channel_threads: bool | None = None,
    task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Receive into `guest` and note how it ended; reports the port."""
    try:
        side.end = await receive_guest(
            guest,
            HOST,
            0,
            ATTESTOR,
            stall_timeout_s=stall_timeout_s,
            journal=journal,
            isolated=isolated,
            channel_threads=channel_threads,
            on_listening=task_status.started,
            on_progress=side.progress.append,
            on_stranger=side.strangers.append,
        )
    except TransferAborted as aborted:
        side.end = aborted


async def goes_on(guest: SimulatedGuest) -> bool:
    """Wait until every vCPU has written more, then park the guest and check all of it."""
    before = activity(guest)
    with trio.fail_after(PATIENCE_S):
        while not all(now > then for now, then in zip(activity(guest), before, strict=True)):  # noqa: ASYNC110
            await trio.sleep(0.001)
        guest.gate.raise_flag()
        while not is_parked(guest):  # noqa: ASYNC110 (the gate has no event)
            await trio.sleep(0.001)
    assert guest.check().faults == ()
    return True


def is_parked(guest: SimulatedGuest) -> bool:
    return guest.gate.parked() == guest.gate.vcpus


def never_ran(guest: SimulatedGuest) -> bool:
    """Whether the vCPUs stand where `empty` made them stand: parked, and their processes stopped."""
    return is_parked(guest) and all(
        Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].startswith("T")
        for process in guest.hypervisor.process_ids
    )


def activity(guest: SimulatedGuest) -> list[int]:
    """For each vCPU a number that grows as long as it runs."""
    statuses = [read_status(guest.memory.words, vcpu) for vcpu in range(guest.gate.vcpus)]
    return [status.steps + status.ticks for status in statuses]
