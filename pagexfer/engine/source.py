"""The source's engine: connects, lets the SVSM's bundles flow over N channels epoch by epoch, parks, and hands over.

One nursery holds it all: a worker for each channel while an epoch runs, and a listener on the control connection. Whatever
goes wrong, the SVSM is asked to abort: before the start token it does and the guest goes on here, after it it refuses, and
the answer is undecided unless the destination's word came.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, NoReturn

import numpy as np
import trio

from ..dirty import collected
from ..errors import (
    ChannelBroken,
    GuestError,
    MalformedData,
    Outcome,
    PagexferError,
    RefusalCode,
    SvsmRefused,
    TransferAborted,
    UsageError,
)
from ..wire.bundle import BundleKind
from ..wire.constants import FIRST_EPOCH, PAGE_SIZE, SESSION_ID_BYTES
from ..wire.control import (
    MAX_PLATFORM_BYTES,
    Accept,
    ChannelsOpen,
    Confirm,
    EpochClosed,
    Established,
    Prepare,
)
from ..wire.framing import ConnectionHello, FrameType, Purpose
from ..wire.handshake import Role, parse_established_untrusted
from ..wire.slot import Command, SessionStatus, SlotStatus
from .audit import audit, predict_audit
from .channel import SourceChannel
from .control import Control, PeerFailed
from .convergence import Costs, Decision
from .course import Course
from .failure import (
    RESUME,
    SECOND_HAND,
    STOP_LOG,
    as_aborted,
    call_back,
    call_back_at_the_end,
    cause_of,
    first_failure,
    hypervisor_call,
    hypervisor_thread,
    is_disturbed,
    let_go_on,
    not_undone,
    say_farewell,
    svsm_lost,
    undecided,
    watch,
)
from .hypervisor import DescribedHypervisor, WatchedHypervisor, octets, saved_device_state
from .plan import Chunk, plan_chunks
from .progress import ChannelTally, Progress, Status
from .repair import Repair, used_up_key_as_broken
from .streams import STALL_TIMEOUT_S, connect
from .threads import carrier

if TYPE_CHECKING:
    from collections.abc import Callable

    from .hypervisor import Hypervisor
    from .progress import MigrationInfo
    from .slots import Slot
    from .steering import Steering

PARK_TIMEOUT_S: Final = 5.0
# The guest stands still while the destination checks the manifest: rather give up than wait for long.
READY_TIMEOUT_S: Final = 10.0
PROGRESS_PERIOD_S: Final = 0.2
_PARK_POLL_S: Final = 0.0002
# Bytes of dirty log in one HINT command: 2 GiB of RAM.
_HINT_BYTES: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """What a source's operator chooses for good; `Steering` has what may change."""

    channels: int = 4
    stall_timeout_s: float = STALL_TIMEOUT_S
    audit: bool = False
    most_threads: int = 0
    compressed: bool = False


