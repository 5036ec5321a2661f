"""The engine as a process of its own: it completes, it shares no RAM and no key, and whoever dies leaves one answer."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import signal
import struct
import threading
from contextlib import suppress
from itertools import count
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Final, Generic, TypeVar

import pytest
import trio

from pagexfer.errors import Outcome, TransferAborted, UsageError
from pagexfer.guests.kvm import KvmGuest
from pagexfer.guests.simulated import SimulatedGuest
from pagexfer.isolation.sides import RECEIVING_BUFFER_BYTES
from pagexfer.migration import MigrationReport, receive_guest, send_guest
from pagexfer.svsm import keys
from pagexfer.testing.proxy import Action, FaultProxy, at_bundle
from pagexfer.wire.bundle import BundleKind
from pagexfer.wire.slot import COMMAND_OFFSET, REGISTER_PAGE_BYTES, STATUS_FIELDS, SlotMemory

from . import kvm_guests
from .fault_points import FAULT_POINTS
from .isolated_engines import engine_processes
from .kvm_guests import needs_kvm
from .machines import (
    ATTESTOR,
    HOST,
    PATIENCE_S,
    RAM_BYTES,
    Machines,
    Side,
    goes_on,
    is_parked,
    never_ran,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from pagexfer.testing.proxy import Frame

_RATE: Final = 5 << 20
_STALL_S: Final = 1.5

GuestT = TypeVar("GuestT", SimulatedGuest, KvmGuest)


class Pair(Generic[GuestT]):
    """A source guest that runs and a destination guest, and how their migration ended."""

    def __init__(self, source: GuestT, destination: GuestT) -> None:
        self.source: GuestT = source
        self.destination: GuestT = destination
        self.sent, self.received = Side(), Side()
        self.stall_s = _STALL_S
        self.cpus: tuple[int, ...] = ()

    async def migrate(
        self, point: Callable[[Frame], bool] | None, act: Callable[[], None], channels: int = 2
    ) -> None:
        """Migrate, `act` being called once `point` comes by."""
        with trio.fail_after(PATIENCE_S):
            async with trio.open_nursery() as nursery:
                port = await nursery.start(self._receive)
                if point is not None:
                    proxy = FaultProxy(HOST, port, point, Action.PASS, act)
                    port = await nursery.start(proxy.serve)
                await self._send(port, channels)
                with trio.move_on_after(PATIENCE_S):
                    while self.received.end is None:  # noqa: ASYNC110 (its task ends with it)
                        await trio.sleep(0.005)
                nursery.cancel_scope.cancel()

    async def _send(self, port: int, channels: int) -> None:
        try:
            self.sent.end = await send_guest(
                self.source,
                HOST,
                port,
                ATTESTOR,
                channels=channels,
                downtime_limit_s=1.0,
                stall_timeout_s=self.stall_s,
                isolated=True,
                cpus=self.cpus,
            )
        except TransferAborted as aborted:
            self.sent.end = aborted

    async def _receive(self, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED) -> None:
        try:
            self.received.end = await receive_guest(
                self.destination,
                HOST,
                0,
                ATTESTOR,
                stall_timeout_s=self.stall_s,
                isolated=True,
                cpus=self.cpus,
                on_listening=task_status.started,
            )
        except TransferAborted as aborted:
            self.received.end = aborted


SimulatedPair = Pair[SimulatedGuest]


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    with Machines(_RATE) as machines:
        yield machines


@pytest.fixture
async def pair(machines: Machines) -> AsyncIterator[SimulatedPair]:
    await machines.start()
    pair = Pair(machines.source, machines.destination)
    yield pair
    ended = isinstance(pair.sent.end, TransferAborted) and pair.sent.end.outcome is Outcome.ENDED
    machines.source_moved = not ended
    assert engine_processes() == []


def _affinities(pid: int) -> list[set[int]]:
    """Of each thread of a process."""
    return [os.sched_getaffinity(int(task.name)) for task in Path(f"/proc/{pid}/task").iterdir()]


def _nothing() -> None:
    return


def _mailboxes() -> list[memoryview]:
    """The memory of this process's two mailboxes, of which the source's is the smaller one."""
    found = []
    for file in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            if "memfd:mailbox" in os.readlink(file):
                found.append(memoryview(mmap.mmap(int(file.name), 0)))
    return sorted(found, key=len)


@pytest.mark.parametrize("channels", [1, 16])
async def test_a_migration_completes(pair: SimulatedPair, channels: int) -> None:
    await pair.migrate(None, _nothing, channels)
    assert isinstance(pair.sent.end, MigrationReport), pair.sent.end
    assert isinstance(pair.received.end, MigrationReport), pair.received.end
    assert len(pair.sent.end.info.channels) == channels
    assert await goes_on(pair.destination)
    assert is_parked(pair.source)


async def test_engines_and_handlers_keep_to_their_cpus(pair: SimulatedPair) -> None:
    """Pinned to one processor, they leave those of pinned vCPUs alone; what else the SVSM's process does is not pinned."""
    allowed = os.sched_getaffinity(0)
    pair.cpus = (max(allowed),)
    seen: list[set[int]] = []
    of_engines: list[list[set[int]]] = []

    def look() -> None:
        of_engines.extend(_affinities(pid) for pid in engine_processes())
        handlers = [thread.native_id for thread in threading.enumerate() if thread.name.startswith("handler")]
        seen.extend(os.sched_getaffinity(task) for task in (*engine_processes(), *handlers) if task)

    await pair.migrate(at_bundle(BundleKind.MANIFEST), look)
    assert isinstance(pair.sent.end, MigrationReport), pair.sent.end
    assert seen == [set(pair.cpus)] * (
        2 + 2 * 3
    )  # engines, and at each side handlers of two channels and of the session
    assert len(of_engines) == 2
    for masks in of_engines:
        # That of the loop and those of both channels; libraries have others, which began before and do nothing.
        assert masks.count(set(pair.cpus)) >= 1 + 2
    assert os.sched_getaffinity(0) == allowed


