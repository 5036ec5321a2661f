"""The ways from one QEMU to another that bench.qemu and bench.compression compare, and what a migration took in each.

After every one the source goes on as well, so that the next one has it as it was.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

import pagexfer
from pagexfer.guests.qemu import QemuGuest
from pagexfer.guests.qemu.values import record, records, text, whole

from .pair import DIRECT, Route, Watch, run_pair
from .qemu_machine import CREDENTIALS, QemuFailed, monitor, resumption
from .sealed import PSK

if TYPE_CHECKING:
    from collections.abc import Callable

    from pagexfer.guests.qemu.qmp import QmpClient

    from .qemu_machine import Machine

_UNLIMITED: Final = 1 << 40
_POLL_S: Final = 0.02
_TIMEOUT_S: Final = 300.0
DOWNTIME_LIMIT_MS: Final = 300
# The guest stands still, so for pagexfer the limit only says whether RAM may be compared once it is stopped, which takes a
# slow machine more than QEMU's usual limit for some GiB. How long that took is in the downtime.
_COMPARING_LIMIT_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class Taken:
    """One migration: from the order until the guest runs at the destination, by that QEMU's word, whatever the way was.

    Downtime is as the source has it, CPU seconds are each side's.
    """

    seconds: float
    downtime_s: float
    source_cpu_s: float
    destination_cpu_s: float

    @property
    def cpu_s(self) -> float:
        return self.source_cpu_s + self.destination_cpu_s


@dataclass(frozen=True, slots=True)
class Job:
    """A migration by pagexfer, for both of its processes."""

    source: Machine
    destination: Machine
    channels: int
    compression_level: int | None
    channel_threads: bool | None


def by_multifd(
    source: Machine,
    destination: Machine,
    channels: int,
    *,
    tls: bool = False,
    zstd_level: int | None = None,
    route: Route = DIRECT,
) -> Taken:
    """QEMU's own multifd. Raises QemuFailed where it fails."""
    settings: dict[str, object] = {
        "multifd-channels": channels,
        "max-bandwidth": _UNLIMITED,
        "downtime-limit": DOWNTIME_LIMIT_MS,
        "tls-creds": CREDENTIALS if tls else "",
        "multifd-compression": "none" if zstd_level is None else "zstd",
    }
    if zstd_level is not None:
        settings["multifd-zstd-level"] = zstd_level
    with resumption(destination) as resumed_at:
        return trio.run(_multifd, source, destination, settings, route, resumed_at)


def by_pagexfer(
    source: Machine,
    destination: Machine,
    channels: int,
    *,
    compression_level: int | None = None,
    channel_threads: bool | None = None,
    route: Route = DIRECT,
) -> Taken:
    """pagexfer with a process of its own at each side, whose CPU seconds count as well as those of the QEMUs."""
    machines = (source, destination)
    began = [machine.cpu_seconds() for machine in machines]
    job = Job(source, destination, channels, compression_level, channel_threads)
    with resumption(destination) as resumed_at:
        (ordered_at, sent), received_cpu_s = run_pair(_receive, _send, job, route)
        seconds = resumed_at() - ordered_at
    spent = [machine.cpu_seconds() - before for machine, before in zip(machines, began, strict=True)]
    trio.run(_go_on, source)
    return replace(
        sent,
        seconds=seconds,
        source_cpu_s=spent[0] + sent.source_cpu_s,
        destination_cpu_s=spent[1] + received_cpu_s,
    )


WAYS: Final[dict[str, Callable[[Machine, Machine, int], Taken]]] = {
    "multifd": partial(by_multifd, tls=False),
    "multifd TLS": partial(by_multifd, tls=True),
    "pagexfer": by_pagexfer,
    "pagexfer threads": partial(by_pagexfer, channel_threads=True),
}


async def _multifd(
    source: Machine,
    destination: Machine,
    settings: dict[str, object],
    route: Route,
    resumed_at: Callable[[], float],
) -> Taken:
    machines = (source, destination)
    async with monitor(source) as here, monitor(destination) as there:
        for qmp in (here, there):
            await _set(qmp, multifd=True, settings=settings)
        began = [machine.cpu_seconds() for machine in machines]
        await there.execute("migrate-incoming", {"uri": "tcp:127.0.0.1:0"})
        listening = records(record(await there.execute("query-migrate")).get("socket-address"))
        with route.lead(int(text(listening[0].get("port")))) as port, trio.fail_after(_TIMEOUT_S):
            ordered_at = time.time()
            await here.execute("migrate", {"uri": f"tcp:127.0.0.1:{port}"})
            info = await _completed(here)
            seconds = await trio.to_thread.run_sync(resumed_at) - ordered_at
        here_cpu_s, there_cpu_s = (
            machine.cpu_seconds() - before for machine, before in zip(machines, began, strict=True)
        )
        await _set(here, multifd=False, settings={"tls-creds": ""})
        await here.execute("cont")
    return Taken(
        seconds,
        whole(info.get("downtime")) / 1000,
        here_cpu_s,
        there_cpu_s,
    )


async def _set(qmp: QmpClient, *, multifd: bool, settings: dict[str, object]) -> None:
    await qmp.execute(
        "migrate-set-capabilities", {"capabilities": [{"capability": "multifd", "state": multifd}]}
    )
    await qmp.execute("migrate-set-parameters", settings)


async def _completed(qmp: QmpClient) -> dict[str, object]:
    while True:
        info = record(await qmp.execute("query-migrate"))
        match info.get("status"):
            case "completed" if info.get("total-time"):  # which QEMU works out a moment after it says so
                return info
            case "failed" | "cancelled":
                raise QemuFailed(f"QEMU's migration failed: {info.get('error-desc', 'its output says why')}")
        await trio.sleep(_POLL_S)


async def _go_on(machine: Machine) -> None:
    async with monitor(machine) as qmp:
        await qmp.execute("cont")


def _receive(job: Job, host: str, on_listening: Callable[[int], None]) -> float:
    """The destination, in a process of its own; its CPU seconds."""

    async def main() -> float:
        watch = Watch()
        async with QemuGuest.attach(job.destination.monitor, incoming=True) as guest:
            await pagexfer.receive_guest(
                guest,
                host,
                0,
                pagexfer.PskAttestor(PSK),
                accept_compression=job.compression_level is not None,
                channel_threads=job.channel_threads,
                on_listening=on_listening,
            )
        return watch.side(0).cpu_seconds

    return trio.run(main)


def _send(job: Job, host: str, port: int) -> tuple[float, Taken]:
    """The source, in a process of its own: when it got the order (`time.time()`), and what it knows, of CPU its own."""

    async def main() -> tuple[float, Taken]:
        watch = Watch()
        async with QemuGuest.attach(job.source.monitor) as guest:
            ordered_at = time.time()
            report = await pagexfer.send_guest(
                guest,
                host,
                port,
                pagexfer.PskAttestor(PSK),
                channels=job.channels,
                compression_level=job.compression_level,
                channel_threads=job.channel_threads,
                downtime_limit_s=_COMPARING_LIMIT_S,
            )
        return ordered_at, Taken(0.0, (report.info.downtime or 0.0) / 1000, watch.side(0).cpu_seconds, 0.0)

    return trio.run(main)
