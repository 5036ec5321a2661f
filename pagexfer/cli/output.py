"""What the command prints: progress on standard error while it runs, one report on standard output at the end."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import click

from ..engine.progress import Status

if TYPE_CHECKING:
    from ..engine.progress import MigrationInfo


def note(line: str) -> None:
    """One line for people."""
    click.echo(f"pagexfer: {line}", err=True)


class ProgressLine:
    """Shows snapshots: one line that rewrites itself on a terminal, else a line for each epoch or second."""

    def __init__(self, *, terminal_only: bool = False) -> None:
        self._terminal = sys.stderr.isatty()
        self._silent = terminal_only and not self._terminal
        self._shown: tuple[Status, int, int] | None = None
        self._width = 0

    def show(self, info: MigrationInfo) -> None:
        """Show a snapshot."""
        if self._silent or info.status is Status.SETUP:
            return
        if self._terminal:
            line = _progress_text(info)
            click.echo(f"\r{line:<{self._width}}", err=True, nl=info.status in _FINAL)
            self._width = len(line)
            return
        moment = (info.status, info.ram.dirty_sync_count, int(info.total_time / 1000))
        if moment != self._shown:
            note(_progress_text(info))
        self._shown = moment


def print_json(report: dict[str, object]) -> None:
    """The one object that goes to standard output."""
    click.echo(json.dumps(report, indent=2))


def print_table(report: dict[str, object]) -> None:
    """The report as a table of names and values."""
    rows = list(_rows(report))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        click.echo(f"{name:<{width}}  {value}")


_FINAL = (Status.COMPLETED, Status.FAILED, Status.CANCELLED)
_MILLISECONDS = ("total-time", "downtime", "setup-time", "expected-downtime", "downtime-limit")
_PERCENT = ("cpu-throttle-percentage", "guest-slowdown-percentage")
_BYTES = ("total", "transferred", "remaining", "normal-bytes")


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
