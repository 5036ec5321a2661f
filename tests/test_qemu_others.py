"""A QEMU that is not pagexfer's alone: other monitors, slow disks, a guest that stops by itself, files that change names.

What is not this move's own doing ends it, and nobody is continued whom it did not stop.
"""

from __future__ import annotations

import os
import re
import socket
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Final

import pytest
import trio

import pagexfer
from pagexfer.errors import GuestError
from pagexfer.guests.qemu import QemuGuest
from pagexfer.guests.qemu.qmp import QmpClient
from pagexfer.guests.qemu.values import record

from .qemu_guests import MOVES_MEMFDS, errors, goes_on, needs_qemu, qemu, until
from .test_migration import PSK

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from pagexfer.guests.qemu.messages import QmpEvent

pytestmark = needs_qemu

_SLOW_DISK_S: Final = 3
_PAUSING = pagexfer.MigrationParameters(pause_before_switchover=True)


@asynccontextmanager
async def somebody_else(
    folder: Path, on_event: Callable[[QmpEvent], None] = lambda _event: None
) -> AsyncIterator[QmpClient]:
    """Another client of the QEMU in `folder`, at its second monitor."""
    async with trio.open_nursery() as nursery:
        qmp = await QmpClient.connect(folder / "other", on_event)
        nursery.start_soon(qmp.run)
        yield qmp
        nursery.cancel_scope.cancel()
    qmp.close()


@asynccontextmanager
async def two_qemus(folder: Path, *options: str) -> AsyncIterator[tuple[QmpClient, QemuGuest, QemuGuest]]:
    """Somebody else at the source's QEMU, the source, whose guest runs, and the destination."""
    with (
        qemu(folder / "s", *options, others=True) as here,
        qemu(folder / "d", *options, incoming=True) as there,
    ):
        async with (
            somebody_else(folder / "s") as other,
            QemuGuest.attach(here) as source,
            QemuGuest.attach(there, incoming=True) as destination,
        ):
            await goes_on(source)
            yield other, source, destination


async def status(qmp: QmpClient) -> object:
    return record(await qmp.execute("query-status"))["status"]


async def receive(
    guest: QemuGuest,
    ends: list[BaseException],
    task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED,
) -> None:
    try:
        await pagexfer.receive_guest(guest, "127.0.0.1", 0, PSK, on_listening=task_status.started)
    except pagexfer.TransferAborted as aborted:
        ends.append(aborted)


async def move(
    source: QemuGuest,
    destination: QemuGuest,
    steering: pagexfer.Steering | None = None,
    *,
    isolated: bool = False,
) -> pagexfer.TransferAborted:
    """A move that ends at both sides; how it ended at the source."""
    ends: list[BaseException] = []
    async with trio.open_nursery() as nursery:
        port: int = await nursery.start(receive, destination, ends)
        with pytest.raises(pagexfer.TransferAborted) as aborted:
            await pagexfer.send_guest(
                source, "127.0.0.1", port, PSK, channels=2, steering=steering, isolated=isolated
            )
    assert len(ends) == 1
    assert destination.run_state != "running"
    assert aborted.value.outcome is pagexfer.Outcome.ENDED
    return aborted.value


async def move_and(
    source: QemuGuest,
    destination: QemuGuest,
    act: Callable[[], Awaitable[object]],
    *,
    isolated: bool = False,
) -> pagexfer.TransferAborted:
    """A move during which `act` happens while the guest still runs at the source, and that ends for it."""
    steering = pagexfer.Steering(_PAUSING)

    async def act_then() -> None:
        await until(lambda: steering.paused)
        await act()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(act_then)
        return await move(source, destination, steering, isolated=isolated)


# What QEMU says and means


