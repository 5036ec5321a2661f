"""A model of the commit exchange, small enough to be explored whole: state machines, journals, network, crashes.

The transitions are those of `svsm.states`, the verdicts those of `svsm.recovery`; what the model adds is the order of the
steps that a command is made of. A side does one command at a time, but anything else may happen between two of its steps:
the other side's steps, messages, a crash. tests/test_journal.py holds the real SVSMs to the order that is assumed here.
"""

from __future__ import annotations

import enum
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple

from pagexfer.svsm.recovery import MayRun, judge, judge_both
from pagexfer.svsm.states import DESTINATION, SOURCE, Event
from pagexfer.wire.bundle import BundleKind
from pagexfer.wire.handshake import Role
from pagexfer.wire.journal import JOURNALED, JournalRecord
from pagexfer.wire.slot import SessionStatus as State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

READY, START, RUNNING, ABORT_TOKEN = (
    BundleKind.READY,
    BundleKind.START_TOKEN,
    BundleKind.RUNNING,
    BundleKind.ABORT_TOKEN,
)
# What cannot be written down is not done; the other records are tried. As in `svsm.journal`, written once more by hand.
DURABLE_FIRST: Final = {State.KEYED, State.STARTED, State.VERIFIED, State.RUNNING}


class Do(enum.Enum):
    """One step of a command; a crash may come between any two."""

    JOURNAL = (
        "journal"  # try to write a status down: it works, it does not, or it does and the side is not told
    )
    INSIST = "insist"  # the same, and the command ends where it does not work
    ENTER = "enter"  # the status in memory
    PARK = "park"
    RELEASE = "release"  # vCPUs run
    SEND = "send"  # a sealed bundle is in the host's hands, who has it for ever


class Step(NamedTuple):
    do: Do
    state: State = State.IDLE
    kind: BundleKind = READY


Steps = tuple[Step, ...]


class Source(NamedTuple):
    state: State = State.IDLE
    journal: State | None = None
    alive: bool = True
    runs: bool = True  # the guest, here: in this process, or because the operator let it
    ready: bool = False
    deaf: bool = False  # it wiped its keys while STARTED
    todo: Steps = ()


class Destination(NamedTuple):
    state: State = State.IDLE
    journal: State | None = None
    alive: bool = True
    machine: bool = (
        True  # what holds the guest's memory; with `Setting.outside` it outlives the SVSM's process
    )
    abandoned: bool = False  # the operator said that it never ran, and never will
    ran: bool = False  # the guest ran here, if for a moment: what it did is done
    key: bool = True  # it can still seal an answer
    todo: Steps = ()


class World(NamedTuple):
    source: Source = Source()
    destination: Destination = Destination()
    sent: tuple[BundleKind, ...] = ()
    heard: int = 0  # fair links only: how many answers the source has got


def _as_it_is(_name: str, steps: Steps) -> Steps:
    return steps


class Design(NamedTuple):
    """What is explored. The defaults are the code's; a test gives another table or another order to see it fail."""

    source: Mapping[tuple[State, Event], State] = SOURCE
    destination: Mapping[tuple[State, Event], State] = DESTINATION
    order: Callable[[str, Steps], Steps] = _as_it_is
    abort_token_from: frozenset[State] = frozenset({State.VERIFIED, State.FAILED})
    fail_keeps_key: bool = True
    abandons_machines_that_live: bool = False


class Setting(NamedTuple):
    """Who is around the two sides."""

    hostile: bool = True  # messages get lost, doubled, reordered and forged; else each arrives once, in order
    crashes: bool = True
    disks_fail: bool = True
    operator: bool = True  # follows `pagexfer recover` wherever a side is dead
    sees_life: bool = (
        True  # `recover` can see that the destination's process lives (False: it got a copy of the file)
    )
    # The destination's guest is in a process of its own (QEMU). One that was left behind may be continued by somebody who
    # asks nobody. As long as its journal says VERIFIED that is a fork in any design; from its abandoning on it must not be.
    outside: bool = False


