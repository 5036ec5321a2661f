"""The library's border: what a program gives that is not what it must be is told at once, in one line, or ends the move."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import trio

from pagexfer import (
    MigrationParameters,
    MigrationReport,
    Outcome,
    PskAttestor,
    Steering,
    TransferAborted,
    UsageError,
)
from pagexfer.dirty import DirtyBitmap, SteppedTracker
from pagexfer.errors import GuestError, LocalProtocolError, PageStateError
from pagexfer.migration import receive_guest, send_guest
from pagexfer.svsm.journal import FileJournal
from pagexfer.svsm.memory import GuestMemory
from pagexfer.svsm.sweep import Sweep
from pagexfer.testing.tracker import SteppedMarks
from pagexfer.wire.constants import PAGE_SIZE

from .engine_guests import DEVICE_STATE, SmallMachine, TestHypervisor
from .loopback import HOST
from .small_guests import ATTESTOR, PAGES

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from numpy.typing import NDArray


@pytest.fixture(params=[False, True], ids=["local", "isolated"])
def isolated(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def machine() -> SmallMachine:
    return SmallMachine()


async def move(
    machine: SmallMachine, arguments: dict[str, Any]
) -> list[MigrationReport | TransferAborted]:  # how the source ended, and the destination
    ends: dict[str, MigrationReport | TransferAborted] = {}

    async def receive(task_status: trio.TaskStatus[int]) -> None:
        receiving = partial(receive_guest, machine.destination, HOST, 0, ATTESTOR)
        try:
            ends["destination"] = await receiving(on_listening=task_status.started)
        except TransferAborted as aborted:
            ends["destination"] = aborted

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            port = await nursery.start(receive)
            try:
                ends["source"] = await send_guest(machine.source, HOST, port, ATTESTOR, **arguments)
            except TransferAborted as aborted:
                ends["source"] = aborted
    return [ends["source"], ends["destination"]]


def ended(ends: list[MigrationReport | TransferAborted], line: str) -> None:
    """The source ended for what its own guest gave, said it in that line, and its peer heard it too."""
    for end, begin in zip(ends, ("", "the source says: "), strict=True):
        assert isinstance(end, TransferAborted), end
        assert (end.outcome, end.reason, str(end)) == (Outcome.ENDED, "guest", begin + line)


# What a dirty log and a tracker give


class Log:
    """A dirty log that gives whatever a test has."""

    def __init__(self, gives: object) -> None:
        self._gives = gives

    def start(self) -> None:
        return

    def collect(self) -> DirtyBitmap:
        return self._gives  # type: ignore[return-value]

    def stop(self) -> None:
        return


REPORTS = [
    (DirtyBitmap(64), f"reports 64 pages, RAM has {PAGES}"),
    (
        DirtyBitmap(PAGES - 1),
        f"reports {PAGES - 1} pages, RAM has {PAGES}",
    ),  # as many words as it should have
    (DirtyBitmap.full(1 << 20), f"reports {1 << 20} pages, RAM has {PAGES}"),
    (None, "gave a NoneType, not a DirtyBitmap"),
    ([1, 2, 3], "gave a list, not a DirtyBitmap"),
    (np.arange(5), "gave a ndarray, not a DirtyBitmap"),
]
report = pytest.mark.parametrize(("gives", "line"), REPORTS, ids=[line for _, line in REPORTS])


@report
async def test_a_log_that_is_not_one_of_all_ram_is_not_believed(
    gives: object, line: str, isolated: bool
) -> None:
    machine = SmallMachine(Log(gives))
    ended(await move(machine, {"isolated": isolated}), f"the dirty log {line}")
    assert machine.stayed()


@report
async def test_a_tracker_that_is_not_one_of_all_ram_is_not_believed(
    gives: object, line: str, machine: SmallMachine
) -> None:
    machine.source.tracker = Log(gives)
    source, _ = await move(machine, {})
    assert isinstance(source, TransferAborted)
    assert (source.outcome, source.reason) == (Outcome.ENDED, "guest")
    assert f"(the guest's tracker {line})" in str(source)
    assert machine.stayed()


class Steps(SteppedMarks):
    """A stepped tracker that gives whatever a test has."""

    def __init__(self, gives: object) -> None:
        super().__init__(np.zeros(PAGES, dtype=np.uint8), 100)
        self._gives = gives

    def collect_part(self, _start: int, _stop: int) -> NDArray[np.int64]:
        return self._gives  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("gives", "line"),
    [
        (np.array([3, 100]), "reports gfns 3 to 100 where it was asked for 0 to 99"),
        (np.array([-1, 3]), "reports gfns -1 to 3 where"),
        (None, "gave a NoneType, not an array of gfns"),
        (np.array([1.5]), "gave a ndarray, not an array of gfns"),
        (DirtyBitmap(PAGES), "gave a DirtyBitmap, not an array of gfns"),
    ],
)
def test_a_part_of_a_tracker_is_of_the_pages_it_was_asked_for(gives: object, line: str) -> None:
    tracker = Steps(gives)
    assert isinstance(tracker, SteppedTracker)
    pending = DirtyBitmap(PAGES)
    with pytest.raises(GuestError, match=f"the guest's tracker {line}"):
        Sweep(tracker, PAGES).step(pending)
    assert pending.gfns().tolist() == list(range(100))  # whatever it found is lost with it


# What a hypervisor gives


@pytest.mark.parametrize("gives", [None, "text", [1, 2]])
async def test_a_device_state_is_bytes(gives: object, isolated: bool, machine: SmallMachine) -> None:
    machine.source.hypervisor.device_state = gives  # type: ignore[assignment]
    line = f"the hypervisor's save_device_state gave a {type(gives).__name__}, not bytes"
    ended(await move(machine, {"isolated": isolated}), line)
    assert machine.stayed()


async def test_bytes_of_other_types_are_a_device_state(isolated: bool, machine: SmallMachine) -> None:
    machine.source.hypervisor.device_state = memoryview(bytearray(DEVICE_STATE))  # type: ignore[assignment]
    ends = await move(machine, {"isolated": isolated})
    assert all(isinstance(end, MigrationReport) for end in ends), ends
    assert machine.destination.hypervisor.loaded == DEVICE_STATE


async def test_a_platform_is_bytes(isolated: bool, machine: SmallMachine) -> None:
    class Described(TestHypervisor):
        async def platform(self) -> bytes:
            await trio.lowlevel.checkpoint()
            return None  # type: ignore[return-value]

        async def check_platform(self, _platform: bytes) -> None:
            await trio.lowlevel.checkpoint()

    machine.source.hypervisor = Described()
    async with trio.open_nursery() as nursery:
        serve = partial(receive_guest, machine.destination, HOST, 0, ATTESTOR)
        port = await nursery.start(_serve, serve)
        with pytest.raises(TransferAborted) as caught:
            await send_guest(machine.source, HOST, port, ATTESTOR, isolated=isolated)
        nursery.cancel_scope.cancel()  # it never saw a source that it could believe
    assert caught.value.reason == "guest"
    assert str(caught.value) == "the hypervisor's platform gave a NoneType, not bytes"
    assert machine.stayed()


async def _serve(serve: Callable[..., Awaitable[MigrationReport]], task_status: trio.TaskStatus[int]) -> None:
    await serve(on_listening=task_status.started)


# RAM


def pages(*shape: int) -> NDArray[np.uint64]:
    return np.zeros(shape or (16, 512), dtype=np.uint64)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (pages(8192), r"shape \(pages, 512\), not uint64 of \(8192,\)"),
        (pages(3, 511), r"not uint64 of \(3, 511\)"),
        (pages(0, 512), r"not uint64 of \(0, 512\)"),
        (np.zeros((16, 4096), dtype=np.uint8), r"not uint8 of \(16, 4096\)"),
        (pages().astype(np.int64), "not int64"),
        (pages().astype(">u8"), "not >u8"),
        (np.frombuffer(bytes(65536), dtype=np.uint64).reshape(-1, 512), "has to be writable"),
        (np.asfortranarray(pages()), "contiguous"),
        (pages(32, 512)[::2], "contiguous"),
        (np.zeros(65536 + 4, dtype=np.uint8)[4:].view(np.uint64).reshape(-1, 512), "aligned"),
        ([[0] * 512], "not a list"),
        (bytearray(65536), "not a bytearray"),
        (memoryview(bytes(65536)), "not a memoryview"),
    ],
)
def test_ram_of_a_wrong_form_is_refused(words: object, line: str) -> None:
    with pytest.raises(LocalProtocolError, match=f"RAM .*{line}"):
        GuestMemory.over(words)  # type: ignore[arg-type]


def test_ram_of_the_right_form_is_taken() -> None:
    assert GuestMemory.over(pages()).pages == 16


@pytest.mark.parametrize("size", [-PAGE_SIZE, 0, 1, 4095])
def test_ram_is_whole_pages(size: int) -> None:
    with pytest.raises(
        PageStateError, match=f"RAM of {size} bytes is not a positive number of 4096-byte pages"
    ):
        GuestMemory.allocate(size)


@pytest.mark.parametrize("size", [4096.0, "4096", None])
def test_a_size_of_ram_is_a_whole_number(size: object) -> None:
    with pytest.raises(PageStateError, match=f"is a whole number, not a {type(size).__name__}"):
        GuestMemory.allocate(size)  # type: ignore[arg-type]


# Arguments


async def _wait(_value: object) -> None:
    await trio.lowlevel.checkpoint()


class _Half:
    """Has a part of what a port has."""

    stop = start = kind = memory = vcpus = None


BOTH: list[tuple[dict[str, Any], str]] = [
    ({"host": None}, "host must be a str, not NoneType"),
    ({"host": b"::1"}, "host must be a str, not bytes"),
    ({"port": 4455.0}, "port must be a whole number, not float"),
    ({"port": "4455"}, "port must be a whole number, not str"),
    ({"port": 65536}, "a port is .*, not 65536"),
    ({"attestor": None}, "attestor must be an Attestor"),
    ({"attestor": b"a key of sixteen"}, "attestor must be an Attestor, and bytes has no kind"),
    ({"attestor": PskAttestor}, "attestor must be an Attestor, and is the class PskAttestor"),
    ({"guest": None}, "guest must be a Guest, and NoneType has no memory"),
    ({"guest": _Half()}, "guest must be a Guest, and _Half has no gate"),
    ({"stall_timeout_s": "5"}, "stall_timeout_s must be a number, not str"),
    ({"stall_timeout_s": None}, "stall_timeout_s must be a number, not NoneType"),
    ({"stall_timeout_s": float("nan")}, "a stall timeout is above 0 s and finite"),
    ({"journal": "x"}, "journal must be a pathlib.Path, not str"),
    ({"isolated": "no"}, "isolated must be True or False, not str"),
    ({"cpus": 0}, "cpus must be a tuple of whole numbers, not int"),
    ({"cpus": "01"}, "cpus must be a tuple of whole numbers, not str"),
    ({"channel_threads": 4}, "channel_threads must be True or False, not int"),
    ({"on_progress": None}, "on_progress must be a function"),
    ({"on_progress": _wait}, "on_progress must be a function, and not an async one"),
]
SOURCE: list[tuple[dict[str, Any], str]] = [
    ({"channels": 4.0}, "channels must be a whole number, not float"),
    ({"channels": "4"}, "channels must be a whole number, not str"),
    ({"bundle_pages": 64.0}, "bundle_pages must be a whole number, not float"),
    ({"downtime_limit_s": "1"}, "downtime_limit_s must be a number, not str"),
    ({"compression_level": 3.5}, "compression_level must be a whole number, not float"),
    ({"ledger": None}, "ledger must be bytes, not NoneType"),
    ({"ledger": "x"}, "ledger must be bytes, not str"),
    ({"ledger": b"x"}, "not the ledger of a guest"),
    ({"steering": 3}, "steering must be a Steering, not int"),
    ({"freshness": None}, "freshness is auto or digest-audit, not None"),
]
DESTINATION: list[tuple[dict[str, Any], str]] = [
    ({"accept_compression": "no"}, "accept_compression must be True or False, not str"),
    ({"on_listening": None}, "on_listening must be a function"),
    ({"on_stranger": "line"}, "on_stranger must be a function, and not an async one, not str"),
]
wrong = partial(
    pytest.mark.parametrize,
    ("given", "line"),
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value[:40],
)


@wrong(BOTH + SOURCE)
async def test_a_source_refuses_wrong_arguments(
    given: dict[str, Any], line: str, machine: SmallMachine
) -> None:
    arguments: dict[str, Any] = {"guest": machine.source, "host": HOST, "port": 1, "attestor": ATTESTOR}
    with pytest.raises(UsageError, match=line) as caught:
        await send_guest(**{**arguments, **given})
    assert str(caught.value).isprintable()


@wrong(BOTH + DESTINATION)
async def test_a_destination_refuses_wrong_arguments(
    given: dict[str, Any], line: str, machine: SmallMachine
) -> None:
    ports: list[int] = []
    arguments: dict[str, Any] = {"guest": machine.destination, "host": HOST, "port": 0}
    arguments |= {"attestor": ATTESTOR, "on_listening": ports.append}
    with pytest.raises(UsageError, match=line) as caught:
        await receive_guest(**{**arguments, **given})
    assert str(caught.value).isprintable()
    assert not ports


@pytest.mark.parametrize(
    ("part", "given", "line"),
    [
        ("memory", bytes(4096), "guest.memory must be a GuestMemory, not bytes"),
        ("gate", _Half(), "guest.gate must be a VcpuGate, and _Half has no raise_flag"),
        ("hypervisor", _Half(), "guest.hypervisor must be a Hypervisor, and _Half has no dirty_log"),
        ("tracker", _Half(), "guest.tracker must be a DirtyTracker, and _Half has no collect"),
        ("hypervisor", TestHypervisor(3), "dirty_log must be a DirtyTracker, and int has"),  # type: ignore[arg-type]
    ],
)
async def test_a_guest_is_one_in_all_its_parts(
    part: str, given: object, line: str, machine: SmallMachine
) -> None:
    setattr(machine.source, part, given)
    with pytest.raises(UsageError, match=line):
        await send_guest(machine.source, HOST, 1, ATTESTOR)


async def test_an_attestor_without_a_kind_is_none(machine: SmallMachine) -> None:
    attestor: Any = SimpleNamespace(
        kind="psk", policy_digest=b"", evidence=1, verify=1, check_move=1, contribution=1
    )
    with pytest.raises(UsageError, match=r"attestor\.kind must be an AttestorKind, not str"):
        await send_guest(machine.source, HOST, 1, attestor)


async def test_numbers_of_other_types_are_numbers(machine: SmallMachine) -> None:
    source, _ = await move(
        machine,
        {
            "channels": np.int64(2),
            "bundle_pages": np.uint16(64),
            "stall_timeout_s": np.float32(5),
            "downtime_limit_s": 1,
            "cpus": [],
            "ledger": bytearray(),
        },
    )
    assert isinstance(source, MigrationReport), source
    assert len(source.info.channels) == 2
    assert source.ledger == b""
    assert machine.moved()


@pytest.mark.parametrize("key", ["a string of sixteen bytes", None, 16, b"short", b""])
def test_a_pre_shared_key_is_bytes_and_long_enough(key: object) -> None:
    with pytest.raises(
        UsageError, match=r"^a pre-shared key (is bytes, not a|has 16 to 4096 bytes)"
    ) as caught:
        PskAttestor(key)  # type: ignore[arg-type]
    assert "sixteen" not in str(caught.value)


# Steering


async def test_a_steering_is_for_one_migration() -> None:
    steering = Steering(MigrationParameters(downtime_limit_s=1.0))
    assert isinstance((await move(SmallMachine(), {"steering": steering}))[0], MigrationReport)
    again = SmallMachine()
    with pytest.raises(UsageError, match="this steering was another migration's"):
        await send_guest(again.source, HOST, 1, ATTESTOR, steering=steering)
    assert again.source.gate.running


async def test_bad_usage_does_not_use_a_steering_up(machine: SmallMachine) -> None:
    steering = Steering()
    bad: list[dict[str, Any]] = [{"channels": 0}, {"ledger": b"x"}, {"isolated": 1}]
    for usage in bad:
        with pytest.raises(UsageError):
            await send_guest(machine.source, HOST, 1, ATTESTOR, steering=steering, **usage)
    assert isinstance((await move(machine, {"steering": steering}))[0], MigrationReport)


async def test_bad_usage_leaves_the_journal_to_whoever_mends_it(tmp_path: Path) -> None:
    _, received = await move(SmallMachine(), {})
    assert isinstance(received, MigrationReport), received
    forged = received.ledger[:-1] + bytes([received.ledger[-1] ^ 1])
    steering, machine = Steering(), SmallMachine()
    usage: dict[str, Any] = {"journal": tmp_path / "journal", "steering": steering}
    with FileJournal(tmp_path / "journal"), pytest.raises(UsageError, match="in use"):
        await send_guest(machine.source, HOST, 1, ATTESTOR, **usage)
    with pytest.raises(UsageError, match="not the ledger of a guest"):
        await send_guest(machine.source, HOST, 1, ATTESTOR, ledger=forged, **usage)
    assert isinstance((await move(machine, usage))[0], MigrationReport)
    # What was its steering's is bad usage too.
    with pytest.raises(UsageError, match="this steering was"):
        await send_guest(
            SmallMachine().source, HOST, 1, ATTESTOR, steering=steering, journal=tmp_path / "other"
        )
    FileJournal(tmp_path / "other").close()
