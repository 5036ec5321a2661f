"""Files that benches leave: looked at before anything is measured, and then written as a whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path


def replaceable(path: Path) -> bool:
    """Whether a new file takes this one's place. A device or a pipe only takes what is written to it."""
    return path.is_file() or not path.exists()


def try_file(path: Path) -> None:
    """Raises OSError where `write_whole` could not write this file."""
    if path.is_fifo():
        return  # whoever reads it may come later
    if path.exists():
        with path.open("ab", buffering=0) as file:
            if not path.is_file():
                file.write(b"\n")  # only so a device says whether it takes anything; JSON may begin with it
    if replaceable(path):
        try_folder(_named(path).parent)


def try_folder(folder: Path) -> None:
    """Raises OSError where no file can be made in this folder."""
    with tempfile.TemporaryFile(dir=folder):
        pass


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it has all of `content`, or what it had where that fails. Raises OSError then."""
    if not replaceable(path):
        path.write_bytes(content)
        return
    target = _named(path)
    new = target.parent / f".bench-{os.getpid()}"
    try:
        with new.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # a full disk may say so no earlier
        if target.exists():
            shutil.copymode(target, new)
        new.replace(target)
    finally:
        new.unlink(missing_ok=True)


def digest(path: Path) -> str:
    """By which a file that was written is known again."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _named(path: Path) -> Path:
    """What a symbolic link names, which need not be there yet: the link itself stays."""
    return Path(os.path.realpath(path))
