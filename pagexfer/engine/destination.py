"""The destination's engine: receives N channels into the SVSM's slots, and lets the guest run when the SVSM says so.

One nursery holds the front door and, once the SVSMs have agreed on keys, one worker for each channel. The workers meet at a
barrier at the end of each epoch, because the epoch token counts over all of them.
"""

from __future__ import annotations

import math
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final, NoReturn

import trio

from ..errors import (
    ChannelBroken,
    ChannelClosed,
    GuestError,
    LocalProtocolError,
    MalformedData,
    Outcome,
    PagexferError,
    RefusalCode,
    SvsmLost,
    SvsmRefused,
    TransferAborted,
)
from ..wire.bundle import BundleKind, parse_header_untrusted
from ..wire.constants import PAGE_SIZE
from ..wire.control import (
    Accept,
    ChannelsOpen,
    Confirm,
    EpochClosed,
    Established,
    Failed,
    Prepare,
)
from ..wire.device_state import MAX_DEVICE_STATE_BYTES
from ..wire.framing import FrameType
from ..wire.handshake import Role, parse_established_untrusted
from ..wire.slot import Command, SessionStatus
from .channel import DestinationChannel, EpochEnd
from .control import Control, PeerFailed
from .failure import (
    as_aborted,
    call_back,
    call_back_at_the_end,
    cause_of,
    first_failure,
    foreign_cause,
    hypervisor_call,
    say_farewell,
    stuck_at_destination,
    svsm_lost,
    unfit,
    watch,
)
from .hypervisor import DescribedHypervisor, WatchedHypervisor
from .progress import ChannelTally, Progress, Status
from .reception import INTRODUCTION_TIMEOUT_S, Reception
from .streams import STALL_TIMEOUT_S
from .threads import carrier

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ..wire.framing import ConnectionHello
    from .hypervisor import Hypervisor
    from .progress import MigrationInfo
    from .slots import Slot
    from .streams import Connection, Listener
    from .threads import Carrier

# Within an epoch every channel has work or meets the others at the barrier; a source that lets a channel be idle for
# longer than this many stall timeouts, each of which would have ended its own side, is gone.
IDLE_STALLS: Final = 4
PROGRESS_PERIOD_S: Final = 0.2
_HAND_OVER: Final = (BundleKind.DEVICE_STATE, BundleKind.VCPU_STATE, BundleKind.MANIFEST)
_CANCELLED: Final = TransferAborted(
    Outcome.ENDED, "cancelled", "the destination's operator cancelled the migration"
)
_BUSY: Final = TransferAborted(
    Outcome.ENDED, "busy", "the destination receives another guest already: choose another port"
)
_TAKEN: Final = TransferAborted(
    Outcome.ENDED, "guest", "another session has the destination's guest, or had it: receive into a new one"
)


class Barrier:
    """Where all channel workers meet at the end of an epoch until channel 0 has closed it."""

    def __init__(self, channels: int) -> None:
        self._channels = channels
        self._arrived: set[int] = set()
        self._all_here = trio.Event()
        self._open = trio.Event()
        self.epoch = 1

    def arrive(self, channel: int, epoch: int) -> None:
        """A channel has no more bundles of `epoch`; over a new connection it says so again.

        Raises MalformedData for any epoch but the current one.
        """
        if epoch != self.epoch:
            raise MalformedData(f"a channel ended epoch {epoch} in epoch {self.epoch}")
        self._arrived.add(channel)
        if len(self._arrived) == self._channels:
            self._all_here.set()

    @property
    def all_here(self) -> bool:
        """Whether every channel has arrived."""
        return self._all_here.is_set()

    async def wait_for_all(self) -> None:
        """Until every channel has arrived."""
        await self._all_here.wait()

    async def wait_open(self) -> None:
        """Until the epoch is closed."""
        await self._open.wait()

    def open(self) -> None:
        """The epoch is closed: all go on to the next."""
        self._open.set()
        self._arrived.clear()
        self._all_here, self._open = trio.Event(), trio.Event()
        self.epoch += 1