async def test_a_guest_is_parked_once_its_devices_are_done_and_not_before(tmp_path: Path) -> None:
    """QEMU says STOP first, and waits for the disks then: what they read is written to RAM after the event."""
    slow = "-blockdev", f"null-co,node-name=slow,size=1048576,latency-ns={_SLOW_DISK_S}000000000"
    with qemu(tmp_path / "s", *slow, others=True) as monitor:
        seen = trio.Event()

        def note(event: QmpEvent) -> None:
            if event.name == "STOP":
                seen.set()

        async with somebody_else(tmp_path / "s", note) as other, QemuGuest.attach(monitor) as guest:
            await goes_on(guest)
            begun = trio.current_time()
            await other.execute("human-monitor-command", {"command-line": 'qemu-io slow "aio_read 0 512"'})
            guest.gate.raise_flag()
            await seen.wait()
            await until(lambda: guest.run_state != "running")
            parked = guest.gate.parked()
            if (
                trio.current_time() < begun + _SLOW_DISK_S
            ):  # on a machine that stood still it may have read by now
                assert parked == 0
            await until(lambda: guest.gate.parked() == guest.gate.vcpus)
            assert guest.run_state == "paused"
            guest.gate.release()
            await goes_on(guest)


async def test_a_guest_whose_monitor_is_lost_is_continued_all_the_same(tmp_path: Path) -> None:
    with qemu(tmp_path) as monitor:
        async with QemuGuest.attach(monitor) as guest:
            for _ in range(3):
                guest.gate.raise_flag()
                await guest.hypervisor.stop()
                link = guest.hypervisor._qmp._socket
                assert link is not None
                link.shutdown(socket.SHUT_RDWR)
                guest.gate.release()
                with trio.fail_after(20):
                    await guest.hypervisor.resume()
                assert guest.run_state == "running"
                await goes_on(guest)
            assert errors(guest) == 0


async def test_a_guest_whose_qemu_is_gone_is_said_so(tmp_path: Path) -> None:
    async with two_qemus(tmp_path) as (other, source, _):
        source.gate.raise_flag()
        await source.hypervisor.stop()
        await other.execute("quit")
        source.gate.release()
        with pytest.raises(GuestError, match="QEMU has ended"), trio.fail_after(20):
            await source.hypervisor.resume()
        with pytest.raises(GuestError, match="QEMU has ended"), trio.fail_after(20):
            await source.hypervisor.resume()


# Others


@pytest.mark.parametrize("isolated", [False, True])
async def test_a_guest_that_somebody_else_pauses_stays_paused(tmp_path: Path, isolated: bool) -> None:
    async with two_qemus(tmp_path) as (other, source, destination):
        aborted = await move_and(source, destination, lambda: other.execute("stop"), isolated=isolated)
        assert aborted.reason == "guest"
        assert "paused, and was not stopped by this move" in str(aborted)
        assert "QEMU is left as it is" in str(aborted)
        assert await status(other) == "paused"


async def test_a_guest_that_somebody_else_migrates_away_is_not_continued(tmp_path: Path) -> None:
    async with two_qemus(tmp_path) as (other, source, destination):

        async def away() -> None:
            await other.execute("migrate", {"uri": "exec:cat >/dev/null"})

        aborted = await move_and(source, destination, away)
        assert "was not stopped by this move" in str(aborted)
        # It was on its way into a file; only who did that may continue it.
        with trio.fail_after(30):
            while await status(other) != "postmigrate":  # noqa: ASYNC110 - no event says so
                await trio.sleep(0.005)
        await source.hypervisor._machine.refresh(source.hypervisor._qmp)
        with pytest.raises(GuestError, match="left as it is"):
            await source.hypervisor.resume()
        assert await status(other) == "postmigrate"


async def test_a_guest_that_stops_for_good_is_not_revived(tmp_path: Path) -> None:
    ending = "-no-reboot", "-no-shutdown"
    async with two_qemus(tmp_path, *ending) as (other, source, destination):
        aborted = await move_and(source, destination, lambda: other.execute("system_reset"))
        assert "this QEMU is shutdown" in str(aborted)
        assert await status(other) == "shutdown"


async def test_a_qemu_that_ends_in_precopy_ends_the_move(tmp_path: Path) -> None:
    async with two_qemus(tmp_path) as (other, source, destination):
        aborted = await move_and(source, destination, lambda: other.execute("quit"))
        assert "QEMU has ended" in str(aborted)


