"""What a hostile or broken engine's process may say: who runs the guest is what the SVSM's state says, in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from socket import socketpair
from typing import TYPE_CHECKING, Final

import pytest

from pagexfer.cli.output import ProgressLine, print_table
from pagexfer.engine.progress import MigrationInfo, RamInfo, Status
from pagexfer.errors import ChannelBroken, Outcome, TransferAborted
from pagexfer.isolation.link import Link
from pagexfer.migration import MigrationReport
from pagexfer.testing.proxy import at_bundle
from pagexfer.wire.bundle import BundleKind
from pagexfer.wire.monitor import as_fields, from_fields_untrusted, parse_fields_untrusted

from .isolated_engines import IsolatedMove, start_hostile_engines

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Literal

_INFO: Final = MigrationInfo(Status.ACTIVE, 1.0, 0.0, 0.0, 0.0, 0.0, RamInfo(1), ())
# Last words after which nobody could know who runs the guest, if the SVSMs did not.
_LAST_WORDS: Final = {
    "nonsense": '{"type": "completed", "info": "nonsense"}',
    "unusable": '{"type": "unusable", "message": "no such option"}',
    "cancelled": '{"type": "cancelled"}',
    "refused": '{"type": "aborted", "outcome": 3, "reason": "policy", "message": "no"}',
    "undecided": '{"type": "aborted", "outcome": 4, "reason": "undecided", "message": "who knows"}',
}


def _progress(text: str) -> str:
    """A progress record, one of whose numbers is `text`."""
    info = as_fields(replace(_INFO, total_time=0.123456789))
    return json.dumps({"type": "progress", "info": info}).replace("0.123456789", text)


@pytest.mark.parametrize("word", _LAST_WORDS.values(), ids=_LAST_WORDS)
@pytest.mark.parametrize("side", ["source", "destination"])
async def test_a_completed_move_is_one_whatever_its_engine_says(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    side: Literal["source", "destination"],
    word: str,
) -> None:
    start_hostile_engines(tmp_path, monkeypatch, "last", word)
    move = IsolatedMove(side)
    await move.run()
    for end in (move.sent, move.received):
        assert isinstance(end.end, MigrationReport), end.end
        assert end.end.info.status is end.progress[-1].status is Status.COMPLETED
    assert move.machine.moved()


async def test_a_completed_move_is_one_though_its_operator_cancels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the destination, which runs the guest when the source hears so, by an engine that agrees to the cancel."""
    start_hostile_engines(tmp_path, monkeypatch, "last", _LAST_WORDS["cancelled"])
    move = IsolatedMove("destination", point=at_bundle(BundleKind.RUNNING))
    move.act = move.scope.cancel
    await move.run()
    assert isinstance(move.sent.end, MigrationReport), move.sent.end
    assert isinstance(move.received.end, MigrationReport), move.received.end
    assert not move.scope.cancelled_caught
    assert move.machine.moved()


async def test_a_cancel_that_an_engine_agrees_to_after_the_start_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_hostile_engines(tmp_path, monkeypatch, "started-cancelled")
    move = IsolatedMove("source", point=at_bundle(BundleKind.START_TOKEN))
    move.act = move.scope.cancel
    await move.run()
    assert isinstance(move.sent.end, TransferAborted), move.sent.end
    assert (move.sent.end.outcome, move.sent.end.reason) == (Outcome.UNDECIDED, "undecided")
    assert "operator cancelled" in str(move.sent.end)
    assert isinstance(move.received.end, MigrationReport)
    assert move.machine.moved()


@pytest.mark.parametrize("word", _LAST_WORDS.values(), ids=_LAST_WORDS)
@pytest.mark.parametrize("side", ["source", "destination"])
async def test_a_move_that_never_began_is_none_whatever_its_engine_says(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    side: Literal["source", "destination"],
    word: str,
) -> None:
    start_hostile_engines(tmp_path, monkeypatch, "say", word)
    move = IsolatedMove(side, patience_s=0.0)
    await (move.run() if side == "source" else move.receive_alone())
    end = (move.sent if side == "source" else move.received).end
    if word == _LAST_WORDS["unusable"]:
        assert str(move.unusable) == "no such option"
    else:
        assert isinstance(end, TransferAborted), end
        refused = word == _LAST_WORDS["refused"]
        assert end.outcome is (Outcome.REFUSED if refused else Outcome.ENDED)
        assert end.reason == ("policy" if refused else "engine")
    if side == "source":
        assert move.machine.stayed()
    assert not move.machine.destination.gate.running