Move = tuple[str, World]


class Model:
    def __init__(self, design: Design, setting: Setting) -> None:
        self.design = design
        self.setting = setting

    def moves(self, world: World) -> Iterator[Move]:
        """Everything that can happen next."""
        yield from self._source_moves(world)
        yield from self._destination_moves(world)
        if self.setting.crashes:
            yield from self._crashes(world)
        if self.setting.operator:
            yield from self._operator_moves(world)

    # The source

    def _source_moves(self, world: World) -> Iterator[Move]:
        side = world.source
        if not side.alive:
            return
        if side.todo:
            yield from self._step(world, Role.SOURCE)
            return
        for event in Event:
            # PREPARE, ESTABLISH, EPOCH, PARK: nothing that the destination has a say in
            if event not in (Event.START, Event.CONFIRMED, Event.PEER_FAILED, Event.ABORT):
                yield from self._source_event(world, event)
        if side.ready:
            yield from self._source_event(world, Event.START)
        yield from self._source_event(world, Event.ABORT)  # cancelled, timed out, or the host's whim
        if self.setting.hostile:
            for kind in {READY, RUNNING, ABORT_TOKEN} & set(world.sent):
                yield from self._source_hears(world, kind)
            yield from self._source_hears(world, None)
        else:
            answers = [kind for kind in world.sent if kind is not START]
            if world.heard < len(answers):
                yield from self._source_hears(world._replace(heard=world.heard + 1), answers[world.heard])

    def _source_event(self, world: World, event: Event, label: str = "") -> Iterator[Move]:
        table, side = self.design.source, world.source
        if (side.state, event) not in table:
            return
        target = table[side.state, event]
        steps: Steps = _entering(Role.SOURCE, side.state, target)
        if event is Event.PARK:
            steps = (Step(Do.PARK), *steps)
        if event is Event.START:
            steps = (*steps, Step(Do.SEND, kind=START))
        if target is State.ABORTED:
            steps = (*steps, Step(Do.RELEASE))
        yield (
            f"source: {label or event.value}",
            world._replace(source=side._replace(todo=self.design.order(event.name, steps))),
        )

    def _source_hears(self, world: World, kind: BundleKind | None) -> Iterator[Move]:
        side, table = world.source, self.design.source
        if side.deaf:
            return
        label = f"hears {kind.name if kind else 'a forged answer'}"
        if kind is READY and side.state is State.PARKED and not side.ready:
            yield f"source: {label}", world._replace(source=side._replace(ready=True))
        elif kind is RUNNING and (side.state, Event.CONFIRMED) in table:
            yield from self._source_event(world, Event.CONFIRMED, label)
        elif kind is ABORT_TOKEN and (side.state, Event.PEER_FAILED) in table:
            yield from self._source_event(world, Event.PEER_FAILED, label)
        elif side.state not in (State.PARKED, State.STARTED):
            return  # it has no keys, or awaits no answer
        elif (side.state, Event.ABORT) in table:
            yield from self._source_event(world, Event.ABORT, label)
        else:
            yield f"source: {label}", world._replace(source=side._replace(deaf=True))

    # The destination

    def _destination_moves(self, world: World) -> Iterator[Move]:
        side = world.destination
        if not side.alive:
            return
        if side.todo:
            yield from self._step(world, Role.DESTINATION)
            return
        for event in Event:
            if event is not Event.START:
                yield from self._destination_event(world, event)
        if START in world.sent:
            yield from self._destination_event(world, Event.START)
        yield from self._answers(world)

    def _destination_event(self, world: World, event: Event) -> Iterator[Move]:
        table, side = self.design.destination, world.destination
        if (side.state, event) not in table:
            return
        if event is Event.FAIL:
            side = self._failing(side)
        steps = _entering(Role.DESTINATION, side.state, table[side.state, event])
        if event is Event.START:
            steps = (*steps, Step(Do.RELEASE))
        todo = self.design.order(event.name, steps)
        yield f"destination: {event.value}", world._replace(destination=side._replace(todo=todo))

    def _answers(self, world: World) -> Iterator[Move]:
        side = world.destination
        if not side.key:
            return
        if side.state is State.VERIFIED:
            yield self._seal(world, side, (), READY)
        if side.state is State.RUNNING:
            yield self._seal(world, side, (), RUNNING)
        if side.state in self.design.abort_token_from:
            steps: Steps = ()
            if side.state is not State.FAILED:
                side = self._failing(side)
                steps = _entering(Role.DESTINATION, side.state, State.FAILED)
            yield self._seal(world, side, (*steps, Step(Do.INSIST, State.FAILED)), ABORT_TOKEN)

    def _seal(self, world: World, side: Destination, before: Steps, kind: BundleKind) -> Move:
        todo = self.design.order(kind.name, (*before, Step(Do.SEND, kind=kind)))
        return f"destination: seals {kind.name}", world._replace(destination=side._replace(todo=todo))

    def _failing(self, side: Destination) -> Destination:
        keeps = self.design.fail_keeps_key and side.state in (State.VERIFIED, State.FAILED)
        return side._replace(key=side.key and keeps)

    # One step of either

    def _step(self, world: World, role: Role) -> Iterator[Move]:
        side = world.source if role is Role.SOURCE else world.destination
        step, rest = side.todo[0], side.todo[1:]
        label = f"{role.name.lower()}: ... {step.do.value}"
        match step.do:
            case Do.JOURNAL | Do.INSIST:
                done = side._replace(journal=step.state, todo=rest)
                yield f"{label} {step.state.name}", _with(world, done)
                if not self.setting.disks_fail:
                    return
                for name, told in (("fails", side), ("works, and says that it failed", done)):
                    yield f"{label} {step.state.name} {name}", _with(world, self._unwritten(told, step, rest))
            case Do.ENTER:
                yield f"{label} {step.state.name}", _with(world, side._replace(state=step.state, todo=rest))
            case Do.SEND:
                after = side._replace(todo=rest)
                if step.kind is ABORT_TOKEN and isinstance(after, Destination):
                    after = after._replace(key=False)
                sent = world.sent if step.kind in world.sent else (*world.sent, step.kind)
                yield f"{label} {step.kind.name}", _with(world._replace(sent=sent), after)
            case Do.PARK | Do.RELEASE if isinstance(side, Source):
                yield label, _with(world, side._replace(runs=step.do is Do.RELEASE, todo=rest))
            case _:
                assert isinstance(side, Destination)
                yield label, _with(world, side._replace(ran=True, todo=rest))

    def _unwritten(self, side: Source | Destination, step: Step, rest: Steps) -> Source | Destination:
        """The side was told that a write failed."""
        if step.do is Do.JOURNAL and step.state not in DURABLE_FIRST:
            return side._replace(todo=rest)
        if step.do is Do.INSIST or isinstance(side, Source):
            return side._replace(todo=())
        # A destination that cannot go on fails.
        failing = self._failing(side)
        verified = State.VERIFIED if step.state is State.VERIFIED else side.state
        return failing._replace(todo=_entering(Role.DESTINATION, verified, State.FAILED))

    def _crashes(self, world: World) -> Iterator[Move]:
        source, destination = world.source, world.destination
        if source.alive:
            yield "source: crashes", world._replace(source=crashed_source(source))
        if destination.alive:
            crashed = crashed_destination(destination, machine=self.setting.outside)
            yield "destination: crashes", world._replace(destination=crashed)
        elif destination.machine:
            gone = crashed_destination(destination)
            yield "destination: its machine ends", world._replace(destination=gone)

    # The operator

    def _operator_moves(self, world: World) -> Iterator[Move]:
        source, destination = world.source, world.destination
        if self.can_abandon(destination):
            yield "operator: abandons", _with(world, abandoned(destination))
        if destination.abandoned and destination.machine:
            yield (
                "somebody: continues the destination's machine",
                _with(world, destination._replace(ran=True)),
            )
        runners = self.recovered(world)
        if not source.alive and Role.SOURCE in runners:
            yield "operator: lets the source run", _with(world, source._replace(runs=True))
        if not destination.alive and Role.DESTINATION in runners:
            yield "operator: lets the destination run", _with(world, destination._replace(ran=True))

    def can_abandon(self, side: Destination) -> bool:
        """Whether `recover --abandon` does it."""
        free = not side.machine or self.design.abandons_machines_that_live
        return free and not side.alive and side.journal is State.VERIFIED

    def recovered(self, world: World) -> set[Role]:
        """Whom `recover` lets run, given one journal, or the other, or both: more than one would be a fork."""
        source, destination = record_of(world.source), record_of(world.destination)
        runners: set[Role] = set()
        source_lives, destination_lives = (
            world.source.alive,
            world.destination.alive and self.setting.sees_life,
        )
        if source is None:
            runners.add(Role.SOURCE)  # there is no journal: no session, so the guest never left
        elif judge(source, active=source_lives).may_run is MayRun.THIS_SIDE:
            runners.add(Role.SOURCE)
        if destination is not None:
            verdict = judge(destination, active=destination_lives)
            if verdict.may_run is MayRun.THIS_SIDE:
                runners.add(Role.DESTINATION)
            if destination.status is State.FAILED:
                runners.add(Role.SOURCE)  # "the source may run it, also where its journal says STARTED"
        if source is not None and destination is not None:
            both = judge_both(source, destination, active=source_lives or destination_lives)
            if both.runner is not None:
                runners.add(both.runner)
        return runners


