"""A guest in a stock QEMU moves while it writes, and goes on at one side only."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest

import pagexfer
from pagexfer.errors import GuestError
from pagexfer.guests.qemu import QemuGuest

from .qemu_guests import errors, goes_on, needs_qemu, qemu, rounds
from .test_migration import PSK, migrate

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = needs_qemu


def allocated(folder: Path) -> int:
    """Bytes of memory behind the first backend of a QEMU."""
    return (folder / "m0").stat().st_blocks * 512


async def test_a_guest_that_writes_moves_and_goes_on(tmp_path: Path) -> None:
    with qemu(tmp_path / "s") as here, qemu(tmp_path / "d", incoming=True) as there:
        async with QemuGuest.attach(here) as source, QemuGuest.attach(there, incoming=True) as destination:
            await goes_on(source)
            touched = allocated(tmp_path / "s")
            report = await migrate(source, destination, 4, freshness="digest-audit")
            assert allocated(tmp_path / "s") == touched < 8 << 20
            # A QEMU loads its firmware before it waits.
            assert allocated(tmp_path / "d") <= touched + (1 << 20)
            await goes_on(destination)
            assert errors(destination) == errors(source) == 0
            assert (source.run_state, destination.run_state) == ("postmigrate", "running")
            assert rounds(destination) > rounds(source)
            assert not np.array_equal(source.memory.words, destination.memory.words)
    assert report.freshness.label == "digest-audit"


def test_the_command_moves_a_qemu(tmp_path: Path) -> None:
    psk = tmp_path / "psk"
    psk.write_text("0123456789abcdef" * 4)
    psk.chmod(0o600)
    command = [sys.executable, "-m", "pagexfer"]
    common = ["--psk-file", str(psk), "--guest", "qemu", "--json"]
    with qemu(tmp_path / "s") as here, qemu(tmp_path / "d", incoming=True) as there:
        received = subprocess.Popen(
            [*command, "receive", "--listen", "127.0.0.1:0", "--qmp", str(there), *common],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert received.stderr is not None
            address = received.stderr.readline().split()[-1]
            send = [*command, "send", "--to", address, "--qmp", str(here), *common]
            refused = subprocess.run([*send, "--ram", "1GiB"], capture_output=True, text=True, check=False)
            assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
            sent = subprocess.run(send, capture_output=True, text=True, check=False, timeout=60)
            output, _ = received.communicate(timeout=60)
        finally:
            received.kill()
            received.communicate()
        assert (sent.returncode, received.returncode) == (0, 0), sent.stderr
        assert json.loads(sent.stdout)["guest"] == {"kind": "qemu", "run-state": "postmigrate"}
        assert json.loads(output)["guest"] == {"kind": "qemu", "run-state": "running"}
        assert json.loads(sent.stdout)["freshness"] == "digest-audit"


async def test_a_destination_that_dies_in_blackout_leaves_the_source_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with qemu(tmp_path / "s") as here, qemu(tmp_path / "d", incoming=True) as there:
        async with QemuGuest.attach(here) as source, QemuGuest.attach(there, incoming=True) as destination:
            await goes_on(source)

            load = destination.hypervisor.load_device_state

            async def die(state: bytes) -> None:
                assert source.gate.parked() == source.gate.vcpus
                os.kill(destination.hypervisor._qmp.process_id, signal.SIGKILL)
                await load(state)

            monkeypatch.setattr(destination.hypervisor, "load_device_state", die)
            with pytest.RaisesGroup(pagexfer.TransferAborted, pagexfer.TransferAborted):
                await migrate(source, destination, 2, freshness="digest-audit")
            await goes_on(source)
            assert errors(source) == 0
            assert source.run_state == "running"
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
