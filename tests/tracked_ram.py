"""RAM of this process for tests of the trackers that look at RAM itself."""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING, Final

import numpy as np
import pytest

from pagexfer.dirty.pagemap import PagemapTracker
from pagexfer.errors import GuestError

if TYPE_CHECKING:
    from numpy.typing import NDArray

PAGES: Final = 300
WORDS: Final = 512


def anonymous(pages: int = PAGES) -> NDArray[np.uint64]:
    """Fresh anonymous memory."""
    mapping = mmap.mmap(-1, pages * mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(mapping, dtype=np.uint64).reshape(-1, WORDS)


def shared(pages: int = PAGES) -> NDArray[np.uint64]:
    """Fresh memory in a memfd."""
    ram_fd = os.memfd_create("ram", os.MFD_CLOEXEC)
    try:
        os.ftruncate(ram_fd, pages * mmap.PAGESIZE)
        return np.frombuffer(mmap.mmap(ram_fd, 0), dtype=np.uint64).reshape(-1, WORDS)
    finally:
        os.close(ram_fd)


def _unavailable_reason() -> str | None:
    tracker = PagemapTracker(anonymous(1))
    try:
        tracker.start()
    except GuestError as error:
        return str(error)
    tracker.stop()
    return None


_REASON = _unavailable_reason()
needs_pagemap = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))
