"""A guest in a stock QEMU moves while it writes, and goes on at one side only."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import trio

import pagexfer
from pagexfer.errors import GuestError
from pagexfer.guests.qemu import QemuGuest

from .qemu_guests import errors, goes_on, needs_qemu, qemu, rounds
from .test_migration import PSK, migrate

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = needs_qemu


async def test_a_guest_that_writes_moves_and_goes_on(tmp_path: Path) -> None:
    with qemu(tmp_path / "s") as here, qemu(tmp_path / "d", incoming=True) as there:
        async with QemuGuest.attach(here) as source, QemuGuest.attach(there, incoming=True) as destination:
            await goes_on(source)
            report = await migrate(source, destination, 4, freshness="digest-audit")
            await goes_on(destination)
            assert errors(destination) == errors(source) == 0
            assert (source.run_state, destination.run_state) == ("postmigrate", "running")
            assert rounds(destination) > rounds(source)
            assert not np.array_equal(source.memory.words, destination.memory.words)
    assert report.freshness.label == "digest-audit"


async def test_a_destination_that_dies_in_blackout_leaves_the_source_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with qemu(tmp_path / "s") as here, qemu(tmp_path / "d", incoming=True) as there:
        async with QemuGuest.attach(here) as source, QemuGuest.attach(there, incoming=True) as destination:
            await goes_on(source)

            async def die(_state: bytes) -> None:
                assert source.gate.parked() == source.gate.vcpus
                await trio.lowlevel.checkpoint()
                raise GuestError("QEMU has ended")

            monkeypatch.setattr(destination.hypervisor, "load_device_state", die)
            with pytest.RaisesGroup(pagexfer.TransferAborted, pagexfer.TransferAborted):
                await migrate(source, destination, 2, freshness="digest-audit")
            await goes_on(source)
            assert errors(source) == 0
            assert (source.run_state, destination.run_state) == ("running", "inmigrate")
            # Nothing of the failed move is left: the guest can still be sent.
            with qemu(tmp_path / "e", incoming=True) as elsewhere:
                async with QemuGuest.attach(elsewhere, incoming=True) as other:
                    await migrate(source, other, 2, freshness="digest-audit")
                    await goes_on(other)
                    assert errors(other) == 0


async def test_a_cancelled_move_leaves_the_source_running(tmp_path: Path) -> None:
    with qemu(tmp_path / "s") as here:
        async with QemuGuest.attach(here) as source:
            await goes_on(source)
            with pytest.raises(pagexfer.TransferAborted, match="refused"):
                await pagexfer.send_guest(source, "127.0.0.1", 1, PSK)
            await goes_on(source)


@pytest.mark.parametrize(
    ("options", "incoming", "share", "why"),
    [
        ((), False, "off", "share=on"),
        (("-S",), False, "on", "only one that is running"),
        ((), True, "on", "-incoming defer"),
    ],
)
async def test_what_cannot_move_is_refused(
    tmp_path: Path, options: tuple[str, ...], incoming: bool, share: str, why: str
) -> None:
    with qemu(tmp_path / "s", *options, share=share) as monitor, pytest.raises(GuestError, match=why):
        async with QemuGuest.attach(monitor, incoming=incoming):
            pass


async def test_another_machine_type_is_refused(tmp_path: Path) -> None:
    with qemu(tmp_path / "s") as here, qemu(tmp_path / "d", "-M", "pc-i440fx-7.1", incoming=True) as there:
        async with QemuGuest.attach(here) as source, QemuGuest.attach(there, incoming=True) as destination:
            await goes_on(source)
            with pytest.RaisesGroup(pagexfer.TransferAborted, pagexfer.TransferAborted) as caught:
                await migrate(source, destination, 1, freshness="digest-audit")
            assert any("pc-i440fx-7.1" in str(aborted) for aborted in caught.value.exceptions)
            await goes_on(source)


async def test_nobody_at_the_monitor(tmp_path: Path) -> None:
    with pytest.raises(GuestError, match="no QMP monitor"):
        async with QemuGuest.attach(tmp_path / "nowhere"):
            pass
