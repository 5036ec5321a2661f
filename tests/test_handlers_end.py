"""Handlers of slots that are still at a command when their session ends: nobody's loop and nobody's files suffer."""

from __future__ import annotations

import os
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from pagexfer.errors import Outcome, TransferAborted
from pagexfer.isolation import sides
from pagexfer.isolation.mailbox import Mailbox
from pagexfer.migration import MigrationReport
from pagexfer.wire.slot import NO_BUFFER, Command

from .isolated_engines import IsolatedMove, start_hostile_engines
from .test_doorbell import Svsm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import BinaryIO

    from .engine_guests import SmallMachine


_LONG_S = 20.0


def _until(condition: Callable[[], bool]) -> None:
    patience = threading.Event()
    for _ in range(5000):
        if condition():
            return
        patience.wait(0.001)
    raise AssertionError("it does not happen")


def _files() -> list[BinaryIO]:
    """As many new files of the program as would get every number that is free."""
    return [tempfile.TemporaryFile(buffering=0) for _ in range(64)]


def _are_untouched(files: list[BinaryIO]) -> bool:
    sizes = [os.fstat(file.fileno()).st_size for file in files]
    for file in files:
        file.close()
    return sizes == [0] * len(files)


def _open_bells() -> int:
    folder = Path("/proc/self/fd")
    return sum(os.readlink(folder / name) == "anon_inode:[eventfd]" for name in _names(folder))


def _names(folder: Path) -> list[str]:
    """Without that of the folder itself."""
    return [name for name in os.listdir(folder) if (folder / name).is_symlink()]


def test_a_handler_that_comes_back_late_rings_nobody_elses_bell() -> None:
    before = _open_bells()
    svsm = Svsm()
    with svsm.mailbox as mailbox:
        host = svsm.host()
        given = (host.to_svsm, host.to_host)
        host.memory.write_command(1, Command.EPOCH, NO_BUFFER, 0, 0, 0)
        os.eventfd_write(host.to_svsm, 1)
        _until(svsm.lock.locked)
        assert mailbox.stop(0.01) == ["handler-3"]
    files = _files()
    assert {file.fileno() for file in files} >= set(given)
    svsm.let.set()
    thread = mailbox.handlers[0].thread
    thread.join(_LONG_S)
    assert not thread.is_alive()
    assert _are_untouched(files)
    assert _open_bells() == before


def test_handlers_leave_no_file_open() -> None:
    before = _open_bells()
    svsm = Svsm(3)
    with svsm.mailbox:
        for _ in range(3):
            svsm.host()
    assert _open_bells() == before
    assert not any(handler.thread.is_alive() for handler in svsm.mailbox.handlers)


class _Held:
    """A call of a guest's own code that does not return before `let`."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.let = threading.Event()
        self.thread: threading.Thread | None = None

    def __call__(self) -> None:
        self.thread = threading.current_thread()
        self.entered.set()
        self.let.wait(_LONG_S)

    def end(self) -> None:
        """Let it return, and wait for its handler's end."""
        assert self.thread is not None
        self.let.set()
        self.thread.join(_LONG_S)
        assert not self.thread.is_alive()


@pytest.fixture
def held() -> Iterator[_Held]:
    held = _Held()
    yield held
    held.let.set()


def _aborted(end: object, outcome: Outcome, reason: str) -> str:
    assert isinstance(end, TransferAborted), end
    assert (end.outcome, end.reason) == (outcome, reason), str(end)
    assert str(end).isprintable()
    return str(end)


def _slow_save(machine: SmallMachine, held: _Held) -> None:
    save = machine.source.gate.save_state

    def slow(vcpu: int) -> bytes:
        held()
        return save(vcpu)

    machine.source.gate.save_state = slow  # type: ignore[method-assign]


async def test_a_slow_gate_is_waited_for_outside_of_the_loop(
    monkeypatch: pytest.MonkeyPatch, held: _Held
) -> None:
    """Here it is the loop that lets the call return: one that stood still would never do that."""
    stopping = threading.Event()
    stop = Mailbox.stop

    def stops(self: Mailbox, timeout_s: float = _LONG_S) -> list[str]:
        stopping.set()
        return stop(self, timeout_s)

    monkeypatch.setattr(Mailbox, "stop", stops)
    move = IsolatedMove("source")
    _slow_save(move.machine, held)

    async def let() -> None:
        while not stopping.is_set():  # noqa: ASYNC110 (it is set in a thread)
            await trio.sleep(0.001)
        held.let.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(let)
        await move.run()
    # No start token was asked for, so nobody needs to be asked.
    assert "start token" not in _aborted(move.sent.end, Outcome.ENDED, "svsm")
    assert move.machine.stayed()


