"""Steering from a terminal: options of `send` and `demo`, and `pagexfer control`, which speaks to a running `send`.

They speak over a unix socket that only its owner may open: a line of JSON each way, `{"command": "set", "name":
"max-bandwidth", "value": "200MiB/s"}` and `{"error": "…"}` or the status.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
import trio

from ..errors import Outcome, UsageError
from .output import print_answer, print_report
from .values import Seconds, Size

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Any, Self

    from ..engine.progress import MigrationInfo
    from ..engine.steering import MigrationParameters, Steering

_MAX_LINE_BYTES: Final = 1 << 16
_ANSWER_TIMEOUT_S: Final = 10.0
_NONE: Final = "none"
NO_THROTTLE: Final = "auto-converge is for test guests: a QEMU slows vCPUs down in its own migration only"
# What may be set, with the field that holds it; the second word says how it is written.
_PARAMETERS: Final = {
    "downtime-limit": "time",
    "max-downtime-limit": "time or none",
    "max-bandwidth": "size or none",
    "timeout": "time or none",
    "auto-converge": "on or off",
    "pause-before-switchover": "on or off",
}


def steering_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that become `MigrationParameters`."""
    for option in (
        click.option("--timeout", type=Seconds(), help="Longest pre-copy; then the guest stays here."),
        click.option(
            "--auto-converge", is_flag=True, help="Slow the vCPUs down where the guest writes too much."
        ),
        click.option(
            "--max-bandwidth", type=Size(), help="What all channels together send a second: 100MiB/s."
        ),
        click.option(
            "--max-downtime-limit",
            type=Seconds(),
            help="Raise the downtime limit up to this where pre-copy does not converge.",
        ),
        click.option(
            "--downtime-limit", type=Seconds(), default="300ms", show_default=True, help="Longest black-out."
        ),
    ):
        command = option(command)
    return command


def steering_arguments(parameters: MigrationParameters) -> list[str]:
    """The options again, for a child process."""
    arguments = [f"--downtime-limit={_written(parameters.downtime_limit_s)}"]
    if parameters.max_downtime_limit_s is not None:
        arguments.append(f"--max-downtime-limit={_written(parameters.max_downtime_limit_s)}")
    if parameters.max_bandwidth_bytes is not None:
        arguments.append(f"--max-bandwidth={parameters.max_bandwidth_bytes}")
    if parameters.timeout_s is not None:
        arguments.append(f"--timeout={_written(parameters.timeout_s)}")
    return [*arguments, "--auto-converge"] if parameters.auto_converge else arguments


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.argument("words", nargs=-1, required=True)
def control(path: Path, words: tuple[str, ...]) -> int:
    """Steer a running 'send' by the PATH of its control socket.

    \b
    WORDS are one of
      status
      continue                   end a pause before switchover
      cancel                     the guest goes on at the source
      set downtime-limit 500ms
      set max-downtime-limit 2s|none
      set max-bandwidth 200MiB/s|none
      set timeout 60s|none
      set auto-converge on|off
      set pause-before-switchover on|off

    Exit code 0: done, and the status is on standard output. 2: not done, for the reason given.
    """
    request: dict[str, str] = {"command": words[0]}
    if words[0] == "set":
        if len(words) != 3:
            raise UsageError("write it like: set downtime-limit 500ms")
        request |= {"name": words[1], "value": words[2]}
    elif len(words) != 1:
        raise UsageError(f"{words[0]} stands alone")
    answer = _ask(path, request)
    if "error" in answer:
        raise UsageError(str(answer["error"]))
    # What is done stays done; a status is all that there is to `status`.
    (print_answer if words[0] == "status" else print_report)(answer, as_json=True)
    return Outcome.COMPLETED


class ControlSocket:
    """The listening end: has `steering` follow what comes. A context manager that takes the socket's file away.

    `can_throttle` says whether the guest's vCPUs can be slowed down.
    """

    def __init__(self, path: Path, steering: Steering, *, can_throttle: bool) -> None:
        """Raises UsageError where no socket can be made there."""
        self._path = path
        self._steering = steering
        self._can_throttle = can_throttle
        self._latest: MigrationInfo | None = None
        self._socket = _bound(path)
        self._file = path.stat()

    def see(self, info: MigrationInfo) -> None:
        """What `status` answers from now on."""
        self._latest = info

    async def serve(self) -> None:
        """Answer whoever connects, for ever."""
        listening = trio.SocketListener(trio.socket.from_stdlib_socket(self._socket))
        await trio.serve_listeners(self._talk, [listening])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._socket.close()
        try:
            if os.path.samestat(self._path.stat(), self._file):
                self._path.unlink()
        except OSError:
            return  # somebody took it away before

    async def _talk(self, stream: trio.SocketStream) -> None:
        buffer = bytearray()
        try:
            while part := await stream.receive_some(_MAX_LINE_BYTES):
                buffer += part
                *lines, rest = buffer.split(b"\n")
                buffer = rest
                for line in lines:
                    await stream.send_all(_line(self._answer(bytes(line))))
                if len(buffer) > _MAX_LINE_BYTES:
                    await stream.send_all(_line({"error": f"a request has at most {_MAX_LINE_BYTES} bytes"}))
                    return
        except trio.BrokenResourceError:
            return  # who asked does not wait for the answer

    def _answer(self, line: bytes) -> dict[str, object]:
        try:
            self._follow(_parse_request_untrusted(line))
        except UsageError as error:
            return {"error": str(error)}
        status = {"status": "setup"} if self._latest is None else self._latest.as_dict()
        return {**status, "parameters": _described(self._steering.parameters)}

    def _follow(self, request: dict[str, str]) -> None:
        match request:
            case {"command": "status", **rest} if not rest:
                return
            case {"command": "continue", **rest} if not rest:
                self._steering.continue_switchover()
            case {"command": "cancel", **rest} if not rest:
                self._steering.cancel()
            case {"command": "set", "name": name, "value": value, **rest} if not rest:
                parameters = _changed(self._steering.parameters, name, value)
                if parameters.auto_converge and not self._can_throttle:
                    raise UsageError(NO_THROTTLE)
                self._steering.parameters = parameters
            case _:
                raise UsageError("a command is status, continue, cancel, or set with a name and a value")


