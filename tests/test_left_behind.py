"""A source that ends undoes at its hypervisor all that it can, says what it cannot, and waits for nobody for ever."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
import trio

from pagexfer.dirty import DirtyBitmap
from pagexfer.engine import failure
from pagexfer.engine.steering import MigrationParameters, Steering
from pagexfer.errors import GateError, GuestError, Outcome, TransferAborted
from pagexfer.migration import receive_guest, send_guest

from .engine_guests import SmallMachine, TestHypervisor
from .loopback import HOST
from .small_guests import ATTESTOR, PAGES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Self


@pytest.fixture(params=[False, True], ids=["local", "isolated"])
def isolated(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


class _Log:
    """A dirty log that is on or off; the call that `hangs` does not return before `let`."""

    def __init__(self, hangs: str = "") -> None:
        self.on = False
        self.hangs = hangs
        self.entered = threading.Event()
        self.let = threading.Event()
        self._collected = 0

    def start(self) -> None:
        self._call("start")
        self.on = True

    def collect(self) -> DirtyBitmap:
        self._collected += 1
        self._call(f"collect {self._collected}")
        return DirtyBitmap(PAGES)

    def stop(self) -> None:
        self._call("stop")
        self.on = False

    def _call(self, name: str) -> None:
        if name == self.hangs:
            self.entered.set()
            self.let.wait(30)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.let.set()


class _Throttling(TestHypervisor):
    """Slows its guest down as often as it is asked to, and the guest is slow already."""

    percentage = 20

    async def throttle(self, percentage: int) -> None:
        await trio.lowlevel.checkpoint()
        self.percentage = percentage


@pytest.fixture
def log() -> Iterator[_Log]:
    with _Log() as log:
        yield log


async def _fail() -> None:
    raise GuestError("the monitor said no")


async def _end(
    machine: SmallMachine, isolated: bool, scope: trio.CancelScope | None = None
) -> TransferAborted:
    """How a move from `machine` ends at its source."""
    async with trio.open_nursery() as nursery:
        port = await nursery.start(_receive, machine)
        with scope or trio.CancelScope(), pytest.raises(TransferAborted) as caught, trio.fail_after(60):
            await send_guest(
                machine.source,
                HOST,
                port,
                ATTESTOR,
                channels=2,
                isolated=isolated,
                steering=Steering(MigrationParameters(auto_converge=True)),
            )
        nursery.cancel_scope.cancel()
    assert caught.value.outcome is Outcome.ENDED
    assert str(caught.value).isprintable()
    return caught.value


async def _receive(machine: SmallMachine, task_status: trio.TaskStatus[int]) -> None:
    with pytest.raises((TransferAborted, trio.Cancelled)) as ended:
        await receive_guest(machine.destination, HOST, 0, ATTESTOR, on_listening=task_status.started)
    if isinstance(ended.value, trio.Cancelled):
        raise ended.value


async def test_a_guest_that_cannot_be_continued_keeps_no_dirty_log_on(isolated: bool, log: _Log) -> None:
    machine = SmallMachine(log)
    machine.source.hypervisor.before_save = machine.source.hypervisor.before_resume = _fail
    end = await _end(machine, isolated)
    assert str(end) == "the monitor said no; and the guest does not go on here: the monitor said no"
    assert not log.on


async def test_a_guest_that_cannot_be_continued_is_slowed_down_no_more(log: _Log) -> None:
    hypervisor = _Throttling(log)
    failed = await failure.let_go_on(hypervisor, lambda: hypervisor.throttle(0), {failure.STOP_LOG})
    assert (failed, hypervisor.percentage) == ({}, 0)
    hypervisor.percentage, hypervisor.before_resume = 20, _fail
    failed = await failure.let_go_on(hypervisor, lambda: hypervisor.throttle(0), {failure.RESUME})
    assert list(failed) == [failure.RESUME]
    assert hypervisor.percentage == 0


async def test_a_gate_that_does_not_let_go_is_said_and_all_else_is_undone(isolated: bool, log: _Log) -> None:
    def keep() -> None:
        raise GateError("the vCPUs do not go on")

    machine = SmallMachine(log)
    machine.source.hypervisor.before_save = _fail
    machine.source.gate.release = keep  # type: ignore[method-assign]
    end = await _end(machine, isolated)
    assert str(end) == (
        "the monitor said no; and the guest does not go on here: the SVSM refused ABORT: GUEST (the vCPUs do not go on)"
    )
    assert not log.on


@pytest.mark.parametrize(
    ("hangs", "what"), [("start", "start"), ("collect 2", "read"), ("collect 3", "read")]
)
async def test_a_dirty_log_that_hangs_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, isolated: bool, hangs: str, what: str
) -> None:
    """In pre-copy, and in black-out, where the guest waits as well."""
    monkeypatch.setattr(failure, "HYPERVISOR_TIMEOUT_S", 0.3)
    with _Log(hangs) as log:
        machine = SmallMachine(log)
        end = await _end(machine, isolated)
        assert (end.reason, str(end)) == (
            "guest",
            f"the hypervisor did not {what} its dirty log within 0.3 s",
        )
        assert machine.stayed()
        assert not log.on


async def test_a_dirty_log_that_does_not_stop_is_said_and_the_guest_goes_on(
    monkeypatch: pytest.MonkeyPatch, isolated: bool
) -> None:
    monkeypatch.setattr(failure, "HYPERVISOR_TIMEOUT_S", 0.3)
    with _Log("stop") as log:
        machine = SmallMachine(log)
        machine.source.hypervisor.before_save = _fail
        end = await _end(machine, isolated)
        assert str(end) == (
            "the monitor said no; and the hypervisor may keep its dirty log on: "
            "the hypervisor did not stop its dirty log within 0.3 s"
        )
        assert machine.stayed()


async def test_a_cancel_waits_for_a_dirty_log_but_not_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(failure, "HYPERVISOR_TIMEOUT_S", 0.3)
    scope = trio.CancelScope()

    async def cancel(condition: Callable[[], bool]) -> None:
        while not condition():  # noqa: ASYNC110 (it is set in a thread)
            await trio.sleep(0.001)
        scope.cancel()

    with _Log("collect 2") as log:
        machine = SmallMachine(log)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cancel, log.entered.is_set)
            end = await _end(machine, isolated=False, scope=scope)
        assert end.reason == "guest"
        assert machine.stayed()
        assert not log.on
