"""Chunks of an epoch against a naive reading of the same counts."""

from __future__ import annotations

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from pagexfer.dirty.content import BLOCK_PAGES
from pagexfer.engine.plan import MAX_CHUNK_PAGES, MIN_CHUNK_PAGES, Chunk, plan_chunks

_REGION_PAGES = 512


def _counts(*pages: int) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    return np.array(pages, dtype=np.uint32)


@given(
    st.lists(st.integers(0, _REGION_PAGES), max_size=60),
    st.integers(1, 64),
    st.integers(0, _REGION_PAGES - 1),
)
@example([0, 0, 0], 1, 0)
@example([_REGION_PAGES] * 60, 1, 0)
def test_every_pending_region_is_in_exactly_one_chunk_in_order(
    pages: list[int], channels: int, short: int
) -> None:
    total_pages = max(0, len(pages) * _REGION_PAGES - short)
    if pages:
        pages[-1] = min(pages[-1], _REGION_PAGES - short)
    chunks = plan_chunks(_counts(*pages), _REGION_PAGES, total_pages, channels)

    covered = np.zeros(total_pages, dtype=int)
    end = 0
    for chunk in chunks:
        assert chunk.pages > 0
        assert end <= chunk.start
        end = chunk.start + chunk.pages
        assert end <= total_pages
        covered[chunk.start : end] += 1
    assert covered.max(initial=0) <= 1
    for region, pending in enumerate(pages):
        part = covered[region * _REGION_PAGES : (region + 1) * _REGION_PAGES]
        assert part.all() if pending else True


@given(st.lists(st.integers(0, _REGION_PAGES), min_size=1, max_size=400), st.integers(1, 16))
def test_a_chunk_has_about_the_same_work_as_the_others(pages: list[int], channels: int) -> None:
    chunks = plan_chunks(_counts(*pages), _REGION_PAGES, len(pages) * _REGION_PAGES, channels)
    target = min(MAX_CHUNK_PAGES, max(MIN_CHUNK_PAGES, sum(pages) // (4 * channels)))
    # As if a region's pages were spread evenly over it.
    density = np.repeat(np.array(pages) / _REGION_PAGES, _REGION_PAGES)
    for chunk in chunks:
        # At most one part more than its share, and no part has more than that.
        assert density[chunk.start : chunk.start + chunk.pages].sum() <= 2 * target + 1e-3
    assert len(chunks) <= sum(pages) // target + 1


def test_an_idle_epoch_has_no_chunk() -> None:
    assert plan_chunks(_counts(0, 0), _REGION_PAGES, 1024, 4) == []
    assert plan_chunks(_counts(), _REGION_PAGES, 0, 4) == []


def test_a_hot_region_is_divided() -> None:
    chunks = plan_chunks(_counts(0, 1 << 20, 0, 1), 1 << 20, 4 << 20, 2)
    assert len(chunks) == 256 + 1
    assert {chunk.pages for chunk in chunks[:-1]} == {MAX_CHUNK_PAGES}
    assert chunks[0].start == 1 << 20
    assert chunks[-1] == Chunk(3 << 20, 1 << 20)


@given(st.integers(1, 1 << 15), st.integers(1, 64))
def test_a_chunk_begins_with_a_whole_block(pending: int, channels: int) -> None:
    region_pages = 1 << 15
    chunks = plan_chunks(_counts(pending, region_pages), region_pages, 2 * region_pages, channels)
    assert all(chunk.start % MIN_CHUNK_PAGES == 0 for chunk in chunks)
    assert MIN_CHUNK_PAGES % BLOCK_PAGES == 0


def test_a_small_dense_epoch_has_work_for_every_channel() -> None:
    chunks = plan_chunks(_counts(0, _REGION_PAGES), _REGION_PAGES, 2 * _REGION_PAGES, 8)
    assert len(chunks) == 8
    assert {chunk.pages for chunk in chunks} == {MIN_CHUNK_PAGES}


def test_skewed_work_is_not_left_to_one_channel() -> None:
    pages = [_REGION_PAGES] * 8 + [1] * 1000
    chunks = plan_chunks(_counts(*pages), _REGION_PAGES, len(pages) * _REGION_PAGES, 4)
    hot = [chunk for chunk in chunks if chunk.start < 8 * _REGION_PAGES]
    assert len(hot) >= 4


def test_the_last_chunk_ends_with_ram() -> None:
    assert plan_chunks(_counts(1, 1), _REGION_PAGES, 700, 1) == [Chunk(0, 700)]


def test_first_epoch_of_a_full_guest_gives_every_channel_several_chunks() -> None:
    counts = np.full(256, _REGION_PAGES, dtype=np.uint32)
    chunks = plan_chunks(counts, _REGION_PAGES, 256 * _REGION_PAGES, 4)
    assert len(chunks) >= 16
    assert {chunk.pages for chunk in chunks} == {MAX_CHUNK_PAGES}
