"""What `--guest qemu` means to `pagexfer send` and `pagexfer receive`: a QEMU that the user started."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import click
from click.core import ParameterSource

from ..errors import UsageError
from ..guests.qemu import QemuGuest
from .steering import NO_THROTTLE

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

_OF_TEST_GUESTS: Final = ("ram", "vcpus", "write_rate", "run_for")


def qemu_monitor(kind: str, qmp: Path | None) -> Path | None:
    """Where the QEMU's monitor is; None for other guests. Raises UsageError where options do not fit the guest."""
    if kind != "qemu":
        if qmp is not None:
            raise UsageError("--qmp belongs to --guest qemu")
        return None
    if qmp is None:
        raise UsageError("--guest qemu needs --qmp PATH, the UNIX socket of QEMU's monitor")
    context = click.get_current_context()
    for name in _OF_TEST_GUESTS:
        if name in context.params and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise UsageError(f"--{name.replace('_', '-')} is for test guests: a QEMU has its own")
    if context.params.get("auto_converge"):
        raise UsageError(NO_THROTTLE)
    return qmp


def refuse_qemu(kind: str) -> None:
    """Raises UsageError for a QEMU, where only test guests will do."""
    if kind == "qemu":
        raise UsageError("the demo brings its own guest: use send and receive for a QEMU")


async def with_qemu(monitor: Path, work: Callable[[QemuGuest], Awaitable[int]], incoming: bool) -> int:
    """Do `work` with the guest behind `monitor`."""
    async with QemuGuest.attach(monitor, incoming=incoming) as guest:
        return await work(guest)