async def test_a_destination_whose_qemu_ends_waits_for_nobody(tmp_path: Path) -> None:
    with qemu(tmp_path / "d", incoming=True, others=True) as there:
        async with (
            somebody_else(tmp_path / "d") as other,
            QemuGuest.attach(there, incoming=True) as destination,
            trio.open_nursery() as nursery,
        ):
            ends: list[BaseException] = []
            await nursery.start(receive, destination, ends)
            await other.execute("quit")
            await until(lambda: bool(ends))
            assert destination.run_state == "gone"
        assert "QEMU has ended" in str(ends[0])


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
async def test_a_guest_that_is_continued_in_blackout_is_not_handed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    """Before or after its devices were saved: what it writes then would be in no epoch."""
    async with two_qemus(tmp_path) as (other, source, destination):
        save = source.hypervisor.save_device_state

        async def interfered() -> bytes:
            if first:
                await other.execute("cont")
            state = await save()
            if not first:
                await other.execute("cont")
            return state

        monkeypatch.setattr(source.hypervisor, "save_device_state", interfered)
        aborted = await move(source, destination)
        # The engine hears of it, or the SVSM sees a vCPU run; either may be first.
        assert re.search("somebody else has continued the guest|a vCPU ran", str(aborted))
        await goes_on(source)
        assert errors(source) == 0


async def test_a_guest_is_moved_by_one_migration_at_a_time(tmp_path: Path) -> None:
    with qemu(tmp_path / "s", others=True) as here:
        async with QemuGuest.attach(here):
            with pytest.raises(GuestError, match="another migration's"):
                async with QemuGuest.attach(tmp_path / "s" / "other"):
                    pass
        async with QemuGuest.attach(here) as again:
            await goes_on(again)


# Disks


async def test_a_source_whose_move_fails_late_has_its_disks_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both QEMUs have the same image, and QEMU locks it for whoever writes to it."""
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    disk = (
        *("-blockdev", f"file,node-name=image,filename={image},locking=on"),
        *("-device", "virtio-blk,drive=image"),
    )
    with qemu(tmp_path / "s", *disk) as here, qemu(tmp_path / "d", *disk, incoming=True) as there:
        async with QemuGuest.attach(here) as source, QemuGuest.attach(there, incoming=True) as destination:
            await goes_on(source)
            load = destination.hypervisor.load_device_state

            async def load_and_fail(state: bytes) -> None:
                await load(state)
                raise GuestError("something fails after the load")

            monkeypatch.setattr(destination.hypervisor, "load_device_state", load_and_fail)
            assert "something fails after the load" in str(await move(source, destination))
            assert destination.run_state == "paused"
            assert source.run_state == "running"
            await goes_on(source)


# Memory


@pytest.mark.parametrize("incoming", [False, True])
async def test_another_file_of_the_name_is_not_the_guests_memory(tmp_path: Path, incoming: bool) -> None:
    with qemu(tmp_path / "s", incoming=incoming) as monitor:
        async with QemuGuest.attach(monitor, incoming=incoming):
            pass
        memory = tmp_path / "s" / "m0"
        memory.rename(tmp_path / "s" / "was-m0")
        memory.write_bytes(bytes(16 << 20))
        with pytest.raises(GuestError, match="not the file that QEMU uses"):
            async with QemuGuest.attach(monitor, incoming=incoming):
                pass
        memory.unlink()
        with pytest.raises(GuestError, match="not there any more"):
            async with QemuGuest.attach(monitor, incoming=incoming):
                pass


async def test_a_file_is_looked_for_where_qemu_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that QEMU was told relative to its own working directory."""
    for place in ("here", "elsewhere"):
        (tmp_path / place).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with qemu(tmp_path / "s", mem_path="m0") as monitor:
        monkeypatch.chdir(tmp_path / "elsewhere")
        (tmp_path / "elsewhere" / "m0").write_bytes(bytes(16 << 20))
        async with QemuGuest.attach(monitor) as guest:
            await goes_on(guest)


