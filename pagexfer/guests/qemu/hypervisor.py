"""The hypervisor of a QEMU guest: stop, continue, and device state by QEMU's own migration."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import trio

from ...errors import GuestError, MalformedData
from .backends import check_unchanged
from .device_state import load_stream, save_stream, split_state_untrusted

if TYPE_CHECKING:
    from .backends import Backend
    from .device_state import Platform
    from .machine import QemuMachine
    from .qmp import QmpClient


class QemuHypervisor:
    """`Hypervisor` of one QEMU. Whether it runs is decided together with the gate: see `QemuMachine`."""

    # A guest's tracker finds what was written.
    dirty_log = None

    def __init__(
        self, qmp: QmpClient, machine: QemuMachine, platform: Platform, backends: tuple[Backend, ...]
    ) -> None:
        self._qmp = qmp
        self._machine = machine
        self._platform = platform
        self._backends = backends

    async def stop(self) -> None:
        self._machine.wanted = False
        await self._machine.wait_settled()

    async def resume(self) -> None:
        """Raises GuestError where QEMU does not go on."""
        self._machine.wanted = True
        await self._machine.wait_settled()

    async def save_device_state(self) -> bytes:
        await check_unchanged(self._qmp, self._backends)
        stream = await save_stream(self._qmp, self._begun)
        await self._machine.refresh(self._qmp)  # no event says that QEMU is "postmigrate" now
        return self._platform.pack() + stream

    async def platform(self) -> bytes:
        """`engine.hypervisor.DescribedHypervisor`: the device state without a stream."""
        await trio.lowlevel.checkpoint()
        return self._platform.pack()

    async def check_platform(self, platform: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self._split(platform)

    async def load_device_state(self, state: bytes) -> None:
        """Raises GuestError where the source is another kind of machine, or QEMU refuses."""
        stream = self._split(state)
        await check_unchanged(self._qmp, self._backends)
        await load_stream(self._qmp, stream)
        status = await self._machine.refresh(self._qmp)
        if status != "paused":
            raise GuestError(f"QEMU took the device state and is not paused but {status}")

    async def watch(self) -> NoReturn:
        """`engine.hypervisor.WatchedHypervisor`."""
        await self._machine.watch()

    def _split(self, state: bytes) -> bytes:
        """QEMU's stream in a device state. Raises GuestError where that is of a machine that does not fit."""
        try:
            source, stream = split_state_untrusted(state)
        except MalformedData as error:
            raise GuestError(str(error)) from error
        self._platform.check_accepts(source)
        return stream

    def _begun(self) -> None:
        self._machine.migrates = True
