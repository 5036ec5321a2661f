"""A receiving command is killed, and its QEMU lives on with the whole guest: `recover` knows, and lets no two sides run."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio

from pagexfer.errors import Outcome
from pagexfer.guests.qemu.qmp import QmpClient
from pagexfer.guests.qemu.values import record
from pagexfer.svsm.journal import read_journal
from pagexfer.testing.proxy import Action, FaultProxy, at_bundle
from pagexfer.wire.bundle import BundleKind
from pagexfer.wire.slot import SessionStatus as State

from .machines import HOST, PATIENCE_S
from .qemu_guests import needs_qemu, qemu, until
from .side_processes import journals, new_psk, recover, side_process
from .test_cli import one_line, run

if TYPE_CHECKING:
    from pagexfer.wire.journal import GuestProcess


pytestmark = needs_qemu

_ROUNDS_AT = 0x7E00


async def killed_at(kind: BundleKind, psk: str, here: Path, there: Path) -> int:
    """Move a guest by two commands, and kill -9 the receiving one at this bundle; the sending one's exit code."""
    ours, theirs = journals(psk)
    common = ("--psk-file", psk, "--guest", "qemu", "--json")
    receive = ("receive", "--listen", f"{HOST}:0", "--journal", theirs, "--qmp", str(there), *common)
    with trio.fail_after(PATIENCE_S):
        async with side_process(*receive) as destination, trio.open_nursery() as nursery:
            kill = destination.process.kill
            proxy = FaultProxy(HOST, await destination.port(), at_bundle(kind), Action.DROP, kill)
            port = await nursery.start(proxy.serve)
            send = ("send", "--to", f"{HOST}:{port}", "--journal", ours, "--qmp", str(here), *common)
            async with side_process(*send) as source:
                code = await source.end()
            assert await destination.end() == -signal.SIGKILL
            nursery.cancel_scope.cancel()
    return code


async def asked(*arguments: str) -> tuple[int, dict[str, Any]]:
    return await trio.to_thread.run_sync(partial(recover, *arguments))


async def run_state(monitor: Path, *commands: str) -> str:
    """What QEMU says of itself, after these commands."""
    client = await QmpClient.connect(monitor)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run)
        for command in commands:
            await client.execute(command)
        status = record(await client.execute("query-status"))["status"]
        nursery.cancel_scope.cancel()
    client.close()
    assert isinstance(status, str)
    return status


def holder(journal: str) -> GuestProcess:
    """The process that has the guest, as the journal says."""
    process = read_journal(Path(journal))[0].process
    assert process is not None
    return process


def command_of(process_id: int) -> str:
    return Path(f"/proc/{process_id}/comm").read_text()


def rounds(folder: Path) -> int:
    with (folder / "m0").open("rb") as memory:
        memory.seek(_ROUNDS_AT)
        return int.from_bytes(memory.read(4), "little")


async def goes_on(folder: Path) -> None:
    before = rounds(folder)
    await until(lambda: rounds(folder) > before + 10)


@pytest.fixture
def psk(tmp_path: Path) -> str:
    return new_psk(tmp_path)


async def test_a_destination_is_abandoned_only_once_its_qemu_is_gone(tmp_path: Path, psk: str) -> None:
    """Killed after READY, and the start token is on its way: QEMU there could run the guest, and the source's too."""
    ours, theirs = journals(psk)
    with qemu(tmp_path / "s") as here:
        await until(lambda: (tmp_path / "s" / "m0").exists() and rounds(tmp_path / "s") > 10)
        with qemu(tmp_path / "d", incoming=True) as there:
            assert await killed_at(BundleKind.START_TOKEN, psk, here, there) == Outcome.UNDECIDED
            process = holder(theirs)
            assert command_of(process.id).startswith("qemu")
            for journal in ([theirs], [ours, theirs]):
                code, report = await asked(*journal)
                assert (code, report["may-run"]) == (Outcome.UNDECIDED, "not decided yet")
                line = f"kill {process.id} where it has that id), then run 'pagexfer recover --abandon'"
                assert line in report["what-to-do"]
            refused = await trio.to_thread.run_sync(partial(run, "recover", "--abandon", theirs))
            assert refused.returncode == Outcome.USAGE
            line = f"pagexfer: process {process.id} still has the whole guest, and could run it: end it ('quit' at its"
            assert one_line(refused.stderr).startswith(line)
            assert read_journal(Path(theirs))[0].status is State.VERIFIED
            assert await run_state(there) == "paused"
        code, report = await asked(ours, theirs)
        assert (code, f"process {process.id} there, which had" in report["what-to-do"]) == (4, True)
        code, report = await asked("--abandon", theirs)
        assert (code, report["state"]) == (Outcome.COMPLETED, "FAILED")
        code, report = await asked(ours, theirs)
        assert (code, report["may-run"]) == (Outcome.COMPLETED, "the source")
        assert await run_state(here, "cont") == "running"
        await goes_on(tmp_path / "s")


async def test_a_guest_that_runs_outlives_the_command_that_received_it(tmp_path: Path, psk: str) -> None:
    ours, theirs = journals(psk)
    with qemu(tmp_path / "s") as here:
        await until(lambda: (tmp_path / "s" / "m0").exists() and rounds(tmp_path / "s") > 10)
        with qemu(tmp_path / "d", incoming=True) as there:
            assert await killed_at(BundleKind.RUNNING, psk, here, there) == Outcome.UNDECIDED
            await goes_on(tmp_path / "d")
            process = holder(theirs)
            for journal, runner in (([theirs], "this side"), ([ours, theirs], "the destination")):
                code, report = await asked(*journal)
                assert (code, report["may-run"]) == (Outcome.COMPLETED, runner)
                assert f"never run it at the source; process {process.id} has it" in report["what-to-do"]
            refused = await trio.to_thread.run_sync(partial(run, "recover", "--abandon", theirs))
            assert refused.returncode == Outcome.USAGE
            assert "RUNNING" in one_line(refused.stderr)
        code, report = await asked(theirs)
        assert f"process {process.id}, which had it, is gone, and it died with that" in report["what-to-do"]