@pytest.mark.parametrize(("cpus", "isolated"), [((0,), False), ((4095,), True)])
async def test_cpus_that_cannot_be_used(machines: Machines, cpus: tuple[int, ...], isolated: bool) -> None:
    with pytest.raises(UsageError, match=r"4095|isolated"):
        await send_guest(machines.source, HOST, 1, ATTESTOR, cpus=cpus, isolated=isolated)


@needs_kvm
async def test_a_kvm_guest_migrates() -> None:
    with (
        KvmGuest.boot(kvm_guests.RAM_BYTES, 2, write_rate_bytes=_RATE) as source,
        KvmGuest.empty(kvm_guests.RAM_BYTES, 2) as destination,
    ):
        await kvm_guests.start(source)
        await kvm_guests.progress(source, 1)
        pair = Pair(source, destination)
        await pair.migrate(None, _nothing, 4)
        assert isinstance(pair.sent.end, MigrationReport), pair.sent.end
        assert isinstance(pair.received.end, MigrationReport), pair.received.end
        await kvm_guests.progress(destination, 1)
        await kvm_guests.park(destination)
        assert destination.check().faults == ()
        assert source.gate.parked() == 2


# Where in a slot: all registers, and buffers, as a host may at any time.
@pytest.mark.parametrize(
    ("side", "first", "size"),
    [(1, COMMAND_OFFSET, 256), (0, REGISTER_PAGE_BYTES, 1 << 16), (1, REGISTER_PAGE_BYTES, 1 << 16)],
    ids=["destination-registers", "source-buffers", "destination-buffers"],
)
async def test_a_thread_that_scribbles_into_the_slots(
    pair: SimulatedPair, side: int, first: int, size: int
) -> None:
    """Also between check and use: what the SVSM believes it has copied before."""
    ended, begun = threading.Event(), threading.Event()
    scribblers: list[threading.Thread] = []

    def scribble(memory: memoryview) -> None:
        random = Random(side)
        slot_bytes = SlotMemory(memory).geometry.slot_bytes
        while not ended.wait(0.0002):
            for slot in (1, 2):
                start = slot * slot_bytes + first
                for _ in range(64):
                    memory[start + random.randrange(size)] = random.randrange(256)
            begun.set()

    def begin() -> None:
        # Everything goes through this process: nothing moves on before the slots are being written to.
        scribblers.append(threading.Thread(target=scribble, args=(_mailboxes()[side],)))
        scribblers[0].start()
        begun.wait()

    try:
        await pair.migrate(at_bundle(BundleKind.PAGES), begin)
    finally:
        ended.set()
        scribblers[0].join()
    if isinstance(pair.sent.end, MigrationReport):  # it never hit a package on its way
        assert first == REGISTER_PAGE_BYTES
        assert is_parked(pair.source)
        assert await goes_on(pair.destination)
    elif pair.sent.end is not None and pair.sent.end.outcome is Outcome.UNDECIDED:
        # It hit the answer to the start token alone: only the destination knows.
        assert first == REGISTER_PAGE_BYTES
        assert is_parked(pair.source)
        if isinstance(pair.received.end, MigrationReport):
            assert await goes_on(pair.destination)
        else:
            assert never_ran(pair.destination)
    else:
        await _ended_before_the_start_token(pair)


