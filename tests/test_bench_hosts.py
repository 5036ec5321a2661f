"""The bench between two machines, as two processes: what it measures, and how it ends where something fails."""

from __future__ import annotations

import json
import os
import signal
import socket
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Final

import pytest

from bench.__main__ import main
from bench.hosts_line import (
    MAX_LINE_BYTES,
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
    receive_line,
    send_line,
)
from bench.hosts_runs import receive_plain, side_process
from bench.pair import SideFailed
from pagexfer import PskAttestor

from .bench_hosts import (
    HOST,
    PATIENCE_S,
    PSK,
    SMALL,
    hosts,
    key_file,
    listener,
    session_members,
    source_arguments,
)

if TYPE_CHECKING:
    from pathlib import Path

# More rounds than anybody waits for: such a series ends because something ends it.
ENDLESS: Final = (*SMALL, "--repeats", "1000")
WELCOME: Final = Welcome("", 1 << 30, "none", "3", "6", "any", 1)


@pytest.fixture
def psk(tmp_path: Path) -> str:
    return key_file(tmp_path)


def test_two_processes_measure_all_pairs(psk: str, tmp_path: Path) -> None:
    result, plot = tmp_path / "hosts.json", tmp_path / "hosts.png"
    more = "--repeats", "2", "--json", str(result), "--plot", str(plot)
    with listener(psk, "--once") as (destination, port):
        with hosts(*source_arguments(psk, port, *SMALL, *more)) as source:
            code, output = source.end()
        assert (code, destination.end()[0]) == (0, 0)
    assert "all measured" in destination.lines[-1]
    assert output.splitlines()[0].startswith("Between two machines, 4 MiB, incompressible, idle")
    assert "fewest that come within 5%" in output
    assert plot.read_bytes().startswith(b"\x89PNG")
    measured = json.loads(result.read_text())
    assert (measured["complete"], measured["ended"]) == (True, "")
    assert measured["destination"]["kernel"] == measured["environment"]["kernel"]
    assert "proof" not in measured["destination"]
    # No number of channels is always the first.
    assert [(run["round"], run["channels"]) for run in measured["runs"]] == [(1, 1), (1, 2), (2, 2), (2, 1)]
    for run in measured["runs"]:
        plain, sealed = run["plain"], run["sealed"]
        assert run["of_tcp"] == pytest.approx(plain["seconds"] / sealed["seconds"])
        assert 0 < run["round_trip_ms"] < 1000
        assert all(seconds > 0 for seconds in plain["cpu_seconds"] + sealed["cpu_seconds"])
        assert sealed["converged"]
        assert 0 < sealed["downtime_ms"] <= sealed["seconds"] * 1000
        assert 0.9 < sealed["sent_bytes"] / (4 << 20) < 1.1
        assert min(plain["sent_again"], sealed["sent_again"]) >= 0
    assert [figure["runs"] for figure in measured["figures"]] == [2, 2]


def test_isolated_engines_and_a_guest_that_writes(psk: str, tmp_path: Path) -> None:
    result = tmp_path / "hosts.json"
    some = "--ram", "8MiB", "--channels", "2", "--content", "half zero", "--write-rate", "2MiB", "--isolated"
    with (
        listener(psk, "--once") as (destination, port),
        hosts(*source_arguments(psk, port, *some, "--repeats", "1", "--json", str(result))) as source,
    ):
        code, output = source.end()
        assert (code, destination.end()[0]) == (0, 0)
    assert "half zero, 2 MB/s written, engines isolated" in output
    (run,) = json.loads(result.read_text())["runs"]
    assert run["sealed"]["converged"]
    assert run["sealed"]["sent_bytes"] < 0.8 * (8 << 20)


# Errors


def test_nobody_listens(psk: str) -> None:
    with socket.create_server((HOST, 0)) as server:
        port = server.getsockname()[1]
    with hosts(*source_arguments(psk, port)) as source:
        code, output = source.end()
    assert (code, output) == (1, "")
    assert source.lines == [
        f"hosts: failed: cannot connect to {HOST}:{port}: Connection refused: is the listener there?"
    ]