def _parse_request_untrusted(line: bytes) -> dict[str, str]:
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        request = None
    if not isinstance(request, dict) or not all(isinstance(value, str) for value in request.values()):
        raise UsageError("a request is a line with a JSON object of strings")
    return request


def _changed(parameters: MigrationParameters, name: str, text: str) -> MigrationParameters:
    """`parameters` with one of them as `text` says. Raises UsageError."""
    match _PARAMETERS.get(name):
        case None:
            raise UsageError(f"there is no parameter {name!r}: choose one of {', '.join(_PARAMETERS)}")
        case "on or off":
            if text not in ("on", "off"):
                raise UsageError(f"{name} is on or off, not {text!r}")
            switched = text == "on"
            if name == "auto-converge":
                return replace(parameters, auto_converge=switched)
            return replace(parameters, pause_before_switchover=switched)
        case "size or none":
            return replace(parameters, max_bandwidth_bytes=None if text == _NONE else _size(text))
        case "time":
            return replace(parameters, downtime_limit_s=_seconds(text))
        case _:
            seconds = None if text == _NONE else _seconds(text)
            if name == "timeout":
                return replace(parameters, timeout_s=seconds)
            return replace(parameters, max_downtime_limit_s=seconds)


def _written(seconds: float) -> str:
    """A time as an option; Python's own way of writing a short one has an exponent."""
    return f"{seconds:.9f}s"


def _size(text: str) -> int:
    try:
        return Size().convert(text, None, None)
    except click.BadParameter as error:
        raise UsageError(error.message) from None


def _seconds(text: str) -> float:
    try:
        return Seconds().convert(text, None, None)
    except click.BadParameter as error:
        raise UsageError(error.message) from None


def _described(parameters: MigrationParameters) -> dict[str, object]:
    """Milliseconds and bytes a second, as QEMU has them."""

    def milliseconds(seconds: float | None) -> float | None:
        return None if seconds is None else round(1000 * seconds, 1)

    return {
        "downtime-limit": milliseconds(parameters.downtime_limit_s),
        "max-downtime-limit": milliseconds(parameters.max_downtime_limit_s),
        "max-bandwidth": parameters.max_bandwidth_bytes,
        "timeout": milliseconds(parameters.timeout_s),
        "auto-converge": parameters.auto_converge,
        "pause-before-switchover": parameters.pause_before_switchover,
    }


def _line(answer: dict[str, object]) -> bytes:
    return json.dumps(answer).encode() + b"\n"


def _bound(path: Path) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Before the file is made: nobody else can open it at any moment.
        os.fchmod(listening.fileno(), 0o600)
        _clear(path)
        listening.bind(os.fspath(path))
        listening.listen()
        listening.setblocking(False)
    except UsageError:
        listening.close()
        raise
    except OSError as error:
        listening.close()
        raise UsageError(f"cannot listen at {path}: {error.strerror or error}") from None
    return listening


def _clear(path: Path) -> None:
    """Take away what a `send` that was killed left behind; anything else stays."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise UsageError(f"cannot listen at {path}: there is a file that is no socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.connect(os.fspath(path))
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno != errno.ECONNREFUSED:
            raise
        path.unlink()


def _ask(path: Path, request: dict[str, str]) -> dict[str, object]:
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
            asking.settimeout(_ANSWER_TIMEOUT_S)
            asking.connect(os.fspath(path))
            asking.sendall(json.dumps(request).encode() + b"\n")
            with asking.makefile("rb") as answers:
                line = answers.readline(1 << 20)
    except TimeoutError:
        raise UsageError(f"no answer from {path} within {_ANSWER_TIMEOUT_S:g} s") from None
    except OSError as error:
        raise UsageError(f"no migration answers at {path}: {error.strerror or error}") from None
    try:
        answer = json.loads(line)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise UsageError(f"what answers at {path} is no migration")
    return answer
