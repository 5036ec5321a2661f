"""`receive --ledger` is killed or fails at the worst moments: no record of a move is lost, and none is made up."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trio

from pagexfer.cli import kept_ledger
from pagexfer.cli.kept_ledger import KeptLedger
from pagexfer.cli.ledger import beside, check_place, keep_ledger
from pagexfer.errors import Outcome, UsageError
from pagexfer.svsm.journal import FileJournal, abandon
from pagexfer.testing.proxy import Action, FaultProxy, at_bundle
from pagexfer.wire.bundle import BundleKind
from pagexfer.wire.handshake import Role
from pagexfer.wire.journal import JournalRecord
from pagexfer.wire.ledger import pack_ledger, parse_ledger_untrusted
from pagexfer.wire.slot import SessionStatus as State

from .journeys import forged
from .machines import HOST, PATIENCE_S
from .side_processes import (
    CALM,
    guest_goes_on,
    journals,
    new_psk,
    receive_arguments,
    recover,
    send_arguments,
    side_process,
)
from .test_cli import one_line, run
from .wire_vectors import data_of, load

LEDGER = data_of(load("ledger")["ledgers"][2])
SESSION = bytes(range(16))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger"


def journal(path: Path, status: State, role: Role = Role.DESTINATION) -> str:
    with FileJournal(path) as kept:
        kept.record(JournalRecord(role, status, SESSION, bytes(16)))
    return str(path)


def asked(*arguments: str, code: int = 0) -> dict[str, Any]:
    done = run("recover", "--json", *arguments)
    assert done.returncode == code, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def files(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_what_is_kept_gets_into_place_once(path: Path) -> None:
    kept = KeptLedger(path)
    kept.finish()
    assert not files(path.parent)
    kept.keep(SESSION, LEDGER)
    assert files(path.parent) == [f"ledger.{SESSION.hex()}.pending"]
    kept.finish()
    assert files(path.parent) == ["ledger"]
    assert path.read_bytes() == LEDGER


def test_what_is_dropped_leaves_the_ledger_before(path: Path) -> None:
    before = pack_ledger(parse_ledger_untrusted(LEDGER)[:1])
    path.write_bytes(before)
    kept = KeptLedger(path)
    kept.keep(SESSION, LEDGER)
    kept.drop()
    kept.drop()
    kept.finish()
    assert files(path.parent) == ["ledger"]
    assert path.read_bytes() == before


def test_what_cannot_get_into_place_stays_beside(
    path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_path: Path, _data: bytes) -> Path:
        raise OSError(28, "No space left on device")

    kept = KeptLedger(path)
    kept.keep(SESSION, LEDGER)
    monkeypatch.setattr(kept_ledger, "keep_ledger", full)
    kept.finish()
    line = f"pagexfer: the guest runs here, and its ledger is {beside(path, SESSION)}: cannot write {path}: No space"
    assert capfd.readouterr().err.startswith(line)
    assert beside(path, SESSION).read_bytes() == LEDGER


def test_what_is_of_a_guest_that_may_not_run_here_stays_beside(
    path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    kept = KeptLedger(path)
    kept.leave()
    kept.keep(SESSION, LEDGER)
    kept.leave()
    assert files(path.parent) == [f"ledger.{SESSION.hex()}.pending"]
    kept.drop()
    kept.leave()
    line = one_line(capfd.readouterr().err)
    assert line.startswith(
        f"pagexfer: where the guest runs here after all, its ledger is {beside(path, SESSION)}: "
    )


@pytest.mark.parametrize(
    ("status", "code", "said", "left"),
    [
        (State.VERIFIED, 4, "not decided yet: ", [f"ledger.{SESSION.hex()}.pending"]),
        (State.RUNNING, 0, " has the record of this move", ["ledger"]),
        (State.FAILED, 0, "removed, as the guest never runs here: ", []),
    ],
)
def test_recover_finishes_what_is_decided(
    path: Path, status: State, code: int, said: str, left: list[str]
) -> None:
    theirs = journal(path.with_name("theirs"), status)
    KeptLedger(path).keep(SESSION, LEDGER)
    assert said in asked("--ledger", str(path), theirs, code=code)["ledger"]
    assert files(path.parent) == [*left, "theirs"]
    if status is not State.VERIFIED:
        assert (
            asked("--ledger", str(path), theirs)["ledger"] == f"nothing of this move was left beside {path}"
        )
    assert files(path.parent) == [*left, "theirs"]


def test_recover_leaves_a_ledger_to_the_command_that_lives(path: Path) -> None:
    kept = KeptLedger(path)
    kept.keep(SESSION, LEDGER)
    with FileJournal(path.with_name("theirs")) as live:
        live.record(JournalRecord(Role.DESTINATION, State.RUNNING, SESSION, bytes(16)))
        assert "not decided yet" in asked("--ledger", str(path), str(live.path))["ledger"]
    assert beside(path, SESSION).exists()
    source = journal(path.with_name("ours"), State.STARTED, Role.SOURCE)
    assert "has the record" in asked("--ledger", str(path), source, str(live.path))["ledger"]
    assert path.read_bytes() == LEDGER


def test_bad_usage(path: Path) -> None:
    source = journal(path.with_name("ours"), State.STARTED, Role.SOURCE)
    theirs = journal(path.with_name("theirs"), State.RUNNING)
    for content in (b"no ledger, but some bytes", b""):
        beside(path, SESSION).write_bytes(content)
        for arguments, word in [((source,), "a destination's"), ((theirs,), "is not a ledger")]:
            done = run("recover", "--ledger", str(path), *arguments)
            assert (done.returncode, done.stdout) == (2, "")
            assert word in one_line(done.stderr)


def test_a_name_that_leaves_no_room_for_one_beside_is_said_before_the_move(tmp_path: Path) -> None:
    """And not in black-out, where the move then ends."""
    longest = 0
    for length in range(150, 256):
        path = tmp_path / ("l" * length)
        try:
            KeptLedger(path).keep(SESSION, LEDGER)
            longest = length
            beside(path, SESSION).unlink()
            check_place(path)
        except OSError:
            with pytest.raises(UsageError, match="File name too long"):
                check_place(path)
    assert longest > 200
    assert files(tmp_path) == []


@pytest.mark.parametrize("links", [True, False])
def test_of_two_commands_at_once_none_overwrites_the_others_ledger(
    path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    """It comes between the look at the file and the write; where a file system has no links, the look is all there is."""
    another = pack_ledger(forged((), parse_ledger_untrusted(LEDGER)[0].proofs, bytes(16)))
    sync, link = os.fsync, os.link

    def no_link(*_names: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    def sync_slowly(descriptor: int) -> None:
        monkeypatch.setattr(os, "fsync", sync)
        assert keep_ledger(path, another) == path
        sync(descriptor)

    monkeypatch.setattr(os, "link", link if links else no_link)
    if links:
        monkeypatch.setattr(os, "fsync", sync_slowly)
    place = keep_ledger(path, LEDGER)
    assert place.read_bytes() == LEDGER
    assert files(path.parent) == sorted({path.name, place.name})
    assert (place != path and path.read_bytes() == another) is links


# Real moves

# Killed with the guest running, both journals final, and the ledger not in its place yet.
_KILLED = """
import os, signal, sys
from pagexfer.cli import kept_ledger
from pagexfer.cli.commands import main
kept_ledger.put_in_place = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
sys.exit(main())
"""


def test_a_command_that_is_killed_once_the_guest_runs_leaves_the_record_of_its_move(
    tmp_path: Path, path: Path
) -> None:
    psk = new_psk(tmp_path)
    ours, theirs = journals(psk)
    arguments = receive_arguments(psk, "--ledger", str(path))
    receiving = subprocess.Popen(
        [sys.executable, "-c", _KILLED, *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with receiving:
        assert receiving.stderr is not None
        port = int(receiving.stderr.readline().rpartition(":")[2])
        sent = run(*send_arguments(psk, port, *CALM))
        assert receiving.wait(PATIENCE_S) == -signal.SIGKILL
    assert sent.returncode == Outcome.COMPLETED, sent.stderr
    assert not path.exists()
    assert "'pagexfer recover --ledger FILE'" in asked(theirs)["what-to-do"]
    report = asked("--ledger", str(path), ours, theirs)
    assert (report["may-run"], report["ledger"]) == (
        "the destination",
        f"{path} has the record of this move",
    )
    done = run("ledger", "verify", str(path), "--psk-file", psk, "--json")
    assert (done.returncode, json.loads(done.stdout)["moves"]) == (0, 1)
    assert files(tmp_path) == ["ledger", "psk", "psk.destination", "psk.source"]


# Ended while the journal's disk hangs at RUNNING.
_HANGS = """
import sys, threading
from pagexfer.cli.commands import main
from pagexfer.isolation import sides
from pagexfer.migration import receive_guest
from pagexfer.svsm.journal import FileJournal
from pagexfer.wire.slot import SessionStatus
record = FileJournal.record
def hang(journal, what):
    if what.status is SessionStatus.RUNNING:
        print("hangs", file=sys.stderr, flush=True)
        threading.Event().wait()
    record(journal, what)
