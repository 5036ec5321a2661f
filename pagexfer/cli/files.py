"""Files that a command line names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ..errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

MAX_FILE_BYTES: Final = 1 << 16


def read_file(path: Path, what: str) -> bytes:
    """All of a small file. Raises UsageError where it cannot be read, or is too large to be `what`."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    if len(data) > MAX_FILE_BYTES:
        raise UsageError(f"{path} has more than {MAX_FILE_BYTES} bytes: not a {what}")
    return data
