"""Where the trusted and the untrusted side meet: one call to send a guest, one to receive it.

These are the library's front door. They make the SVSM of this side, its slots, and the engine that drives them, all in this
thread: a slot is local here, its doorbell a direct call.
"""

from __future__ import annotations

import math
import mmap
import os
import secrets
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, Literal, get_args

import trio

from . import arguments
from .engine.destination import DestinationEngine
from .engine.failure import call_back
from .engine.hypervisor import ThrottlingHypervisor
from .engine.slots import Slot
from .engine.source import SourceEngine, SourceOptions
from .engine.steering import DOWNTIME_LIMIT_S, MigrationParameters, Steering
from .engine.streams import STALL_TIMEOUT_S, listen
from .engine.threads import most_threads
from .errors import LedgerRefused, MalformedData, PagexferError, TransferAborted, UsageError
from .guests.guest import GuestElsewhere
from .isolation.sides import (
    BUFFER_BYTES,
    BUFFERS,
    RECEIVING_BUFFER_BYTES,
    receive_isolated,
    send_isolated,
)
from .isolation.task import Task
from .svsm.commands import destination_channel, destination_control, source_channel, source_control
from .svsm.compression import MAX_LEVEL, MIN_LEVEL, Compressor, need_zstd
from .svsm.destination import DestinationSvsm
from .svsm.export import usual_bundle_pages
from .svsm.journal import FileJournal
from .svsm.memory import GuestMemory
from .svsm.processes import process_of
from .svsm.source import SourceSvsm
from .wire.constants import GUEST_ID_BYTES, MAX_BUNDLE_DATA_PAGES, MAX_CHANNELS
from .wire.handshake import AttestorKind
from .wire.ledger import guest_id_of
from .wire.slot import CONTROL_SLOT, SlotGeometry, SlotMemory

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractContextManager
    from pathlib import Path

    from .attestation import Attestor, Claims
    from .engine.progress import MigrationInfo
    from .guests.guest import Guest
    from .svsm.journal import LedgerStore
    from .svsm.service import SlotService
    from .wire.handshake import Freshness

# Steps in which the destination's RAM is provided: some 20 ms each, so that an end does not wait for long.
_PROVIDED_BYTES: Final = 1 << 24
# Up to how many channels have threads on few CPUs, where nobody chose. An engine that is a process of its own sleeps for
# every bundle, and a thread's sleep is cheap. Where the SVSM is in the same process, threads contend for the interpreter's
# lock: a source that makes digests takes it many times for a bundle, a destination seldom.
_MOST_ISOLATED_ON_FEW: Final = 8
_MOST_SOURCE_ON_FEW: Final = 1
_MOST_DESTINATION_ON_FEW: Final = 4

# Ends for which the SVSM of this side may have noted what of its own failed.
_LOCAL_REASONS: Final = ("guest", "journal", "undecided")

# What the ports have: a program's own need not be checked for its types.
_GATE: Final = ("vcpus", "raise_flag", "parked", "save_state", "load_state", "release")
_HYPERVISOR: Final = ("dirty_log", "stop", "resume", "save_device_state", "load_device_state")
_ATTESTOR: Final = ("kind", "policy_digest", "evidence", "verify", "check_move", "contribution")

FreshnessChoice = Literal["auto", "digest-audit"]


@dataclass(frozen=True, slots=True)
class MigrationReport:
    """A completed migration: its final figures, who vouched for the dirty pages, and what the peer proved of itself.

    `freshness` is what was done, whatever was asked for: its `meaning` says plainly who was believed.

    `ledger` is the guest's ledger as this side has it: at the destination with the record of this move, which the source
    never gets.
    """

    info: MigrationInfo
    freshness: Freshness
    peer: Claims
    ledger: bytes


