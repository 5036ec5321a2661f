"""Everything that a hostile host has in its hands: the SVSMs' slots, all messages, and nothing of what is inside.

Every command to an SVSM goes through `World.ring`, where the referee looks at each answer.
"""

from __future__ import annotations

import secrets
from collections import Counter, defaultdict, deque
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

from ...attestation import PskAttestor
from ...errors import LocalProtocolError, MalformedData
from ...svsm.commands import destination_channel, destination_control, source_channel, source_control
from ...svsm.destination import DestinationSvsm
from ...svsm.source import SourceSvsm
from ...wire.bundle import Direction
from ...wire.constants import GUEST_ID_BYTES
from ...wire.slot import CONTROL_SLOT, NO_BUFFER, REGISTER_PAGE_BYTES, Command, SlotStatus
from ...wire.slot import SessionStatus as State
from ..pair import Message
from ..slot import BUFFERS, HostSlot
from .guest import HostileGuest, Machine
from .hold import Hold, Point
from .referee import Answered, Referee
from .schedule import Tracking
from .violation import Violation

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable

    from ...svsm.service import SlotService
    from ...wire.slot import SlotMemory, StatusRegisters
    from .ledger import CipherLedger
    from .schedule import Schedule, Step

# The smallest buffers there are: a bundle of 14 pages, so that one epoch has several even of a small guest.
_BUFFER_BYTES: Final = 1 << 16
_SLOT_BYTES: Final = REGISTER_PAGE_BYTES + BUFFERS * _BUFFER_BYTES
_MAX_SOURCES: Final = 4
_MAX_DESTINATIONS: Final = 5
_MAX_CHANNELS: Final = 3
ARENA_BYTES: Final = (_MAX_SOURCES + _MAX_DESTINATIONS) * (_MAX_CHANNELS + 1) * _SLOT_BYTES
CONTROL: Final = 0  # index of the control slot; channel c is slot c + 1
FIRST: Final = CONTROL + 1
_ATTESTOR: Final = PskAttestor(b"the key that both sides of a test have")


class Side:
    """One SVSM and its slots: the control slot first, then each channel's. `machine` is what it guards."""

    def __init__(self, svsm: SourceSvsm | DestinationSvsm, machine: Machine, slots: list[HostSlot]) -> None:
        self.svsm = svsm
        self.machine = machine
        self.slots = slots
        self.opened: set[int] = set()  # channels whose opening bundle a destination took
        self.alive = True
        self.is_source = isinstance(svsm, SourceSvsm)


class Reply(NamedTuple):
    """What came back from a command; `status` is None where there was nobody to answer."""

    ok: bool
    status: StatusRegisters | None
    data: bytes


class Held(NamedTuple):
    """An export that stands still inside of an SVSM."""

    side: Side
    slot: int
    hold: Hold[Reply]


