"""The one protocol of everything that can say which pages were written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from .bitmap import DirtyBitmap


class DirtyTracker(Protocol):
    """Reports pages written since the last `collect`. A write that races with it is reported by it or by the next."""

    def start(self) -> None:
        """Begin to track; from here on no write is lost. Raises GuestError where this machine cannot."""
        ...

    def collect(self) -> DirtyBitmap:
        """Pages written since `start` or the last `collect`, and forget them."""
        ...

    def stop(self) -> None:
        """Stop tracking. Calling it again changes nothing."""
        ...