async def send_guest(
    guest: Guest,
    host: str,
    port: int,
    attestor: Attestor,
    *,
    ledger: bytes = b"",
    channels: int = 4,
    bundle_pages: int | None = None,
    downtime_limit_s: float | None = None,
    steering: Steering | None = None,
    stall_timeout_s: float = STALL_TIMEOUT_S,
    freshness: FreshnessChoice = "auto",
    compression_level: int | None = None,
    journal: Path | None = None,
    isolated: bool = False,
    cpus: tuple[int, ...] = (),
    channel_threads: bool | None = None,
    on_progress: Callable[[MigrationInfo], None] = lambda _info: None,
) -> MigrationReport:
    """Migrate a running guest to the destination that listens at `host`:`port`, over `channels` TCP connections.

    A bundle has up to `bundle_pages` pages with content, as far as they fit a slot's buffer (480 do): more of them cost
    less in calls. By default 480, and 256 with more than 16 channels.

    `steering` holds what may be changed while it runs, and can pause and end it; make one for each migration, as one that
    was another's is refused.
    `downtime_limit_s` is short for one that is never changed.

    A destination that is silent, or takes nothing, for `stall_timeout_s` is taken for dead. With a file as `journal`,
    `pagexfer recover` answers after a crash who may run the guest; without one nobody can.

    With `isolated`, the engine is a process of its own, which shares mailbox memory and doorbells with this one and nothing
    else; `cpus` pins that process, and the threads that serve its slots, to these processors.

    With `channel_threads` each channel has a thread of its own, without them one event loop carries all. By default up to
    16 channels have threads. On one or two CPUs up to eight have where the engine is a process of its own; elsewhere a
    single one of a source, and up to four of a destination.

    `ledger` is what the guest's last destination reported as its ledger, empty for a guest that never moved.

    `freshness` "auto" believes the guest's own tracker, or the hypervisor's dirty log where it has none; "digest-audit"
    believes nobody: the SVSM hashes all of RAM in black-out and sends what is not as it was sent. What that cost is in the
    report (`info.audit`). A tracker that compares RAM with what was sent makes "auto" a digest audit as well.

    `on_progress` is called some five times a second, in the loop that carries the migration, and must not block: while it
    does, nothing moves.

    With a `compression_level` of 1 (fastest) to 9, pages are compressed by zstd before they are sealed, for slow links; the
    destination must accept it. A core compresses some 0.3 GB/s of RAM; with `channel_threads`, several do. The length of a
    bundle then tells hosts and network how well its pages compress.

    When it returns, the guest runs at the destination and stays parked here for good. Raises UsageError for bad arguments
    and TransferAborted otherwise: its `outcome` says whether the guest goes on here (ENDED, REFUSED) or nobody may know
    (UNDECIDED). Cancelling before the start token makes the guest go on here.

    What the program's own code raises is no exception to that. Whatever comes out of `on_progress` ends the migration with
    reason "callback", whatever else than a PagexferError comes out of the hypervisor or its dirty log with reason "guest";
    the outcome says who may run the guest, `__cause__` is what was raised. Once the outcome is there, as with the last call
    of `on_progress`, it changes nothing any more and is logged (logger "pagexfer"). Anything else, from a guest's gate,
    memory or tracker or from the attestor, is a defect and comes as it is, in exception groups: before the start token the
    guest goes on here, and after it nobody may know, as with UNDECIDED.
    """
    _check_side(guest, host, attestor, journal, on_progress)
    port, stall_timeout_s = _check_network(port, 1, stall_timeout_s)
    channels = arguments.whole("channels", channels)
    if not 1 <= channels <= MAX_CHANNELS:
        raise UsageError(f"a migration has 1 to {MAX_CHANNELS} channels, not {channels}")
    bundle_pages = (
        usual_bundle_pages(channels)
        if bundle_pages is None
        else arguments.whole("bundle_pages", bundle_pages)
    )
    if not 1 <= bundle_pages <= MAX_BUNDLE_DATA_PAGES:
        raise UsageError(f"a bundle has 1 to {MAX_BUNDLE_DATA_PAGES} pages, not {bundle_pages}")
    steering = _steering(steering, downtime_limit_s)
    if freshness not in get_args(FreshnessChoice):
        raise UsageError(f"freshness is {' or '.join(get_args(FreshnessChoice))}, not {freshness}")
    compressor = _compressor(compression_level)
    cpus = _check_threads(isolated, cpus, channel_threads)
    ledger = arguments.octets("ledger", ledger)
    audit = freshness == "digest-audit"
    threads = _most_threads(channel_threads, _MOST_ISOLATED_ON_FEW if isolated else _MOST_SOURCE_ON_FEW, cpus)
    options = SourceOptions(channels, stall_timeout_s, audit, threads, compressor is not None)
    try:
        guest_id = guest_id_of(ledger) or secrets.token_bytes(GUEST_ID_BYTES)
    except MalformedData as error:
        raise _no_ledger(error) from None
    with _kept(journal) as kept:
        try:
            svsm = SourceSvsm(
                guest.memory,
                guest.gate,
                guest.tracker,
                attestor,
                guest_id,
                audit=audit,
                bundle_pages=bundle_pages,
                compressor=compressor,
                ledger=ledger,
                journal=kept,
            )
        except (MalformedData, LedgerRefused) as error:
            raise _no_ledger(error) from None
        steering.engage()  # after all else that is bad usage, so that it is still fresh for who mends that
        if isolated:
            task = Task(
                True,
                host,
                port,
                guest.memory.pages,
                guest.gate.vcpus,
                guest.hypervisor.dirty_log is not None,
                cpus,
                stall_timeout_s,
                options,
                steering.parameters,
                isinstance(guest.hypervisor, ThrottlingHypervisor),
            )
            move = partial(send_isolated, guest, svsm, task, steering, on_progress)
        else:
            engine = SourceEngine(
                _local_slot(CONTROL_SLOT, partial(source_control, svsm=svsm, shared=False)),
                [
                    _local_slot(channel, partial(source_channel, svsm=svsm, channel=channel, shared=False))
                    for channel in range(channels)
                ],
                guest.hypervisor,
                guest.memory.pages,
                guest.gate.vcpus,
                options,
                steering,
                on_progress,
            )
            move = partial(engine.run, host, port)
        info = await _run(move, svsm, guest.memory, guest.memory.map_ahead)
        return MigrationReport(info, svsm.freshness, svsm.peer, ledger)


