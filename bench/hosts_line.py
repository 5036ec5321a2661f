"""The control line between the two machines of `hosts`: lines of JSON in turn, and the proof that both have the key.

    destination   Hello         which version of this it speaks
    source        Answer        the same, its proof, and how many runs will come
    destination   Welcome       its proof, what it takes at most, and what machine it is
    for each run:
    source        Run           what comes next
    destination   Listening     at which port
                  (the run, over connections of its own)
    destination   Done          what it spent

Instead of its line the destination may say Failed, and that is its last. A proof is an HMAC of both nonces, by a key made
of the pre-shared key. Before it has the source's, a destination does nothing but read one line and compute an HMAC. What
comes after the proofs is neither encrypted nor authenticated: who can change what is on the wire can spoil figures.

Whatever goes wrong raises SideFailed, with one line that can be shown.
"""

from __future__ import annotations

import hmac
import json
import secrets
import socket
from dataclasses import asdict, dataclass, fields
from time import monotonic
from typing import TYPE_CHECKING, Final, TypeVar

from pagexfer.wire.constants import MAX_CHANNELS

from .pair import SideFailed

if TYPE_CHECKING:
    from collections.abc import Callable

    from pagexfer import PskAttestor

VERSION: Final = 1
# Several times the longest line there is: a Welcome of five texts.
MAX_LINE_BYTES: Final = 4096
MAX_TEXT: Final = 300
# How long the other side may take for a line that it has at hand.
PROMPT_S: Final = 10.0
# A host that is gone without a word shows after some 30 s, however long a run takes: where nothing is said, and where what
# was said is not acknowledged.
_KEEP_ALIVE: Final = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000),
)
# Where struct tcp_info of linux/tcp.h has the shortest round trip, in microseconds.
_MIN_RTT: Final = slice(148, 152)
_NONCE_BYTES: Final = 16
_KEY_LABEL: Final = b"pagexfer bench hosts"
_SOURCE, _DESTINATION = "source", "destination"

PLAIN: Final = "plain TCP"
MOVE: Final = "move"


@dataclass(frozen=True, slots=True)
class Hello:
    """The destination's first line."""

    version: int
    nonce: str


@dataclass(frozen=True, slots=True)
class Answer:
    """The source has the key, and will have so many runs."""

    version: int
    nonce: str
    proof: str
    runs: int


@dataclass(frozen=True, slots=True)
class Welcome:
    """The destination has the key, too: what it takes at most, and what its figures depend on."""

    proof: str
    ram_limit_bytes: int
    revision: str
    python: str
    kernel: str
    cpu: str
    cpus: int


@dataclass(frozen=True, slots=True)
class Run:
    """What comes next: PLAIN TCP of so many bytes over so many connections, or a MOVE of a guest with so much RAM."""

    what: str
    ram_bytes: int
    channels: int
    isolated: bool = False


@dataclass(frozen=True, slots=True)
class Listening:
    """The destination is ready for the run at this port."""

    port: int


@dataclass(frozen=True, slots=True)
class Done:
    """What the run cost the destination; `failure` says why a move did not arrive, and is empty for one that did."""

    cpu_seconds: float
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Failed:
    """The destination cannot go on."""

    text: str


Message = Hello | Answer | Welcome | Run | Listening | Done | Failed
Wanted = TypeVar("Wanted", Hello, Answer, Welcome, Run, Listening, Done)

_KINDS: Final = {kind.__name__: kind for kind in (Hello, Answer, Welcome, Run, Listening, Done, Failed)}
# Of the numbers by name, where not any from 0 on will do.
_RANGES: Final = {"port": (1, 65535), "channels": (1, MAX_CHANNELS), "runs": (1, 10**6)}
_ANY: Final = (0, 2**53)


def send_line(control: socket.socket, message: Message) -> None:
    """Send one line."""
    line = json.dumps({"kind": type(message).__name__, **asdict(message)}) + "\n"
    control.settimeout(PROMPT_S)
    try:
        control.sendall(line.encode())
    except OSError as error:
        raise SideFailed(_broken(error)) from None


def receive_line(control: socket.socket, wanted: type[Wanted], timeout_s: float = PROMPT_S) -> Wanted:
    """Receive one line of this kind, for all of which the other side has `timeout_s`."""
    message = parse_untrusted(_read(control, timeout_s))
    if isinstance(message, Failed):
        raise SideFailed(f"the other side says: {message.text}")
    if not isinstance(message, wanted):
        raise SideFailed(
            f"the other side says {type(message).__name__} where {wanted.__name__} is due on the control line"
        )
    return message


