"""Two machines that do not fit part before a page is sent, while the guest still runs at its source."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio

from pagexfer.errors import GuestError, Outcome, TransferAborted
from pagexfer.guests.kvm.hypervisor import KIND as KVM
from pagexfer.guests.platform import check_kind, describe_kind
from pagexfer.guests.simulated.hypervisor import KIND as SIMULATED
from pagexfer.migration import MigrationReport
from pagexfer.wire.control import MAX_PLATFORM_BYTES

from .engine_guests import SmallMachine, TestHypervisor
from .isolated_engines import IsolatedMove

if TYPE_CHECKING:
    from collections.abc import Callable

_OURS = b"a machine"
_DIFFERS = "the source's machine is an old one, the destination's a new one"


class Described(TestHypervisor):
    """A hypervisor that says what machine it has."""

    def __init__(self, platform: bytes = _OURS) -> None:
        super().__init__()
        self.described = platform
        self.compared: list[bytes] = []
        self.before_describe = self.before_compare = trio.lowlevel.checkpoint

    async def platform(self) -> bytes:
        await self.before_describe()
        return self.described

    async def check_platform(self, platform: bytes) -> None:
        await self.before_compare()
        self.compared.append(platform)
        if platform != self.described:
            raise GuestError(_DIFFERS)


@pytest.fixture(params=["source", "destination"])
def move(request: pytest.FixtureRequest) -> IsolatedMove:
    """One side's engine is the parameter, and isolated."""
    return IsolatedMove(request.param)


def _described(move: IsolatedMove, here: TestHypervisor, there: TestHypervisor) -> SmallMachine:
    move.machine.source.hypervisor, move.machine.destination.hypervisor = here, there
    return move.machine


def _ended(end: object, reason: str) -> str:
    assert isinstance(end, TransferAborted), end
    assert (end.outcome, end.reason) == (Outcome.ENDED, reason), str(end)
    return str(end)


async def test_machines_that_fit(move: IsolatedMove) -> None:
    there = Described()
    machine = _described(move, Described(), there)
    await move.run()
    assert there.compared == [_OURS]
    assert isinstance(move.sent.end, MigrationReport), move.sent.end
    assert machine.moved()


async def test_machines_that_differ(move: IsolatedMove) -> None:
    here, there = Described(b"an old one"), Described()
    machine = _described(move, here, there)
    await move.run()
    assert _ended(move.sent.end, "geometry") == f"the destination says: {_DIFFERS}"
    assert _ended(move.received.end, "geometry") == _DIFFERS
    assert there.compared == [b"an old one"]
    assert here.calls == []  # it was never stopped
    assert all(info.ram.transferred == 0 for info in move.sent.progress)
    assert not machine.destination.memory.words.any()
    assert machine.stayed()


@pytest.mark.parametrize(("here", "there"), [(TestHypervisor, Described), (Described, TestHypervisor)])
async def test_one_that_says_nothing_fits_every_other(
    move: IsolatedMove, here: type[TestHypervisor], there: type[TestHypervisor]
) -> None:
    machine = _described(move, here(), there())
    await move.run()
    assert getattr(machine.destination.hypervisor, "compared", []) == []
    assert isinstance(move.sent.end, MigrationReport), move.sent.end
    assert machine.moved()


async def test_a_platform_has_a_cap(move: IsolatedMove) -> None:
    machine = _described(move, Described(bytes(MAX_PLATFORM_BYTES)), Described(bytes(MAX_PLATFORM_BYTES)))
    await move.run()
    assert machine.moved()
    other = IsolatedMove(move.isolated, patience_s=0.0)  # a destination waits for another source
    machine = _described(other, Described(bytes(MAX_PLATFORM_BYTES + 1)), Described())
    await other.run()
    assert "over the cap of 16384" in _ended(other.sent.end, "guest")
    assert machine.stayed()


async def _fail() -> None:
    await trio.lowlevel.checkpoint()
    raise ZeroDivisionError("no machine")


async def test_a_hypervisor_that_cannot_describe_its_machine(move: IsolatedMove) -> None:
    here = Described()
    here.before_describe = _fail
    move.patience_s = 0.0
    machine = _described(move, here, Described())
    await move.run()
    said = _ended(move.sent.end, "guest")
    assert said.startswith("the hypervisor did not describe"), said
    assert machine.stayed()


async def test_a_hypervisor_that_cannot_compare(move: IsolatedMove) -> None:
    there = Described()
    there.before_compare = _fail
    machine = _described(move, Described(), there)
    await move.run()
    for end in (move.sent.end, move.received.end):
        assert "the hypervisor did not c" in _ended(end, "geometry")
    assert "no machine" not in str(move.sent.end)  # that is the destination's own
    assert machine.stayed()


@pytest.mark.parametrize(("source", "destination"), [(KVM, SIMULATED), (SIMULATED, KVM)])
def test_kinds_of_guests(source: str, destination: str) -> None:
    check: Callable[[bytes], None] = partial(check_kind, kind=destination)
    check(describe_kind(destination))
    for other in (describe_kind(source), b"", b"\xff", describe_kind(destination) + b" "):
        with pytest.raises(GuestError, match=destination):
            check(other)
