"""The control line of the bench between two machines: what may come on it, and the proofs."""

from __future__ import annotations

import json
import socket
from dataclasses import asdict, replace
from threading import Timer
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.hosts_line import (
    MAX_LINE_BYTES,
    MAX_TEXT,
    VERSION,
    Answer,
    Done,
    Failed,
    Hello,
    Listening,
    Message,
    Run,
    Welcome,
    join,
    line_key,
    offer,
    parse_untrusted,
    printable,
    receive_line,
    send_line,
)
from bench.pair import SideFailed
from pagexfer import PskAttestor

PSK: Final = b"a pre-shared key of 32 bytes ..."
WELCOME: Final = Welcome("", 1 << 30, "none", "3", "6", "any", 1)
MESSAGES: Final[tuple[Message, ...]] = (
    Hello(VERSION, "00"),
    Answer(VERSION, "00", "00", 2),
    WELCOME,
    Run("move", 4 << 20, 2),
    Listening(4461),
    Done(0.5),
    Failed("no"),
)


def text_of(message: Message) -> bytes:
    return json.dumps({"kind": type(message).__name__, **asdict(message)}).encode() + b"\n"


@pytest.mark.parametrize("message", MESSAGES)
def test_every_message_comes_as_it_was_sent(message: Message) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        send_line(ours, message)
        assert parse_untrusted(theirs.recv(MAX_LINE_BYTES)) == message


@pytest.mark.parametrize("message", MESSAGES)
def test_a_line_that_is_flipped_or_cut_is_malformed_or_another_message(message: Message) -> None:
    line = text_of(message)
    for position in range(len(line) - 1):
        with pytest.raises(SideFailed):
            parse_untrusted(line[:position])
        for bit in range(8):
            _is_message_or_refused(
                line[:position] + bytes([line[position] ^ 1 << bit]) + line[position + 1 :]
            )


@given(st.binary() | st.text().map(lambda text: json.dumps({"kind": "Run", "what": text}).encode()))
def test_any_bytes_are_a_message_or_refused(line: bytes) -> None:
    _is_message_or_refused(line)


def _is_message_or_refused(line: bytes) -> None:
    try:
        values: list[object] = list(asdict(parse_untrusted(line)).values())
    except SideFailed as failed:
        values = [str(failed)]
    assert all(value.isprintable() and len(value) <= MAX_TEXT for value in values if isinstance(value, str))


@pytest.mark.parametrize(
    "changed",
    [
        {"kind": "Nothing"},
        {"kind": ["Run"]},
        {"what": 1},
        {"what": "x" * (MAX_TEXT + 1)},
        {"what": "\x1b[2J"},
        {"what": "\ud800"},
        {"ram_bytes": -1},
        {"ram_bytes": 1e6},
        {"ram_bytes": True},
        {"ram_bytes": 2**60},
        {"channels": 0},
        {"channels": 1025},
        {"isolated": 1},
        {"more": 1},
    ],
)
def test_a_value_that_cannot_be_is_refused(changed: dict[str, object]) -> None:
    with pytest.raises(SideFailed, match="control line"):
        parse_untrusted(json.dumps({"kind": "Run", **asdict(Run("move", 4 << 20, 1)), **changed}).encode())


@pytest.mark.parametrize(
    "line",
    [
        b"[" * MAX_LINE_BYTES,
        b'{"kind": "Done", "cpu_seconds": NaN, "failure": ""}',
        b'{"kind": "Done", "cpu_seconds": Infinity, "failure": ""}',
        b'{"kind": "Listening", "port": ' + b"9" * 4000 + b"}",
        b'{"kind": "Listening", "port": ' + b"9" * 4500 + b"}",
        b"\xff\xfe{",
        b"[]",
        b"null",
    ],
)
def test_what_json_can_be_besides_is_refused(line: bytes) -> None:
    with pytest.raises(SideFailed):
        parse_untrusted(line)


@pytest.mark.parametrize("version", [VERSION + 1, 0, 10**4000])
def test_another_version_is_told_whatever_else_it_has(version: int) -> None:
    line = f'{{"kind": "Hello", "version": {version}, "news": []}}'
    with pytest.raises(SideFailed, match="use the same revision on both"):
        parse_untrusted(line.encode())


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (b"", "says nothing for 0.05 s"),
        (b"{", "says nothing for 0.05 s"),
        (b" " * MAX_LINE_BYTES, "more than 4096 bytes"),
        (b"\n", "no JSON"),
        (text_of(Run("move", 1 << 20, 1)), "says Run where Hello is due"),
        (text_of(Failed("because")), "the other side says: because"),
    ],
)
def test_a_line_that_is_not_due_is_one_error(sent: bytes, said: str) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(sent)
        with pytest.raises(SideFailed, match=said):
            receive_line(ours, Hello, 0.05)


def test_a_line_that_ends_in_its_middle_is_told_as_that() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            theirs.sendall(b'{"kind"')
        with pytest.raises(SideFailed, match="ended the connection in the middle of a line"):
            receive_line(ours, Hello)


def test_a_proof_sent_back_is_none() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        send_line(theirs, Hello(VERSION, "00"))

        def impostor() -> None:
            answer = receive_line(theirs, Answer)
            send_line(theirs, replace(WELCOME, proof=answer.proof))

        sender = Timer(0, impostor)
        sender.start()
        with pytest.raises(SideFailed, match="does not have the same pre-shared key"):
            join(ours, line_key(PskAttestor(PSK)), 2)
        sender.join()


def test_both_sides_with_the_key_are_introduced() -> None:
    ours, theirs = socket.socketpair()
    key = line_key(PskAttestor(PSK))
    with ours, theirs:
        runs: list[int] = []
        other = Timer(0, lambda: runs.append(offer(theirs, key, lambda proof: replace(WELCOME, proof=proof))))
        other.start()
        assert join(ours, key, 7).ram_limit_bytes == WELCOME.ram_limit_bytes
        other.join()
        assert runs == [7]


def test_texts_of_this_side_fit_into_a_line() -> None:
    said = printable("a\nb\x1b" + "c" * 1000)
    assert said.startswith("a?b?c")
    assert len(said) == MAX_TEXT
