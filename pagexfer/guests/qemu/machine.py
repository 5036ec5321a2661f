"""One QEMU as gate and hypervisor share it: its run state as events tell it, and who wants it to run.

A stock QEMU has no SVSM that could park vCPUs, so the gate's flag is emulated by QMP `stop`: vCPUs may run only while
the flag is down and the hypervisor is to run them. One task sends `stop` and `cont` accordingly.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Final

import trio

from ...errors import GuestError
from .values import record, text

if TYPE_CHECKING:
    from .messages import QmpEvent
    from .qmp import QmpClient

_RETRY_S: Final = 0.1


class QemuMachine:
    """Run state of the QEMU behind `qmp`; `run` must go on in a nursery.

    The gate's part, `flag_up`, `stopped` and `wake`, may be used by any thread: an SVSM's slots can have threads of their
    own.
    """

    def __init__(self) -> None:
        self._trio = trio.lowlevel.current_trio_token()
        self.flag_up = False
        self.wanted = True
        self.status = ""
        self.fault: GuestError | None = None
        self._news = trio.Event()
        self._work = trio.Event()

    @property
    def stopped(self) -> bool:
        """Whether QEMU said that no vCPU runs, and since then nothing else."""
        return self.status in ("paused", "postmigrate", "inmigrate", "finish-migrate", "prelaunch")

    def on_event(self, event: QmpEvent) -> None:
        """Follow what QEMU says by itself."""
        match event.name:
            case "STOP":
                self._set_status("paused")
            case "RESUME":
                self._set_status("running")
            case "SHUTDOWN":
                self._set_status("shutdown")

    def on_reconnect(self) -> None:
        """Events may have been missed: ask."""
        self.status = ""
        self._begin()

    def wake(self) -> None:
        """Somebody's wish has changed."""
        with suppress(trio.RunFinishedError):  # then nobody is left who could tell QEMU
            self._trio.run_sync_soon(self._begin, idempotent=True)

    async def refresh(self, qmp: QmpClient) -> str:
        """Ask for the run state."""
        self._set_status(text(record(await qmp.execute("query-status")).get("status")))
        return self.status

    async def run(self, qmp: QmpClient) -> None:
        """Keep QEMU as it is wanted, until cancelled."""
        while True:
            await self._work.wait()
            self._work = trio.Event()
            try:
                await self._settle(qmp)
            except GuestError as error:
                self.fault = error
                self._tell()
                if not qmp.gone:
                    await trio.sleep(_RETRY_S)

    async def wait_settled(self) -> None:
        """Until QEMU is as it is wanted. Raises GuestError where that fails."""
        self._begin()
        while not self._settled():
            if self.fault is not None:
                raise self.fault
            await self._news.wait()
        await trio.lowlevel.checkpoint()

    def _begin(self) -> None:
        self.fault = None
        self._work.set()

    async def _settle(self, qmp: QmpClient) -> None:
        if not self.status:
            await self.refresh(qmp)
        while not self._settled():
            await qmp.execute("cont" if self._may_run() else "stop")
            await self.refresh(qmp)
            if self.status not in ("running", "paused", "postmigrate"):
                raise GuestError(f"QEMU neither runs nor is stopped: its run state is {self.status}")
        self._tell()

    def _may_run(self) -> bool:
        return self.wanted and not self.flag_up

    def _settled(self) -> bool:
        return self.status == "running" if self._may_run() else self.stopped

    def _set_status(self, status: str) -> None:
        self.status = status
        self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = trio.Event()
