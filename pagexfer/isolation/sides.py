"""Both sides of a migration whose engine is another process: this process is the SVSM's and has the guest.

Whatever the engine says of its end, who may run the guest is what the SVSM's own state says.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from ..engine.failure import (
    HYPERVISOR_TIMEOUT_S,
    RESUME,
    THROTTLE,
    as_aborted,
    call_back_at_the_end,
    cause_of,
    first_failure,
    hypervisor_call,
    let_go_on,
    not_undone,
    one_line,
    stuck_at_destination,
    undecided,
)
from ..engine.hypervisor import ThrottlingHypervisor
from ..engine.progress import Progress, Status
from ..engine.steering import Steering
from ..errors import (
    GuestError,
    LocalProtocolError,
    Outcome,
    PagexferError,
    TransferAborted,
    UsageError,
)
from ..svsm.commands import destination_channel, destination_control, source_channel, source_control
from ..wire.constants import MAX_CHANNELS, PAGE_SIZE
from ..wire.slot import CONTROL_SLOT, SessionStatus
from .mailbox import Mailbox
from .monitor import EngineProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from ..engine.hypervisor import Hypervisor
    from ..engine.progress import MigrationInfo
    from ..guests.guest import Guest
    from ..svsm.destination import DestinationSvsm
    from ..svsm.source import SourceSvsm
    from .task import Task

_LOG: Final = logging.getLogger("pagexfer")
BUFFERS: Final = 2
BUFFER_BYTES: Final = 1 << 21
# A destination takes the largest bundle that there may be.
RECEIVING_BUFFER_BYTES: Final = 1 << 22
# Commands that are carried out beside others have the lock for moments.
_LOCK_TIMEOUT_S: Final = 1.0
# States of either side that no end of its engine changes.
_DECIDED: Final = (SessionStatus.STARTED, SessionStatus.FINISHED, SessionStatus.RUNNING)
_NOT_COMPLETE: Final = TransferAborted(
    Outcome.ENDED, "engine", "the engine says that the move is complete, and it is not"
)
_UNAWARE: Final = TransferAborted(
    Outcome.ENDED,
    "engine",
    "the engine's process lost track of who may run the guest, and the SVSM ended the migration",
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

    def abort() -> None:
        if svsm.state is SessionStatus.PARKED:
            engine.left.add(RESUME)  # a gate may know no other way to park than its hypervisor's pause
        if svsm.state not in _DECIDED:
            svsm.abort()

    def give_up() -> None:
        with svsm.lock:
            abort()

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
        with trio.CancelScope(shield=True):
            held_up, refusal = await trio.to_thread.run_sync(_settle, mailbox, svsm, abort)
    # No slot is served any more: the state is the last one, unless a command is still under way.
    with trio.CancelScope(shield=True):
        steering.waits(paused=False)
        failed: dict[str, PagexferError] = {}
        if svsm.state not in _DECIDED and (held_up is None or held_up.outcome is Outcome.ENDED):
            # An engine that died undid nothing.
            lift_throttle = partial(_lift_throttle, guest.hypervisor, engine.left)
            failed = await let_go_on(guest.hypervisor, lift_throttle, engine.left)
            if refusal is not None:
                failed[RESUME] = refusal
    if svsm.state is SessionStatus.FINISHED:
        return _completed(engine, info, task, on_progress)
    if svsm.state is SessionStatus.STARTED:
        if isinstance(error, TransferAborted) and error.outcome is Outcome.UNDECIDED:
            raise error
        raise undecided(_cause(error)) from error
    if held_up is not None:
        raise held_up from error
    if failed:
        first = next(iter(failed.values()))
        raise not_undone(_cause(error), failed) from cause_of(first, error or first)
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

    def fail() -> None:
        if svsm.state not in _DECIDED:
            svsm.fail()

    def give_up() -> None:
        with svsm.lock:
            fail()

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
        with trio.CancelScope(shield=True):
            held_up, _ = await trio.to_thread.run_sync(_settle, mailbox, svsm, fail)
    # No slot is served any more: the state is the last one, unless a command is still under way.
    with trio.CancelScope(shield=True):
        if svsm.state is SessionStatus.RUNNING:
            # The engine may have died between the SVSM's release and the hypervisor's.
            try:
                with hypervisor_call("continue the guest"):
                    await guest.hypervisor.resume()
            except GuestError as stuck:
                raise stuck_at_destination(stuck) from cause_of(stuck, stuck)
    if svsm.state is SessionStatus.RUNNING:
        return _completed(engine, info, task, on_progress)
    if held_up is not None:
        raise held_up from error
    raise _failure(error)


def _settle(
    mailbox: Mailbox, svsm: SourceSvsm | DestinationSvsm, end_session: Callable[[], None]
) -> tuple[TransferAborted | None, PagexferError | None]:
    """Serve no slot any more, and end the session unless it is decided; commands that are under way are waited for first.

    In a thread, so that the program's event loop does not stand still for the guest's own code, say its gate. Returns how
    this side ends where a command does not end, and keeps the SVSM; and why the guest was not let go, where a gate refuses.
    """
    unfinished = mailbox.stop(HYPERVISOR_TIMEOUT_S)
    if not svsm.lock.acquire(timeout=_LOCK_TIMEOUT_S):
        return None if svsm.state in _DECIDED else _held_up(svsm.state, unfinished), None
    refusal: PagexferError | None = None
    try:
        end_session()
    except PagexferError as error:
        refusal = error
    finally:
        svsm.lock.release()
    if unfinished:
        _LOG.warning(
            "the session has ended, and %s did not: a call of the guest's own", ", ".join(unfinished)
        )
    return None, refusal


def _held_up(state: SessionStatus, handlers: list[str]) -> TransferAborted:
    """The end of a side whose SVSM cannot be asked any more. The one command that it is at can decide a session that is
    PARKED or VERIFIED, and no other.
    """
    is_open = state in (SessionStatus.PARKED, SessionStatus.VERIFIED)
    return TransferAborted(
        Outcome.UNDECIDED if is_open else Outcome.ENDED,
        "svsm",
        f"the SVSM does not end what it is at ({', '.join(handlers)}): a call of the guest's gate, memory, tracker or "
        f"journal has not returned for {HYPERVISOR_TIMEOUT_S:g} s; "
        + (
            "until it does nobody can say who may run the guest: ask the other side before you do anything with it"
            if is_open
            else "the migration has ended all the same"
        ),
    )


async def _run(engine: EngineProcess, task: Task) -> tuple[MigrationInfo | None, BaseException | None]:
    """The engine's final figures, or how it ended otherwise: any error, or a cancel. The SVSM's state comes before both."""
    try:
        return await engine.run(task), None
    except BaseException as error:
        return None, error


async def _lift_throttle(hypervisor: Hypervisor, left: Collection[str]) -> None:
    if isinstance(hypervisor, ThrottlingHypervisor) and THROTTLE in left:
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
    return failure if isinstance(failure, UsageError) else _cause(error)


def _cause(error: BaseException | None) -> TransferAborted:
    """How the engine ended, in one line, whatever it was. What it says of who may run the guest is left out."""
    if error is None:
        return _NOT_COMPLETE
    try:
        failure = first_failure(error)
    except BaseException as defect:
        return TransferAborted(Outcome.ENDED, "internal", one_line(repr(defect)))
    if isinstance(failure, TransferAborted) and failure.outcome is Outcome.UNDECIDED:
        return _UNAWARE
    return _CANCELLED if failure is None else as_aborted(failure)