def test_a_wrong_key_is_told_to_both_and_ends_no_listener(psk: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.touch(mode=0o600)
    other.write_bytes(PSK[::-1])
    with listener(psk, "--once") as (destination, port):
        with hosts(*source_arguments(str(other), port, *SMALL)) as source:
            assert source.end() == (1, "")
        assert source.lines == [
            "hosts: failed: the other side says: wrong key: both sides need the same pre-shared key"
        ]
        assert "does not have the same pre-shared key" in destination.line_with(HOST)
        with hosts(*source_arguments(psk, port, *SMALL, "--repeats", "1")) as source:
            assert source.end()[0] == 0
        assert destination.end()[0] == 0


def test_a_guest_above_the_limit_is_refused_before_anything_runs(psk: str) -> None:
    with (
        listener(psk, "--ram", "2MiB", "--once") as (destination, port),
        hosts(*source_arguments(psk, port, *SMALL)) as source,
    ):
        assert source.end() == (1, "")
        assert source.lines == [
            "hosts: failed: the destination takes guests of up to 2 MiB, not 4 MiB: its listener's --ram says how much"
        ]
        assert destination.end()[0] == 1


@pytest.mark.parametrize("killed", ["destination", "source"])
def test_a_side_that_is_killed_leaves_nothing_and_what_was_measured_stays(
    killed: str, psk: str, tmp_path: Path
) -> None:
    result = tmp_path / "hosts.json"
    with (
        listener(psk) as (destination, port),
        hosts(*source_arguments(psk, port, *ENDLESS, "--json", str(result))) as source,
    ):
        source.line_with("round 2 of")
        victim = destination if killed == "destination" else source
        os.kill(victim.process.pid, signal.SIGKILL)  # it alone: the others have to see that by themselves
        assert victim.end()[0] == -signal.SIGKILL
        if killed == "source":
            destination.line_with("the other side")
            # The next one is served as if nothing had been.
            with hosts(*source_arguments(psk, port, *SMALL, "--repeats", "1")) as second:
                assert second.end()[0] == 0
            return
        code, output = source.end()
    assert code == 1
    assert source.lines[-1].startswith("hosts: failed: ")
    assert not any("failed" in line for line in source.lines[:-1])
    _holds_finished_rounds(output, result, "the other side")


def test_a_run_whose_process_is_killed_is_told_to_the_source(psk: str) -> None:
    with (
        listener(psk, "--once") as (destination, port),
        socket.create_connection((HOST, port), PATIENCE_S) as control,
    ):
        join(control, line_key(PskAttestor(PSK)), 2)
        send_line(control, Run("move", 4 << 20, 1))
        receive_line(control, Listening, PATIENCE_S)
        for process in session_members(destination.process.pid):
            if process != destination.process.pid:
                os.kill(process, signal.SIGKILL)
        with pytest.raises(SideFailed, match="the other side says: a process ended without a result"):
            receive_line(control, Done, PATIENCE_S)
        assert destination.end()[0] == 1
    assert "without a result" in destination.lines[-1]


@pytest.mark.parametrize("interrupted", ["destination", "source"])
def test_an_interrupt_is_one_line_and_what_was_measured_stays(
    interrupted: str, psk: str, tmp_path: Path
) -> None:
    result = tmp_path / "hosts.json"
    with (
        listener(psk) as (destination, port),
        hosts(*source_arguments(psk, port, *ENDLESS, "--json", str(result))) as source,
    ):
        source.line_with("round 2 of")
        # As a terminal does it: to all processes of the side.
        os.killpg((destination if interrupted == "destination" else source).process.pid, signal.SIGINT)
        code, output = source.end()
        assert code == 1
        if interrupted == "source":
            assert source.lines[-1] == "hosts: interrupted"
            destination.line_with("the other side")
            os.killpg(destination.process.pid, signal.SIGINT)
        else:
            assert source.lines[-1].startswith("hosts: failed: ")
        assert destination.end() == (1, "")
        assert destination.lines[-1] == "hosts: interrupted"
    _holds_finished_rounds(output, result, "interrupted" if interrupted == "source" else "the other side")


def test_an_interrupt_before_anything_was_measured_is_one_line(psk: str, tmp_path: Path) -> None:
    result = tmp_path / "hosts.json"
    with (
        listener(psk, "--once") as (destination, port),
        hosts(*source_arguments(psk, port, *ENDLESS, "--json", str(result))) as source,
    ):
        source.line_with("round 1 of")  # its processes are starting
        os.killpg(source.process.pid, signal.SIGINT)
        assert source.end() == (1, "")
        assert source.lines[-1] == "hosts: interrupted"
        assert destination.end()[0] == 1
    assert not result.exists()


def _holds_finished_rounds(output: str, result: Path, ended: str) -> None:
    assert "not complete" in output.splitlines()[0]
    measured = json.loads(result.read_text())
    assert measured["complete"] is False
    assert ended in measured["ended"]
    assert {(1, 1), (1, 2)} <= {(run["round"], run["channels"]) for run in measured["runs"]}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "one of the arguments --to --listen is required"),
        (["--to", "nowhere"], "is not HOST:PORT"),
        (["--to", f"{'a' * 64}:1"], "has no host name"),
        (["--to", f"{HOST}:1", "--once"], "--once is for the listener"),
        (["--listen", f"{HOST}:0", "--channels", "2"], "--channels is for the source"),
        (["--listen", f"{HOST}:65535"], "no port after 65535"),
        (["--listen", "192.0.2.1:4460"], "cannot listen"),
        (["--listen", f"{HOST}:0", "--data-port", "65536"], "is not a port"),
        (["--listen", f"{HOST}:0", "--psk-file", "/no/such/file"], "cannot read the pre-shared key"),
    ],
)
def test_bad_usage_is_one_line_and_code_2(
    arguments: list[str], said: str, psk: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["hosts", "--psk-file", psk, *arguments])
    assert end.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_port_in_use_is_told_before_anything_is_served(
    psk: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server((HOST, 0)) as server:
        with pytest.raises(SystemExit) as end:
            main(
                [
                    *("hosts", "--listen", f"{HOST}:0", "--psk-file", psk),
                    *("--data-port", str(server.getsockname()[1])),
                ]
            )
        assert end.value.code == 2
    assert "Address already in use" in capsys.readouterr().err


# What is no part of a series


def text_of(message: Message) -> bytes:
    return json.dumps({"kind": type(message).__name__, **asdict(message)}).encode() + b"\n"


def test_a_listener_outlives_whatever_comes_from_strangers_and_key_holders(psk: str) -> None:
    key = line_key(PskAttestor(PSK))
    strange = {
        b"GET / HTTP/1.1\r\n": "no JSON",
        b"x" * (MAX_LINE_BYTES + 1): "more than 4096 bytes",
        text_of(Run("move", 1 << 20, 1)): "says Run where Answer is due",
        text_of(Answer(VERSION, "00", "00", 1)): "does not have the same pre-shared key",
        text_of(Answer(VERSION + 1, "00", "00", 1)): "speaks version 2",
        text_of(Answer(VERSION, "00", "00", 1))[:-5]: "in the middle of a line",
    }
    wrong: dict[Message, str] = {
        Run("move", 3 << 20, 1): "not 3 MiB",
        Run("dance", 1 << 20, 1): "no run of the name 'dance'",
        Run("move", (1 << 20) + 1, 1): "whole number of 4096-byte pages",
        Hello(VERSION, "00"): "says Hello where Run is due",
    }
    with listener(psk, "--ram", "2MiB") as (destination, port):
        for sent, said in strange.items():
            with socket.create_connection((HOST, port), PATIENCE_S) as control:
                receive_line(control, Hello)
                control.sendall(sent)
                control.shutdown(socket.SHUT_WR)
                assert said in destination.line_with(f"hosts: {HOST}: ")
        for message, said in wrong.items():
            with socket.create_connection((HOST, port), PATIENCE_S) as control:
                join(control, key, 2)
                send_line(control, message)
                assert said in destination.line_with(f"hosts: {HOST}: ")
        with socket.create_connection((HOST, port), PATIENCE_S) as control:
            join(control, key, 2)
            send_line(control, Run("plain TCP", 1 << 20, 1))
            receive_line(control, Listening, PATIENCE_S)
            send_line(control, Run("plain TCP", 1 << 20, 1))
            assert "speaks out of turn" in destination.line_with(f"hosts: {HOST}: ")
        with hosts(
            *source_arguments(psk, port, "--ram", "1MiB", "--channels", "1", "--repeats", "1")
        ) as source:
            assert source.end()[0] == 0
        # No line but those that were looked for.
        assert (
            len([line for line in destination.lines if f"hosts: {HOST}: " in line])
            == len(strange) + len(wrong) + 1
        )


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([b"SSH-2.0-OpenSSH_9.9\r\n"], "no JSON"),
        ([b"x" * (MAX_LINE_BYTES + 1)], "more than 4096 bytes"),
        ([text_of(WELCOME)], "says Welcome where Hello is due"),
        ([text_of(Hello(VERSION + 1, "00"))], "speaks version 2 of this bench, this side 1"),
        ([text_of(Hello(VERSION, "00"))[:-9]], "in the middle of a line"),
        ([text_of(Hello(VERSION, "00")), text_of(WELCOME)], "does not have the same pre-shared key"),
        ([text_of(Hello(VERSION, "00"))], "ended the connection"),
    ],
)
def test_a_source_meets_something_that_is_no_listener(lines: list[bytes], said: str, psk: str) -> None:
    with (
        socket.create_server((HOST, 0)) as server,
        hosts(*source_arguments(psk, server.getsockname()[1], *SMALL)) as source,
    ):
        server.settimeout(PATIENCE_S)
        control, _ = server.accept()
        with control:
            for line in lines:
                control.sendall(line)
            control.shutdown(socket.SHUT_WR)
            assert source.end() == (1, "")
    assert len(source.lines) == 1
    assert source.lines[0].startswith("hosts: failed: ")
    assert said in source.lines[0]


