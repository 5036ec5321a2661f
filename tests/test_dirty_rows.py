"""Which rows of a dirty bitmap may have marks: none is missed, whoever made the mark, and what is cleared is forgotten."""

from __future__ import annotations

import numpy as np
import pytest

from pagexfer.dirty import DirtyBitmap


def test_words_in_other_hands_are_always_looked_at() -> None:
    bitmap = DirtyBitmap(1 << 20)
    words = bitmap.words
    assert bitmap.region_counts(64).sum() == 0
    bitmap.clear()
    words[5000] = 0b101
    marked = [5000 * 64, 5000 * 64 + 2]
    united = DirtyBitmap(1 << 20)
    united.union(bitmap)
    assert bitmap.any()
    assert bitmap.count() == united.count() == 2
    assert bitmap.copy() == united == bitmap
    for found in (bitmap.gfns(), bitmap.first(0, 1 << 20, 10), united.gfns(), united.first(0, 1 << 20, 10)):
        assert found.tolist() == marked
    assert bitmap.take().region_counts(1 << 12).nonzero()[0].tolist() == [5000 // 64]


@pytest.mark.parametrize("region_pages", [64, 512, 4096, 1 << 15])
@pytest.mark.parametrize("density", [0.00001, 0.001])
def test_rows_without_marks_are_forgotten_and_found_again(region_pages: int, density: float) -> None:
    pages = 1 << 20
    gfns = np.unique(np.random.default_rng(1).integers(0, pages, round(pages * density)))
    bitmap = DirtyBitmap.full(pages)
    bitmap.clear_range(0, pages)
    for marked in (gfns, gfns[::2], gfns + 0):
        assert not bitmap.region_counts(region_pages).any()
        bitmap.set_gfns(marked)
        assert bitmap.gfns().tolist() == bitmap.first(0, pages, pages).tolist() == marked.tolist()
        counts = np.bincount(marked // region_pages, minlength=pages // region_pages)
        assert bitmap.region_counts(region_pages).tolist() == counts.tolist()
        bitmap.clear_gfns(marked)
        assert not bitmap.any()


def test_marks_of_runs_and_of_a_log_are_found() -> None:
    bitmap = DirtyBitmap(1 << 20)
    bitmap.set_runs(np.array([200_000, 70_000]), np.array([9_000, 3]))
    assert bitmap.gfns().tolist() == [*range(70_000, 70_003), *range(200_000, 209_000)]
    bitmap.clear()
    log = np.zeros(12_000, dtype=np.uint64)
    log[[7, 11_000]] = 1
    bitmap.union_part(64 * 4_000, log.tobytes())
    assert bitmap.gfns().tolist() == [64 * 4_007, 64 * 15_000]