def parse_untrusted(line: bytes) -> Message:
    """The message in a line, or SideFailed. Every value has its type, numbers their range, texts no control characters."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        raise SideFailed("what comes on the control line is no JSON: is that pagexfer's bench?") from None
    name = found.pop("kind", None) if isinstance(found, dict) else None
    if not isinstance(name, str) or name not in _KINDS:
        raise SideFailed("what comes on the control line is no message of this bench")
    # Before anything else: lines of another version may look otherwise.
    version = found.get("version", VERSION)
    if type(version) is int and version != VERSION:
        raise SideFailed(
            f"the other side speaks version {_shown(version)} of this bench, this side {VERSION}: "
            "use the same revision on both"
        )
    types = {field.name: field.type for field in fields(_KINDS[name])}
    if found.keys() != types.keys() or not all(_fits(key, types[key], found[key]) for key in types):
        raise SideFailed(f"{name} on the control line is malformed")
    return _KINDS[name](**found)


def offer(control: socket.socket, key: bytes, welcome: Callable[[str], Welcome]) -> int:
    """The destination's side of the introduction; returns how many runs the source announces."""
    nonce = secrets.token_hex(_NONCE_BYTES)
    send_line(control, Hello(VERSION, nonce))
    answer = receive_line(control, Answer)
    if not hmac.compare_digest(answer.proof.encode(), _proof(key, _SOURCE, nonce, answer.nonce).encode()):
        refuse(control, "wrong key: both sides need the same pre-shared key")
        raise SideFailed("the other side does not have the same pre-shared key")
    send_line(control, welcome(_proof(key, _DESTINATION, nonce, answer.nonce)))
    return answer.runs


def join(control: socket.socket, key: bytes, runs: int) -> Welcome:
    """The source's side of it; returns what the destination says of itself."""
    hello = receive_line(control, Hello)
    nonce = secrets.token_hex(_NONCE_BYTES)
    send_line(control, Answer(VERSION, nonce, _proof(key, _SOURCE, hello.nonce, nonce), runs))
    welcome = receive_line(control, Welcome)
    if not hmac.compare_digest(
        welcome.proof.encode(), _proof(key, _DESTINATION, hello.nonce, nonce).encode()
    ):
        raise SideFailed("the other side does not have the same pre-shared key")
    return welcome


def refuse(control: socket.socket, text: str) -> None:
    """Say why this is the end, as far as the other side still listens."""
    try:
        send_line(control, Failed(printable(text)))
    except SideFailed:
        return


def line_key(attestor: PskAttestor) -> bytes:
    """The key of the proofs. No report data is ever this label, so a proof here is none in a migration's handshake."""
    return attestor.evidence(_KEY_LABEL)


def keep_alive(control: socket.socket) -> None:
    """Have the kernel see whether the other host is still there."""
    for level, name, value in _KEEP_ALIVE:
        control.setsockopt(level, name, value)


def round_trip_s(control: socket.socket) -> float:
    """Seconds to the other host and back at best, as the kernel measured them in the last minutes."""
    info = control.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _MIN_RTT.stop)
    return int.from_bytes(info[_MIN_RTT], "little") / 1e6


def printable(text: str) -> str:
    """A text that a line may have."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)[:MAX_TEXT]


def _read(control: socket.socket, timeout_s: float) -> bytes:
    """Up to the end of a line and not a byte further: what follows is not for this reader. Lines are few and short."""
    deadline = monotonic() + timeout_s
    line = bytearray()
    while not line.endswith(b"\n"):
        if len(line) == MAX_LINE_BYTES:
            raise SideFailed(f"a line of more than {MAX_LINE_BYTES} bytes comes on the control line")
        control.settimeout(max(deadline - monotonic(), 0.001))
        try:
            byte = control.recv(1)
        except OSError as error:
            if isinstance(error, TimeoutError) and error.errno is None:  # else the kernel's own
                raise SideFailed(f"the other side says nothing for {timeout_s:g} s") from None
            raise SideFailed(_broken(error)) from None
        if not byte:
            raise SideFailed(
                f"the other side ended the connection{' in the middle of a line' if line else ''}"
            )
        line += byte
    return bytes(line)


def _fits(name: str, kind: object, value: object) -> bool:
    # Types of fields are text: annotations are not evaluated. No bool is taken for an int.
    if type(value).__name__ != kind:
        return False
    if isinstance(value, str):
        return len(value) <= MAX_TEXT and value.isprintable()
    least, most = _RANGES.get(name, _ANY)
    return isinstance(value, (int, float)) and least <= value <= most  # not so for NaN


def _proof(key: bytes, whose: str, *nonces: str) -> str:
    return hmac.digest(key, json.dumps([whose, VERSION, *nonces]).encode(), "sha256").hex()


def _shown(number: int) -> str:
    return str(number) if 0 <= number < 10**6 else "?"


def _broken(error: OSError) -> str:
    return f"the connection to the other side broke: {error.strerror or error}"
