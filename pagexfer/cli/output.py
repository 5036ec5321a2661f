"""What the command prints: progress on standard error while it runs, one report on standard output at the end.

Whether somebody reads it must not decide how a migration ends: what cannot be written is left out, and so is all that would
follow it.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

import click

from ..engine.progress import Status
from ..errors import UsageError

if TYPE_CHECKING:
    from typing import TextIO

    from ..engine.progress import MigrationInfo


def note(line: str) -> None:
    """One line for people."""
    say(f"pagexfer: {line}")


def say(text: str, *, nl: bool = True) -> None:
    """Text on standard error, as far as that can be written."""
    with suppress(OSError):
        _write(sys.stderr, text, nl=nl)


class ProgressLine:
    """Shows snapshots: one line that rewrites itself on a terminal, else a line for each epoch or second."""

    def __init__(self, *, terminal_only: bool = False) -> None:
        self._terminal = sys.stderr is not None and sys.stderr.isatty()
        self._silent = terminal_only and not self._terminal
        self._shown: tuple[Status, int, float] | None = None

    def show(self, info: MigrationInfo) -> None:
        """Show a snapshot."""
        if self._silent or info.status is Status.SETUP:
            return
        if self._terminal:
            # A line that wraps cannot be rewritten; some terminals wrap once the last column is full.
            line = _progress_text(info)[: _columns() - 1]
            say(f"\r{line}{_CLEAR_REST}", nl=info.status in _FINAL)
            return
        moment = (info.status, info.ram.dirty_sync_count, info.total_time // 1000)
        if moment != self._shown:
            note(_progress_text(info))
        self._shown = moment


def print_report(report: dict[str, object], *, as_json: bool) -> None:
    """The report of what is done already, which stays done where its report cannot be written: then a line says that."""
    try:
        print_answer(report, as_json=as_json)
    except UsageError as error:
        note(str(error))


def print_answer(report: dict[str, object], *, as_json: bool) -> None:
    """The report for which the command was called. Raises UsageError where it cannot be written."""
    if as_json:
        print_json(report)
    else:
        print_table(report)


def print_json(report: dict[str, object]) -> None:
    """The one object that goes to standard output. Raises UsageError where it cannot be written."""
    _print(json.dumps(report, indent=2))


def print_table(report: dict[str, object]) -> None:
    """The report as a table of names and values. Raises UsageError where it cannot be written."""
    rows = list(_rows(report))
    width = max(len(name) for name, _ in rows)
    _print("\n".join(f"{name:<{width}}  {value}" for name, value in rows))


def output_failed() -> bool:
    """Whether standard output takes nothing; then nothing else goes there. Where it does, it gets an empty line."""
    try:
        _write(sys.stdout, "")
    except OSError:
        return True
    return False


_CLEAR_REST = "\x1b[K"  # ECMA-48 EL: from here to the end of the line
_FINAL = (Status.COMPLETED, Status.FAILED, Status.CANCELLED)
_MILLISECONDS = ("total-time", "downtime", "setup-time", "expected-downtime", "downtime-limit")
_PERCENT = ("cpu-throttle-percentage", "guest-slowdown-percentage")
_BYTES = ("total", "transferred", "remaining", "normal-bytes")


def _columns() -> int:
    """The width of the terminal that standard error is; one that does not know its own has 80, as ever."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except OSError:
        return 80


def _progress_text(info: MigrationInfo) -> str:
    ram = info.ram
    throttle = f"  throttle {info.throttle.percentage} %" if info.throttle is not None else ""
    expected = (
        f"  expected downtime {info.expected_downtime:.0f} ms" if info.expected_downtime is not None else ""
    )
    return (
        f"{info.status.value:<9} {info.percent:5.1f} %  epoch {ram.dirty_sync_count}  "
        f"{ram.transferred / 2**20:.0f} MiB sent, {ram.remaining / 2**20:.1f} MiB to go  "
        f"{ram.mbps / 8 * 1e6 / 2**20:.0f} MiB/s{expected}{throttle}"
    )


def _rows(report: dict[str, object], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in report.items():
        if isinstance(value, dict):
            rows += _rows(value, f"{prefix}{key} ")
        elif isinstance(value, list):
            rows += [(prefix + key, str(item)) for item in value if not isinstance(item, dict)]
        elif key in _MILLISECONDS:
            rows.append((prefix + key, f"{value} ms"))
        elif key in _PERCENT:
            rows.append((prefix + key, f"{value} %"))
        elif key in _BYTES and isinstance(value, int):
            rows.append((prefix + key, f"{value / 2**20:.1f} MiB"))
        elif isinstance(value, bool):
            rows.append((prefix + key, "yes" if value else "NO"))
        elif value is None:
            rows.append((prefix + key, "none"))
        else:
            rows.append((prefix + key, str(value)))
    return rows


def _print(text: str) -> None:
    try:
        _write(sys.stdout, text)
    except OSError as error:
        raise UsageError(f"cannot write the report to standard output: {error.strerror}") from None


def _write(stream: TextIO | None, text: str, *, nl: bool = True) -> None:
    """Write all of `text` now. Raises OSError where it cannot be written, and then never again."""
    if stream is None:
        return  # closed from the start: the caller wants none of it
    try:
        click.echo(text, file=stream, nl=nl)
    except OSError:
        _give_up(stream)
        raise


def _give_up(stream: TextIO) -> None:
    """What the stream holds goes nowhere; else Python tries it again at its end, and fails with a code of its own."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
