"""A guest in a stock QEMU moves while it writes, and goes on at one side only."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pytest
import trio

import pagexfer
from pagexfer.cli.commands import cli
from pagexfer.errors import GuestError, UsageError
from pagexfer.guests.qemu import QemuGuest
from pagexfer.guests.qemu.device_state import Platform
from pagexfer.guests.qemu.qmp import QmpClient
from pagexfer.guests.qemu.values import record

from .qemu_guests import errors, goes_on, needs_huge_pages, needs_qemu, qemu, rounds, until
from .test_migration import PSK, migrate

if TYPE_CHECKING:
    from collections.abc import Iterator
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
            report = await migrate(source, destination, 4)
            assert allocated(tmp_path / "s") == touched < 8 << 20
            # A QEMU loads its firmware before it waits.
            assert allocated(tmp_path / "d") <= touched + (1 << 20)
            await goes_on(destination)
            assert errors(destination) == errors(source) == 0
            assert (source.run_state, destination.run_state) == ("postmigrate", "running")
            assert rounds(destination) > rounds(source)
            assert not np.array_equal(source.memory.words, destination.memory.words)
    assert report.freshness.label == "digest-audit"
    assert report.info.audit is None  # RAM was scanned once in black-out, not twice


async def test_ram_is_equal_page_by_page_when_the_guest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with qemu(tmp_path / "s") as here, qemu(tmp_path / "d", incoming=True) as there:
        async with QemuGuest.attach(here) as source, QemuGuest.attach(there, incoming=True) as destination:
            await goes_on(source)
            resume = destination.hypervisor.resume
            different: list[int] = []

            async def compare() -> None:
                assert (source.run_state, destination.run_state) == ("postmigrate", "paused")
                different.append(int((source.memory.words != destination.memory.words).any(axis=1).sum()))
                await resume()

            monkeypatch.setattr(destination.hypervisor, "resume", compare)
            await migrate(source, destination, 3)
            await goes_on(destination)
    assert different == [0]


@needs_huge_pages(16)
async def test_ram_in_huge_pages_moves(tmp_path: Path) -> None:
    with qemu(tmp_path / "s", huge=True) as here, qemu(tmp_path / "d", incoming=True, huge=True) as there:
        async with QemuGuest.attach(here) as source, QemuGuest.attach(there, incoming=True) as destination:
            await goes_on(source)
            source.memory.words[-1] = 7  # in the backend of huge pages
            await migrate(source, destination, 2)
            await goes_on(destination)
            assert (destination.memory.words[-1] == 7).all()
            assert errors(destination) == 0


@needs_huge_pages(8)
async def test_huge_pages_at_one_side_only_are_refused(tmp_path: Path) -> None:
    with qemu(tmp_path / "s", huge=True) as here, qemu(tmp_path / "d", incoming=True) as there:
        async with QemuGuest.attach(here) as source, QemuGuest.attach(there, incoming=True) as destination:
            await goes_on(source)
            with pytest.RaisesGroup(pagexfer.TransferAborted, pagexfer.TransferAborted) as caught:
                await migrate(source, destination, 2)
            assert all("page size" in str(aborted) for aborted in caught.value.exceptions)
            await goes_on(source)


async def test_the_gmac_audit_can_be_had_as_well(tmp_path: Path) -> None:
    with qemu(tmp_path / "s") as here, qemu(tmp_path / "d", incoming=True) as there:
        async with QemuGuest.attach(here) as source, QemuGuest.attach(there, incoming=True) as destination:
            await goes_on(source)
            report = await migrate(source, destination, 1, freshness="digest-audit")
            await goes_on(destination)
            assert errors(destination) == 0
    assert report.freshness.label == "digest-audit"
    assert report.info.audit is not None
    assert report.info.audit.pages == 0  # the tracker had found all of them


def _by_command(folder: Path, here: Path, there: Path, *options: str) -> tuple[_Ended, _Ended]:
    """Move a guest with two commands; how the source's and the destination's ended."""
    psk = folder / "psk"
    psk.write_text("0123456789abcdef" * 4)
    psk.chmod(0o600)
    command = [sys.executable, "-m", "pagexfer"]
    common = ["--psk-file", str(psk), "--guest", "qemu", "--json", *options]
    receive = [*command, "receive", "--listen", "127.0.0.1:0", "--qmp", str(there), *common]
    received = subprocess.Popen(receive, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert received.stderr is not None
        address = received.stderr.readline().split()[-1]
        send = [*command, "send", "--to", address, "--qmp", str(here), *common]
        sent = subprocess.run(send, capture_output=True, text=True, check=False, timeout=60)
        output, said = received.communicate(timeout=60)
    finally:
        received.kill()
        received.communicate()
    return _Ended(sent.returncode, sent.stdout, sent.stderr), _Ended(received.returncode, output, said)


class _Ended(NamedTuple):
    code: int
    output: str
    said: str


@pytest.mark.parametrize("isolation", [[], ["--isolated"]], ids=["one-process", "isolated"])
def test_the_command_moves_a_qemu(tmp_path: Path, isolation: list[str]) -> None:
    with qemu(tmp_path / "s") as here, qemu(tmp_path / "d", incoming=True) as there:
        sent, received = _by_command(tmp_path, here, there, *isolation)
    assert (sent.code, received.code) == (0, 0), sent.said + received.said
    assert json.loads(sent.output)["guest"] == {"kind": "qemu", "run-state": "postmigrate"}
    assert json.loads(received.output)["guest"] == {"kind": "qemu", "run-state": "running"}
    assert json.loads(sent.output)["freshness"] == "digest-audit"


@pytest.fixture
def small_memory_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in a memory file system of 8 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(mounting, check=False).returncode:
        pytest.skip("only root can mount a memory file system of its own")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


async def test_a_destination_without_memory_for_all_of_ram_leaves_the_source_running(
    tmp_path: Path, small_memory_folder: Path
) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "m0").write_bytes(np.random.default_rng(1).bytes(16 << 20))
    with qemu(tmp_path / "s") as here, qemu(small_memory_folder, incoming=True) as there:
        sent, received = await trio.to_thread.run_sync(_by_command, tmp_path, here, there)
        async with QemuGuest.attach(here) as source:
            await goes_on(source)
    assert (sent.code, received.code) == (1, 1)
    for side in (sent, received):
        assert "the destination room for RAM" in side.said.splitlines()[-1]
        assert "Traceback" not in side.said
    assert json.loads(received.output)["guest"] == {"kind": "qemu", "run-state": "inmigrate"}


def test_options_of_test_guests_are_refused(tmp_path: Path) -> None:
    psk = tmp_path / "psk"
    psk.write_text("0123456789abcdef" * 4)
    psk.chmod(0o600)
    send = ["send", "--to", "127.0.0.1:1", "--psk-file", str(psk), "--guest", "qemu", "--qmp", "nowhere"]
    with pytest.raises(UsageError, match="--ram is for test guests"):
        cli.main([*send, "--ram", "1GiB"], standalone_mode=False)
    with pytest.raises(GuestError, match="no QMP monitor"):
        cli.main(send, standalone_mode=False)


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
                await migrate(source, destination, 2)
            await goes_on(source)
            assert errors(source) == 0
            assert source.run_state == "running"
            # Nothing of the failed move is left: the guest can still be sent.
            with qemu(tmp_path / "e", incoming=True) as elsewhere:
                async with QemuGuest.attach(elsewhere, incoming=True) as other:
                    await migrate(source, other, 2)
                    await goes_on(other)
                    assert errors(other) == 0


async def test_a_cancel_in_blackout_leaves_the_source_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with qemu(tmp_path / "s") as here, qemu(tmp_path / "d", incoming=True) as there:
        async with QemuGuest.attach(here) as source, QemuGuest.attach(there, incoming=True) as destination:
            await goes_on(source)
            steering, load = pagexfer.Steering(), destination.hypervisor.load_device_state

            async def cancel(state: bytes) -> None:
                assert source.run_state == "postmigrate"
                steering.cancel()
                await load(state)
                await until(lambda: source.run_state == "running")

            monkeypatch.setattr(destination.hypervisor, "load_device_state", cancel)
            async with trio.open_nursery() as nursery:
                port: int = await nursery.start(serve_in_vain, destination)
                with pytest.raises(pagexfer.TransferAborted, match="cancelled") as aborted:
                    await pagexfer.send_guest(source, "127.0.0.1", port, PSK, steering=steering)
                assert aborted.value.outcome is pagexfer.Outcome.ENDED
            await goes_on(source)
            assert errors(source) == 0
            assert destination.run_state != "running"


async def serve_in_vain(
    guest: QemuGuest, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED
) -> None:
    with pytest.raises(pagexfer.TransferAborted):
        await pagexfer.receive_guest(guest, "127.0.0.1", 0, PSK, on_listening=task_status.started)


async def test_nobody_at_the_destination_leaves_the_source_running(tmp_path: Path) -> None:
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


@pytest.mark.parametrize(("option", "value"), [("-M", "pc-i440fx-7.1"), ("-cpu", "Skylake-Client")])
async def test_another_machine_is_refused_before_ram_is_sent(tmp_path: Path, option: str, value: str) -> None:
    with qemu(tmp_path / "s") as here, qemu(tmp_path / "d", option, value, incoming=True) as there:
        async with QemuGuest.attach(here) as source, QemuGuest.attach(there, incoming=True) as destination:
            await goes_on(source)
            with pytest.RaisesGroup(pagexfer.TransferAborted, pagexfer.TransferAborted) as caught:
                await migrate(source, destination, 1)
            for aborted in caught.value.exceptions:
                assert isinstance(aborted, pagexfer.TransferAborted)
                assert (aborted.reason, value in str(aborted)) == ("geometry", True), str(aborted)
            assert rounds(destination) == 0
            await goes_on(source)


@pytest.mark.parametrize(("option", "value"), [("-M", "pc-i440fx-7.1"), ("-cpu", "Skylake-Client")])
async def test_another_machine_is_refused_also_with_the_device_state(
    tmp_path: Path, option: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the source says of its machine is nobody's word; what comes sealed is."""
    with qemu(tmp_path / "s") as here, qemu(tmp_path / "d", option, value, incoming=True) as there:
        async with QemuGuest.attach(here) as source, QemuGuest.attach(there, incoming=True) as destination:
            monkeypatch.setattr(source.hypervisor, "platform", destination.hypervisor.platform)
            await goes_on(source)
            with pytest.RaisesGroup(pagexfer.TransferAborted, pagexfer.TransferAborted) as caught:
                await migrate(source, destination, 1)
            reasons = {str(getattr(aborted, "reason", "")) for aborted in caught.value.exceptions}
            assert reasons <= {"device-state", "guest"}, caught.value.exceptions
            await goes_on(source)


