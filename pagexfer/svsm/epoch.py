"""The source's book of the epoch that is open: what was sealed in it, and what of that turns out to be lost (R3, R9).

Until the next epoch begins, the token that closes this one may still prove lost with its connection. So a token that was
sealed is a place in a stream, and the epoch ends for good only when the host goes on, as it does once the destination has
closed it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ..dirty import DirtyBitmap
from ..errors import IntegrityError
from ..wire.constants import FIRST_EPOCH
from ..wire.token import EpochTotals

if TYPE_CHECKING:
    from .content import ContentTable
    from .streams import Lost

Place = tuple[int, int]  # incarnation of channel 0, and counter


class Replaced(NamedTuple):
    """What a broken connection cost: pages that go again with the next epoch, and whether token or ledger must go again."""

    pages: int
    token: bool
    ledger: bool


class EpochBook:
    """Counts of the open epoch, and where the token and the ledger went; `lost` are pages that did not arrive."""

    def __init__(self, pages: int) -> None:
        self.number = FIRST_EPOCH
        self.bundles = 0
        self.lost = DirtyBitmap(pages)
        self.ledger: Place | None = None
        self._token: Place | None = None
        self._pages = 0

    @property
    def next_number(self) -> int:
        """The epoch in which the destination is once it has everything that was sealed."""
        return self.number if self._token is None else self.number + 1

    @property
    def totals(self) -> EpochTotals:
        """What the token says."""
        return EpochTotals(self.bundles, self._pages)

    def add(self, pages: int) -> None:
        """A bundle of so many pages was sealed."""
        self.bundles += 1
        self._pages += pages

    def seal(self, place: Place) -> None:
        """The token was sealed at `place`."""
        self._token = place

    def commit(self) -> bool:
        """The host goes on, so the destination has the token and all that it counts; False where none was sealed."""
        if self._token is None:
            return False
        self._token = None
        self.number += 1
        self.bundles = self._pages = 0
        return True

    def account(self, lost: list[Lost], content: ContentTable) -> Replaced:
        """Take back what did not arrive. Raises IntegrityError where that cannot be of this epoch."""
        pages, token, ledger = 0, False, False
        for loss in lost:
            # Of each bundle the pages are known; what has none is the opening bundle, or stood on channel 0.
            gfns = content.withdraw(loss.channel, loss.incarnation, loss.received)
            others = int(loss.received == 0)
            if _is_lost(self._token, loss):
                self._token, token = None, True
                others += 1
            if _is_lost(self.ledger, loss):
                self.ledger, ledger = None, True
                others += 1
            bundles = loss.sealed - loss.received - others
            if not 0 <= bundles <= self.bundles or (bundles == 0) != (len(gfns) == 0):
                raise IntegrityError("a record that leaves out bundles of an epoch that was closed")
            self.bundles -= bundles
            self._pages -= len(gfns)
            self.lost.set_gfns(gfns)
            pages += len(gfns)
        return Replaced(pages, token, ledger)


def _is_lost(place: Place | None, loss: Lost) -> bool:
    """Whether what stands at `place` on channel 0 is among the lost bundles."""
    return (
        loss.channel == 0 and place is not None and place[0] == loss.incarnation and place[1] >= loss.received
    )