@pytest.mark.parametrize(
    "word",
    [
        _progress("1" + "0" * 400),
        _progress("NaN"),
        json.dumps({"type": "progress", "info": as_fields(replace(_INFO, ram=RamInfo(1 << 64)))}),
        '{"type": "call", "id": 1, "name": "throttle"}',
        '{"type": "call", "id": 1, "name": "no such thing \\ud800"}',
        '{"type": "listening", "port": 65536}',
    ],
    ids=["digits", "nan", "integer", "throttle", "call", "port"],
)
@pytest.mark.parametrize("side", ["source", "destination"])
async def test_nonsense_ends_the_session_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: Literal["source", "destination"], word: str
) -> None:
    start_hostile_engines(tmp_path, monkeypatch, "say", word)
    move = IsolatedMove(side, patience_s=0.0)
    await (move.run() if side == "source" else move.receive_alone())
    end = (move.sent if side == "source" else move.received).end
    assert isinstance(end, TransferAborted), end
    assert (end.outcome, end.reason) == (Outcome.ENDED, "engine")
    assert "nonsense" in str(end)
    assert str(end).isprintable()


async def test_what_it_says_is_shown_as_one_line_without_escapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [
        '{"type": "stranger", "line": "\\u001b[2Ja \\ud800 stranger\\n"}',
        '{"type": "aborted", "outcome": 3, "reason": "\\u001b[31mred", "message": "one\\ntwo \\ud800 \\u001b[2J"}',
    ]
    start_hostile_engines(tmp_path, monkeypatch, "say", *lines)
    move = IsolatedMove("destination")
    await move.receive_alone()
    assert isinstance(move.received.end, TransferAborted)
    assert (move.received.end.outcome, move.received.end.reason) == (Outcome.REFUSED, " [31mred")
    assert str(move.received.end) == "one two    [2J"
    assert move.received.strangers == [" [2Ja   stranger "]


async def test_a_message_that_nothing_can_be_done_with_is_clean_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_hostile_engines(
        tmp_path, monkeypatch, "say", '{"type": "unusable", "message": "\\u001b[2J\\ud800"}'
    )
    move = IsolatedMove("destination")
    await move.receive_alone()
    assert str(move.unusable) == " [2J "


async def test_slots_before_there_is_a_session_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ('{"type": "call", "id": 1, "name": "slots"}', '{"type": "cancelled"}')
    start_hostile_engines(tmp_path, monkeypatch, "say", *words)
    move = IsolatedMove("destination")
    await move.receive_alone()
    assert isinstance(move.received.end, TransferAborted), move.received.end
    assert "nothing that makes sense" in str(move.received.end)


async def test_slots_are_given_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start_hostile_engines(tmp_path, monkeypatch, "slots-twice")
    move = IsolatedMove("destination")
    await move.run()
    assert isinstance(move.received.end, MigrationReport), move.received.end
    assert move.machine.moved()


async def test_files_for_a_process_that_is_gone() -> None:
    ours, theirs = socketpair()
    with ours:
        theirs.close()
        with pytest.raises(ChannelBroken):
            await Link(ours).send_descriptors([0])


@pytest.mark.parametrize("number", ["9223372036854775807", "1e999", "-1e999"])
def test_any_number_that_is_taken_can_be_shown(capsys: pytest.CaptureFixture[str], number: str) -> None:
    fields = parse_fields_untrusted(_progress(number).encode())
    info = from_fields_untrusted(MigrationInfo, fields["info"])
    ProgressLine().show(info)
    print_table(info.as_dict())
    assert "active" in capsys.readouterr().err
