"""How many of the blocks that were sent have changed since, by a sample of them."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

_SAMPLE: Final = 32
# A look at all of the sample, 4 MiB, for every 128 MiB that were sent.
_PERIOD: Final = 1024
# A tenth of the blocks sent again costs about what digests of all pages do.
_MANY_IN: Final = 10


class Probes:
    """A sample of blocks, each that was sent about as likely in it as any other; `many_change` is what the last look says.

    Threads may add at the same time: at worst a block is looked at too often, or one is not.
    """

    def __init__(self) -> None:
        self._sample: list[int] = []
        self._seen = 0
        self._until_look = _PERIOD
        self.many_change = False

    def add(self, blocks: NDArray[np.int64], changed: Callable[[int], bool]) -> None:
        """`blocks`, at least one, were sent together; now and then the whole sample is looked at."""
        self._seen += len(blocks)
        block = int(blocks[secrets.randbelow(len(blocks))])
        if len(self._sample) < _SAMPLE:
            self._sample.append(block)
        else:
            # As if every block of these had its own chance to take a place (Vitter's algorithm R).
            place = secrets.randbelow(self._seen)
            if place < _SAMPLE * len(blocks):
                self._sample[place % _SAMPLE] = block
        self._until_look -= len(blocks)
        if self._until_look <= 0:
            self._until_look = _PERIOD
            found = sum(map(changed, tuple(self._sample)))
            self.many_change = found * _MANY_IN > len(self._sample)