FileJournal.record = hang
sides.HYPERVISOR_TIMEOUT_S = 0.2
receive_guest.__kwdefaults__["stall_timeout_s"] = 2.0
sys.exit(main())
"""


def test_a_command_that_cannot_say_who_runs_the_guest_leaves_its_ledger_beside(
    tmp_path: Path, path: Path
) -> None:
    """In its place, it would be the record of a move that was none, signed by both sides."""
    psk = new_psk(tmp_path)
    arguments = receive_arguments(psk, "--ledger", str(path), "--isolated")
    with subprocess.Popen(
        [sys.executable, "-c", _HANGS, *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as receiving:
        assert receiving.stderr is not None
        port = int(receiving.stderr.readline().rpartition(":")[2])
        command = [sys.executable, "-m", "pagexfer", *send_arguments(psk, port, *CALM)]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as sending:
            while receiving.stderr.readline() != "hangs\n":
                assert receiving.poll() is None
            receiving.terminate()
            said = receiving.stderr.read()
            assert receiving.wait(PATIENCE_S) == Outcome.UNDECIDED, said
            assert sending.wait(PATIENCE_S) == Outcome.UNDECIDED
    assert "the guest runs here, and" not in said
    pending = next(tmp_path.glob("ledger.*.pending"))
    assert f"its ledger is {pending}: " in said
    assert not path.exists()
    theirs = journals(psk)[1]
    assert asked("--ledger", str(path), theirs, code=4)["ledger"] == f"not decided yet: {pending}"
    asked("--abandon", "--ledger", str(path), theirs)
    assert files(tmp_path) == ["psk", "psk.destination", "psk.source"]


async def test_a_destination_that_is_killed_with_the_start_token_on_its_way_leaves_no_ledger(
    tmp_path: Path, path: Path
) -> None:
    psk = new_psk(tmp_path)
    with trio.fail_after(PATIENCE_S):
        async with (
            side_process(*receive_arguments(psk, "--ledger", str(path))) as destination,
            trio.open_nursery() as nursery,
        ):
            kill = destination.process.kill
            proxy = FaultProxy(
                HOST, await destination.port(), at_bundle(BundleKind.START_TOKEN), Action.DROP, kill
            )
            async with side_process(*send_arguments(psk, await nursery.start(proxy.serve), *CALM)) as source:
                assert await source.end() == Outcome.UNDECIDED
            nursery.cancel_scope.cancel()
    await trio.to_thread.run_sync(abandon, Path(journals(psk)[1]))
    code, report = await trio.to_thread.run_sync(recover, "--ledger", str(path), *journals(psk))
    assert (code, report["may-run"]) == (Outcome.COMPLETED, "the source")
    assert files(tmp_path) == ["psk", "psk.destination", "psk.source"]


@pytest.mark.parametrize("options", [(), ("--isolated",)], ids=["one-process", "isolated"])
async def test_a_folder_that_goes_away_before_the_start_token_ends_the_move(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    """What cannot be kept is not done: the source hears so and goes on."""
    psk = new_psk(tmp_path)
    folder = tmp_path / "ledgers"
    folder.mkdir()
    with trio.fail_after(PATIENCE_S):
        async with (
            side_process(*receive_arguments(psk, "--ledger", str(folder / "l"), *options)) as destination,
            trio.open_nursery() as nursery,
        ):
            proxy = FaultProxy(
                HOST,
                await destination.port(),
                at_bundle(BundleKind.START_TOKEN),
                Action.PASS,
                lambda: shutil.rmtree(folder),
            )
            async with side_process(*send_arguments(psk, await nursery.start(proxy.serve), *CALM)) as source:
                assert await source.end() == Outcome.ENDED
            assert await destination.end() == Outcome.ENDED
            nursery.cancel_scope.cancel()
    assert destination.report()["error"]["reason"] == "journal"
    assert "the ledger cannot be written: No such file" in destination.report()["error"]["message"]
    assert guest_goes_on(source.report())
    code, report = await trio.to_thread.run_sync(recover, *journals(psk))
    assert (code, report["may-run"]) == (Outcome.COMPLETED, "the source")