async def test_memory_that_is_readonly_is_refused(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(16 << 20))
    readonly = f"memory-backend-file,id=nv,size=16M,share=on,readonly=on,mem-path={image}"
    with (
        qemu(tmp_path / "s", "-object", readonly) as monitor,
        pytest.raises(GuestError, match="nv is readonly"),
    ):
        async with QemuGuest.attach(monitor):
            pass


@pytest.mark.skipif(MOVES_MEMFDS, reason="this QEMU, older than 8.1, leaves memfds out of its stream")
async def test_a_memfd_that_qemu_would_send_itself_is_refused(tmp_path: Path) -> None:
    with (
        qemu(tmp_path / "s", memfd=True) as monitor,
        pytest.raises(GuestError, match="m1 is a memfd"),
    ):
        async with QemuGuest.attach(monitor):
            pass


async def test_memory_that_is_plugged_in_meanwhile_ends_the_move(tmp_path: Path) -> None:
    slots = "-m", "32M,slots=2,maxmem=1G"
    with (
        qemu(tmp_path / "s", *slots, others=True) as here,
        qemu(tmp_path / "d", *slots, incoming=True, others=True) as there,
    ):
        async with QemuGuest.attach(here) as source, QemuGuest.attach(there, incoming=True) as destination:
            await goes_on(source)
            steering = pagexfer.Steering(_PAUSING)

            async def plug() -> None:
                await until(lambda: steering.paused)
                for folder in (tmp_path / "s", tmp_path / "d"):
                    backend = {"id": "m2", "size": 128 << 20, "share": True, "mem-path": str(folder / "m2")}
                    async with somebody_else(folder) as other:
                        await other.execute("object-add", {"qom-type": "memory-backend-file", **backend})
                        await other.execute("device_add", {"driver": "pc-dimm", "id": "dimm", "memdev": "m2"})
                steering.continue_switchover()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(plug)
                aborted = await move(source, destination, steering)
            assert "memory was plugged" in str(aborted)
            await goes_on(source)


# Settings of QEMU's own migration


@pytest.mark.parametrize("incoming", [False, True])
@pytest.mark.parametrize("capability", ["multifd", "return-path", "pause-before-switchover"])
async def test_capabilities_that_do_not_fit_are_refused_at_once(
    tmp_path: Path, capability: str, incoming: bool
) -> None:
    with qemu(tmp_path / "s", incoming=incoming, others=True) as monitor:
        async with somebody_else(tmp_path / "s") as other:
            on = {"capability": capability, "state": True}
            await other.execute("migrate-set-capabilities", {"capabilities": [on]})
        with pytest.raises(GuestError, match=f"has {capability} on"):
            async with QemuGuest.attach(monitor, incoming=incoming):
                pass


async def test_tls_of_qemus_own_migration_is_refused_at_once(tmp_path: Path) -> None:
    with qemu(tmp_path / "s", others=True) as monitor:
        async with somebody_else(tmp_path / "s") as other:
            await other.execute("migrate-set-parameters", {"tls-creds": "none-such"})
        with pytest.raises(GuestError, match="tls-creds"):
            async with QemuGuest.attach(monitor):
                pass


async def test_a_destination_that_listens_itself_is_refused_at_once(tmp_path: Path) -> None:
    with (
        qemu(tmp_path / "d", "-incoming", "tcp:127.0.0.1:0") as monitor,
        pytest.raises(GuestError, match="start it with -incoming defer"),
    ):
        async with QemuGuest.attach(monitor, incoming=True):
            pass


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
async def test_the_files_of_somebody_elses_qemu_are_out_of_reach() -> None:
    with TemporaryDirectory() as name, qemu(Path(name) / "s") as monitor:
        os.chmod(name, 0o755)
        os.chmod(monitor, 0o777)
        os.seteuid(65534)
        try:
            with pytest.raises(GuestError, match="its user or root"):
                async with QemuGuest.attach(monitor):
                    pass
        finally:
            os.seteuid(0)
