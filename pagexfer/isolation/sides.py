"""Both sides of a migration whose engine is another process: this process is the SVSM's and has the guest.

Whatever the engine says of its end, who may run the guest is what the SVSM's own state says.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from ..engine.failure import cause_of, hypervisor_call, with_cause
from ..engine.hypervisor import ThrottlingHypervisor
from ..engine.progress import Status
from ..engine.steering import Steering
from ..errors import GuestError, LocalProtocolError, Outcome, TransferAborted
from ..svsm.commands import destination_channel, destination_control, source_channel, source_control
from ..wire.constants import MAX_CHANNELS
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
# As the engine says it where it has tried, too.
_STUCK: Final = "and the guest does not go on here"


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
        aborted: TransferAborted | None = None
        stuck: GuestError | None = None
        info: MigrationInfo | None = None
        try:
            info = await engine.run(task)
        except TransferAborted as error:
            aborted = error
        finally:
            with trio.CancelScope(shield=True):
                give_up()
                steering.waits(paused=False)
                if svsm.state is SessionStatus.ABORTED:
                    stuck = await _let_go_on(guest.hypervisor, throttled=True)
    if svsm.state is SessionStatus.FINISHED:
        return _completed(info or engine.latest)
    why = str(aborted) if aborted is not None else "the engine says that the move is complete, and it is not"
    if svsm.state is SessionStatus.STARTED:
        if aborted is not None and aborted.outcome is Outcome.UNDECIDED:
            raise aborted
        raise TransferAborted(
            Outcome.UNDECIDED,
            "undecided",
            f"the start token left and no answer came: the guest stays parked here; ask the destination ({why})",
        )
    if aborted is None or aborted.outcome is Outcome.UNDECIDED:
        aborted = TransferAborted(Outcome.ENDED, "engine", why)
    if stuck is not None and _STUCK not in str(aborted):
        message = f"{aborted}; {_STUCK}: {with_cause(stuck)}"
        raise TransferAborted(aborted.outcome, aborted.reason, message) from cause_of(stuck, stuck)
    raise aborted


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

    with Mailbox(1 + MAX_CHANNELS, BUFFERS, BUFFER_BYTES, give_up, task.cpus) as mailbox:

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
        aborted: TransferAborted | None = None
        stuck: GuestError | None = None
        info: MigrationInfo | None = None
        try:
            info = await engine.run(task)
        except TransferAborted as error:
            aborted = error
        finally:
            with trio.CancelScope(shield=True):
                give_up()
                if svsm.state is SessionStatus.RUNNING:
                    # The engine may have died between the SVSM's release and the hypervisor's.
                    stuck = await _let_go_on(guest.hypervisor, throttled=False)
    if stuck is not None:
        message = f"the guest was released here but does not run: {with_cause(stuck)}"
        raise TransferAborted(Outcome.UNDECIDED, "undecided", message) from cause_of(stuck, stuck)
    if svsm.state is SessionStatus.RUNNING:
        return _completed(info or engine.latest)
    if aborted is not None:
        raise aborted
    raise TransferAborted(Outcome.ENDED, "engine", "the engine says that the move is complete, and it is not")


async def _let_go_on(hypervisor: Hypervisor, *, throttled: bool) -> GuestError | None:
    """Have the guest run. Returns why it does not, where it does not."""
    try:
        with hypervisor_call("continue the guest"):
            await hypervisor.resume()
        # An engine that died did not lift it.
        if throttled and isinstance(hypervisor, ThrottlingHypervisor):
            with hypervisor_call("throttle the guest"):
                await hypervisor.throttle(0)
    except GuestError as error:
        return error
    return None


def _completed(info: MigrationInfo | None) -> MigrationInfo:
    if info is None:
        raise TransferAborted(
            Outcome.UNDECIDED, "engine", "the move is complete, and the engine never reported"
        )
    return replace(info, status=Status.COMPLETED)