@pytest.mark.parametrize("spoiled", [field.name for field in STATUS_FIELDS[:-1]])
async def test_an_svsm_with_a_defect_in_its_answers(
    pair: SimulatedPair, monkeypatch: pytest.MonkeyPatch, spoiled: str
) -> None:
    """The source's engine believes nothing that cannot be, and waits for no answer for ever."""
    random = Random(spoiled)
    place = [field.name for field in STATUS_FIELDS].index(spoiled)
    most = (1 << 8 * struct.calcsize(STATUS_FIELDS[place].code)) - 1
    write_status = SlotMemory.write_status
    answers = count()

    def write(self: SlotMemory, *registers: int | None) -> None:
        answer = list(registers)
        of_source = self.geometry.buffer_bytes < RECEIVING_BUFFER_BYTES
        # From its second bundle on: two channels were opened before.
        if of_source and self.geometry.slot_id in (1, 2) and next(answers) >= 3:
            answer[place] = random.randint(0, most)
        write_status(self, *answer)  # type: ignore[arg-type]

    monkeypatch.setattr(SlotMemory, "write_status", write)
    await pair.migrate(None, _nothing)
    counts = spoiled in {
        "result",
        "result2",
    }  # which only the SVSM knows: a move may complete, and be misreported
    if counts and isinstance(pair.received.end, MigrationReport):
        assert is_parked(pair.source)
        assert await goes_on(pair.destination)
    else:
        await _ended_before_the_start_token(pair)


async def _ended_before_the_start_token(pair: SimulatedPair) -> None:
    assert isinstance(pair.sent.end, TransferAborted)
    assert pair.sent.end.outcome is Outcome.ENDED, pair.sent.end
    assert "\n" not in str(pair.sent.end)
    assert never_ran(pair.destination)
    assert await goes_on(pair.source)