class DestinationEngine:
    """One incoming migration; `run` once. `make_slots` gives the channels' slots once their number is known."""

    def __init__(
        self,
        control_slot: Slot,
        make_slots: Callable[[int], Awaitable[list[Slot]]],
        hypervisor: Hypervisor,
        ram_pages: int,
        on_progress: Callable[[MigrationInfo], None],
        on_stranger: Callable[[str], None],
        stall_timeout_s: float = STALL_TIMEOUT_S,
        most_threads: int = 0,
    ) -> None:
        self._control_slot = control_slot
        self._make_slots = make_slots
        self._hypervisor = hypervisor
        self._on_progress = on_progress
        self._on_stranger = on_stranger
        self._stall_timeout_s = stall_timeout_s
        self._most_threads = most_threads
        self._progress = Progress(ram_pages * PAGE_SIZE, trio.current_time())
        self._heard: Callable[[Connection], None] = lambda _connection: None
        self._attempts = 0
        self._session = b""
        self._established_message = b""
        self._expected_channels = 0
        self._platform = b""
        self._slots: list[Slot] = []
        self._doors: list[trio.Lock] = []
        self._channels: dict[int, DestinationChannel] = {}
        self._control: Control | None = None
        self._established = trio.Event()
        self._refused: TransferAborted | None = None
        self._all_open = trio.Event()
        self._handing_over = trio.Event()
        self._device_state = bytearray()
        self._loading_since: float | None = None
        self._ready = False  # the source may have released the start token
        self._running = False

    async def run(self, listener: Listener) -> MigrationInfo:
        """Receive one migration at `listener`; returns when the guest runs here.

        Raises TransferAborted where it does not: the guest then never runs here. Strangers before and meanwhile are
        dropped, each with one line to `on_stranger`.
        """
        patience = min(INTRODUCTION_TIMEOUT_S, self._stall_timeout_s)
        reception = Reception(listener, self._greet, self._attach, self._on_stranger, patience)
        self._heard = reception.heard
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(reception.serve)
                if isinstance(self._hypervisor, WatchedHypervisor):
                    nursery.start_soon(watch, self._hypervisor)
                control = await self._agree()
                nursery.start_soon(control.listen)
                # The source has nothing more to say there but that it failed.
                nursery.start_soon(control.receive, Failed, math.inf)
                await self._wait_for_channels(control, listener)
                await self._receive(control)
                nursery.cancel_scope.cancel()
        except BaseException as error:
            if not self._running:
                with trio.CancelScope(shield=True):
                    await self._give_up(error)
        finally:
            listener.close()
            for channel in self._channels.values():
                channel.connection.close()
            if self._control is not None:
                self._control.connection.close()
        return self._finish(Status.COMPLETED)

    # Front door

    async def _greet(self, connection: Connection) -> bool:
        """Handshake with whoever opened a control connection; True once it is this migration's source."""
        attempt = self._attempts = self._attempts + 1
        try:
            return await self._agree_with(Control(connection, Role.SOURCE), attempt)
        finally:
            if self._control is None or self._control.connection is not connection:
                with trio.CancelScope(shield=True), suppress(PagexferError):
                    await self._control_slot.exchange(Command.ABORT, attempt)

    async def _agree_with(self, control: Control, attempt: int) -> bool:
        hello = (await control.receive_first(Prepare)).handshake
        self._heard(control.connection)
        try:
            _, reply = await self._control_slot.exchange(Command.PREPARE, attempt, hello)
            await control.send(Accept(reply))
            confirm = await control.receive_first(Confirm)
            answer, established = await self._control_slot.exchange(Command.SETUP, attempt, confirm.handshake)
        except (SvsmRefused, SvsmLost) as error:
            is_over = isinstance(error, SvsmLost) or self._control_slot.session is SessionStatus.FAILED
            if self._established.is_set() or not is_over:
                aborted = _BUSY if self._established.is_set() else as_aborted(error)
                await say_farewell(control, aborted)
                raise
            # The SVSM is lost, or the peer is the source and cannot be served: waiting for another one would not help.
            self._refused = as_aborted(error)
            if isinstance(error, SvsmRefused) and error.code in (RefusalCode.GEOMETRY, RefusalCode.GUEST):
                self._refused = unfit(hello, reply) if error.code is RefusalCode.GEOMETRY else _TAKEN
        else:
            self._established_message = established
            self._expected_channels = answer.result
            self._platform = confirm.platform
        # The rest is `_agree`'s: the introduction's timeout must not come between the SVSM's session and this side's.
        self._control = control
        self._established.set()
        return True

    async def _attach(self, connection: Connection, hello: ConnectionHello) -> bool:
        """Make a connection the session's channel if it proves that it is."""
        if hello.session != self._session or hello.channel >= len(self._slots):
            raise MalformedData("it names no channel of this migration")
        opening = await connection.receive_frame(FrameType.BUNDLE)
        self._heard(connection)
        replaces = parse_header_untrusted(opening, len(opening)).incarnation > 0
        # One after the other, each in its turn: so nobody but its worker gives commands to the slot of a channel that is
        # attached, and a stranger, of whom nothing more is awaited, keeps the real one waiting for one refusal.
        async with self._doors[hello.channel]:
            await (self._replace if replaces else self._open)(connection, hello.channel, opening)
        if len(self._channels) == len(self._slots):
            self._all_open.set()
        return True

    async def _open(self, connection: Connection, channel: int, opening: bytes) -> None:
        """Let a connection that proves that it is the session's be a channel's first."""
        if channel in self._channels:  # its slot is in use: nothing of a stranger goes there
            raise MalformedData(f"channel {channel} of this migration is open already")
        slot = self._slots[channel]
        await slot.exchange(Command.SETUP, package=opening)
        self._channels[channel] = DestinationChannel(slot, connection, self._progress.channels[channel])

    async def _replace(self, connection: Connection, channel: int, opening: bytes) -> None:
        """Let a connection that proves that it is the session's take the place of a channel's before (R9)."""
        await self._control_slot.exchange(Command.REPLACE, channel, opening)
        old = self._channels.get(channel)
        if old is not None:
            # What the old connection still brings would be out of place once the SVSM has its successor.
            await old.retire()
        _, word = await self._control_slot.exchange(Command.REPLACE, channel)
        await connection.send_frame(FrameType.BUNDLE, word)
        tally = self._progress.channels[channel]
        tally.replaced += 1
        self._channels[channel] = DestinationChannel(self._slots[channel], connection, tally)
        if old is not None:
            old.replaced.set()

    # Phases

    async def _agree(self) -> Control:
        """Until both SVSMs have keys; from here on the source's end is this migration's end."""
        await self._established.wait()
        if self._refused is not None:
            raise self._refused
        if self._control is None:
            raise LocalProtocolError("established without a control connection")
        await self._check_platform()
        self._session, _ = parse_established_untrusted(self._established_message)
        self._slots = await self._make_slots(self._expected_channels)
        self._doors = [trio.Lock() for _ in self._slots]
        self._progress.channels = [ChannelTally(channel) for channel in range(len(self._slots))]
        await self._control.send(Established(self._established_message))
        return self._control

    async def _check_platform(self) -> None:
        """Whether the source's machine fits this one: nobody's word, but better asked before RAM is sent than after it."""
        if not self._platform or not isinstance(self._hypervisor, DescribedHypervisor):
            return
        try:
            with hypervisor_call("compare the machines"):
                await self._hypervisor.check_platform(self._platform)
        except GuestError as error:
            raise TransferAborted(Outcome.ENDED, "geometry", str(error), foreign_cause(error)) from error

    async def _wait_for_channels(self, control: Control, listener: Listener) -> None:
        """Until every channel is open."""
        with trio.move_on_after(self._stall_timeout_s):
            await self._all_open.wait()
        if not self._all_open.is_set():
            came = f"only {len(self._channels)} of {len(self._slots)} channels came within {self._stall_timeout_s:g} s"
            if listener.lacks:
                raise TransferAborted(Outcome.ENDED, "resources", f"{came}: out of {listener.lacks}")
            raise TransferAborted(Outcome.ENDED, "connection", came)
        await control.send(ChannelsOpen(len(self._slots)))
        self._progress.set_up(trio.current_time())

    async def _receive(self, control: Control) -> None:
        """Import everything until the guest runs."""
        barrier = Barrier(len(self._channels))
        carry = carrier(len(self._channels), self._most_threads)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._report)
            for channel in self._channels:
                if channel != 0:
                    nursery.start_soon(self._serve, channel, partial(self._work, channel, carry, barrier))
            await self._serve(0, partial(self._lead, carry, barrier, control))
            nursery.cancel_scope.cancel()

    async def _serve(self, channel: int, work: Callable[[DestinationChannel], Awaitable[None]]) -> None:
        """Let `work` serve a channel, over one connection after the other."""
        while True:
            link = self._channels[channel]
            try:
                with link.at_work():
                    return await work(link)
            except (ChannelBroken, ChannelClosed) as error:
                if not self._handing_over.is_set():
                    await self._wait_for_replacement(link)
                if link.replaced.is_set():
                    continue
                if channel and self._handing_over.is_set():
                    return None  # all that is left goes over channel 0
                raise ChannelBroken(f"channel {channel} was not replaced: {error}") from error

    async def _wait_for_replacement(self, link: DestinationChannel) -> None:
        """Until another connection took the place of this one, none can any more, or none came for too long."""
        with trio.move_on_after(self._stall_timeout_s):
            async with trio.open_nursery() as nursery:

                async def give_up() -> None:
                    await self._handing_over.wait()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(give_up)
                await link.replaced.wait()
                nursery.cancel_scope.cancel()

    async def _work(self, channel: int, carry: Carrier, barrier: Barrier, link: DestinationChannel) -> None:
        """A channel that carries pages only: the SVSM takes nothing else over it."""
        importing = partial(link.import_pages, IDLE_STALLS * self._stall_timeout_s)
        while True:
            arrival = await carry(link.connection, importing)
            if isinstance(arrival, EpochEnd):
                barrier.arrive(channel, arrival.epoch)
                await barrier.wait_open()

    async def _lead(
        self, carry: Carrier, barrier: Barrier, control: Control, link: DestinationChannel
    ) -> None:
        """Channel 0, which also carries states and tokens; returns when the guest runs."""
        importing = partial(link.import_pages, IDLE_STALLS * self._stall_timeout_s)
        while True:
            arrival = await carry(link.connection, importing)
            if isinstance(arrival, EpochEnd):
                barrier.arrive(0, arrival.epoch)
                await barrier.wait_for_all()
                continue
            kind, part = arrival
            if kind in _HAND_OVER:
                self._handing_over.set()  # the source replaces nothing any more once it has begun to send states
            match kind:
                case BundleKind.DEVICE_STATE:
                    self._keep(part)
                case BundleKind.EPOCH_TOKEN:
                    if not barrier.all_here:
                        raise MalformedData("an epoch's token came before every channel's BARRIER")
                    closed = barrier.epoch
                    barrier.open()
                    self._progress.begin_epoch(0)
                    await control.send(EpochClosed(closed))
                case BundleKind.MANIFEST:
                    await self._get_ready(link)
                case BundleKind.START_TOKEN:
                    await self._start(link)
                    return

    def _keep(self, part: bytes) -> None:
        """Put the next part of the device state to those before. The cap is looked at here too: the memory is ours."""
        self._device_state += part
        if len(self._device_state) > MAX_DEVICE_STATE_BYTES:
            raise MalformedData(f"device state over the cap of {MAX_DEVICE_STATE_BYTES} bytes")

    async def _get_ready(self, link: DestinationChannel) -> None:
        """The SVSM found everything complete; READY once the hypervisor has taken its own state over."""
        self._loading_since = trio.current_time()
        try:
            with hypervisor_call("load the devices"):
                await self._hypervisor.load_device_state(bytes(self._device_state))
        except GuestError as error:
            cause = foreign_cause(error)
            raise TransferAborted(Outcome.ENDED, "device-state", str(error), cause) from error
        self._loading_since = None
        self._ready = True
        await link.answer(BundleKind.READY)

    async def _start(self, link: DestinationChannel) -> None:
        """The SVSM has released the vCPUs: from here on the guest is this side's, whatever becomes of the source."""
        with trio.CancelScope(shield=True):
            with hypervisor_call("continue the guest"):
                await self._hypervisor.resume()
            self._running = True
            try:
                await link.answer(BundleKind.RUNNING)
            except (ChannelBroken, ChannelClosed) as error:
                # The source stays parked and says that it is undecided; this side's answer is clear.
                line = f"the guest runs here, but the source may not know: {error}"
                call_back_at_the_end(self._on_stranger, line)
            # Strangers may still be at the door, whose hellos go to this slot as well.
            await self._control_slot.exchange(Command.FINISH)

    async def _report(self) -> None:
        while True:
            call_back(self._on_progress, self._progress.info(trio.current_time()))
            await trio.sleep(PROGRESS_PERIOD_S)

    # Ends

    async def _give_up(self, error: BaseException) -> NoReturn:
        """End the session for good, tell the source, and raise what the caller should see."""
        refusal = await self._fail_session()
        failure = first_failure(error) or svsm_lost(refusal)
        aborted = _CANCELLED if failure is None else as_aborted(failure)
        if self._control is not None and aborted.reason == "connection":
            aborted = await self._control.last_words() or aborted
        if self._control is not None and not isinstance(aborted, PeerFailed):
            await say_farewell(self._control, aborted)
        # A source that has waited for long enough goes without a word: what it waited for is known here.
        if self._loading_since is not None and aborted.reason in ("connection", "timeout"):
            loading_s = trio.current_time() - self._loading_since
            line = f"{aborted}; the hypervisor here had been loading the devices for {loading_s:.1f} s"
            aborted = TransferAborted(aborted.outcome, aborted.reason, line)
        # An SVSM that is lost says nothing of who runs the guest.
        if isinstance(refusal, SvsmRefused) and self._ready:
            aborted = stuck_at_destination(aborted)
        self._finish(Status.CANCELLED if aborted is _CANCELLED else Status.FAILED)
        if aborted is _CANCELLED:
            raise error
        raise aborted from cause_of(failure, error)

    async def _fail_session(self) -> PagexferError | None:
        """FAILED for good, and if the source may have released the start token, the word that lets it go on.

        Returns why the session is not FAILED, where it is not.
        """
        try:
            if 0 in self._channels:
                with trio.move_on_after(self._stall_timeout_s):
                    await self._channels[0].answer(BundleKind.ABORT_TOKEN)
                return None
        except PagexferError:
            pass  # not verified yet, or the source is gone: then the plain end below
        if self._control_slot.session is SessionStatus.FAILED:
            return None
        try:
            await self._control_slot.command(Command.ABORT)
        except PagexferError as refusal:
            return refusal
        return None

    def _finish(self, status: Status) -> MigrationInfo:
        self._progress.end(status, trio.current_time())
        info = self._progress.info(trio.current_time())
        call_back_at_the_end(self._on_progress, info)
        return info