async def test_a_gate_that_does_not_return_is_said_so(monkeypatch: pytest.MonkeyPatch, held: _Held) -> None:
    """The guest is parked, and what the SVSM is at could be the start token."""
    monkeypatch.setattr(sides, "HYPERVISOR_TIMEOUT_S", 0.1)
    monkeypatch.setattr(sides, "_LOCK_TIMEOUT_S", 0.05)
    move = IsolatedMove("source")
    _slow_save(move.machine, held)
    await move.run()
    line = _aborted(move.sent.end, Outcome.UNDECIDED, "svsm")
    assert "the SVSM does not end what it is at (" in line
    assert "handler-0)" in line
    assert "start token" not in line
    assert "resume" not in move.machine.source.hypervisor.calls
    files = _files()
    held.end()
    assert _are_untouched(files)


async def test_a_tracker_that_does_not_return_leaves_the_guest_here(
    monkeypatch: pytest.MonkeyPatch, held: _Held
) -> None:
    monkeypatch.setattr(sides, "HYPERVISOR_TIMEOUT_S", 0.1)
    monkeypatch.setattr(sides, "_LOCK_TIMEOUT_S", 0.05)
    move = IsolatedMove("source")
    collect = move.machine.source.tracker.collect

    def slow() -> object:
        held()
        return collect()

    monkeypatch.setattr(move.machine.source.tracker, "collect", slow)
    await move.run()
    assert "does not end what it is at (handler-65535)" in _aborted(move.sent.end, Outcome.ENDED, "svsm")
    assert move.machine.source.gate.running
    held.end()
    assert move.machine.source.gate.running


@pytest.mark.parametrize("returns", [True, False])
async def test_a_destination_gate_that_is_slow_or_stands_still(
    monkeypatch: pytest.MonkeyPatch, held: _Held, returns: bool
) -> None:
    monkeypatch.setattr(sides, "HYPERVISOR_TIMEOUT_S", _LONG_S if returns else 0.1)
    monkeypatch.setattr(sides, "_LOCK_TIMEOUT_S", 0.05)
    move = IsolatedMove("destination")
    load = move.machine.destination.gate.load_state

    def slow(vcpu: int, state: bytes) -> None:
        if returns:
            held.let.wait(2.5)  # longer than the engine has patience
        else:
            held()
        load(vcpu, state)

    move.machine.destination.gate.load_state = slow  # type: ignore[method-assign]
    await move.run()
    line = _aborted(move.received.end, Outcome.ENDED, "svsm")
    assert ("does not end what it is at" in line) is not returns
    assert "released" not in line
    if not returns:
        held.end()
    assert not move.machine.destination.gate.running
    assert move.machine.stayed()


async def test_a_destination_gate_that_is_slow_to_release_has_the_guest(held: _Held) -> None:
    """Its engine lost the SVSM over it, and knows nothing."""
    move = IsolatedMove("destination")
    release = move.machine.destination.gate.release

    def slow() -> None:
        held.let.wait(2.5)  # longer than the engine has patience
        release()

    move.machine.destination.gate.release = slow  # type: ignore[method-assign]
    await move.run()
    assert isinstance(move.received.end, MigrationReport), move.received.end
    assert move.machine.moved()
    assert "ask the destination" in _aborted(move.sent.end, Outcome.UNDECIDED, "undecided")


@pytest.mark.parametrize("side", ["source", "destination"])
async def test_what_an_engine_does_not_know_is_not_said_where_the_svsm_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: str
) -> None:
    word = '{"type": "aborted", "outcome": 4, "reason": "undecided", "message": "the start token left"}'
    start_hostile_engines(tmp_path, monkeypatch, "say", word)
    move = IsolatedMove("source" if side == "source" else "destination", patience_s=0.0)
    await (move.run() if side == "source" else move.receive_alone())
    end = (move.sent if side == "source" else move.received).end
    assert "start token" not in _aborted(end, Outcome.ENDED, "engine")
