"""Compressed pages between two engines and between two commands: fewer bytes, or one clear line on both sides."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import click
import pytest
import trio

from pagexfer.cli.values import Compression
from pagexfer.errors import Outcome, TransferAborted, UsageError
from pagexfer.migration import MigrationReport, receive_guest, send_guest
from pagexfer.wire.constants import PAGE_SIZE

from .engine_guests import SmallMachine
from .loopback import HOST
from .small_guests import ATTESTOR
from .test_cli import GUEST, Destination, key_file, one_line, run, went_on

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("zstandard", reason="compression needs the zstd extra")

_End = MigrationReport | TransferAborted


async def move(
    machine: SmallMachine, level: int | None, *, accept: bool, isolated: bool
) -> tuple[_End, _End]:
    """How source and destination ended."""
    received: list[_End] = []

    async def receive(task_status: trio.TaskStatus[int]) -> None:
        try:
            done = await receive_guest(
                machine.destination,
                HOST,
                0,
                ATTESTOR,
                accept_compression=accept,
                isolated=isolated,
                on_listening=task_status.started,
            )
        except TransferAborted as aborted:
            received.append(aborted)
        else:
            received.append(done)

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            port = await nursery.start(receive)
            sent: _End
            try:
                sent = await send_guest(
                    machine.source,
                    HOST,
                    port,
                    ATTESTOR,
                    channels=2,
                    compression_level=level,
                    isolated=isolated,
                )
            except TransferAborted as aborted:
                sent = aborted
    return sent, received[0]


@pytest.mark.parametrize("isolated", [False, True])
async def test_fewer_bytes_move(isolated: bool) -> None:
    machine = SmallMachine()
    machine.source.memory.words[:] = 7
    ends = await move(machine, 3, accept=True, isolated=isolated)
    assert machine.moved()
    for end in ends:
        assert isinstance(end, MigrationReport)
        ram = end.info.ram
        assert ram.normal * PAGE_SIZE >= ram.total
        assert sum(channel.transferred for channel in end.info.channels) < ram.total / 20
        assert ram.transferred < ram.total / 10


async def test_a_destination_that_accepts_it_takes_what_is_not_compressed() -> None:
    machine = SmallMachine()
    sent, _ = await move(machine, None, accept=True, isolated=False)
    assert isinstance(sent, MigrationReport)
    assert machine.moved()


@pytest.mark.parametrize("isolated", [False, True])
async def test_a_destination_that_was_not_told_refuses(isolated: bool) -> None:
    machine = SmallMachine()
    for end in await move(machine, 1, accept=False, isolated=isolated):
        assert isinstance(end, TransferAborted)
        assert (end.outcome, end.reason) == (Outcome.ENDED, "compression")
        assert "--accept-compression" in str(end)
    assert machine.source.gate.running
    assert not machine.destination.gate.running
    assert not machine.destination.memory.words.any()


@pytest.mark.parametrize("level", [0, 10])
async def test_a_level_that_is_none(level: int) -> None:
    with pytest.raises(UsageError, match="1 to 9"):
        await send_guest(SmallMachine().source, HOST, 1, ATTESTOR, compression_level=level)


async def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    machine = SmallMachine()
    with pytest.raises(UsageError, match="pagexfer\\[zstd\\]"):
        await send_guest(machine.source, HOST, 1, ATTESTOR, compression_level=1)
    with pytest.raises(UsageError, match="pagexfer\\[zstd\\]"):
        await receive_guest(machine.destination, HOST, 0, ATTESTOR, accept_compression=True)


# The command


def test_demo_compresses() -> None:
    done = run("demo", *GUEST, "--compress", "zstd", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["guest"]["consistent"]


def test_a_receive_that_was_not_told(tmp_path: Path) -> None:
    psk = key_file(tmp_path / "psk", "0123456789abcdef" * 4)
    destination = Destination("--psk-file", psk, *GUEST)
    sent = run(
        "send", "--to", destination.address, "--psk-file", psk, *GUEST, "--compress", "zstd:3", "--json"
    )
    code, report, errors = destination.end()
    assert (sent.returncode, code) == (1, 1)
    assert report["error"]["reason"] == json.loads(sent.stdout)["error"]["reason"] == "compression"
    for said in (sent.stderr, errors):
        assert "--accept-compression" in one_line(said)
    assert went_on(sent.stdout)


@pytest.mark.parametrize(("text", "level"), [("zstd", 1), ("zstd:1", 1), ("zstd:9", 9)])
def test_levels(text: str, level: int) -> None:
    assert Compression().convert(text, None, None) == level


@pytest.mark.parametrize("text", ["", "lz4", "zstd:", "zstd:0", "zstd:10", "zstd:-1", "zstd:x", "ZSTD:3 "])
def test_bad_levels(text: str) -> None:
    with pytest.raises(click.BadParameter, match="zstd:1 to zstd:9"):
        Compression().convert(text, None, None)