async def receive_guest(
    guest: Guest,
    host: str,
    port: int,
    attestor: Attestor,
    *,
    stall_timeout_s: float = STALL_TIMEOUT_S,
    accept_compression: bool = False,
    journal: Path | None = None,
    ledger_store: LedgerStore | None = None,
    isolated: bool = False,
    cpus: tuple[int, ...] = (),
    channel_threads: bool | None = None,
    on_listening: Callable[[int], None] = lambda _port: None,
    on_progress: Callable[[MigrationInfo], None] = lambda _info: None,
    on_stranger: Callable[[str], None] = lambda _line: None,
) -> MigrationReport:
    """Receive one guest into `guest`, which has fresh RAM and vCPUs that never ran, listening at `host`:`port`.

    `on_listening` gets the port, which the kernel chooses for 0; `on_stranger` one line for each connection that was not
    the source's; `journal`, `isolated`, `cpus` and `channel_threads` are as for `send_guest`. A source that compresses
    pages is refused, with reason "compression", without `accept_compression`. `on_progress` is as for `send_guest`, and
    called from when a source is there.

    It waits for a source without limit: put it in a deadline, as of `trio.fail_after`, where that is too long. A guest that
    was received, or sent away, is not received into again: for its way back, make a fresh one.

    `ledger_store` gets the report's `ledger` before the guest may run here, so that no crash loses the record of this move.
    What it cannot keep ends the migration, as with a journal.

    When it returns, the guest runs here. Raises UsageError where address or journal cannot be used, and TransferAborted
    where the migration failed: the guest then never runs here, except with outcome UNDECIDED.

    What the program's own code raises is treated as in `send_guest`: what comes out of a callback or the hypervisor before
    the guest runs here ends the migration, and the guest never runs here. Where the hypervisor cannot continue it in the
    end the outcome is UNDECIDED. Once it runs here, what a callback raises is logged. Where a defect comes in exception
    groups, `pagexfer recover` answers from the journal.
    """
    _check_side(guest, host, attestor, journal, on_progress)
    port, stall_timeout_s = _check_network(port, 0, stall_timeout_s)
    cpus = _check_threads(isolated, cpus, channel_threads)
    arguments.function("on_listening", on_listening)
    arguments.function("on_stranger", on_stranger)
    arguments.flag("accept_compression", accept_compression)
    if accept_compression:
        need_zstd()
    process = process_of(guest.process_id) if isinstance(guest, GuestElsewhere) else None
    with _kept(journal) as kept:
        svsm = DestinationSvsm(
            guest.memory,
            guest.gate,
            attestor,
            accept_compression=accept_compression,
            journal=kept,
            process=process,
            store=ledger_store,
        )
        if isolated:
            task = Task(
                False,
                host,
                port,
                guest.memory.pages,
                guest.gate.vcpus,
                guest.hypervisor.dirty_log is not None,
                cpus,
                stall_timeout_s,
                most_threads=_most_threads(channel_threads, _MOST_ISOLATED_ON_FEW, cpus),
            )
            receiving = partial(receive_isolated, guest, svsm, task, on_progress, on_listening, on_stranger)
            info = await _run(receiving, svsm, guest.memory, guest.memory.prefault)
            return MigrationReport(info, svsm.freshness, svsm.peer, svsm.ledger)

        async def make_slots(count: int) -> list[Slot]:
            return [
                _local_slot(
                    channel,
                    partial(destination_channel, svsm=svsm, channel=channel, shared=False),
                    RECEIVING_BUFFER_BYTES,
                )
                for channel in range(count)
            ]

        engine = DestinationEngine(
            _local_slot(CONTROL_SLOT, partial(destination_control, svsm=svsm, shared=False)),
            make_slots,
            guest.hypervisor,
            guest.memory.pages,
            on_progress,
            on_stranger,
            stall_timeout_s,
            _most_threads(channel_threads, _MOST_DESTINATION_ON_FEW),
        )
        listener = await listen(host, port, stall_timeout_s)
        try:
            call_back(on_listening, listener.port)
            info = await _run(partial(engine.run, listener), svsm, guest.memory, guest.memory.prefault)
        finally:
            listener.close()
        return MigrationReport(info, svsm.freshness, svsm.peer, svsm.ledger)