class SourceEngine:
    """One outgoing migration; `run` once. `slots` are the channels' slots, `control_slot` the session's."""

    def __init__(
        self,
        control_slot: Slot,
        slots: list[Slot],
        hypervisor: Hypervisor,
        ram_pages: int,
        vcpus: int,
        options: SourceOptions,
        steering: Steering,
        on_progress: Callable[[MigrationInfo], None],
    ) -> None:
        self._control_slot = control_slot
        self._slots = slots
        self._hypervisor = hypervisor
        self._ram_pages = ram_pages
        self._vcpus = vcpus
        self._options = options
        self._steering = steering
        self._on_progress = on_progress
        self._progress = Progress(ram_pages * PAGE_SIZE, trio.current_time())
        self._channels: list[SourceChannel] = []
        self._lost_pages = 0  # since the epoch began
        self._course = Course(
            steering,
            hypervisor,
            self._progress,
            options.stall_timeout_s,
            compressed=options.compressed,
        )
        self._cancelled = TransferAborted(
            Outcome.ENDED, "cancelled", "the source's operator cancelled the migration"
        )
        self._epoch = FIRST_EPOCH
        self._carry = carrier(options.channels, options.most_threads)
        self._left_at_hypervisor: set[str] = set()  # what of ours is to be undone there
        self._start_asked = False
        self._completed = False

    async def run(self, host: str, port: int) -> MigrationInfo:
        """Migrate to the destination at `host`:`port`; returns the final figures.

        Raises TransferAborted with the outcome: ENDED or REFUSED with the guest running here again, UNDECIDED after the
        start token. Cancelling it, or its steering, before the start token lets the guest go on here. Raises UsageError,
        with nothing done, where the guest is another session's or has left.
        """
        control: Control | None = None
        try:
            hello = await self._prepare()
            control = Control(await connect(host, port, self._options.stall_timeout_s), Role.DESTINATION)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._migrate, control, hello, host, port, nursery.cancel_scope)
                nursery.start_soon(self._report)
                nursery.start_soon(self._course.follow, self._channels)
                nursery.start_soon(self._end_on_cancel)
                if isinstance(self._hypervisor, WatchedHypervisor):
                    nursery.start_soon(watch, self._hypervisor)
        except UsageError:
            raise  # of `_prepare`: there is nothing to give up
        except BaseException as error:
            if not self._completed:
                with trio.CancelScope(shield=True):
                    await self._give_up(error, control)
        finally:
            self._close(control)
        return self._finish(Status.COMPLETED)

    # Phases

    async def _prepare(self) -> bytes:
        """Make the guest this session's, before anybody is connected to or the hypervisor is touched; returns the hello."""
        try:
            _, hello = await self._control_slot.exchange(Command.PREPARE, self._options.channels)
        except SvsmRefused as refused:
            if refused.code is RefusalCode.STATE:
                raise UsageError("this guest is being moved already, or has left") from None
            raise
        return hello

    async def _migrate(
        self, control: Control, hello: bytes, host: str, port: int, done: trio.CancelScope
    ) -> None:
        session = await self._handshake(control, hello)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(control.listen)
            await self._open_channels(control, session, host, port)
            # Before any page: a guest that may not move again is refused while it still runs here.
            await self._channels[0].token(BundleKind.LEDGER)
            self._progress.set_up(trio.current_time())
            connect_again = partial(connect, host, port, self._options.stall_timeout_s)
            repair = Repair(self._channels, connect_again, session, self._options.stall_timeout_s)
            nursery.start_soon(repair.watch)
            with self._course.precopy():
                await self._precopy(control, repair)
            with self._course.blackout():
                await self._blackout(control, repair)
                # Little is left to send from here on, and a connection that breaks ends the migration before START.
                await repair.stop()
                await self._hand_over()
            nursery.cancel_scope.cancel()
        done.cancel()

    async def _handshake(self, control: Control, hello: bytes) -> bytes:
        await control.connection.send_frame(
            FrameType.HELLO, ConnectionHello(Purpose.CONTROL, 0, bytes(SESSION_ID_BYTES)).pack()
        )
        await control.send(Prepare(hello))
        reply = (await control.receive_first(Accept)).handshake
        _, proof = await self._control_slot.exchange(Command.SETUP, package=reply)
        await control.send(Confirm(proof, await self._platform()))
        established = (await control.receive_first(Established)).handshake
        session, _ = parse_established_untrusted(established)
        await self._control_slot.exchange(Command.CONFIRM, package=established)
        return session

    async def _platform(self) -> bytes:
        if not isinstance(self._hypervisor, DescribedHypervisor):
            return b""
        with hypervisor_call("describe its machine"):
            platform = octets("platform", await self._hypervisor.platform())
        if len(platform) > MAX_PLATFORM_BYTES:
            raise GuestError(f"a platform of {len(platform)} bytes is over the cap of {MAX_PLATFORM_BYTES}")
        return platform

    async def _open_channels(self, control: Control, session: bytes, host: str, port: int) -> None:
        for channel, slot in enumerate(self._slots):
            tally = ChannelTally(channel)
            connection = await connect(host, port, self._options.stall_timeout_s)
            self._channels.append(SourceChannel(channel, slot, connection, tally))
            self._progress.channels.append(tally)
            await self._channels[-1].open(session)
        opened = await control.receive(ChannelsOpen, self._options.stall_timeout_s)
        if opened.channels != len(self._slots):
            raise MalformedData(f"the destination has {opened.channels} of {len(self._slots)} channels open")

    async def _precopy(self, control: Control, repair: Repair) -> None:
        log = self._hypervisor.dirty_log
        if log is not None:
            self._left_at_hypervisor.add(STOP_LOG)
            await hypervisor_thread("start its dirty log", log.start)
        audit_s: float | None = None
        look_s = 0.0
        while True:
            began = trio.current_time()
            pending, chunks = await self._begin_epoch()
            if audit_s is None:  # the first epoch looks for nothing: all of RAM is to be sent
                audit_s = (
                    await predict_audit(self._control_slot, self._ram_pages) if self._options.audit else 0.0
                )
            else:
                # An SVSM that compares RAM with what was sent does so in black-out too.
                took_s = trio.current_time() - began
                look_s = min(look_s or took_s, took_s)
            round_trip_s = control.connection.round_trip_s()
            costs = Costs(audit_s, round_trip_s, look_s)
            if await self._course.decide(pending, costs) is Decision.SWITCHOVER:
                return
            await self._transfer(control, repair, pending, chunks)

    async def _blackout(self, control: Control, repair: Repair) -> None:
        """Park the guest and send everything that is left of its memory."""
        self._progress.park(trio.current_time())
        # A gate may know no other way to park than its hypervisor's pause.
        self._left_at_hypervisor.add(RESUME)
        await self._park()
        self._course.step("stopping the guest")
        # The hypervisor's stop after the park, which it has no part in, and before the last epoch: until then its devices
        # may write to pages that they share with the guest.
        with hypervisor_call("stop the guest"):
            await self._hypervisor.stop()
        await self._course.lift_throttle()
        self._course.step("looking for what was written last")
        pending, chunks = await self._begin_epoch()
        if self._options.audit:
            self._course.step("comparing RAM with what was sent")
            self._progress.audit = await audit(self._control_slot)
            if self._progress.audit.pages:
                pending, chunks = await self._begin_epoch()
        self._course.step("sending the last pages")
        await self._transfer(control, repair, pending, chunks)
        while self._lost_pages:
            pending, chunks = await self._begin_epoch()
            await self._transfer(control, repair, pending, chunks)

    async def _hand_over(self) -> None:
        self._course.step("saving the devices")
        with hypervisor_call("save the devices"):
            device_state = await saved_device_state(self._hypervisor)
        self._course.step("sending the states of devices and vCPUs")
        first = self._channels[0]
        await first.device_state(device_state)
        for vcpu in range(self._vcpus):
            await first.vcpu_state(vcpu)
        await first.token(BundleKind.MANIFEST)
        self._course.step("waiting for the destination")
        stall_timeout = self._options.stall_timeout_s
        await self._await_answer(first, BundleKind.READY, min(READY_TIMEOUT_S, stall_timeout))
        await trio.lowlevel.checkpoint_if_cancelled()
        # From here on only the destination's sealed answer says who runs the guest. Neither a cancel nor the end of the
        # control connection, which may well arrive first, cuts it off; the timeouts bound the shield.
        with trio.CancelScope(shield=True):
            self._start_asked = True
            await first.token(BundleKind.START_TOKEN)
            await self._await_answer(first, BundleKind.RUNNING, stall_timeout)
            await self._control_slot.command(Command.FINISH)
            self._completed = True

    # Steps

    async def _begin_epoch(self) -> tuple[int, list[Chunk]]:
        """Pending pages and the chunks that cover them."""
        self._lost_pages = 0
        log = self._hypervisor.dirty_log
        if log is not None:
            collect = partial(collected, log, self._ram_pages, "dirty log")
            dirty = await hypervisor_thread("read its dirty log", collect)
            words = dirty.words.view(np.uint8).data
            for start in range(0, len(words), _HINT_BYTES):
                await self._control_slot.exchange(
                    Command.HINT, start * 8, bytes(words[start : start + _HINT_BYTES])
                )
        while True:
            answer, counts = await self._control_slot.exchange(Command.EPOCH)
            if answer.status is not SlotStatus.INCOMPLETE:
                break
            await trio.lowlevel.checkpoint()  # where the SVSM reads all RAM, this takes as long
        chunks = plan_chunks(
            np.frombuffer(counts, dtype="<u4"), answer.result2, self._ram_pages, self._options.channels
        )
        return answer.result, chunks

    async def _transfer(self, control: Control, repair: Repair, pending: int, chunks: list[Chunk]) -> None:
        """Send one epoch over all channels and have the destination close it."""
        began, sent = trio.current_time(), self._progress.transferred
        self._progress.begin_epoch(pending)
        self._course.pace(self._channels)
        queue = deque(chunks)
        async with trio.open_nursery() as nursery:
            for channel in self._channels:
                nursery.start_soon(self._send_epoch, channel, repair, queue)
        await self._close_epoch(control, repair)
        self._epoch += 1
        self._course.finished(pending, began, self._progress.transferred - sent)

    async def _send_epoch(self, channel: SourceChannel, repair: Repair, queue: deque[Chunk]) -> None:
        while True:
            try:
                with used_up_key_as_broken():
                    return await self._carry(channel.connection, partial(self._export, channel, queue))
            except ChannelBroken:
                await self._replace(channel, repair)

    async def _export(self, channel: SourceChannel, queue: deque[Chunk]) -> None:
        await channel.export(queue)
        await channel.barrier(self._epoch)

    async def _close_epoch(self, control: Control, repair: Repair) -> None:
        """Send the token until the destination has closed the epoch.

        Where a connection breaks meanwhile, channel 0 is replaced as well: a token on its way counts what was lost.
        """
        first = self._channels[0]
        barriers_due: set[SourceChannel] = set()  # on connections that replaced those that had them
        token_due = True
        while True:
            try:
                if token_due:
                    for channel in tuple(barriers_due):
                        await channel.barrier(self._epoch)
                        barriers_due.discard(channel)  # no connection carries it twice
                    with used_up_key_as_broken():
                        await first.token(BundleKind.EPOCH_TOKEN)
                    token_due = False
            except ChannelBroken:
                closed = False
            else:
                closed = await self._epoch_closed(control, repair)
            if closed:
                return
            broken = {first, *repair.ended()}
            barriers_due |= broken
            for channel in broken:
                token_due |= await self._replace(channel, repair)

    async def _epoch_closed(self, control: Control, repair: Repair) -> bool:
        """True once the destination has closed the epoch, False where a connection ends before."""
        closed: EpochClosed | None = None
        async with trio.open_nursery() as nursery:

            async def give_up() -> None:
                await repair.wait_ended()
                nursery.cancel_scope.cancel()

            nursery.start_soon(give_up)
            closed = await control.receive(EpochClosed, self._course.close_timeout_s(self._channels))
            nursery.cancel_scope.cancel()
        if closed is not None and closed.epoch != self._epoch:
            raise MalformedData(f"the destination closed epoch {closed.epoch} instead of {self._epoch}")
        return closed is not None

    async def _replace(self, channel: SourceChannel, repair: Repair) -> bool:
        """Replace a channel's connection; returns whether the epoch's token was lost with it."""
        damage = await repair.replace(channel)
        self._lost_pages += damage.pages
        self._course.pace(self._channels)
        return damage.token

    async def _park(self) -> None:
        with trio.move_on_after(PARK_TIMEOUT_S):
            while True:
                answer = await self._control_slot.command(Command.BLACKOUT)
                if answer.status is not SlotStatus.INCOMPLETE:
                    return
                await trio.sleep(_PARK_POLL_S)
        raise TransferAborted(
            Outcome.ENDED, "vcpu-not-parked", f"not every vCPU parked within {PARK_TIMEOUT_S:g} s"
        )

    async def _await_answer(self, channel: SourceChannel, kind: BundleKind, timeout: float) -> None:
        try:
            with trio.fail_after(timeout):
                answer = await channel.receive_answer()
        except trio.TooSlowError:
            raise ChannelBroken(f"the destination did not say {kind.name} within {timeout:g} s") from None
        if answer is not kind:
            raise TransferAborted(
                Outcome.ENDED,
                "destination-failed",
                f"the destination answered {answer.name}, not {kind.name}",
            )

    async def _end_on_cancel(self) -> None:
        await self._steering.wait_cancelled()
        raise self._cancelled

    async def _report(self) -> None:
        while True:
            call_back(self._on_progress, self._progress.info(trio.current_time()))
            await trio.sleep(PROGRESS_PERIOD_S)

    # Ends

    async def _give_up(self, error: BaseException, control: Control | None) -> NoReturn:
        """Have the SVSM abort, tell the destination, and raise what the caller should see."""
        refusal: PagexferError | None = None
        try:
            await self._control_slot.command(Command.ABORT)
        except PagexferError as refused:
            refusal = refused
        # A refused ABORT may have ended the session all the same, where a gate does not let its vCPUs go.
        has_ended = refusal is None or self._control_slot.session is SessionStatus.ABORTED
        if is_disturbed(self._hypervisor, error):
            self._left_at_hypervisor.add(RESUME)
        failed: dict[str, PagexferError] = {}
        if has_ended:
            failed = await let_go_on(self._hypervisor, self._course.lift_throttle, self._left_at_hypervisor)
        if isinstance(refusal, SvsmRefused):
            failed[RESUME] = refusal
        failure = first_failure(error) or svsm_lost(refusal)
        aborted = self._cancelled if failure is None else as_aborted(failure)
        if control is not None and aborted.reason in SECOND_HAND:
            aborted = await control.last_words() or aborted
        if control is not None and not isinstance(aborted, PeerFailed):
            await say_farewell(control, aborted)
        in_doubt = self._start_asked and not has_ended
        aborted = undecided(aborted) if in_doubt else not_undone(aborted, failed)
        self._finish(Status.CANCELLED if aborted is self._cancelled else Status.FAILED)
        if failure is None and aborted is self._cancelled:
            raise error
        raise aborted from cause_of(failure, error)

    def _finish(self, status: Status) -> MigrationInfo:
        self._steering.waits(paused=False)
        self._progress.end(status, trio.current_time())
        info = self._progress.info(trio.current_time())
        call_back_at_the_end(self._on_progress, info)
        return info

    def _close(self, control: Control | None) -> None:
        for channel in self._channels:
            channel.connection.close()
        if control is not None:
            control.connection.close()
