"""The hostile host in memory: what it must have tried for its silence to mean something, and that it is not blind."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from itertools import product

import pytest

from pagexfer.svsm.states import DESTINATION, SOURCE, Event
from pagexfer.testing.hostile import (
    ATTACKS,
    Act,
    HostileHost,
    Schedule,
    Step,
    Tracking,
    Violation,
    as_python,
    fails_alike,
    make_schedule,
    shrink,
)
from pagexfer.testing.hostile.__main__ import main
from pagexfer.testing.hostile.hypervisor import COMMANDS
from pagexfer.testing.hostile.world import Reply, Side, World
from pagexfer.wire.slot import Command
from pagexfer.wire.slot import SessionStatus as State

SCHEDULES = 1200
# What is seldom by its nature (an attack on two messages that wait, say) still has to come this often in a run.
AT_LEAST_TRIED = 20
AT_LEAST_REACHED = 300


def test_no_schedule_violates_a_rule_and_every_attack_and_state_was_there() -> None:
    report = HostileHost().run_seeds(range(SCHEDULES))
    seldom = {
        act.value: report.tally[act.value] for act in ATTACKS if report.tally[act.value] < AT_LEAST_TRIED
    }
    assert seldom == {}
    reached = [f"source {state.name}" for state in SOURCE.values()]
    reached += [f"destination {state.name}" for state in DESTINATION.values()]
    assert {name: report.tally[name] for name in reached if report.tally[name] < AT_LEAST_REACHED} == {}
    assert report.tally["migrations completed"] > SCHEDULES // 5
    assert report.tally["audits completed"] > AT_LEAST_TRIED
    assert report.tally["pages that an audit caught"] > 0
    for code in ("COMMAND", "STATE", "NOT_READY", "INTEGRITY", "AUTHENTICATION"):
        assert report.tally[f"refused {code}"] > AT_LEAST_TRIED


def test_seeds_that_nobody_has_seen_yet() -> None:
    first = random.SystemRandom().randrange(1 << 32)
    print(f"seeds {first} to {first + 99}")
    HostileHost().run_seeds(range(first, first + 100))


def test_an_honest_host_completes_every_migration() -> None:
    host = HostileHost()
    for seed in range(30):
        schedule = make_schedule(seed)
        steps = tuple(step for step in schedule.steps if step.act in (Act.HONEST, Act.WRITE, Act.PAGE_STATE))
        host.run(replace(schedule, steps=steps + (Step(Act.HONEST, 5),) * 150))
    assert host.report.tally["migrations completed"] == 30
    assert not any(name.startswith("refused") for name in host.report.tally)


@pytest.mark.parametrize(
    "act",
    [Act.HIDE_DIRTY, Act.FALSE_HINT, Act.SLOW_PARK, Act.STRANGER, Act.RERUN_SOURCE, Act.RERUN_SESSION],
)
@pytest.mark.parametrize("tracking", [Tracking.SVSM, Tracking.AUDIT, Tracking.COMPARISON])
def test_what_a_host_may_do_without_harm_does_not_end_a_migration(act: Act, tracking: Tracking) -> None:
    """Also a network full of strangers, and a host that asks for a second session: refused, and nothing else happens."""
    host = HostileHost()
    for seed in range(20):
        attacks = [Step(act, *random.Random(seed).choices(range(1 << 16), k=3)) for _ in range(3)]
        steps = [Step(Act.HONEST, 3)] * 150
        steps[12:12], steps[30:30] = attacks[:1], attacks[1:]
        host.run(Schedule(tuple(steps), pages=16, vcpus=2, channels=2, tracking=tracking))
    assert host.report.tally["migrations completed"] == 20
    assert host.report.tally[act.value] >= 20


def test_any_command_at_any_slot_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those too that seeds seldom bring, and numbers that are none: no rule is broken, and most migrations complete."""
    asked: set[tuple[bool, bool, int]] = set()
    ring = World.ring

    def noted(world: World, side: Side, slot: int, command: int, *rest: int) -> Reply:
        asked.add((side.is_source, slot > 0, command))
        return ring(world, side, slot, command, *rest)

    monkeypatch.setattr(World, "ring", noted)
    rng = random.Random(1)
    host = HostileHost()
    slots = list(product(range(len(COMMANDS)), (0, 1), (0, 1)))
    for number, side, slot in slots:
        steps = [Step(Act.HONEST, rng.randrange(1 << 16)) for _ in range(100)]
        for _ in range(4):
            # The last number makes it this very command, and chooses arguments and package.
            attack = Step(Act.COMMAND, side, 8 * number + slot, 3 * rng.randrange(1 << 14))
            steps.insert(rng.randrange(60), attack)
        host.run(Schedule(tuple(steps), pages=8, vcpus=1, channels=1))
    assert set(Command) < set(COMMANDS)
    assert asked == {
        (source, channel, number)
        for source in (True, False)
        for channel in (True, False)
        for number in COMMANDS
    }
    assert host.report.tally["migrations completed"] > len(slots) // 2


def test_the_same_seeds_give_the_same_run() -> None:
    """But for the keys, which are fresh: what happens does not depend on them."""
    assert HostileHost().run_seeds(range(60)).tally == HostileHost().run_seeds(range(60)).tally


