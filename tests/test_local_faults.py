"""What fails on one side: that side names the cause, the other one hears where it was and no more."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
import trio

from pagexfer.engine.streams import Listener
from pagexfer.errors import JournalError, Outcome, TransferAborted
from pagexfer.migration import receive_guest, send_guest
from pagexfer.svsm.journal import FileJournal
from pagexfer.svsm.memory import GuestMemory
from pagexfer.wire.constants import WORDS_PER_PAGE

from .engine_guests import SmallMachine
from .loopback import HOST
from .small_guests import ATTESTOR, PAGES

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from pagexfer.wire.journal import JournalRecord


async def _ends(
    machine: SmallMachine, *, isolated: bool, journal: Path | None = None, stall_timeout_s: float = 30.0
) -> tuple[TransferAborted, TransferAborted]:
    """How source and destination end; `journal` and `stall_timeout_s` are the destination's."""
    ends: dict[str, TransferAborted] = {}

    async def receive(task_status: trio.TaskStatus[int]) -> None:
        with pytest.raises(TransferAborted) as caught:
            await receive_guest(
                machine.destination,
                HOST,
                0,
                ATTESTOR,
                journal=journal,
                stall_timeout_s=stall_timeout_s,
                isolated=isolated,
                on_listening=task_status.started,
            )
        ends["destination"] = caught.value

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            port = await nursery.start(receive)
            with pytest.raises(TransferAborted) as caught:
                await send_guest(machine.source, HOST, port, ATTESTOR, channels=2, isolated=isolated)
    for end in (caught.value, ends["destination"]):
        assert end.outcome is Outcome.ENDED
        assert str(end).isprintable()
    assert machine.source.gate.running
    assert not machine.destination.gate.running
    return caught.value, ends["destination"]


@pytest.mark.parametrize("isolated", [False, True], ids=["local", "isolated"])
async def test_ram_for_which_there_is_no_room(isolated: bool) -> None:
    def no_room(_gfn: int, _octets: memoryview) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def all_holes() -> Iterable[tuple[int, int]]:
        return []

    machine = SmallMachine()
    machine.destination.memory.close()
    words = np.zeros((PAGES, WORDS_PER_PAGE), dtype=np.uint64)
    machine.destination.memory = GuestMemory.over(words, all_holes, no_room)
    sent, received = await _ends(machine, isolated=isolated)
    assert (sent.reason, received.reason) == ("guest", "guest")
    assert str(received).endswith("(RAM cannot be written: No space left on device)")
    assert str(sent).startswith("the destination says: a vCPU, a page or its state was refused")
    assert "No space" not in str(sent)


@pytest.mark.parametrize("isolated", [False, True], ids=["local", "isolated"])
async def test_a_journal_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, isolated: bool
) -> None:
    def full(journal: FileJournal, _record: JournalRecord) -> None:
        raise JournalError(f"cannot write the journal {journal.path}: No space left on device")

    monkeypatch.setattr(FileJournal, "record", full)
    path = tmp_path / "journal"
    sent, received = await _ends(SmallMachine(), isolated=isolated, journal=path)
    assert (sent.reason, received.reason) == ("journal", "journal")
    assert str(received).endswith(f"(cannot write the journal {path}: No space left on device)")
    assert str(sent) == (
        "the destination says: the journal or the ledger could not be written: look at its disk and its folder"
    )


class _PoorSocket:
    """A listening socket with descriptors for `count` newcomers."""

    def __init__(self, real: trio.socket.SocketType, count: int) -> None:
        self._real = real
        self._count = count

    async def accept(self) -> tuple[trio.socket.SocketType, object]:
        if not self._count:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        self._count -= 1
        return await self._real.accept()

    def getsockname(self) -> tuple[str, int]:
        address: tuple[str, int] = self._real.getsockname()
        return address

    def close(self) -> None:
        self._real.close()


async def test_a_destination_without_descriptors_for_all_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    async def listen(host: str, port: int, stall_timeout_s: float) -> Listener:
        listeners = await trio.open_tcp_listeners(port, host=host)
        # For the control connection and one of two channels.
        poor = _PoorSocket(listeners[0].socket, 2)
        return Listener([poor], stall_timeout_s)  # type: ignore[list-item]

    monkeypatch.setattr("pagexfer.migration.listen", listen)
    sent, received = await _ends(SmallMachine(), isolated=False, stall_timeout_s=0.3)
    assert (sent.reason, received.reason) == ("resources", "resources")
    line = "only 1 of 2 channels came within 0.3 s: out of file descriptors (see 'ulimit -n')"
    assert str(received) == line
    assert str(sent) == f"the destination says: {line}"


def test_the_command_takes_as_many_descriptors_as_it_may() -> None:
    """64 channels need more than the 48 files that each side may have until it says otherwise."""
    demo = "demo --channels 64 --guest simulated --ram 16MiB --vcpus 1 --write-rate 1MiB --downtime-limit 2s"
    done = subprocess.run(
        ["bash", "-c", f"ulimit -Sn 48 && exec {sys.executable} -m pagexfer {demo}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