def test_a_source_whose_destination_says_nonsense_in_a_run(psk: str) -> None:
    with (
        socket.create_server((HOST, 0)) as server,
        hosts(*source_arguments(psk, server.getsockname()[1], *SMALL)) as source,
    ):
        server.settimeout(PATIENCE_S)
        control, _ = server.accept()
        with control, socket.create_server((HOST, 0)) as data:
            offer(control, line_key(PskAttestor(PSK)), lambda proof: replace(WELCOME, proof=proof))
            assert receive_line(control, Run) == Run("plain TCP", 4 << 20, 1)
            send_line(control, Listening(data.getsockname()[1]))
            send_line(control, Listening(1))
            assert source.end() == (1, "")
    assert (
        source.lines[-1]
        == "hosts: failed: the other side says Listening where Done is due on the control line"
    )


def test_plain_tcp_is_taken_from_the_source_alone() -> None:
    run = Run("plain TCP", 1 << 20, 1)
    with side_process(receive_plain, run, HOST, 0, HOST) as pipe:
        port = pipe.recv()
        with socket.create_connection((HOST, port), PATIENCE_S, ("127.0.0.2", 0)) as stranger:
            assert stranger.recv(1) == b""
        with socket.create_connection((HOST, port), PATIENCE_S) as source:
            source.sendall(bytes(1 << 20))
            source.shutdown(socket.SHUT_WR)
            assert source.recv(1) == b"!"
        assert isinstance(pipe.recv(), Done)


def test_plain_tcp_that_is_cut_is_a_failure() -> None:
    with side_process(receive_plain, Run("plain TCP", 1 << 20, 1), HOST, 0, HOST) as pipe:
        with socket.create_connection((HOST, pipe.recv()), PATIENCE_S) as source:
            source.sendall(b"a part")
        assert pipe.recv() == Failed("not all bytes of plain TCP came")
