"""Steering a running `send` from another terminal: real processes, a real socket, and whatever else comes to it."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest
import trio

from pagexfer.cli.steering import ControlSocket
from pagexfer.engine.steering import Steering
from pagexfer.errors import UsageError

from .test_cli import COMMAND, GUEST, TIMEOUT_S, Destination, key_file, one_line, run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class _Send:
    """A `send` that waits before its switchover, steered at `path`."""

    def __init__(self, folder: Path) -> None:
        psk = key_file(folder / "psk", "0123456789abcdef" * 4)
        self.path = folder / "steer"
        self.destination = Destination("--psk-file", psk, "--run-for", "100ms", *GUEST)
        self.process = subprocess.Popen(
            [
                *(*COMMAND, "send", "--to", self.destination.address, "--psk-file", psk, *GUEST, "--json"),
                *("--control-socket", str(self.path), "--pause-before-switchover"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def control(self, *words: str) -> dict[str, Any]:
        done = run("control", str(self.path), *words)
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        assert isinstance(answer, dict)
        return answer

    def ask(self, **request: str) -> dict[str, Any]:
        """Without a process for it, which takes longer than the rest of a test."""
        return _raw(self.path, json.dumps(request).encode() + b"\n")

    def wait_for_pause(self) -> None:
        # The command's own line says so; the socket answers from then on.
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if "pre-switchover" in line:
                return
        raise AssertionError("no pause")

    def end(self) -> tuple[int, dict[str, Any]]:
        output, _ = self.process.communicate(timeout=TIMEOUT_S)
        return self.process.returncode, json.loads(output)

    def close(self) -> None:
        for process in (self.process, self.destination.process):
            process.kill()
            process.wait()
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()


@pytest.fixture
def send(tmp_path: Path) -> Iterator[_Send]:
    running = _Send(tmp_path)
    yield running
    running.close()


def test_limits_are_set_and_a_pause_continued(send: _Send) -> None:
    send.wait_for_pause()
    assert send.path.stat().st_mode & 0o777 == 0o600
    assert send.ask(command="status")["status"] == "pre-switchover"
    send.control("set", "downtime-limit", "500ms")
    send.ask(command="set", name="max-bandwidth", value="200MiB/s")
    answer = send.ask(command="set", name="auto-converge", value="on")
    assert answer["parameters"] == {
        "downtime-limit": 500.0,
        "max-downtime-limit": None,
        "max-bandwidth": 200 << 20,
        "timeout": None,
        "auto-converge": True,
        "pause-before-switchover": True,
    }
    send.control("continue")
    code, report = send.end()
    assert code == 0
    assert report["status"] == "completed"
    assert report["downtime-limit"] == 500.0
    assert not send.path.exists()
    code, received, _ = send.destination.end()
    assert code == 0
    assert received["guest"]["consistent"]


def test_bad_requests_change_nothing_and_a_cancel_ends_it(send: _Send) -> None:
    send.wait_for_pause()
    for words, text in (
        (("set", "downtime-limit", "soon"), "300ms"),
        (("set", "downtime-limit"), "set downtime-limit 500ms"),
        (("status", "now"), "alone"),
    ):
        done = run("control", str(send.path), *words)
        assert done.returncode == 2, words
        assert text in one_line(done.stderr)
        assert not done.stdout
    for name, value, text in (
        ("max-bandwidth", "1", "1 MiB/s"),
        ("downtime-limit", "500", "300ms"),
        ("timeout", "60", "300ms"),
        ("downtime-limit", "3600s", "below 2000 s"),
        ("max-downtime-limit", "1ms", "below"),
        ("auto-converge", "maybe", "on or off"),
        ("colour", "red", "no parameter 'colour'"),
    ):
        assert text in send.ask(command="set", name=name, value=value)["error"]
    assert "status, continue, cancel" in send.ask(command="frobnicate")["error"]
    # What speaks no JSON, too much of it, or nothing.
    for request in (b"\n", b"hello\n", b"[1]\n", b'{"command": 3}\n', b"[" * 9999 + b"\n", b"x" * (1 << 17)):
        assert "error" in _raw(send.path, request)
    _raw(send.path, b"")
    assert send.control("status")["parameters"]["downtime-limit"] == 300.0
    send.ask(command="cancel")
    code, report = send.end()
    assert code == 1
    assert report["status"] == "cancelled"
    assert report["error"]["reason"] == "cancelled"
    assert report["guest"]["consistent"]
    assert report["guest"]["progressed"]


def _raw(path: Path, request: bytes) -> dict[str, Any]:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(TIMEOUT_S)
        client.connect(str(path))
        client.sendall(request)
        client.shutdown(socket.SHUT_WR)
        answer = b""
        while part := client.recv(1 << 16):
            answer += part
    return dict(json.loads(answer)) if answer else {}


def test_nothing_to_control(tmp_path: Path) -> None:
    done = run("control", str(tmp_path / "none"), "status")
    assert done.returncode == 2
    assert "no migration answers" in one_line(done.stderr)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--max-bandwidth", "fast"], "512MiB"),
        (["--max-bandwidth", "1"], "1 MiB/s"),
        (["--max-downtime-limit", "1ms"], "below the downtime limit"),
        (["--timeout", "0"], "above zero"),
    ],
)
def test_bad_options(tmp_path: Path, arguments: list[str], word: str) -> None:
    psk = key_file(tmp_path / "psk", "0123456789abcdef" * 4)
    done = run("send", "--to", "127.0.0.1:1", "--psk-file", psk, *GUEST, *arguments)
    assert done.returncode == 2
    assert word in one_line(done.stderr)
    assert not done.stdout


# The socket's file


def test_what_a_killed_send_left_behind_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "steer"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with ControlSocket(path, Steering(), can_throttle=True):
        assert path.is_socket()
    assert not path.exists()


async def test_a_guest_that_cannot_be_slowed_down_refuses_to_be(tmp_path: Path) -> None:
    path, steering = tmp_path / "steer", Steering()
    with ControlSocket(path, steering, can_throttle=False) as listening:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listening.serve)

            async def ask(value: str) -> dict[str, Any]:
                request = {"command": "set", "name": "auto-converge", "value": value}
                return await trio.to_thread.run_sync(_raw, path, json.dumps(request).encode() + b"\n")

            assert "a QEMU slows vCPUs down" in (await ask("on"))["error"]
            assert not steering.parameters.auto_converge
            assert not (await ask("off"))["parameters"]["auto-converge"]
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("what", ["file", "live socket", "no folder", "long name"])
def test_a_path_that_cannot_be_used(tmp_path: Path, what: str) -> None:
    path = tmp_path / "steer"
    with socket.socket(socket.AF_UNIX) as other:
        if what == "file":
            path.write_text("precious")
        elif what == "live socket":
            other.bind(str(path))
            other.listen()
        elif what == "no folder":
            path = tmp_path / "none" / "steer"
        else:
            path = tmp_path / ("x" * 200)
        why = "no socket" if what == "file" else ""
        with pytest.raises(UsageError, match=f"cannot listen at.*{why}") as caught:
            ControlSocket(path, Steering(), can_throttle=True)
        assert str(caught.value).isprintable()
    if what == "file":
        assert path.read_text() == "precious"


def test_a_demo_with_a_capped_link() -> None:
    options = ("--max-bandwidth", "16MiB/s", "--auto-converge", "--timeout", "3600s")
    began = time.monotonic()
    done = run("demo", "--json", *GUEST, "--write-rate", "1MiB", *options)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ram"]["transferred"] / (time.monotonic() - began) < 1.5 * (16 << 20)
    assert report["guest"]["consistent"]