async def _run(
    move: Callable[[], Awaitable[MigrationInfo]],
    svsm: SourceSvsm | DestinationSvsm,
    memory: GuestMemory,
    provide: Callable[[int, int], bool],
) -> MigrationInfo:
    """Send or receive, and meanwhile have RAM provided, part by part.

    An engine learns only the coarse code of what its SVSM refused. Who has the SVSM in this process may know more.
    """
    end: MigrationInfo | TransferAborted | UsageError
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_provide, memory, provide)
        try:
            end = await move()
        except (TransferAborted, UsageError) as aborted:
            end = aborted  # raised outside of the nursery, which would wrap it into a group
        nursery.cancel_scope.shield = True  # the outcome stands, also where a cancel comes with it
        nursery.cancel_scope.cancel()
    if isinstance(end, TransferAborted) and end.reason in _LOCAL_REASONS and svsm.local_fault:
        raise TransferAborted(end.outcome, end.reason, str(end), svsm.local_fault) from end
    if isinstance(end, (TransferAborted, UsageError)):
        raise end
    return end


def _kept(journal: Path | None) -> AbstractContextManager[FileJournal | None]:
    """The journal of a session that begins, where there is to be one, until the session's end."""
    return nullcontext() if journal is None else FileJournal.for_session(journal)


def _no_ledger(error: PagexferError) -> UsageError:
    return UsageError(f"what was given as ledger is not the ledger of a guest: {error}")


