"""The ledger of `receive --ledger FILE` on its way: beside FILE before the guest may run here, in its place once it does.

A command that dies in between leaves it beside, and `recover --ledger FILE` finishes it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import MalformedData, UsageError
from .ledger import beside, keep_ledger, write_ledger
from .output import note

if TYPE_CHECKING:
    from pathlib import Path


class KeptLedger:
    """`LedgerStore` for the ledger that shall be at `path`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._beside: Path | None = None

    def keep(self, session: bytes, ledger: bytes) -> None:
        self._beside = beside(self._path, session)
        write_ledger(self._beside, ledger)

    def drop(self) -> None:
        if self._beside is not None:
            forget(self._beside)
            self._beside = None

    def leave(self) -> None:
        """The command ends and cannot say that the guest runs here: what is kept stays beside, and is said to be there."""
        if self._beside is not None and self._beside.exists():
            note(
                f"where the guest runs here after all, its ledger is {self._beside}: 'pagexfer recover --ledger "
                f"{self._path}' on this side's journal puts it in place"
            )

    def finish(self) -> None:
        """The guest runs here: put what is kept into its place, and say where that is another one."""
        if self._beside is None:
            return
        try:
            place = put_in_place(self._path, self._beside)
        except OSError as error:
            # The guest runs here, whatever becomes of the file: that is what the exit code says.
            note(
                f"the guest runs here, and its ledger is {self._beside}: cannot write {self._path}: {error.strerror}"
            )
            return
        if place != self._path:
            note(f"{self._path} has other moves and stays as it is: the ledger of this guest is {place}")


def put_in_place(path: Path, kept: Path) -> Path:
    """Finish a ledger that was left beside; returns where it is now. Raises OSError, and UsageError where it is none."""
    try:
        place = keep_ledger(path, kept.read_bytes())
    except MalformedData as error:
        raise UsageError(f"{kept} is not a ledger: {error}") from None
    forget(kept)
    return place


def forget(kept: Path) -> None:
    """Remove what is not needed beside any more, where that can be."""
    try:
        kept.unlink(missing_ok=True)
    except OSError as error:
        note(f"cannot remove {kept}: {error.strerror}")
