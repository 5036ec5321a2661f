"""How many of the blocks that were sent have changed since, by a sample of them."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

_SAMPLE: Final = 32
# A look at all of the sample, 4 MiB, for every 128 MiB that were sent.
_PERIOD: Final = 1024
# A tenth of the blocks sent again costs about what digests of all pages do.
_MANY_IN: Final = 10


class Probes:
    """A sample of blocks, each sent one as likely in it as any other (Vitter's algorithm R).

    Threads may add at the same time: at worst a block is looked at too often, or one is not.
    """

    def __init__(self) -> None:
        self._sample: list[int] = []
        self._bundles = 0
        self._until_look = _PERIOD
        self.many_change = False

    def add(self, block: int, blocks: int, differs: Callable[[int], bool]) -> None:
        """One of `blocks` that were sent; now and then the whole sample is looked at."""
        self._bundles += 1
        if len(self._sample) < _SAMPLE:
            self._sample.append(block)
        else:
            place = secrets.randbelow(self._bundles)
            if place < _SAMPLE:
                self._sample[place] = block
        self._until_look -= blocks
        if self._until_look <= 0:
            self._until_look = _PERIOD
            changed = sum(map(differs, tuple(self._sample)))
            self.many_change = changed * _MANY_IN > len(self._sample)
