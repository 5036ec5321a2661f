"""One side is a process and dies, or is stopped, at a moment that an event triggers: the other ends with one clear line.

Whoever still may run the guest proves that it does, and no process is left behind.
"""

from __future__ import annotations

import resource
import signal
from typing import TYPE_CHECKING

import pytest
import trio

from pagexfer.errors import Outcome, TransferAborted
from pagexfer.testing.proxy import Action, FaultProxy, at_bundle, at_frame
from pagexfer.wire.bundle import BundleKind
from pagexfer.wire.framing import FrameType

from .machines import HOST, PATIENCE_S, Machines, goes_on, never_ran
from .side_processes import (
    CALM,
    ISOLATED,
    SideProcess,
    guest_goes_on,
    journals,
    new_psk,
    only_the_source_may_run,
    receive_arguments,
    recover,
    send_arguments,
    side_process,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pagexfer.testing.proxy import Frame


@pytest.fixture
def psk(tmp_path: Path) -> str:
    return new_psk(tmp_path)


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    with Machines() as machines:
        yield machines


async def test_destination_killed_while_it_waits(psk: str) -> None:
    with trio.fail_after(PATIENCE_S):
        async with side_process(*receive_arguments(psk)) as destination:
            port = await destination.port()
            destination.signal(signal.SIGKILL)
        async with side_process(*send_arguments(psk, port, *CALM)) as source:
            assert await source.end() == Outcome.ENDED
    report = source.report()
    assert "Connection refused" in report["error"]["message"]
    assert guest_goes_on(report)


@pytest.mark.parametrize(
    ("point", "outcome", "left"),
    [
        (lambda: at_frame(FrameType.HELLO, channel=0), Outcome.ENDED, "KEYED"),
        (lambda: at_bundle(BundleKind.PAGES, 2), Outcome.ENDED, "KEYED"),
        (lambda: at_bundle(BundleKind.MANIFEST), Outcome.ENDED, "KEYED"),
        (lambda: at_bundle(BundleKind.START_TOKEN), Outcome.UNDECIDED, "VERIFIED"),
    ],
    ids=["handshake", "mid-epoch", "black-out", "start-token"],
)
async def test_destination_killed_at(
    psk: str,
    point: Callable[[], Callable[[Frame], bool]],
    outcome: Outcome,
    left: str,
) -> None:
    with trio.fail_after(PATIENCE_S):
        async with side_process(*receive_arguments(psk)) as destination, trio.open_nursery() as nursery:
            proxy = FaultProxy(
                HOST,
                await destination.port(),
                point(),
                Action.DELAY,
                lambda: destination.signal(signal.SIGKILL),
            )
            async with side_process(*send_arguments(psk, await nursery.start(proxy.serve), *CALM)) as source:
                assert await source.end() == outcome
            nursery.cancel_scope.cancel()
    report = source.report()
    if outcome is Outcome.ENDED:
        assert report["error"]["reason"] == "connection"
        assert guest_goes_on(report)
    else:
        assert "stays parked here" in report["error"]["message"]
        assert "progressed" not in report["guest"]
    await only_the_source_may_run(psk, "ABORTED" if outcome is Outcome.ENDED else "STARTED", left)


@pytest.mark.parametrize(
    ("point", "options"),
    [
        (lambda: at_bundle(BundleKind.PAGES, 2), ()),
        (lambda: at_bundle(BundleKind.MANIFEST), ()),
        (lambda: at_bundle(BundleKind.MANIFEST), ISOLATED),
    ],
    ids=["mid-epoch", "black-out", "isolated-black-out"],
)
async def test_destination_stopped_at(
    psk: str, machines: Machines, point: Callable[[], Callable[[Frame], bool]], options: tuple[str, ...]
) -> None:
    await machines.start()
    with trio.fail_after(PATIENCE_S):
        async with (
            side_process(*receive_arguments(psk, *options)) as destination,
            trio.open_nursery() as nursery,
        ):
            port = await destination.port()
            proxy = FaultProxy(HOST, port, point(), Action.DELAY, lambda: destination.signal(signal.SIGSTOP))
            sent = await machines.send(await nursery.start(proxy.serve), 0.3)
            destination.process.kill()
            nursery.cancel_scope.cancel()
    assert isinstance(sent.end, TransferAborted)
    assert (sent.end.outcome, sent.end.reason) == (Outcome.ENDED, "connection")
    assert proxy.reached.is_set()
    assert await goes_on(machines.source)
    assert never_ran(machines.destination)


@pytest.mark.parametrize(
    ("point", "outcome", "left"),
    [
        (lambda: at_bundle(BundleKind.PAGES, 2), Outcome.ENDED, "KEYED"),
        (lambda: at_bundle(BundleKind.MANIFEST), Outcome.ENDED, "KEYED"),
        (lambda: at_bundle(BundleKind.START_TOKEN), Outcome.COMPLETED, "STARTED"),
    ],
    ids=["mid-epoch", "black-out", "start-token"],
)
async def test_source_killed_at(
    psk: str,
    point: Callable[[], Callable[[Frame], bool]],
    outcome: Outcome,
    left: str,
) -> None:
    with trio.fail_after(PATIENCE_S):
        async with side_process(*receive_arguments(psk)) as destination, trio.open_nursery() as nursery:
            sources: list[SideProcess] = []
            proxy = FaultProxy(
                HOST,
                await destination.port(),
                point(),
                Action.PASS,
                lambda: sources[0].signal(signal.SIGKILL),
            )
            async with side_process(*send_arguments(psk, await nursery.start(proxy.serve), *CALM)) as source:
                sources.append(source)
                assert await source.end() == -signal.SIGKILL
            assert await destination.end() == outcome
            nursery.cancel_scope.cancel()
    report = destination.report()
    if outcome is Outcome.COMPLETED:
        assert guest_goes_on(report)  # the token had left: the guest is the destination's
    else:
        assert report["error"]["reason"] == "connection"
        assert "progressed" not in report["guest"]
    code, verdict = await trio.to_thread.run_sync(recover, *journals(psk))
    assert verdict["source-state"] == left
    runner = "the destination" if outcome is Outcome.COMPLETED else "the source"
    assert (code, verdict["may-run"]) == (Outcome.COMPLETED, runner)


@pytest.mark.parametrize("side", ["source", "destination"])
async def test_a_disk_that_is_full_at_switchover(psk: str, side: str) -> None:
    """What cannot be written down is not done: no start token leaves, or no vCPU runs; and the source may run the guest."""
    sides: dict[str, SideProcess] = {}

    def fill_disk() -> None:
        resource.prlimit(sides[side].process.pid, resource.RLIMIT_FSIZE, (0, 0))

    with trio.fail_after(PATIENCE_S):
        async with side_process(*receive_arguments(psk)) as destination, trio.open_nursery() as nursery:
            sides["destination"] = destination
            point = BundleKind.READY if side == "source" else BundleKind.START_TOKEN
            proxy = FaultProxy(HOST, await destination.port(), at_bundle(point), Action.PASS, fill_disk)
            async with side_process(*send_arguments(psk, await nursery.start(proxy.serve), *CALM)) as source:
                sides["source"] = source
                code = await source.end()
            assert await destination.end() == Outcome.ENDED
            nursery.cancel_scope.cancel()
    assert destination.report()["error"]["reason"] == "journal"
    report = source.report()
    # Each side is told where it was; which file it was, and why, is said at that side alone.
    texts = {"source": report["error"]["message"], "destination": destination.report()["error"]["message"]}
    own, other = texts.pop(side), texts.popitem()[1]
    assert "the journal or the ledger could not be written" in own
    assert "File too large" in own
    assert f"the {side} says: the journal or the ledger could not be written" in other
    assert "File too large" not in other
    if side == "source":
        assert (code, report["error"]["reason"]) == (Outcome.ENDED, "journal")
        assert guest_goes_on(report)
        code, verdict = await trio.to_thread.run_sync(recover, *journals(psk))
        assert (verdict["source-state"], verdict["destination-state"]) == ("KEYED", "FAILED")
        assert (code, verdict["may-run"]) == (Outcome.COMPLETED, "the source")
    else:  # it could not write down that it FAILED either, so it gave no abort token
        assert (code, report["error"]["reason"]) == (Outcome.UNDECIDED, "undecided")
        await only_the_source_may_run(psk, "STARTED", "VERIFIED")


async def test_a_disk_that_is_full_from_the_beginning(psk: str) -> None:
    """The destination ends at once instead of refusing one source after the other."""
    with trio.fail_after(PATIENCE_S):
        async with side_process(*receive_arguments(psk)) as destination:
            port = await destination.port()
            resource.prlimit(destination.process.pid, resource.RLIMIT_FSIZE, (0, 0))
            async with side_process(*send_arguments(psk, port, *CALM)) as source:
                assert await source.end() == Outcome.ENDED
            assert await destination.end() == Outcome.ENDED
    for side in (source, destination):
        assert side.report()["error"]["reason"] == "journal"
    assert guest_goes_on(source.report())
    assert not await trio.Path(journals(psk)[1]).exists()
