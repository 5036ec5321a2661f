"""What RAM looks like to a tracker that is given the RAM itself, and private memory for copies of its pages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from ..errors import LocalProtocolError

if TYPE_CHECKING:
    from numpy.typing import NDArray

PAGE_SIZE: Final = 4096
WORDS_PER_PAGE: Final = PAGE_SIZE // 8


class PageCopies:
    """Private memory for copies of `pages` pages: `words` of shape (pages, 512), as octets, and each page's octets.

    Slicing a page costs half as much as hashing it, so it is done once and not for every copy.
    """

    def __init__(self, pages: int) -> None:
        self.words: NDArray[np.uint64] = np.empty((pages, WORDS_PER_PAGE), dtype=np.uint64)
        self.octets = self.words.reshape(-1).view(np.uint8).data
        self.each = [
            self.octets[start : start + PAGE_SIZE] for start in range(0, pages * PAGE_SIZE, PAGE_SIZE)
        ]


def check_form(words: NDArray[np.uint64]) -> None:
    """Raises LocalProtocolError where `words` is not whole pages in this machine's words, one after the other."""
    given: object = words
    if not isinstance(given, np.ndarray):
        raise LocalProtocolError(f"RAM is an array of uint64, not a {type(given).__name__}")
    if words.ndim != 2 or words.shape[1] != WORDS_PER_PAGE or not len(words) or words.dtype != np.uint64:
        raise LocalProtocolError(f"RAM is uint64 of shape (pages, 512), not {words.dtype} of {words.shape}")
    if not words.flags.c_contiguous or not words.flags.aligned:
        raise LocalProtocolError("RAM has to be contiguous, and its words aligned")
