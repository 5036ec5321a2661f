"""The process of a guest's machine: what it is called in a journal, and whether it still lives.

A machine monitor of its own (QEMU) outlives the process that has the SVSM, with the guest's whole memory in it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final
from uuid import UUID

from ..errors import UsageError
from ..wire.journal import GuestProcess

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_PID_NAMESPACE: Final = Path("/proc/self/ns/pid")
# Fields of /proc/PID/stat behind the name, which is in parentheses and may have any bytes.
_STATE, _THREADS, _START = 0, 17, 19


def process_of(process_id: int) -> GuestProcess:
    """The process that now has this id. Raises UsageError where it cannot be seen."""
    try:
        return GuestProcess(*_here(), process_id, int(_fields(process_id)[_START]))
    except OSError as error:
        raise UsageError(
            f"process {process_id}, which has the guest, cannot be seen: {error.strerror}"
        ) from None


def lives(process: GuestProcess) -> bool | None:
    """Whether it still has its memory; None where that cannot be seen from here: another machine, boot or pid namespace."""
    try:
        if _here() != (process.boot, process.namespace):
            return None
    except OSError:
        return None
    try:
        fields = _fields(process.id)
    except OSError:
        return _exists(process.id)
    # A zombie has given its memory back, unless it is but the first thread that has ended.
    ended = fields[_STATE] in (b"Z", b"X") and int(fields[_THREADS]) <= 1
    return int(fields[_START]) == process.start and not ended


def _here() -> tuple[bytes, int]:
    return UUID(_BOOT_ID.read_text().strip()).bytes, _PID_NAMESPACE.stat().st_ino


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
