"""What pagexfer sets of QEMU's own migration is as it was afterwards, whatever becomes of the move."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from pagexfer.errors import GuestError
from pagexfer.guests.qemu import QemuGuest, device_state
from pagexfer.guests.qemu.values import record, records

from .qemu_guests import errors, goes_on, needs_qemu, qemu, until
from .test_migration import migrate

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = needs_qemu


async def settings(guest: QemuGuest) -> tuple[set[object], object]:
    """Capabilities that are on, and the bandwidth."""
    execute = guest.hypervisor._qmp.execute
    on = {
        entry["capability"]
        for entry in records(await execute("query-migrate-capabilities"))
        if entry["state"]
    }
    return on, record(await execute("query-migrate-parameters"))["max-bandwidth"]


async def switch_on(guest: QemuGuest, capability: str) -> None:
    wanted = {"capabilities": [{"capability": capability, "state": True}]}
    await guest.hypervisor._qmp.execute("migrate-set-capabilities", wanted)


class _AtStep(trio.abc.Instrument):
    """Calls `act` at the `number`th turn of any task."""

    def __init__(self, number: int, act: Callable[[], None]) -> None:
        self._left = number
        self._act = act

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._left -= 1
        if not self._left:
            self._act()


async def test_a_source_that_is_cancelled_at_any_point_has_its_settings_back(tmp_path: Path) -> None:
    with qemu(tmp_path) as monitor:
        async with QemuGuest.attach(monitor) as guest:
            before = await settings(guest)
            cancelled, step = True, 0
            while cancelled:
                step += 1
                guest.gate.raise_flag()
                await guest.hypervisor.stop()
                with trio.CancelScope() as scope:
                    instrument = _AtStep(step, scope.cancel)
                    trio.lowlevel.add_instrument(instrument)
                    await guest.hypervisor.save_device_state()
                trio.lowlevel.remove_instrument(instrument)
                cancelled = scope.cancelled_caught
                assert await settings(guest) == before, step
                guest.gate.release()
                await guest.hypervisor.resume()
            assert step > 20
            await goes_on(guest)
            assert errors(guest) == 0


async def test_settings_are_back_after_a_move_and_not_another_way_than_they_were(tmp_path: Path) -> None:
    with qemu(tmp_path / "s") as here, qemu(tmp_path / "d", incoming=True) as there:
        async with QemuGuest.attach(here) as source, QemuGuest.attach(there, incoming=True) as destination:
            await switch_on(source, "x-ignore-shared")
            before = await settings(source), await settings(destination)
            await migrate(source, destination, 2)
            assert (await settings(source), await settings(destination)) == before
            assert before[0][0] == {"x-ignore-shared"}
            await goes_on(destination)


async def test_a_destination_that_gets_no_stream_has_its_settings_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with qemu(tmp_path / "s") as here, qemu(tmp_path / "d", incoming=True) as there:
        async with QemuGuest.attach(here) as source, QemuGuest.attach(there, incoming=True) as destination:
            source.gate.raise_flag()
            await source.hypervisor.stop()
            state = await source.hypervisor.save_device_state()
            destination.memory.words[:] = source.memory.words  # where some devices look as well
            before = await settings(destination)
            seen = []

            async def refuse(_qmp: object) -> trio.socket.SocketType:
                seen.append(await settings(destination))
                raise GuestError("no")

            monkeypatch.setattr(device_state, "_hand_over", refuse)
            with pytest.raises(GuestError, match="no"):
                await destination.hypervisor.load_device_state(state)
            assert seen[0][0] == {"x-ignore-shared", "late-block-activate"}
            assert await settings(destination) == before
            monkeypatch.undo()
            await destination.hypervisor.load_device_state(state)
            await until(lambda: destination.run_state == "paused")
