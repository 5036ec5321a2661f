"""The main job on one machine: a destination and a source as two processes, joined by loopback.

Both children are the same `receive` and `send` that work between two hosts; this parent gives them a fresh key or test CA,
passes their progress on, and merges their reports: figures from the source, the guest's proof from the destination, and
from each what the other proved of itself.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from ..attestation.insecure import EmulatedAuthority
from ..attestation.snp import Product
from ..errors import Outcome
from ..guests.checked import resolve_kind
from ..wire.handshake import AttestorKind
from .output import note, print_report

if TYPE_CHECKING:
    from typing import IO

    from ..guests.checked import GuestKind

_LISTENING: Final = "listening at "
_CHILD_TIMEOUT_S: Final = 30.0


class _Ended(NamedTuple):
    """A child's end: exit code, its JSON report or an empty one, and what it said last on standard error."""

    code: int
    report: dict[str, object]
    last_line: str


def run_demo(
    attest: AttestorKind,
    source_options: list[str],
    destination_options: list[str],
    kind: GuestKind,
    ram: int,
    vcpus: int,
    both: list[str],
    *,
    as_json: bool,
) -> int:
    """Run both sides, `both` being options of either, and print the merged report; returns the exit code."""
    guest = ["--guest", resolve_kind(kind), "--ram", str(ram), "--vcpus", str(vcpus), *both, "--json"]
    with tempfile.TemporaryDirectory(prefix="pagexfer-") as folder:
        proof = _attestation(attest, Path(folder))
        with _Child(
            ["receive", "--listen", "127.0.0.1:0", *proof, *destination_options, *guest]
        ) as destination:
            address = destination.wait_for(_LISTENING)
            if address is None:
                ended = destination.end(wait=True)
                return _report(_Ended(ended.code, {}, ""), ended, as_json=as_json)
            with _Child(["send", "--to", address, *proof, *source_options, *guest]) as source:
                sent = source.end(wait=True)
            # A source that did not complete leaves a destination behind that may still wait for one.
            return _report(sent, destination.end(wait=sent.code == Outcome.COMPLETED), as_json=as_json)


def _attestation(kind: AttestorKind, folder: Path) -> list[str]:
    """The options with which both children know each other."""
    if kind is AttestorKind.EMULATED:
        ca = folder / "test-ca"
        EmulatedAuthority.generate(Product.GENOA, now=datetime.now(UTC)).save(ca)
        return ["--attest", kind.label, "--test-ca", str(ca)]
    psk = folder / "psk"
    psk.touch(mode=0o600)
    psk.write_text(secrets.token_hex(32))
    return ["--psk-file", str(psk)]


def _report(sent: _Ended, received: _Ended, *, as_json: bool) -> int:
    code = sent.code if sent.code != Outcome.COMPLETED else received.code
    report = dict(sent.report)
    if sent.code == Outcome.COMPLETED:
        report["attestation"] = _both(sent.report, received.report)
        report["guest"] = received.report.get("guest", {"consistent": False, "progressed": False})
        if received.code != Outcome.COMPLETED:
            report["error"] = received.report.get("error", _error(received))
            report["status"] = "failed"
    if not report:
        ended = sent if sent.last_line else received
        code = code or Outcome.ENDED
        report = {"status": "failed", "error": _error(ended)}
    if code == Outcome.USAGE:
        return code
    # A child that was killed has a negative code, which is none of the documented ones.
    code = code if code >= 0 else Outcome.ENDED
    print_report(report, as_json=as_json)
    return code


def _both(sent: dict[str, object], received: dict[str, object]) -> dict[str, object]:
    """Each side's attestation as the other side saw it."""
    by_source, by_destination = sent.get("attestation"), received.get("attestation")
    merged: dict[str, object] = {}
    if isinstance(by_destination, dict):
        merged |= {"kind": by_destination["kind"], "source": by_destination["peer"]}
    if isinstance(by_source, dict):
        merged |= {"kind": by_source["kind"], "destination": by_source["peer"]}
    return merged


def _error(ended: _Ended) -> dict[str, object]:
    return {
        "reason": "process",
        "message": ended.last_line or f"a side ended with exit code {ended.code} and no report",
    }


class _Child:
    """One side as a process. Its standard error is passed on line by line, its standard output is the report."""

    def __init__(self, arguments: list[str]) -> None:
        # An interrupt in the middle of this would leave a child that nobody knows.
        interrupted = threading.Event()
        ours = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pagexfer", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
                process_group=0,  # Ctrl-C at a terminal is for the parent, which ends its sides
            )
            assert self._process.stdout is not None
            assert self._process.stderr is not None
            self._said: list[str] = []
            self._news = threading.Condition()
            self._output = bytearray()
            self._readers = [
                threading.Thread(target=self._listen, args=(self._process.stderr,)),
                threading.Thread(target=self._collect, args=(self._process.stdout,)),
            ]
            for reader in self._readers:
                reader.start()
        finally:
            signal.signal(signal.SIGINT, ours)
        if interrupted.is_set() and ours is not signal.SIG_IGN:
            self.__exit__()
            raise KeyboardInterrupt

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._join()

    def wait_for(self, beginning: str) -> str | None:
        """What follows `beginning` on a line of standard error; None where the process ends without it."""
        with self._news:
            while True:
                for line in self._said:
                    _, found, rest = line.partition(beginning)
                    if found:
                        return rest
                if not self._readers[0].is_alive() or self._process.poll() is not None:
                    return None
                self._news.wait(0.1)

    def end(self, *, wait: bool) -> _Ended:
        """Wait for the process to end, or have it end now."""
        if not wait:
            self._process.terminate()
        self._join()
        try:
            report = json.loads(self._output) if self._output else {}
        except ValueError:
            report = {}
        return _Ended(self._process.returncode, report, self._said[-1] if self._said else "")

    def _join(self) -> None:
        self._process.wait()
        for reader in self._readers:
            reader.join(_CHILD_TIMEOUT_S)

    def _listen(self, stream: IO[bytes]) -> None:
        for raw in stream:
            line = raw.decode(errors="replace").rstrip("\n").removeprefix("pagexfer: ")
            if line:
                note(line)
            with self._news:
                self._said.append(line)
                self._news.notify_all()

    def _collect(self, stream: IO[bytes]) -> None:
        self._output += stream.read()
