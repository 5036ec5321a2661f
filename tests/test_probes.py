"""Blocks or single pages: what the content tracker keeps digests of follows what changes while RAM is sent."""

from __future__ import annotations

import numpy as np
import pytest

from pagexfer.dirty.content import BLOCK_PAGES, ContentTracker
from pagexfer.svsm.page_digest import fresh_digest

from .test_content_tracker import WORDS, tell


class Sending:
    """RAM of 2048 blocks that is sent in bundles of 256 pages, in order."""

    def __init__(self) -> None:
        self.half = 1024 * BLOCK_PAGES
        words = np.random.default_rng(1).integers(1, 1 << 63, (2 * 1024, WORDS), dtype=np.uint64)
        self.ram = np.repeat(words, BLOCK_PAGES, axis=0)
        self.tracker = ContentTracker(self.ram, fresh_digest())
        self.tracker.start()

    def send(self, start: int, stop: int) -> None:
        for first in range(start, stop, 256):
            gfns = np.arange(first, first + 256)
            tell(self.tracker, gfns, self.ram[gfns])

    def is_single(self, gfn: int) -> bool:
        """Whether a page has a digest of its own, or its whole block is reported with it."""
        self.ram[gfn] += np.uint64(1)
        found = self.tracker.collect().gfns()
        assert gfn in found
        return len(found[found // BLOCK_PAGES == gfn // BLOCK_PAGES]) == 1


@pytest.mark.parametrize(
    ("changed", "single"), [([], False), ([*range(0, 1016, 300)], False), ([*range(0, 1016, 8)] * 7, True)]
)
@pytest.mark.parametrize("skip", range(8))
def test_pages_get_digests_of_their_own_once_many_blocks_change_meanwhile(
    changed: list[int], single: bool, skip: int
) -> None:
    """Whichever block of each bundle it is that does not change, by pages that are written behind the sending."""
    sending = Sending()
    sending.send(0, sending.half - 256)
    blocks = sorted({8 * (block // 8) + (skip + 1 + turn // 127) % 8 for turn, block in enumerate(changed)})
    sending.ram[np.array(blocks, dtype=np.int64) * BLOCK_PAGES + 5] += np.uint64(1)
    sending.send(sending.half - 256, 2 * sending.half)
    assert sending.is_single(sending.half + 800) == single


def test_blocks_are_sent_whole_again_once_few_change() -> None:
    sending = Sending()
    for calm in (False, True, True, True, True):
        sending.send(0, sending.half)
        if not calm:
            sending.ram[: sending.half, 9] += np.uint64(1)
    sending.send(sending.half, 2 * sending.half)
    assert not sending.is_single(sending.half + 800)
