"""What RAM looks like to a tracker that is given the RAM itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from ..errors import LocalProtocolError

if TYPE_CHECKING:
    from numpy.typing import NDArray

PAGE_SIZE: Final = 4096
WORDS_PER_PAGE: Final = PAGE_SIZE // 8


def check_form(words: NDArray[np.uint64]) -> None:
    """Raises LocalProtocolError where `words` is not whole pages, one after the other."""
    if words.ndim != 2 or words.shape[1] != WORDS_PER_PAGE or not len(words) or words.dtype != np.uint64:
        raise LocalProtocolError(f"RAM is uint64 of shape (pages, 512), not {words.dtype} of {words.shape}")
    if not words.flags.c_contiguous:
        raise LocalProtocolError("RAM has to be contiguous")