def _check_side(
    guest: Guest,
    host: str,
    attestor: Attestor,
    journal: Path | None,
    on_progress: Callable[[MigrationInfo], None],
) -> None:
    """What both sides are given and take as it is."""
    arguments.port("guest", guest, "a Guest", ("memory", "gate", "tracker", "hypervisor"))
    if not isinstance(guest.memory, GuestMemory):
        raise UsageError(f"guest.memory must be a GuestMemory, not {type(guest.memory).__name__}")
    arguments.port("guest.gate", guest.gate, "a VcpuGate", _GATE)
    arguments.port("guest.hypervisor", guest.hypervisor, "a Hypervisor", _HYPERVISOR)
    for name, tracker in (
        ("guest.tracker", guest.tracker),
        ("guest.hypervisor.dirty_log", guest.hypervisor.dirty_log),
    ):
        if tracker is not None:
            arguments.port(name, tracker, "a DirtyTracker", ("start", "collect", "stop"))
    arguments.text("host", host)
    arguments.port("attestor", attestor, "an Attestor", _ATTESTOR)
    if not isinstance(attestor.kind, AttestorKind):
        raise UsageError(f"attestor.kind must be an AttestorKind, not {type(attestor.kind).__name__}")
    if journal is not None:
        arguments.path("journal", journal)
    arguments.function("on_progress", on_progress)


def _check_network(port: int, lowest_port: int, stall_timeout_s: float) -> tuple[int, float]:
    port = arguments.whole("port", port)
    if not lowest_port <= port < 1 << 16:
        raise UsageError(f"a port is {lowest_port} to 65535, not {port}")
    stall_timeout_s = arguments.real("stall_timeout_s", stall_timeout_s)
    if not 0 < stall_timeout_s < math.inf:
        raise UsageError(f"a stall timeout is above 0 s and finite, not {stall_timeout_s:g} s")
    return port, stall_timeout_s


def _steering(steering: Steering | None, downtime_limit_s: float | None) -> Steering:
    if steering is None:
        limit_s = (
            DOWNTIME_LIMIT_S
            if downtime_limit_s is None
            else arguments.real("downtime_limit_s", downtime_limit_s)
        )
        return Steering(MigrationParameters(downtime_limit_s=limit_s))
    if not isinstance(steering, Steering):
        raise UsageError(f"steering must be a Steering, not {type(steering).__name__}")
    if downtime_limit_s is not None:
        raise UsageError("the downtime limit is given twice: leave it to the steering")
    return steering


def _compressor(level: int | None) -> Compressor | None:
    if level is None:
        return None
    level = arguments.whole("compression_level", level)
    if not MIN_LEVEL <= level <= MAX_LEVEL:
        raise UsageError(f"a compression level is {MIN_LEVEL} to {MAX_LEVEL}, not {level}")
    need_zstd()
    return Compressor(level)


def _check_threads(isolated: bool, cpus: tuple[int, ...], channel_threads: bool | None) -> tuple[int, ...]:
    arguments.flag("isolated", isolated)
    if channel_threads is not None:
        arguments.flag("channel_threads", channel_threads)
    cpus = arguments.wholes("cpus", cpus)
    if cpus and not isolated:
        raise UsageError("CPUs can be chosen for an isolated engine only")
    missing = sorted(set(cpus) - os.sched_getaffinity(0))
    if missing:
        raise UsageError(f"CPU {missing[0]} does not exist or is not this process's to use")
    return cpus


def _most_threads(wanted: bool | None, on_few_cpus: int, cpus: tuple[int, ...] = ()) -> int:
    """Up to how many channels have threads, on `cpus` or all that this process may use."""
    if wanted is None:
        return most_threads(len(cpus or os.sched_getaffinity(0)), on_few_cpus)
    return MAX_CHANNELS if wanted else 0


async def _provide(memory: GuestMemory, provide: Callable[[int, int], bool]) -> None:
    """In the background, while this side waits for its peer and for the network."""
    for start in range(0, memory.ram_bytes, _PROVIDED_BYTES):
        length = min(_PROVIDED_BYTES, memory.ram_bytes - start)
        if not await trio.to_thread.run_sync(provide, start, length):
            return


def _local_slot(
    slot_id: int, serve: Callable[[SlotMemory], SlotService], buffer_bytes: int = BUFFER_BYTES
) -> Slot:
    """A slot whose SVSM lives in this process: ringing its doorbell is a call. There is no such slot on hardware."""
    geometry = SlotGeometry(slot_id, BUFFERS, buffer_bytes)
    memory = SlotMemory.format(mmap.mmap(-1, geometry.slot_bytes), geometry)
    service = serve(memory)

    async def ring() -> None:
        service.service()

    return Slot(memory, ring)
