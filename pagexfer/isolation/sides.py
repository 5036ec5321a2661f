"""Both sides of a migration whose engine is another process: this process is the SVSM's and has the guest.

Whatever the engine says of its end, who may run the guest is what the SVSM's own state says.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from ..engine.failure import (
    as_aborted,
    call_back_at_the_end,
    cause_of,
    first_failure,
    hypervisor_call,
    let_go_on,
    one_line,
    stuck_at_destination,
    stuck_at_source,
    undecided,
)
from ..engine.hypervisor import ThrottlingHypervisor
from ..engine.progress import Progress, Status
from ..engine.steering import Steering
from ..errors import GuestError, LocalProtocolError, Outcome, TransferAborted, UsageError
from ..svsm.commands import destination_channel, destination_control, source_channel, source_control
from ..wire.constants import MAX_CHANNELS, PAGE_SIZE
from ..wire.slot import CONTROL_SLOT, SessionStatus
from .mailbox import Mailbox
from .monitor import EngineProcess

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..engine.hypervisor import Hypervisor
    from ..engine.progress import MigrationInfo
    from ..guests.guest import Guest
    from ..svsm.destination import DestinationSvsm
    from ..svsm.source import SourceSvsm
    from .task import Task

BUFFERS: Final = 2
BUFFER_BYTES: Final = 1 << 21
# A destination takes the largest bundle that there may be.
RECEIVING_BUFFER_BYTES: Final = 1 << 22
_NOT_COMPLETE: Final = TransferAborted(
    Outcome.ENDED, "engine", "the engine says that the move is complete, and it is not"
)
_CANCELLED: Final = TransferAborted(
    Outcome.ENDED, "cancelled", "the source's operator cancelled the migration"
)


async def send_isolated(
    guest: Guest,
    svsm: SourceSvsm,
    task: Task,
    steering: Steering,
    on_progress: Callable[[MigrationInfo], None],
) -> MigrationInfo:
    """Have a process of its own send `guest`. Raises as `SourceEngine.run` does."""

    def give_up() -> None:
        with svsm.lock:
            if svsm.state not in (SessionStatus.STARTED, SessionStatus.FINISHED):
                svsm.abort()

    channels = task.options.channels
    with Mailbox(1 + channels, BUFFERS, BUFFER_BYTES, give_up, task.cpus) as mailbox:
        bells = mailbox.open(CONTROL_SLOT, partial(source_control, svsm=svsm))
        for channel in range(channels):
            bells += mailbox.open(channel, partial(source_channel, svsm=svsm, channel=channel))
        engine = EngineProcess(
            guest.hypervisor,
            [mailbox.memory_fd, *bells],
            list,
            on_progress,
            lambda _port: None,
            lambda _line: None,
            steering,
        )
        info, error = await _run(engine, task)
    # No slot is served any more: the state is the last one.
    with trio.CancelScope(shield=True):
        give_up()
        steering.waits(paused=False)
        stuck: GuestError | None = None
        if svsm.state is SessionStatus.ABORTED:
            # An engine that died undid nothing.
            stuck = await let_go_on(guest.hypervisor, partial(_lift_throttle, guest.hypervisor))
    if svsm.state is SessionStatus.FINISHED:
        return _completed(engine, info, task, on_progress)
    if svsm.state is SessionStatus.STARTED:
        if isinstance(error, TransferAborted) and error.outcome is Outcome.UNDECIDED:
            raise error
        raise undecided(_cause(error)) from error
    if stuck is not None:
        raise stuck_at_source(_cause(error), stuck) from cause_of(stuck, error or stuck)
    raise _failure(error)


async def receive_isolated(
    guest: Guest,
    svsm: DestinationSvsm,
    task: Task,
    on_progress: Callable[[MigrationInfo], None],
    on_listening: Callable[[int], None],
    on_stranger: Callable[[str], None],
) -> MigrationInfo:
    """Have a process of its own receive into `guest`. Raises as `DestinationEngine.run` does."""

    def give_up() -> None:
        with svsm.lock:
            if svsm.state is not SessionStatus.RUNNING:
                svsm.fail()

    with Mailbox(1 + MAX_CHANNELS, BUFFERS, RECEIVING_BUFFER_BYTES, give_up, task.cpus) as mailbox:

        def make_slots() -> list[int]:
            if len(mailbox.handlers) > 1:
                raise LocalProtocolError("the slots were asked for twice")
            bells: list[int] = []
            for channel in range(svsm.channels):
                bells += mailbox.open(channel, partial(destination_channel, svsm=svsm, channel=channel))
            return bells

        bells = mailbox.open(CONTROL_SLOT, partial(destination_control, svsm=svsm))
        engine = EngineProcess(
            guest.hypervisor,
            [mailbox.memory_fd, *bells],
            make_slots,
            on_progress,
            on_listening,
            on_stranger,
            Steering(),
        )
        info, error = await _run(engine, task)
    # No slot is served any more: the state is the last one.
    with trio.CancelScope(shield=True):
        give_up()
        if svsm.state is SessionStatus.RUNNING:
            # The engine may have died between the SVSM's release and the hypervisor's.
            try:
                with hypervisor_call("continue the guest"):
                    await guest.hypervisor.resume()
            except GuestError as stuck:
                raise stuck_at_destination(stuck) from cause_of(stuck, stuck)
    if svsm.state is SessionStatus.RUNNING:
        return _completed(engine, info, task, on_progress)
    raise _failure(error)


async def _run(engine: EngineProcess, task: Task) -> tuple[MigrationInfo | None, BaseException | None]:
    """The engine's final figures, or how it ended otherwise: any error, or a cancel. The SVSM's state comes before both."""
    try:
        return await engine.run(task), None
    except BaseException as error:
        return None, error


async def _lift_throttle(hypervisor: Hypervisor) -> None:
    if isinstance(hypervisor, ThrottlingHypervisor):
        with hypervisor_call("throttle the guest"):
            await hypervisor.throttle(0)


def _completed(
    engine: EngineProcess,
    info: MigrationInfo | None,
    task: Task,
    on_progress: Callable[[MigrationInfo], None],
) -> MigrationInfo:
    """The SVSM says so; the figures are the engine's, as far as it gave any."""
    now = trio.current_time()
    figures = info or engine.latest or Progress(task.ram_pages * PAGE_SIZE, now).info(now)
    final = replace(figures, status=Status.COMPLETED)
    if final != engine.latest:
        call_back_at_the_end(on_progress, final)
    return final


def _failure(error: BaseException | None) -> BaseException:
    """What the caller should see of an ended session: how the engine ended, or a cancel. Raises a defect of ours."""
    failure = first_failure(error) if error is not None else _NOT_COMPLETE
    if error is not None and failure is None:
        return error
    if isinstance(failure, UsageError):
        return failure
    cause = _cause(error)
    # The SVSM's state says more.
    return (
        TransferAborted(Outcome.ENDED, "engine", str(cause)) if cause.outcome is Outcome.UNDECIDED else cause
    )


def _cause(error: BaseException | None) -> TransferAborted:
    """How the engine ended, in one line, whatever it was."""
    if error is None:
        return _NOT_COMPLETE
    try:
        failure = first_failure(error)
    except BaseException as defect:
        return TransferAborted(Outcome.ENDED, "internal", one_line(repr(defect)))
    return _CANCELLED if failure is None else as_aborted(failure)
