"""DirtyBitmap against a set of Python integers, the simplest thing that can be right."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pagexfer.dirty import DirtyBitmap, as_run
from pagexfer.dirty.bits import BLOCK_WORDS
from pagexfer.errors import LocalProtocolError

if TYPE_CHECKING:
    from random import Random

    from numpy.typing import NDArray

# Around the edges of words, of the span that `first` spreads, and of what lies behind it.
SIZES = st.sampled_from([1, 2, 63, 64, 65, 127, 128, 129, 200, 1000, 4095, 4096, 4097, 4500, 8300, 40_000])
ONE_TIB_PAGES = 1 << 28


@st.composite
def marked_pages(draw: st.DrawFn, pages: int) -> set[int]:
    """Single pages and runs of pages."""
    gfn = st.integers(0, pages - 1)
    marked = draw(st.sets(gfn, max_size=40))
    for first in draw(st.lists(gfn, max_size=4)):
        marked |= set(range(first, min(pages, first + draw(st.sampled_from([2, 64, 130, 5000])))))
    return marked


@st.composite
def bitmaps(draw: st.DrawFn) -> tuple[DirtyBitmap, set[int]]:
    pages = draw(SIZES)
    marked = draw(marked_pages(pages))
    return bitmap_of(marked, pages), marked


def ranges(pages: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(0, pages), st.integers(0, pages)).map(lambda pair: (min(pair), max(pair)))


def array(gfns: set[int] | list[int]) -> NDArray[np.int64]:
    return np.array(sorted(gfns) if isinstance(gfns, set) else gfns, dtype=np.int64)


def bitmap_of(marked: set[int], pages: int) -> DirtyBitmap:
    """Made without any code of ours: a big integer has the bitmap's layout."""
    number = sum(1 << gfn for gfn in marked)
    return DirtyBitmap.from_words(number.to_bytes(-(-pages // 64) * 8, "little"), pages)


def marks(bitmap: DirtyBitmap) -> set[int]:
    """Read back without any code of ours, the bits that must stay zero among them."""
    number = int.from_bytes(bitmap.words.tobytes(), "little")
    return {gfn for gfn in range(number.bit_length()) if number >> gfn & 1}


@given(
    SIZES.flatmap(lambda pages: st.tuples(st.just(pages), marked_pages(pages), marked_pages(pages))),
    st.data(),
)
def test_gfns_are_set_cleared_and_tested(case: tuple[int, set[int], set[int]], data: st.DataObject) -> None:
    pages, marked, other = case
    in_any_order = data.draw(st.permutations(sorted(other)[:50] + sorted(other)[:3]))
    for gfns in (array(other), array(in_any_order)):
        chosen = set(gfns.tolist())
        bitmap = bitmap_of(marked, pages)
        assert bitmap.test(gfns).tolist() == [gfn in marked for gfn in gfns.tolist()]
        assert bitmap.test(gfns).dtype == np.bool_
        assert bitmap.any_of(gfns) == bool(marked & chosen)
        bitmap.set_gfns(gfns)
        assert marks(bitmap) == marked | chosen
        bitmap = bitmap_of(marked, pages)
        bitmap.clear_gfns(gfns)
        assert marks(bitmap) == marked - chosen


@given(bitmaps(), st.data())
def test_ranges_are_set_and_cleared(case: tuple[DirtyBitmap, set[int]], data: st.DataObject) -> None:
    bitmap, marked = case
    start, stop = data.draw(ranges(bitmap.pages))
    cleared = bitmap.copy()
    assert bitmap.any_of(range(start, stop)) == any(start <= gfn < stop for gfn in marked)
    bitmap.set_range(start, stop)
    cleared.clear_range(start, stop)
    assert marks(bitmap) == marked | set(range(start, stop))
    assert marks(cleared) == marked - set(range(start, stop))


@given(bitmaps(), st.data())
def test_gfns_of_a_range_are_sorted(case: tuple[DirtyBitmap, set[int]], data: st.DataObject) -> None:
    bitmap, marked = case
    start, stop = data.draw(ranges(bitmap.pages))
    assert bitmap.gfns().tolist() == sorted(marked)
    assert bitmap.gfns(start).tolist() == sorted(gfn for gfn in marked if gfn >= start)
    assert bitmap.gfns(start, stop).tolist() == sorted(gfn for gfn in marked if start <= gfn < stop)
    assert bitmap.gfns(start, stop).dtype == np.int64


@given(bitmaps(), st.data())
def test_first_gives_the_beginning_of_gfns(case: tuple[DirtyBitmap, set[int]], data: st.DataObject) -> None:
    bitmap, marked = case
    start, stop = data.draw(ranges(bitmap.pages))
    limit = data.draw(st.sampled_from([0, 1, 2, 7, 128, 512, 100_000]))
    expected = sorted(gfn for gfn in marked if start <= gfn < stop)[:limit]
    assert bitmap.first(start, stop, limit).tolist() == expected
    assert bitmap.first(start, stop, limit).dtype == np.int64


@given(bitmaps())
def test_runs_are_maximal(case: tuple[DirtyBitmap, set[int]]) -> None:
    bitmap, marked = case
    starts, lengths = bitmap.runs()
    covered = [
        gfn for start, length in zip(starts, lengths, strict=True) for gfn in range(start, start + length)
    ]
    assert covered == sorted(marked)
    assert starts.tolist() == sorted(gfn for gfn in marked if gfn - 1 not in marked)


@given(bitmaps(), bitmaps(), st.randoms())
def test_runs_are_set_in_any_order(
    case: tuple[DirtyBitmap, set[int]], other: tuple[DirtyBitmap, set[int]], random: Random
) -> None:
    (bitmap, marked), (source, _) = case, other
    runs = [
        (first, length)
        for first, length in zip(*source.runs(), strict=True)
        if first + length <= bitmap.pages
    ]
    random.shuffle(runs)
    starts, lengths = np.array(runs, dtype=np.int64).reshape(-1, 2).T
    bitmap.set_runs(starts, lengths)
    assert marks(bitmap) == marked | {first + n for first, length in runs for n in range(length)}


@given(
    st.lists(
        st.tuples(
            st.integers(0, 3), st.integers(-2, 2), st.sampled_from([1, 2, 63, 64, 65, 128, BLOCK_WORDS * 64])
        ),
        min_size=1,
        max_size=6,
    )
)
def test_runs_that_overlap_and_long_ones_are_set(places: list[tuple[int, int, int]]) -> None:
    pages = BLOCK_WORDS * 64 + 1000
    starts = array([max(0, 64 * word + bit) for word, bit, _ in places])
    lengths = array([length for _, _, length in places])
    bitmap, expected = DirtyBitmap(pages), DirtyBitmap(pages)
    bitmap.set_runs(starts, lengths)
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        expected.set_range(start, start + length)
    assert bitmap == expected


@pytest.mark.parametrize(("start", "length"), [(-1, 2), (0, 0), (5, -1), (99, 2), (100, 1)])
def test_bad_runs_are_refused_and_change_nothing(start: int, length: int) -> None:
    bitmap = bitmap_of({5, 99}, 100)
    with pytest.raises(LocalProtocolError, match="none of a guest of 100 pages"):
        bitmap.set_runs(array([1, start]), array([1, length]))
    assert marks(bitmap) == {5, 99}


@given(bitmaps(), st.data())
def test_a_part_of_a_log_is_united(case: tuple[DirtyBitmap, set[int]], data: st.DataObject) -> None:
    bitmap, marked = case
    first, stop = data.draw(ranges(len(bitmap.words)))
    log = bitmap_of(set(data.draw(marked_pages(bitmap.pages))), bitmap.pages).words[first:stop].tobytes()
    bitmap.union_part(first * 64, log)
    number = int.from_bytes(log, "little")
    assert marks(bitmap) == marked | {
        first * 64 + bit for bit in range(number.bit_length()) if number >> bit & 1
    }


@pytest.mark.parametrize(
    ("first_gfn", "log"),
    [(32, bytes(8)), (0, bytes(7)), (-64, bytes(8)), (128, bytes(8)), (64, bytes(16)), (64, b"\xff" * 8)],
)
def test_a_part_that_does_not_fit_is_refused_and_changes_nothing(first_gfn: int, log: bytes) -> None:
    bitmap = bitmap_of({5, 99}, 100)
    with pytest.raises(LocalProtocolError):
        bitmap.union_part(first_gfn, log)
    assert marks(bitmap) == {5, 99}


@pytest.mark.parametrize("density", [0, 0.00001, 0.0001, 0.01])
def test_large_bitmaps_are_united_and_counted_at_any_density(density: float) -> None:
    pages = BLOCK_WORDS * 64 * 2 + 777
    rng = np.random.default_rng(3)
    one, other = (np.unique(rng.integers(0, pages, round(pages * density))) for _ in range(2))
    bitmap, added = DirtyBitmap(pages), DirtyBitmap(pages)
    bitmap.set_gfns(one)
    added.set_gfns(other)
    bitmap.union(added)
    union = np.union1d(one, other).astype(np.int64)
    assert np.array_equal(bitmap.gfns(), union)
    assert bitmap.any() == bool(union.size)
    regions = -(-pages // 512)
    assert bitmap.region_counts(512).tolist() == np.bincount(union >> 9, minlength=regions).tolist()


def test_marks_that_a_caller_puts_into_the_words_count() -> None:
    bitmap, target = DirtyBitmap(100), DirtyBitmap(100)
    words = bitmap.words
    bitmap.clear()
    words[1] = 1
    assert bitmap.any()
    target.union(bitmap.take())
    assert marks(target) == {64}
    assert not bitmap.any()


@given(bitmaps(), st.sampled_from([64, 128, 512, 4096, 65536]))
def test_region_counts(case: tuple[DirtyBitmap, set[int]], region_pages: int) -> None:
    bitmap, marked = case
    expected = [0] * -(-bitmap.pages // region_pages)
    for gfn in marked:
        expected[gfn // region_pages] += 1
    counts = bitmap.region_counts(region_pages)
    assert counts.tolist() == expected
    assert counts.dtype == np.uint32


@given(bitmaps(), st.sampled_from([64, 192, 512, 65536]))
def test_chunks_are_those_with_a_mark(case: tuple[DirtyBitmap, set[int]], chunk_pages: int) -> None:
    bitmap, marked = case
    numbers = sorted({gfn // chunk_pages for gfn in marked})
    expected = [(n * chunk_pages, min(bitmap.pages, (n + 1) * chunk_pages)) for n in numbers]
    assert list(bitmap.chunks(chunk_pages)) == expected


@example((DirtyBitmap.full(64), set(range(64))), 65)
@given(bitmaps(), st.integers(1, 70))
def test_split_covers_all_pages_evenly(case: tuple[DirtyBitmap, set[int]], parts: int) -> None:
    bitmap, marked = case
    ranges_ = bitmap.split(parts)
    assert len(ranges_) == parts
    assert [ranges_[0][0], *(stop for _, stop in ranges_)] == [*(start for start, _ in ranges_), bitmap.pages]
    assert ranges_[0][0] == 0
    for part, (_, stop) in enumerate(ranges_[:-1], start=1):
        assert stop % 64 == 0 or stop == bitmap.pages
        before = sum(gfn < stop for gfn in marked)
        assert 0 <= before - len(marked) * part // parts < 64


@given(SIZES.flatmap(lambda pages: st.tuples(st.just(pages), marked_pages(pages), marked_pages(pages))))
def test_whole_bitmaps_are_united_taken_and_compared(case: tuple[int, set[int], set[int]]) -> None:
    pages, marked, other = case
    bitmap = bitmap_of(marked, pages)
    assert (bitmap == bitmap_of(other, pages)) == (marked == other)
    assert bitmap.count() == len(marked)
    assert bitmap.any() == bool(marked)
    bitmap.union(bitmap_of(other, pages))
    assert marks(bitmap) == marked | other
    taken = bitmap.take()
    assert (marks(taken), marks(bitmap), bitmap.any()) == (marked | other, set(), False)
    copied = taken.copy()
    taken.clear()
    assert (marks(taken), marks(copied)) == (set(), marked | other)
    bitmap.union_words(copied.words)
    assert bitmap == copied


class BitmapMachine(RuleBasedStateMachine):
    """Any order of operations on one bitmap leaves it equal to a set that went through the same."""

    @initialize(pages=SIZES)
    def make(self, pages: int) -> None:
        self.bitmap = DirtyBitmap(pages)
        self.marked: set[int] = set()

    @rule(data=st.data())
    def set_gfns(self, data: st.DataObject) -> None:
        gfns = data.draw(marked_pages(self.bitmap.pages))
        self.bitmap.set_gfns(array(gfns))
        self.marked |= gfns

    @rule(data=st.data())
    def clear_gfns(self, data: st.DataObject) -> None:
        gfns = data.draw(marked_pages(self.bitmap.pages))
        self.bitmap.clear_gfns(array(gfns))
        self.marked -= gfns

    @rule(data=st.data())
    def set_and_clear_known_runs(self, data: st.DataObject) -> None:
        first, second = (range(*data.draw(ranges(self.bitmap.pages))) for _ in range(2))
        self.bitmap.set_gfns(first)
        self.bitmap.clear_gfns(second)
        self.marked = (self.marked | set(first)) - set(second)

    @rule(data=st.data())
    def set_range(self, data: st.DataObject) -> None:
        start, stop = data.draw(ranges(self.bitmap.pages))
        self.bitmap.set_range(start, stop)
        self.marked |= set(range(start, stop))

    @rule(data=st.data())
    def clear_range(self, data: st.DataObject) -> None:
        start, stop = data.draw(ranges(self.bitmap.pages))
        self.bitmap.clear_range(start, stop)
        self.marked -= set(range(start, stop))

    @rule(data=st.data())
    def union(self, data: st.DataObject) -> None:
        gfns = data.draw(marked_pages(self.bitmap.pages))
        self.bitmap.union(bitmap_of(gfns, self.bitmap.pages))
        self.marked |= gfns

    @rule(limit=st.integers(1, 600))
    def send_a_bundle(self, limit: int) -> None:
        """What the export does per bundle."""
        gfns = self.bitmap.first(0, self.bitmap.pages, limit)
        assert gfns.tolist() == sorted(self.marked)[:limit]
        if gfns.size:
            self.bitmap.clear_gfns(as_run(gfns))
        self.marked -= set(gfns.tolist())

    @rule()
    def take(self) -> None:
        taken = self.bitmap.take()
        assert marks(taken) == self.marked
        self.marked = set()

    @rule()
    def go_on_with_a_copy(self) -> None:
        self.bitmap = self.bitmap.copy()

    @invariant()
    def same_marks(self) -> None:
        assert marks(self.bitmap) == self.marked
        assert self.bitmap.gfns().tolist() == sorted(self.marked)
        assert self.bitmap.count() == len(self.marked)


TestBitmapMachine = BitmapMachine.TestCase


@pytest.mark.parametrize("pages", [1, 63, 64, 65, 4097, BLOCK_WORDS * 64 * 2 + 5])
def test_empty_and_full(pages: int) -> None:
    empty, full = DirtyBitmap(pages), DirtyBitmap.full(pages)
    assert (empty.count(), empty.any(), empty.gfns().size, empty.runs()[0].size) == (0, False, 0, 0)
    assert list(empty.chunks(64)) == []
    assert empty.first(0, pages, 10).size == 0
    assert (full.count(), full.any()) == (pages, True)
    assert np.array_equal(full.gfns(), np.arange(pages))
    assert [part.tolist() for part in full.runs()] == [[0], [pages]]
    assert int(full.words[-1]) == (1 << ((pages - 1) % 64 + 1)) - 1
    full.clear_range(0, pages)
    assert full == empty


def test_no_gfns_change_nothing() -> None:
    bitmap = bitmap_of({3, 70}, 100)
    none = np.zeros(0, dtype=np.int64)
    bitmap.set_gfns(none)
    bitmap.clear_gfns(none)
    assert bitmap.test(none).tolist() == []
    assert marks(bitmap) == {3, 70}


def test_a_run_is_a_range_and_anything_else_stays() -> None:
    assert as_run(array([7])) == range(7, 8)
    assert as_run(array([3, 4, 5])) == range(3, 6)
    scattered = array([3, 5, 6])
    assert as_run(scattered) is scattered


@pytest.mark.parametrize("gfns", [[5, 5, 7], [7, 5, 5], [7, 6, 5], [5, 7, 6, 8], [6, 5], [64, 63, 65]])
def test_gfns_that_only_look_contiguous(gfns: list[int]) -> None:
    bitmap = DirtyBitmap(100)
    bitmap.set_gfns(array(gfns))
    assert marks(bitmap) == set(gfns)
    bitmap = bitmap_of({5, 63}, 100)
    assert bitmap.test(array(gfns)).tolist() == [gfn in {5, 63} for gfn in gfns]
    bitmap = DirtyBitmap.full(100)
    bitmap.clear_gfns(array(gfns))
    assert marks(bitmap) == set(range(100)) - set(gfns)


@pytest.mark.parametrize("start", [0, 1, 64, 100])
def test_first_looks_far_and_stops_where_it_is_told(start: int) -> None:
    bitmap = bitmap_of({start + 7, 20_000, 20_001, 20_063, 20_070, 39_999}, 40_000)
    found = [start + 7, 20_000, 20_001, 20_063, 20_070, 39_999]
    for limit in range(8):
        assert bitmap.first(start, 40_000, limit).tolist() == found[:limit]
        assert bitmap.first(start, 20_001, limit).tolist() == found[:2][:limit]
        assert bitmap.first(start, 20_063, limit).tolist() == found[:3][:limit]


def test_a_run_crosses_the_steps_of_a_pass() -> None:
    step = BLOCK_WORDS * 64
    bitmap = DirtyBitmap(3 * step)
    bitmap.set_range(step - 1, 2 * step + 1)
    assert [part.tolist() for part in bitmap.runs()] == [[step - 1], [step + 2]]
    assert np.array_equal(bitmap.gfns(), np.arange(step - 1, 2 * step + 1))
    assert bitmap.first(0, 3 * step, 2).tolist() == [step - 1, step]


def test_sparse_bitmap_of_one_tib() -> None:
    rng = np.random.default_rng(20)
    gfns = np.unique(rng.integers(0, ONE_TIB_PAGES, 3000))
    bitmap = DirtyBitmap(ONE_TIB_PAGES)
    bitmap.set_gfns(rng.permutation(gfns))
    assert np.array_equal(bitmap.gfns(), gfns)
    assert np.array_equal(bitmap.gfns(1 << 20, 1 << 27), gfns[(gfns >= 1 << 20) & (gfns < 1 << 27)])
    assert np.array_equal(bitmap.first(1, ONE_TIB_PAGES, 100), gfns[gfns >= 1][:100])
    assert bitmap.count() == len(gfns)
    starts, lengths = bitmap.runs()
    assert np.array_equal(starts, gfns[np.diff(gfns, prepend=-2) > 1])
    assert lengths.sum() == len(gfns)
    assert bitmap.region_counts(1 << 18).tolist() == np.bincount(gfns >> 18, minlength=1 << 10).tolist()
    taken = bitmap.take()
    assert (taken.count(), bitmap.any()) == (len(gfns), False)


@pytest.mark.parametrize("gfns", [[-1], [100], [5, 100], [100, 5], [5, -1, 6], [98, 99, 100]])
def test_gfns_out_of_range_are_refused(gfns: list[int]) -> None:
    bitmap = bitmap_of({5, 99}, 100)
    for operation in (bitmap.set_gfns, bitmap.clear_gfns, bitmap.test):
        with pytest.raises(LocalProtocolError, match="do not fit a guest of 100 pages"):
            operation(array(gfns))
    assert marks(bitmap) == {5, 99}


@pytest.mark.parametrize(("start", "stop"), [(-1, 5), (0, 101), (6, 5), (101, 101)])
def test_bad_ranges_are_refused(start: int, stop: int) -> None:
    bitmap = bitmap_of({5, 99}, 100)
    for on_gfns in (bitmap.set_gfns, bitmap.clear_gfns, bitmap.any_of):
        with pytest.raises(LocalProtocolError, match="not a range of a guest of 100 pages"):
            on_gfns(range(start, stop))
    for operation in (bitmap.set_range, bitmap.clear_range, bitmap.gfns):
        with pytest.raises(LocalProtocolError, match="not a range of a guest of 100 pages"):
            operation(start, stop)
    with pytest.raises(LocalProtocolError, match="not a range"):
        bitmap.first(start, stop, 1)
    assert marks(bitmap) == {5, 99}


def test_other_arguments_that_do_not_fit_are_refused() -> None:
    bitmap = DirtyBitmap(100)
    with pytest.raises(LocalProtocolError, match="at least one page, not 0"):
        DirtyBitmap(0)
    with pytest.raises(LocalProtocolError, match="101 pages does not fit one of 100"):
        bitmap.union(DirtyBitmap(101))
    with pytest.raises(LocalProtocolError, match="first -1 marked"):
        bitmap.first(0, 100, -1)
    for region_pages in (0, -64, 32, 96):
        with pytest.raises(LocalProtocolError, match="power of two"):
            bitmap.region_counts(region_pages)
    for chunk_pages in (0, -64, 100):
        with pytest.raises(LocalProtocolError, match="multiple of 64"):
            bitmap.chunks(chunk_pages)
    with pytest.raises(LocalProtocolError, match="at least one part"):
        bitmap.split(0)


@pytest.mark.parametrize("size", [0, 8, 15, 17, 24])
def test_a_log_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(LocalProtocolError, match=f"100 pages have a log of 16 bytes, not {size}"):
        DirtyBitmap.from_words(bytes(size), 100)


def test_a_log_with_stray_bits_is_refused_and_changes_nothing() -> None:
    bitmap = bitmap_of({5}, 100)
    words = np.array([1, 1 << 36], dtype=np.uint64)
    with pytest.raises(LocalProtocolError, match="behind the last of 100"):
        bitmap.union_words(words)
    assert marks(bitmap) == {5}
    words[1] = 1 << 35
    bitmap.union_words(words.data)
    assert marks(bitmap) == {0, 5, 99}


def test_a_bitmap_is_no_view_of_the_log() -> None:
    words = np.array([1], dtype=np.uint64)
    bitmap = DirtyBitmap.from_words(words, 64)
    words[0] = 2
    assert marks(bitmap) == {0}


def test_a_bitmap_is_compared_by_content_and_has_no_hash() -> None:
    assert bitmap_of({1}, 64) != bitmap_of({1}, 63)
    assert bitmap_of({1}, 64) != {1}
    with pytest.raises(TypeError, match="unhashable"):
        hash(DirtyBitmap(1))