def record_of(side: Source | Destination) -> JournalRecord | None:
    if side.journal is None:
        return None
    role = Role.SOURCE if isinstance(side, Source) else Role.DESTINATION
    return JournalRecord(role, side.journal, bytes(16), bytes(16))


def _entering(role: Role, state: State, target: State) -> Steps:
    enter = Step(Do.ENTER, target)
    if target is State.FAILED and state in (State.IDLE, State.KEYED, State.IMPORTING):
        return (enter,)  # KEYED says the same
    return (
        (Step(Do.JOURNAL, target), enter) if target is not state and target in JOURNALED[role] else (enter,)
    )


def _with(world: World, side: Source | Destination) -> World:
    return world._replace(source=side) if isinstance(side, Source) else world._replace(destination=side)


def crashed_source(side: Source) -> Source:
    """Only the journal is left."""
    return Source(journal=side.journal, alive=False, runs=False)


def crashed_destination(side: Destination, *, machine: bool = False) -> Destination:
    """Only the journal is left, what the guest did while it ran, and with `machine` the guest itself."""
    return Destination(
        journal=side.journal,
        alive=False,
        machine=machine,
        abandoned=side.abandoned,
        ran=side.ran,
        key=False,
    )


def abandoned(side: Destination) -> Destination:
    return side._replace(journal=State.FAILED, abandoned=True)


class Counterexample(AssertionError):
    """A way to a state that must not be."""

    def __init__(self, what: str, way: list[str]) -> None:
        super().__init__("\n  ".join([f"{what}:", *way]))
        self.what = what


def explore(model: Model, check: Callable[[Model, World], str]) -> set[World]:
    """Every world that can come about, each checked; raises Counterexample with the shortest way where `check` objects."""
    first = World()
    came_from: dict[World, tuple[str, World] | None] = {first: None}
    frontier = deque([first])
    while frontier:
        world = frontier.popleft()
        if what := check(model, world):
            raise Counterexample(what, _way(came_from, world))
        for label, after in model.moves(world):
            if after not in came_from:
                came_from[after] = label, world
                frontier.append(after)
    return set(came_from)


def _way(came_from: Mapping[World, tuple[str, World] | None], world: World) -> list[str]:
    labels = []
    while (step := came_from[world]) is not None:
        label, world = step
        labels.append(label)
    return labels[::-1]
