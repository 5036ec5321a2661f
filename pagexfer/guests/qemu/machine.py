"""One QEMU as gate and hypervisor share it: its run state as it says itself, and who wants it to run.

A stock QEMU has no SVSM that could park vCPUs, so the gate's flag is emulated by QMP `stop`: vCPUs may run only while
the flag is down and the hypervisor is to run them. One task sends `stop` and `cont` accordingly.

Others may have monitors of the same QEMU, and a guest may stop by itself. Only what was stopped here is continued here, and
what somebody else does to a guest that moves ends the move: a QEMU that was migrated away by somebody else, switched off or
paused stays as it is.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Final, NoReturn

import trio

from ...errors import GuestError
from .qmp import QmpBroken
from .values import record, text

if TYPE_CHECKING:
    from .messages import QmpEvent
    from .qmp import QmpClient

_RETRY_S: Final = 0.1
# QEMU answers `stop` once its devices have ended what they were at, and a disk may be slow.
_STOP_TIMEOUT_S: Final = 60.0
_CHANGES: Final = ("STOP", "RESUME", "SHUTDOWN", "SUSPEND", "WAKEUP", "GUEST_PANICKED")
_STOPPED: Final = ("paused", "inmigrate", "prelaunch")
# After QEMU's own migration, in which its device state was saved.
_MIGRATED: Final = ("finish-migrate", "postmigrate")
# For switches between here and a destination that has told them of itself already; QEMU's own usual numbers.
_ANNOUNCE: Final = {"initial": 50, "max": 550, "rounds": 5, "step": 100}


class QemuMachine:
    """Run state of the QEMU behind `qmp`; `run` must go on in a nursery.

    The gate's part, `flag_up`, `stopped` and `wake`, may be used by any thread: an SVSM's slots can have threads of their
    own.
    """

    def __init__(self) -> None:
        self._trio = trio.lowlevel.current_trio_token()
        self.flag_up = False
        self.wanted = True
        self.status = ""  # empty where it may have changed since QEMU said it
        self.holds = False  # it was stopped from here, and nobody else has continued it
        self.migrates = False  # its own migration was begun from here
        self.fault: GuestError | None = None
        self._interference = ""
        self._news = trio.Event()
        self._work = trio.Event()

    @property
    def stopped(self) -> bool:
        """Whether QEMU was stopped from here and has said since that nothing runs: neither vCPUs nor what devices began."""
        return self.holds and self._stands_still()

    def on_event(self, event: QmpEvent) -> None:
        """Follow what QEMU says by itself. What its run state is now, has to be asked.

        STOP comes while devices are still at what they began, which writes to RAM: only an answer of QEMU's main loop,
        which waits for them, says that they are done (`do_vm_stop` of QEMU's system/cpus.c).
        """
        if event.name not in _CHANGES:
            return
        if event.name == "RESUME" and self.holds and not self._may_run():
            self.interfere("somebody else has continued the guest while it was being moved")
        self._set_status("")
        self._begin()

    def on_reconnect(self) -> None:
        """Events may have been missed: ask."""
        self._set_status("")
        self._begin()

    def interfere(self, what: str) -> None:
        """This guest is not this side's alone any more."""
        self._interference = what
        self.holds = False
        self._tell()

    def end(self) -> None:
        """QEMU is gone for good."""
        self.status = "gone"
        self.interfere("QEMU has ended, or its monitor takes nobody any more")
        self._begin()

    def wake(self) -> None:
        """Somebody's wish has changed."""
        with suppress(trio.RunFinishedError):  # then nobody is left who could tell QEMU
            self._trio.run_sync_soon(self._begin, idempotent=True)

    async def refresh(self, qmp: QmpClient) -> str:
        """Ask for the run state."""
        self._set_status(
            text(record(await qmp.execute("query-status", timeout_s=_STOP_TIMEOUT_S)).get("status"))
        )
        return self.status

    async def run(self, qmp: QmpClient) -> None:
        """Keep QEMU as it is wanted, until cancelled."""
        while True:
            await self._work.wait()
            self._work = trio.Event()
            try:
                await self._settle(qmp)
            except QmpBroken:
                continue  # it begins again with the next connection, or fails at the end of all
            except GuestError as error:
                self.fault = error
                self._tell()
                await trio.sleep(_RETRY_S)

    async def wait_settled(self) -> None:
        """Until QEMU is as it is wanted. Raises GuestError where that fails, or is not this side's to do."""
        self._begin()
        while not self._settled():
            if self.fault is not None:
                raise self.fault
            await self._news.wait()
        await trio.lowlevel.checkpoint()

    async def watch(self) -> NoReturn:
        """For ever. Raises GuestError once this guest was stopped or continued, and not from here."""
        while not (trouble := self._trouble()):
            await self._news.wait()
        raise GuestError(trouble)

    def _begin(self) -> None:
        self.fault = None
        self._work.set()

    async def _settle(self, qmp: QmpClient) -> None:
        if not self.status:
            await self.refresh(qmp)
        while not self._settled():
            if trouble := self._trouble():
                is_left = self._may_run() and self.status != "gone"
                raise GuestError("QEMU is left as it is" if is_left else trouble)
            if self._may_run():
                await self._continue(qmp)
            else:
                await qmp.execute("stop", timeout_s=_STOP_TIMEOUT_S)
                self.holds = True
            await self.refresh(qmp)
        if self.status == "running":
            self.holds = self.migrates = False
            self._interference = ""
        self._tell()

    async def _continue(self, qmp: QmpClient) -> None:
        # As it is now: somebody else's migration of a paused guest comes with no event.
        status = await self.refresh(qmp)
        if not self._stands_still():
            raise GuestError(f"QEMU is {status}, and not by this move: it is left as it is")
        await qmp.execute("cont")
        if status in _MIGRATED:
            with suppress(GuestError):
                await qmp.execute("announce-self", _ANNOUNCE)

    def _stands_still(self) -> bool:
        return self.status in _STOPPED or (self.migrates and self.status in _MIGRATED)

    def _trouble(self) -> str:
        """What ends a move of this guest; empty while all is well, or not known."""
        if self._interference or self.holds or self.status in ("", "running"):
            return self._interference
        return f"this QEMU is {self.status}, and was not stopped by this move"

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
