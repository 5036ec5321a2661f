"""A guest in a stock QEMU that somebody else started: RAM in shared memory backends, everything else by QMP."""

from __future__ import annotations

import os
from contextlib import ExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Final

import trio

from ...dirty.content import ContentTracker
from ...errors import GuestError
from ...svsm.memory import GuestMemory
from ...svsm.page_digest import fresh_digest
from .backends import close_backends, data_gfns, find_backends, map_backends, writer
from .device_state import OVER, Platform
from .gate import CpuModel, QemuGate
from .hypervisor import QemuHypervisor
from .machine import QemuMachine
from .qmp import QmpClient
from .values import record, records, text, whole

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


# They change what QEMU's stream goes over, or what it waits for.
_UNFIT_CAPABILITIES: Final = (
    "background-snapshot",
    "block",
    "compress",
    "mapped-ram",
    "multifd",
    "pause-before-switchover",
    "postcopy-ram",
    "rdma-pin-all",
    "return-path",
    "switchover-ack",
    "x-colo",
)


class QemuGuest:
    """`GuestElsewhere` of kind "qemu". Made by `attach`.

    Its tracker finds pages that are not as they were sent, so nobody has to be believed about writes.
    """

    kind = "qemu"

    def __init__(
        self,
        memory: GuestMemory,
        tracker: ContentTracker,
        gate: QemuGate,
        hypervisor: QemuHypervisor,
        machine: QemuMachine,
        process_id: int,
    ) -> None:
        self.process_id = process_id
        self.memory = memory
        self.tracker = tracker
        self.gate = gate
        self.hypervisor = hypervisor
        self._machine = machine

    @property
    def run_state(self) -> str:
        """QEMU's run state: "running", "paused", "postmigrate"; empty where it may have changed, "gone" after its end."""
        return self._machine.status

    @classmethod
    @asynccontextmanager
    async def attach(cls, qmp_path: Path, *, incoming: bool = False) -> AsyncIterator[QemuGuest]:
        """The guest of the QEMU whose monitor is at `qmp_path`; leaves QEMU alone at the end.

        A source runs. With `incoming` QEMU was started with `-incoming defer`, and does not run before the SVSM lets it.
        Raises GuestError, with the reason, where this QEMU cannot be migrated.
        """
        machine = QemuMachine()
        end: BaseException | None = None
        qmp = await QmpClient.connect(qmp_path, machine.on_event, machine.on_reconnect)
        with ExitStack() as cleanup:
            cleanup.callback(qmp.close)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_follow, qmp, machine)
                try:
                    guest = await cls._open(qmp, machine, cleanup, incoming=incoming)
                    nursery.start_soon(machine.run, qmp)
                    yield guest
                except BaseException as error:
                    end = error  # raised outside of the nursery, which would wrap it into a group
                nursery.cancel_scope.cancel()
        if end is not None:
            raise end

    @classmethod
    async def _open(
        cls, qmp: QmpClient, machine: QemuMachine, cleanup: ExitStack, *, incoming: bool
    ) -> QemuGuest:
        await _check_idle(qmp, machine, incoming=incoming)
        models = tuple([await _model(qmp, cpu) for cpu in records(await qmp.execute("query-cpus-fast"))])
        name = text(await qmp.execute("qom-get", {"path": "/machine", "property": "type"}))
        process_id = qmp.process_id
        backends = await find_backends(qmp)
        cleanup.callback(close_backends, backends)
        memory = GuestMemory.over(map_backends(backends), lambda: data_gfns(backends), writer(backends))
        if not incoming:
            memory.launch()  # a stock guest has no RMP: every page counts as private
        workers = len(os.sched_getaffinity(0))
        tracker = ContentTracker(
            memory.words, fresh_digest(), data=lambda: memory.data_ranges, workers=workers
        )
        if incoming:
            machine.flag_up = machine.holds = True
            machine.wanted = False
            await qmp.execute(
                "stop"
            )  # while it waits this says: do not run by yourself after the device state
        gate = QemuGate(machine, models)
        hypervisor = QemuHypervisor(qmp, machine, Platform.of(name, models, backends), backends)
        return cls(memory, tracker, gate, hypervisor, machine, process_id)


async def _follow(qmp: QmpClient, machine: QemuMachine) -> None:
    await qmp.run()
    machine.end()


async def _check_idle(qmp: QmpClient, machine: QemuMachine, *, incoming: bool) -> None:
    status = await machine.refresh(qmp)
    if incoming and status != "inmigrate":
        raise GuestError(f"this QEMU is {status}: start the destination's with -incoming defer")
    if not incoming and status != "running":
        raise GuestError(f"this QEMU is {status}, and only one that is running can be sent")
    jobs = records(await qmp.execute("query-block-jobs"))
    if jobs:
        raise GuestError(f"QEMU runs the block job {jobs[0].get('device')}: let it end, or cancel it")
    migration = record(await qmp.execute("query-migrate"))
    if "socket-address" in migration:
        raise GuestError("this QEMU listens for a migration of its own: start it with -incoming defer")
    if migration.get("status") not in OVER:
        raise GuestError(f"QEMU is in a migration of its own already: {migration.get('status')}")
    blocked = migration.get("blocked-reasons")
    if isinstance(blocked, list) and blocked:
        raise GuestError(f"QEMU says that this guest cannot be migrated: {blocked[0]}")
    for capability in records(await qmp.execute("query-migrate-capabilities")):
        if capability.get("capability") in _UNFIT_CAPABILITIES and capability.get("state") is True:
            raise GuestError(
                f"QEMU's own migration has {capability.get('capability')} on, with which the device state cannot be had: "
                "switch it off (migrate-set-capabilities)"
            )
    if record(await qmp.execute("query-migrate-parameters")).get("tls-creds"):
        raise GuestError("QEMU's own migration has tls-creds, with which the device state cannot be had")


async def _model(qmp: QmpClient, cpu: dict[str, object]) -> CpuModel:
    kind = await qmp.execute("qom-get", {"path": text(cpu.get("qom-path")), "property": "type"})
    return CpuModel(whole(cpu.get("cpu-index")), text(cpu.get("target")), text(kind))