@pytest.mark.parametrize("tracking", [Tracking.SVSM, Tracking.AUDIT, Tracking.COMPARISON])
def test_a_hidden_dirty_page_is_sent_where_the_host_need_not_be_believed(tracking: Tracking) -> None:
    """The one freshness that is not promised is the host's word (R13): there the referee sees the stale page."""
    steps = (
        [Step(Act.HONEST)] * 10 + [Step(Act.HIDE_DIRTY), Step(Act.WRITE, 3, 0, 5)] + [Step(Act.HONEST)] * 100
    )
    schedule = Schedule(tuple(steps), tracking=Tracking.HOST)
    with pytest.raises(Violation, match=r"^R4"):
        HostileHost().run(schedule)
    host = HostileHost()
    host.run(replace(schedule, tracking=tracking))
    assert host.report.tally["migrations completed"] == 1
    assert host.report.tally["pages that an audit caught"] == (tracking is Tracking.AUDIT)


def test_a_manifest_asked_for_while_a_page_is_being_sealed_sends_no_page_twice() -> None:
    """Found by seed 79: asking took a page that was written meanwhile into the epoch that was carrying it."""
    early_manifest = Step(Act.EARLY_TOKEN, 0, 1)
    steps = (
        *[Step(Act.HONEST)] * 11,
        Step(Act.HOLD, 0, 1, 8 + 16 * 2),
        *[Step(Act.HONEST)] * 5,
        Step(Act.WRITE),
        *[Step(Act.HONEST)] * 2,
        early_manifest,
        *[Step(Act.HONEST)] * 9,
    )
    host = HostileHost()
    host.run(Schedule(steps, pages=1, channels=3))
    assert host.report.tally[Act.HOLD.value] == 1
    assert host.report.tally["refused NOT_READY"] > 0


@pytest.mark.parametrize("tracking", [Tracking.AUDIT, Tracking.COMPARISON])
def test_without_a_comparison_there_is_no_manifest(tracking: Tracking) -> None:
    """The host's own attempt ends, and the guest goes on at the source."""
    steps = (Step(Act.SKIP_COMPARISON), *[Step(Act.HONEST)] * 400)
    host = HostileHost()
    host.run(Schedule(steps, tracking=tracking))
    assert host.report.tally["refused NOT_READY"] > 0
    assert host.report.tally["source STARTED"] == 0
    assert host.report.tally["source ABORTED"] > 0


# Finding, shrinking, reproducing


@pytest.fixture
def abort_after_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SOURCE, (State.STARTED, Event.ABORT), State.ABORTED)


@pytest.mark.usefixtures("abort_after_start")
def test_a_violation_comes_with_its_seed_and_a_schedule_that_reproduces_it() -> None:
    with pytest.raises(Violation) as caught:
        HostileHost().run_seeds(range(400, 700))
    assert caught.value.rule == "R7"
    text, _, code = caught.value.what.partition(", shortest schedule:\n")
    assert "; seed " in text
    shortest = eval(code, {"Schedule": Schedule, "Step": Step, "Act": Act, "Tracking": Tracking})
    assert isinstance(shortest, Schedule)
    assert sum(step.act is not Act.HONEST for step in shortest.steps) <= 2
    with pytest.raises(Violation, match=r"^R7"):
        HostileHost().run(shortest)


@pytest.mark.usefixtures("abort_after_start")
def test_the_command_prints_a_violation_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["hostile", "--schedules", "300", "--seed", "400"])
    assert main() == 1
    printed = capsys.readouterr().out
    assert "violations                                             1\nR7: " in printed


def test_the_command_prints_what_was_tried(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["hostile", "--schedules", "40", "--seed", "7"])
    assert main() == 0
    printed = capsys.readouterr().out
    assert "violations                                             0\n" in printed
    assert printed.rstrip().endswith("seeds 7 to 46")


def test_no_schedules_at_all_are_bad_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["hostile", "--schedules", "0"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2


def test_shrinking_leaves_nothing_out_that_is_needed() -> None:
    def fails(schedule: Schedule) -> bool:
        kinds = [step.act for step in schedule.steps]
        return kinds.count(Act.DROP) >= 2 and Step(Act.FLIP, 7) in schedule.steps

    schedule = make_schedule(1)
    needed = [Step(Act.DROP, 1), Step(Act.DROP, 2, 3), Step(Act.FLIP, 7)]
    long = replace(schedule, steps=(*schedule.steps[:20], *needed, *schedule.steps[20:], *needed))
    short = shrink(long, fails)
    assert len(short.steps) == 3
    assert fails(short)
    assert short.pages == short.vcpus == short.channels == 1


def test_a_failure_of_another_kind_is_another_failure() -> None:
    schedule = Schedule((Step(Act.HONEST),) * 10)
    assert not fails_alike(schedule, Violation("R1", "something else"))


def test_a_schedule_prints_as_python() -> None:
    steps = (Step(Act.HONEST), Step(Act.HONEST), Step(Act.FLIP, 0, 2))
    schedule = Schedule(steps, 12, 2, 3, Tracking.AUDIT)
    text = as_python(schedule)
    assert "*[Step(Act.HONEST)] * 2," in text
    assert eval(text, {"Schedule": Schedule, "Step": Step, "Act": Act, "Tracking": Tracking}) == schedule
