"""The process of a guest's machine: what it is called in a journal, and whether it still lives.

A machine monitor of its own (QEMU) outlives the process that has the SVSM, with the guest's whole memory in it.
"""

from __future__ import annotations

import errno
import os
from functools import partial
from pathlib import Path
from typing import Final
from uuid import UUID

from ..errors import UsageError
from ..wire.journal import GuestProcess

_PROC: Final = Path("/proc")
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_PID_NAMESPACE: Final = Path("/proc/self/ns/pid")
_STATUS: Final = Path("/proc/self/status")
_TIME_OFFSETS: Final = Path("/proc/self/timens_offsets")
# Fields of /proc/PID/stat behind the name, which is in parentheses and may have any bytes.
_STATE, _THREADS, _START = 0, 17, 19


def process_of(process_id: int) -> GuestProcess:
    """The process that now has this id. Raises UsageError where it cannot be seen."""
    try:
        return GuestProcess(*_here(), process_id, _start(_fields(process_id)))
    except OSError as error:
        raise UsageError(
            f"process {process_id}, which has the guest, cannot be seen: {error.strerror}"
        ) from None


def lives(process: GuestProcess) -> bool | None:
    """Whether it still has its memory; None where that cannot be seen from here: another machine, boot or pid namespace.

    From a pid namespace above its own, as outside of a container, it is seen as long as it lives, and not that it is gone.
    """
    try:
        boot, namespace = _here()
    except OSError:
        return None
    if boot != process.boot:
        return None
    if namespace != process.namespace:
        return True if any(map(partial(_is_below, process), _PROC.iterdir())) else None
    try:
        fields = _fields(process.id)
    except OSError:
        return _exists(process.id)
    return _is(process, fields)


def _is(process: GuestProcess, fields: list[bytes]) -> bool:
    """Whether `fields` are those of this process, and not of a later one that got its id."""
    # A zombie has given its memory back, unless it is but the first thread that has ended.
    ended = fields[_STATE] in (b"Z", b"X") and int(fields[_THREADS]) <= 1
    # Two time namespaces may round a start to two ticks, and no id comes again within one.
    return abs(_start(fields) - process.start) <= 1 and not ended


def _is_below(process: GuestProcess, entry: Path) -> bool:
    """Whether `entry` of /proc is this process, whose id is that of a pid namespace below."""
    if not entry.name.isdigit():
        return False
    try:
        return process.id in _ids(entry / "status")[1:] and _is(process, _fields(int(entry.name)))
    except OSError:  # it has ended meanwhile
        return False


def _here() -> tuple[bytes, int]:
    """Boot and pid namespace. Raises OSError where /proc is another namespace's, whose numbers are other processes'."""
    if len(_ids(_STATUS)) > 1:
        raise OSError(errno.ESRCH, "/proc is that of another pid namespace")
    return UUID(_BOOT_ID.read_text().strip()).bytes, _PID_NAMESPACE.stat().st_ino


def _ids(status: Path) -> list[int]:
    """A process's id in the pid namespace of /proc, and in each below it down to its own."""
    lines = status.read_bytes().splitlines()
    return next(([*map(int, line.split()[1:])] for line in lines if line.startswith(b"NSpid:")), [])


def _start(fields: list[bytes]) -> int:
    """When a process began, in clock ticks after the boot. /proc counts from the boot of the reader's time namespace."""
    try:
        offsets = [line.split() for line in _TIME_OFFSETS.read_bytes().splitlines()]
    except FileNotFoundError:  # a kernel without time namespaces
        offsets = []
    ticks = os.sysconf("SC_CLK_TCK")
    shift = sum(
        int(seconds) * ticks + int(nanoseconds) * ticks // 10**9
        for clock, seconds, nanoseconds in offsets
        if clock == b"boottime"
    )
    return max(int(fields[_START]) - shift, 0)


def _fields(process_id: int) -> list[bytes]:
    return Path(f"/proc/{process_id}/stat").read_bytes().rpartition(b") ")[2].split()


def _exists(process_id: int) -> bool:
    """For a process that is not in /proc: other users' may be hidden there (hidepid)."""
    try:
        os.kill(process_id, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