async def test_a_source_that_dies_after_the_start_token_stays_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    psk = tmp_path / "psk"
    psk.write_text("0123456789abcdef" * 4)
    psk.chmod(0o600)
    with qemu(tmp_path / "s") as here, qemu(tmp_path / "d", incoming=True) as there:
        async with QemuGuest.attach(there, incoming=True) as destination, trio.open_nursery() as nursery:
            resume = destination.hypervisor.resume
            attestor = pagexfer.PskAttestor.from_file(psk)

            async def receive(task_status: trio.TaskStatus[int]) -> None:
                await pagexfer.receive_guest(
                    destination, "127.0.0.1", 0, attestor, on_listening=task_status.started
                )

            port: int = await nursery.start(receive)
            arguments = ["--guest", "qemu", "--qmp", str(here), "--psk-file", str(psk)]
            sender = subprocess.Popen(  # noqa: ASYNC220 - it is killed, not waited for
                [sys.executable, "-m", "pagexfer", "send", "--to", f"127.0.0.1:{port}", *arguments],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

            async def kill_first() -> None:
                sender.kill()
                sender.wait()
                await resume()

            monkeypatch.setattr(destination.hypervisor, "resume", kill_first)
            await until(lambda: destination.run_state == "running")
            await goes_on(destination)
            assert errors(destination) == 0
            assert sender.returncode == -signal.SIGKILL
            qmp = await QmpClient.connect(here)
            nursery.start_soon(qmp.run)
            assert record(await qmp.execute("query-status"))["status"] == "postmigrate"
            nursery.cancel_scope.cancel()
        qmp.close()


@pytest.mark.parametrize(
    ("sizes", "why"),
    [
        ((24, 8), "differ in number or size"),
        ((24, 16), "the destination's 40 MiB"),
        ((8, 16), "the destination's 24 MiB"),
    ],
)
async def test_other_ram_is_refused(tmp_path: Path, sizes: tuple[int, int], why: str) -> None:
    with qemu(tmp_path / "s") as here, qemu(tmp_path / "d", incoming=True, sizes=sizes) as there:
        async with QemuGuest.attach(here) as source, QemuGuest.attach(there, incoming=True) as destination:
            await goes_on(source)
            with pytest.RaisesGroup(pagexfer.TransferAborted, pagexfer.TransferAborted) as caught:
                await migrate(source, destination, 1)
            assert any(why in str(aborted) for aborted in caught.value.exceptions), caught.value.exceptions
            await goes_on(source)


def test_other_pages_are_refused() -> None:
    small, huge = Platform("pc", "max", ((1 << 30, 4096),)), Platform("pc", "max", ((1 << 30, 2 << 20),))
    small.check_accepts(small)
    with pytest.raises(GuestError, match="huge"):
        small.check_accepts(huge)
    with pytest.raises(GuestError, match="huge"):
        huge.check_accepts(small)


_DISKS = [
    option
    for name in ("n0", "n1")
    for option in ("-blockdev", f"null-co,node-name={name},size=1073741824,read-zeroes=on")
]


@pytest.mark.parametrize(
    ("command", "arguments", "why"),
    [
        (
            "blockdev-backup",
            {"job-id": "j0", "device": "n0", "target": "n1", "sync": "full", "speed": 1},
            "block job j0",
        ),
        ("migrate", {"uri": "unix:LISTENER"}, "migration of its own already: active"),
    ],
)
async def test_what_qemu_is_busy_with_is_let_be(
    tmp_path: Path, command: str, arguments: dict[str, object], why: str
) -> None:
    with (
        qemu(tmp_path / "s", *_DISKS) as monitor,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener,
    ):
        listener.bind(str(tmp_path / "nobody-reads"))
        listener.listen()
        if "uri" in arguments:
            arguments = {"uri": f"unix:{tmp_path / 'nobody-reads'}"}
        async with trio.open_nursery() as nursery:
            qmp = await QmpClient.connect(monitor)
            nursery.start_soon(qmp.run)
            await qmp.execute(command, arguments)
            # Nothing tells that a migration is past its set-up.
            while record(await qmp.execute("query-migrate")).get("status") == "setup":  # noqa: ASYNC110
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
        qmp.close()
        with pytest.raises(GuestError, match=why):
            async with QemuGuest.attach(monitor):
                pass


async def test_nobody_at_the_monitor(tmp_path: Path) -> None:
    with pytest.raises(GuestError, match="no QMP monitor"):
        async with QemuGuest.attach(tmp_path / "nowhere"):
            pass