class World:
    """One guest, its source SVSMs one after the other, destinations, and the network between them.

    `source` and `destination` are the sides that the honest part of the host works with now.
    """

    def __init__(self, schedule: Schedule, ledger: CipherLedger, arena: mmap.mmap) -> None:
        self.schedule = schedule
        self.ledger = ledger
        self.guest = HostileGuest(schedule.pages, schedule.vcpus, schedule.tracking)
        self.referee = Referee(self.guest, ledger)
        self.tally: Counter[str] = Counter()
        self._arena = memoryview(arena)
        self._slots_used = 0
        self._machines: list[Machine] = [self.guest]
        self.sources: list[Side] = []
        self.destinations: list[Side] = []
        self.queues: defaultdict[tuple[Direction, int], deque[Message]] = defaultdict(deque)
        self.seen: list[Message] = []
        self.letters: list[bytes] = []  # handshake messages
        self.withheld: set[int] = set()
        self.hiding = False
        self.skipping = False
        self.waiting: list[Step] = []  # attacks that found nothing to act on so far
        self.held: Held | None = None
        self.steps_held = 0
        source, destination = self.new_source(), self.new_destination()
        assert source is not None
        assert destination is not None
        self.source, self.destination = source, destination

    def close(self) -> None:
        """Give all memory back."""
        if self.held is not None:  # after a violation, which counts more than what comes of this
            with suppress(Violation):
                self.let_go()
        for machine in self._machines:
            machine.memory.close()

    # New sides

    def new_source(self) -> Side | None:
        """Another SVSM session over the same guest, as after a reset; None where there were enough."""
        if len(self.sources) == _MAX_SOURCES:
            return None
        svsm = SourceSvsm(
            self.guest.memory,
            self.guest.gate,
            self.guest.tracker,
            _ATTESTOR,
            secrets.token_bytes(GUEST_ID_BYTES),
            audit=self.schedule.tracking is Tracking.AUDIT,
        )
        slots = [self._slot(CONTROL_SLOT, partial(source_control, svsm=svsm))] + [
            self._slot(channel, partial(source_channel, svsm=svsm, channel=channel))
            for channel in range(self.schedule.channels)
        ]
        side = Side(svsm, self.guest, slots)
        self.sources.append(side)
        return side

    def new_destination(self) -> Side | None:
        """Another machine that waits for a guest; None where there were enough."""
        if len(self.destinations) == _MAX_DESTINATIONS:
            return None
        machine = Machine.empty(self.schedule.pages, self.schedule.vcpus)
        self._machines.append(machine)
        svsm = DestinationSvsm(machine.memory, machine.gate, _ATTESTOR)
        slots = [self._slot(CONTROL_SLOT, partial(destination_control, svsm=svsm))] + [
            self._slot(channel, partial(destination_channel, svsm=svsm, channel=channel))
            for channel in range(self.schedule.channels)
        ]
        side = Side(svsm, machine, slots)
        self.destinations.append(side)
        return side

    def crash(self, side: Side) -> None:
        """This side never does anything again. What a destination had in memory is gone; a source's gate stays as it is."""
        if self.held is not None and self.held.side is side:
            self.let_go()
        side.alive = False
        side.slots.clear()
        if not side.is_source:
            side.machine.crash()

    def _slot(self, slot_id: int, serve: Callable[[SlotMemory], SlotService]) -> HostSlot:
        start = self._slots_used * _SLOT_BYTES
        self._slots_used += 1
        return HostSlot(slot_id, serve, _BUFFER_BYTES, self._arena[start : start + _SLOT_BYTES])

    # Commands

    def command(
        self,
        side: Side,
        slot: int,
        command: int,
        argument: int = 0,
        argument2: int = 0,
        package: bytes | None = None,
    ) -> Reply:
        """One command of a host that keeps to the slot's rules."""
        if not side.alive:
            return Reply(False, None, b"")
        buffer = NO_BUFFER
        if package is not None:
            try:
                buffer = side.slots[slot].give(package)
            except LocalProtocolError:  # this host spoilt its own slot before
                return Reply(False, None, b"")
        length = 0 if package is None else len(package)
        return self.ring(side, slot, command, buffer, argument, argument2, length)

    def ring(
        self, side: Side, slot: int, command: int, buffer: int, argument: int, argument2: int, length: int
    ) -> Reply:
        """Any registers at all. Raises Violation where what comes back is not as documented."""
        if self.holds(side, slot):
            self.let_go()  # nobody looks at its registers before
        host = side.slots[slot]
        package = b""
        if buffer < BUFFERS and length <= host.memory.geometry.package_bytes:
            package = bytes(host.memory.packages[buffer][:length])
        self.ledger.owner = side
        before = self.referee.before(side, command)
        self.tally["commands"] += 1
        try:
            status = host.ring(command, buffer, argument, argument2, length)
        except Violation:
            raise
        except MalformedData as error:
            raise Violation("R8", f"an answer that is none: {error}") from error
        except Exception as error:
            raise Violation("R8", f"{type(error).__name__} came out of the SVSM: {error}") from error
        try:
            data = host.take(status)
        except LocalProtocolError:
            data = b""
        hold = self.ledger.hold
        if hold is not None and hold.is_mine and hold.state is not None:
            before = before._replace(state=hold.state, sent=hold.sent)
        ok = status.status is not SlotStatus.REFUSED
        if status.error is not None:
            self.tally[f"refused {status.error.name}"] += 1
        if status.session is not before.state:
            self.tally[f"{'source' if side.is_source else 'destination'} {status.session.name}"] += 1
        if command == Command.AUDIT and status.session is State.PARKED and ok:
            self.tally["pages that an audit caught"] += status.result2
            self.tally["audits completed"] += status.status is SlotStatus.OK
        self.referee.answered(side, before, Answered(slot, command, argument, package, status, data))
        return Reply(ok, status, data)

    # An export that takes long

    def hold(self, side: Side, channel: int, point: Point, steps: int) -> bool:
        """Have a source seal whatever is pending over a channel, and stop there for so many steps of the schedule.

        False where nothing was to be sealed.
        """
        slot = channel + 1
        export = partial(self.command, side, slot, Command.EXPORT, 0, self.schedule.pages)
        hold = self.ledger.hold = Hold(export, point, side)
        if not hold.begin():
            self.ledger.hold = None
            hold.finish()
            return False
        hold.sent = {gfn: self.guest.is_now(gfn) for gfn in range(self.schedule.pages)}
        self.held = Held(side, slot, hold)
        self.steps_held = steps
        return True

    def holds(self, side: Side, slot: int) -> bool:
        """Whether a slot's handler stands still."""
        return self.held is not None and (self.held.side, self.held.slot) == (side, slot)

    def step_ended(self) -> None:
        """To be told after each step of the schedule."""
        self.steps_held -= 1
        if self.steps_held <= 0:
            self.let_go()

    def let_go(self) -> None:
        """Let the export end that stands still, if one does; what was sealed goes on its way."""
        if self.held is None:
            return
        side, slot, hold = self.held
        self.held = None
        hold.state = side.svsm.state
        try:
            reply = hold.finish()
        finally:
            self.ledger.hold = None
        if reply.data and side is self.source:
            self.send(Direction.FORWARD, slot - 1, reply.data)

    # Messages

    def send(self, direction: Direction, channel: int, data: bytes) -> None:
        """A message leaves: it is seen, and waits for its delivery."""
        message = Message(direction, channel, data)
        self.seen.append(message)
        self.queues[direction, channel].append(message)

    def deliver(self, message: Message, to: Side) -> Reply:
        """Give a message to a side, as the host of that side does with what comes over that channel."""
        channel = message.channel % self.schedule.channels
        if to.is_source:
            return self.command(to, CONTROL + 1, Command.IMPORT, package=message.data)
        if channel in to.opened:
            return self.command(to, channel + 1, Command.IMPORT, package=message.data)
        reply = self.command(to, channel + 1, Command.SETUP, package=message.data)
        if reply.ok:
            to.opened.add(channel)
        return reply

    def receiver(self, message: Message) -> Side:
        """Whom the honest host would give a message to."""
        return self.destination if message.direction is Direction.FORWARD else self.source

    def begin_anew(self) -> bool:
        """The honest host takes fresh sides and forgets what was on its way. False where there were enough."""
        source, destination = self.new_source(), self.new_destination()
        if source is None or destination is None:
            return False
        self.source, self.destination = source, destination
        self.queues.clear()
        self.withheld.clear()
        return True