async def test_the_engine_has_neither_ram_nor_keys(
    pair: SimulatedPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair.stall_s = 10.0  # the look takes its time, and this process waits for it
    secrets: list[bytes] = []
    derive = keys.KeySchedule.traffic_key

    def noted(self: keys.KeySchedule, *stream: int) -> object:
        secret = derive(self, *stream)  # type: ignore[arg-type]
        secrets.append(bytes(secret.reveal()))
        return secret

    monkeypatch.setattr(keys.KeySchedule, "traffic_key", noted)
    marker = bytes(pair.source.memory.words[RAM_BYTES // 8192][:8].tobytes())
    assert any(marker)
    found: dict[str, list[str]] = {}

    def look() -> None:
        for engine in engine_processes():
            maps = Path(f"/proc/{engine}/maps").read_text()
            files = [os.readlink(file) for file in Path(f"/proc/{engine}/fd").iterdir() if file.is_symlink()]
            memory = _memory_of(engine, maps)
            found["maps"] = found.get("maps", []) + re.findall(r"memfd:\S+|\S+/cryptography/\S+", maps)
            found["files"] = found.get("files", []) + files
            found["memory"] = found.get("memory", []) + [
                name
                for name, secret in (("marker", marker), *(("key", secret) for secret in secrets))
                if secret in memory
            ]

    await pair.migrate(at_bundle(BundleKind.MANIFEST), look)
    assert isinstance(pair.sent.end, MigrationReport), pair.sent.end
    assert secrets
    assert set(found["maps"]) == {"memfd:mailbox"}
    # libffi keeps the file of its own code open.
    kinds = {re.sub(r"[\d\[\]]+$", "", file) for file in found["files"] if "/libffi.so" not in file}
    assert kinds <= {
        "/dev/null",
        "pipe:",
        "socket:",
        "anon_inode:[eventfd",
        "anon_inode:[eventpoll",
        "/memfd:mailbox (deleted)",
    } | {os.readlink("/proc/self/fd/2")} | {file for file in kinds if file.startswith("/dev/")}
    assert found["memory"] == []


def _memory_of(process: int, maps: str) -> bytes:
    """All that a process can read, its mailbox among it."""
    content = bytearray()
    with Path(f"/proc/{process}/mem").open("rb", buffering=0) as memory:
        for line in maps.splitlines():
            area = re.match(r"([0-9a-f]+)-([0-9a-f]+) rw", line)
            if area is None:
                continue
            start, end = int(area[1], 16), int(area[2], 16)
            if "memfd:mailbox" in line:
                end = min(end, start + (16 << 20))  # the slots that this session has
            memory.seek(start)
            try:
                while start < end and (part := memory.read(end - start)):
                    content += part
                    start += len(part)
            except OSError:
                continue
    return bytes(content)


def _engine(side: int) -> None:
    os.kill(engine_processes()[side], signal.SIGKILL)


def _handler(side: int) -> None:
    """The one of channel 0, which tokens go through: it dies at its next command. A destination's starts last."""
    handlers = [thread for thread in threading.enumerate() if thread.name == "handler-0"]
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(handlers[-1 - side].ident or 0), ctypes.py_object(SystemExit)
    )


_DESTINATION, _SOURCE = 0, -1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(
    ("point", "victim", "side", "outcome", "runs_there"),
    [
        ("channel-open", _handler, _SOURCE, Outcome.ENDED, False),
        ("mid-epoch", _engine, _DESTINATION, Outcome.ENDED, False),
        ("mid-epoch", _handler, _SOURCE, Outcome.ENDED, False),
        ("first-barrier", _engine, _SOURCE, Outcome.ENDED, False),
        ("last-barrier", _engine, _DESTINATION, Outcome.ENDED, False),
        ("epoch-token", _engine, _DESTINATION, Outcome.ENDED, False),
        ("last-epoch-token", _engine, _SOURCE, Outcome.ENDED, False),
        ("device-state", _handler, _SOURCE, Outcome.ENDED, False),
        ("vcpu-state", _handler, _DESTINATION, Outcome.ENDED, False),
        ("manifest", _engine, _SOURCE, Outcome.ENDED, False),
        ("ready", _handler, _SOURCE, Outcome.ENDED, False),
        ("start-token", _handler, _DESTINATION, Outcome.UNDECIDED, False),
        ("running", _engine, _SOURCE, Outcome.UNDECIDED, True),
    ],
)
async def test_who_may_run_once_an_engine_or_a_handler_is_killed_at(
    pair: SimulatedPair,
    point: str,
    victim: Callable[[int], None],
    side: int,
    outcome: Outcome,
    runs_there: bool,
) -> None:
    await pair.migrate(FAULT_POINTS[point](), lambda: victim(side), channels=3)
    assert isinstance(pair.sent.end, TransferAborted), pair.sent.end
    assert pair.sent.end.outcome is outcome
    if outcome is Outcome.ENDED:
        assert await goes_on(pair.source)
    else:
        assert is_parked(pair.source)
    if runs_there:
        assert isinstance(pair.received.end, MigrationReport)
        assert await goes_on(pair.destination)
    else:
        assert isinstance(pair.received.end, TransferAborted)
        assert never_ran(pair.destination)


async def test_an_engine_that_stands_still_is_ended(pair: SimulatedPair) -> None:
    await pair.migrate(at_bundle(BundleKind.PAGES, 2), lambda: os.kill(engine_processes()[1], signal.SIGSTOP))
    assert isinstance(pair.sent.end, TransferAborted)
    assert (pair.sent.end.outcome, pair.sent.end.reason) == (Outcome.ENDED, "engine")
    assert await goes_on(pair.source)
    assert never_ran(pair.destination)
