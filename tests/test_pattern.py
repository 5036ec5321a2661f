"""The pattern: its closed form, and that no kind of damage to RAM escapes `check_ram`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagexfer.errors import GuestError
from pagexfer.guests.pattern import (
    COUNTER_FACTOR,
    GFN_FACTOR,
    LCG_FACTOR,
    LCG_INCREMENT,
    PATTERN_GFN,
    STATUS_GFN,
    STATUS_WORD_ERRORS,
    STATUS_WORD_POSITION,
    STATUS_WORD_ROUND,
    STATUS_WORD_STEPS,
    Layout,
    RamCheck,
    check_ram,
    fill,
    page_content,
    read_status,
    scattered_stride,
)
from pagexfer.wire.constants import PAGE_SIZE, WORDS_PER_PAGE

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

_VCPUS = 2
_LAYOUT = Layout.plan(1 << 20, _VCPUS, seed=7)


def _plain_page(gfn: int, counter: int, seed: int) -> list[int]:
    """The specification of a page, word by word in Python integers."""
    words = [gfn, counter, (seed + gfn * GFN_FACTOR + counter * COUNTER_FACTOR) % 2**64]
    while len(words) < WORDS_PER_PAGE - 1:
        words.append((words[-1] * LCG_FACTOR + LCG_INCREMENT) % 2**64)
    words.append(sum(words) % 2**64)
    return words


def _ram_after(steps: list[int]) -> NDArray[np.uint64]:
    """RAM of a guest whose vCPUs have made so many steps each, written step by step."""
    words = np.zeros((_LAYOUT.ram_pages, WORDS_PER_PAGE), dtype=np.uint64)
    fill(words, _LAYOUT)
    for vcpu, count in enumerate(steps):
        for step in range(count):
            done, position = divmod(step, _LAYOUT.slice_pages)
            gfn = _LAYOUT.first_gfn(vcpu) + position * _LAYOUT.stride % _LAYOUT.slice_pages
            words[gfn] = page_content(np.array([gfn]), done + 1, _LAYOUT.seed)[0]
        done, position = divmod(count, _LAYOUT.slice_pages)
        status = words[STATUS_GFN + vcpu]
        status[STATUS_WORD_ROUND], status[STATUS_WORD_POSITION] = done + 1, position
        status[STATUS_WORD_STEPS] = count
    return words


@given(
    gfns=st.lists(st.integers(0, 2**40 - 1), min_size=1, max_size=3),
    counter=st.integers(0, 2**63),
    seed=st.integers(0, 2**63),
)
def test_closed_form_equals_the_recurrence(gfns: list[int], counter: int, seed: int) -> None:
    content = page_content(np.array(gfns, dtype=np.int64), counter, seed)
    assert content.tolist() == [_plain_page(gfn, counter, seed) for gfn in gfns]


@given(pages=st.integers(1, 5000))
def test_stride_visits_every_page_once(pages: int) -> None:
    visited = np.arange(pages) * scattered_stride(pages) % pages
    assert np.array_equal(np.sort(visited), np.arange(pages))


@given(ram_pages=st.integers(128, 4096), vcpus=st.integers(1, 4), free=st.sampled_from([0.0, 0.25, 0.4]))
def test_slices_lie_side_by_side_in_ram(ram_pages: int, vcpus: int, free: float) -> None:
    layout = Layout.plan(ram_pages * PAGE_SIZE, vcpus, free=free)
    firsts = [layout.first_gfn(vcpu) for vcpu in range(vcpus)]
    assert firsts == [PATTERN_GFN + vcpu * layout.slice_pages for vcpu in range(vcpus)]
    assert layout.end_gfn == firsts[-1] + layout.slice_pages <= ram_pages
    assert ram_pages - layout.end_gfn >= int((ram_pages - PATTERN_GFN) * free)


def test_plan_refuses_to_leave_nothing_to_write_to() -> None:
    with pytest.raises(GuestError, match="100% of it free, is too small"):
        Layout.plan(1 << 20, 1, free=1.0)


@pytest.mark.parametrize(
    ("ram_bytes", "vcpus", "reason"),
    [
        (1 << 20, 0, "vCPUs"),
        (1 << 20, 33, "vCPUs"),
        ((1 << 20) + 1, 1, "whole number"),
        (70 * PAGE_SIZE, 1, "too small"),
        (0, 1, "too small"),
    ],
)
def test_plan_refuses(ram_bytes: int, vcpus: int, reason: str) -> None:
    with pytest.raises(GuestError, match=reason):
        Layout.plan(ram_bytes, vcpus)


@pytest.mark.parametrize(
    "steps", [0, 1, 5, _LAYOUT.slice_pages - 1, _LAYOUT.slice_pages, 2 * _LAYOUT.slice_pages + 3]
)
def test_consistent_at_every_boundary(steps: int) -> None:
    result = check_ram(_ram_after([steps, 3]), _VCPUS)
    assert result.faults == ()
    assert result.consistent
    assert [status.steps for status in result.statuses] == [steps, 3]
    assert result.activity == steps + 3


def test_status_is_what_the_guest_wrote() -> None:
    status = read_status(_ram_after([_LAYOUT.slice_pages + 4, 0]), 0)
    assert (status.round, status.position, status.steps) == (2, 4, _LAYOUT.slice_pages + 4)
    assert (status.errors, status.bad_gfn, status.ticks) == (0, 0, 0)


def _lose_page(words: NDArray[np.uint64]) -> None:
    words[_LAYOUT.first_gfn(0) + 3] = 0


def _stale_page(words: NDArray[np.uint64]) -> None:
    gfn = _LAYOUT.first_gfn(0) + _LAYOUT.stride  # step 1 of round 1, done
    words[gfn] = page_content(np.array([gfn]), 0, _LAYOUT.seed)[0]


def _early_page(words: NDArray[np.uint64]) -> None:
    gfn = _LAYOUT.first_gfn(0) + 20 * _LAYOUT.stride % _LAYOUT.slice_pages  # step 20, not yet done
    words[gfn] = page_content(np.array([gfn]), 1, _LAYOUT.seed)[0]


def _torn_page(words: NDArray[np.uint64]) -> None:
    gfn = _LAYOUT.first_gfn(1)  # step 0 of round 1, done
    words[gfn, 256:] = page_content(np.array([gfn]), 0, _LAYOUT.seed)[0, 256:]


def _flip_last_bit(words: NDArray[np.uint64]) -> None:
    words[_LAYOUT.end_gfn - 1, 511] ^= np.uint64(1 << 63)


def _swap_pages(words: NDArray[np.uint64]) -> None:
    first = _LAYOUT.first_gfn(1)
    words[[first + 1, first + 2]] = words[[first + 2, first + 1]]


def _dirty_free_page(words: NDArray[np.uint64]) -> None:
    words[-1, 511] = 1


def _lose_status(words: NDArray[np.uint64]) -> None:
    words[STATUS_GFN + 1] = 0


def _other_guest_status(words: NDArray[np.uint64]) -> None:
    words[STATUS_GFN + 1] = words[STATUS_GFN]


def _old_position(words: NDArray[np.uint64]) -> None:
    words[STATUS_GFN, STATUS_WORD_POSITION] -= np.uint64(1)
    words[STATUS_GFN, STATUS_WORD_STEPS] -= np.uint64(1)


def _wrong_steps(words: NDArray[np.uint64]) -> None:
    words[STATUS_GFN, STATUS_WORD_STEPS] += np.uint64(1)


def _position_outside(words: NDArray[np.uint64]) -> None:
    words[STATUS_GFN, STATUS_WORD_POSITION] = _LAYOUT.slice_pages


def _guest_found_errors(words: NDArray[np.uint64]) -> None:
    words[STATUS_GFN + 1, STATUS_WORD_ERRORS] = 1


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (_lose_page, "vCPU 0: 1 pages differ from round 0, .* holds gfn 0 of round 0"),
        (_stale_page, "vCPU 0: 1 pages differ from round 1, .* of round 0"),
        (_early_page, "vCPU 0: 1 pages differ from round 0, .* of round 1"),
        (_torn_page, "vCPU 1: 1 pages differ from round 1"),
        (_flip_last_bit, "vCPU 1: 1 pages differ from round 0"),
        (_swap_pages, "vCPU 1: 2 pages differ"),
        (_dirty_free_page, "1 pages of free memory are not zero, first gfn 255"),
        (_lose_status, "vCPU 1: its status page is lost"),
        (_other_guest_status, "vCPU 1: its status page does not fit"),
        (_old_position, "vCPU 0: 1 pages differ from round 0, .* of round 1"),
        (_wrong_steps, "vCPU 0: its count of pages"),
        (_position_outside, "vCPU 0: its status page does not fit"),
        (_guest_found_errors, "vCPU 1: the guest itself found 1 wrong"),
    ],
)
def test_damage_is_found(damage: Callable[[NDArray[np.uint64]], None], fault: str) -> None:
    words = _ram_after([5, 1])
    damage(words)
    result = check_ram(words, _VCPUS)
    assert not result.consistent
    assert re.search(fault, result.faults[0])


def test_status_lost_by_an_empty_guest() -> None:
    words = np.zeros((_LAYOUT.ram_pages, WORDS_PER_PAGE), dtype=np.uint64)
    assert check_ram(words, 1).faults == ("vCPU 0: its status page is lost",)


@given(
    steps=st.integers(0, 300), gfn=st.integers(PATTERN_GFN, _LAYOUT.ram_pages - 1), bit=st.integers(0, 32767)
)
def test_no_flipped_bit_escapes(steps: int, gfn: int, bit: int) -> None:
    words = _ram_after([steps, 0])
    words[gfn, bit // 64] ^= np.uint64(1 << bit % 64)
    result: RamCheck = check_ram(words, _VCPUS)
    assert len(result.faults) == 1
    assert str(gfn) in result.faults[0]
