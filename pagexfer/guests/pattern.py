"""The self-checking pattern that every test guest writes over its RAM, without end.

Each vCPU owns a slice of consecutive pages and visits them again and again in a fixed scattered order; in round r it
checks that a page still holds what round r - 1 wrote, then writes round r's content. So at any step boundary the vCPU's
round and position say what every byte of its slice must be: a lost, stale or torn page cannot hide, neither from the
guest, which finds it on the next visit, nor from `check_ram` on the host side. The guest says in one status page a vCPU
where it stands; the layout stands there too, so that RAM alone is enough to check it.

    gfn 0 .. 15                   the guest's own code and tables, if it has any
    gfn 16 .. 16 + vcpus - 1      status pages
    gfn 64 .. 64 + used - 1       pattern pages: vcpus slices of `slice_pages`
    rest                          free memory, all zero

Content of a pattern page for (gfn, counter), 512 uint64 words, all arithmetic modulo 2^64:

    word 0        gfn
    word 1        counter (the round that wrote it; the fill before the guest starts is round 0)
    word 2        x0 = seed + gfn * GFN_FACTOR + counter * COUNTER_FACTOR
    word 3..510   each the word before it * LCG_FACTOR + LCG_INCREMENT
    word 511      sum of words 0 to 510
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from ..errors import GuestError
from ..wire.constants import PAGE_SIZE, WORDS_PER_PAGE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

STATUS_GFN: Final = 16
PATTERN_GFN: Final = 64
MAX_GUEST_VCPUS: Final = 32
_MIN_SLICE_PAGES: Final = 8

STATUS_MAGIC: Final = 0x5055_4747_5354_4154
GFN_FACTOR: Final = 0x9E37_79B9_7F4A_7C15
COUNTER_FACTOR: Final = 0xC2B2_AE3D_27D4_EB4F
LCG_FACTOR: Final = 0x5851_F42D_4C95_7F2D  # Knuth's MMIX constants
LCG_INCREMENT: Final = 0x1405_7B7E_F767_814F

# Words of a status page. The guest writes the first group after every step; the second is fixed from the start.
STATUS_WORD_MAGIC: Final = 0
STATUS_WORD_ROUND: Final = 1  # round that is under way, from 1
STATUS_WORD_POSITION: Final = 2  # steps done in this round, 0 .. slice_pages - 1
STATUS_WORD_STEPS: Final = 3  # pages written since the start
STATUS_WORD_ERRORS: Final = 4  # pages found wrong by the guest itself
STATUS_WORD_BAD_GFN: Final = 5  # the last of them
STATUS_WORD_TICKS: Final = 6  # heartbeats, also of an idle guest
STATUS_WORD_SEED: Final = 8
STATUS_WORD_FIRST_GFN: Final = 9
STATUS_WORD_SLICE_PAGES: Final = 10
STATUS_WORD_STRIDE: Final = 11
STATUS_WORD_VCPUS: Final = 12

_BLOCK_PAGES: Final = 1024  # pages computed at a time: 4 MiB of temporaries


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a workload of `vcpus` vCPUs has its slices in `ram_pages` of RAM."""

    ram_pages: int
    vcpus: int
    slice_pages: int
    stride: int
    seed: int

    @classmethod
    def plan(cls, ram_bytes: int, vcpus: int, *, free: float = 0.25, seed: int = 1) -> Layout:
        """A layout that leaves the part `free` (0 to 1) of RAM zero. Raises GuestError where RAM is too small."""
        if not 1 <= vcpus <= MAX_GUEST_VCPUS:
            raise GuestError(f"a guest has 1 to {MAX_GUEST_VCPUS} vCPUs, not {vcpus}")
        if ram_bytes % PAGE_SIZE:
            raise GuestError(f"RAM of {ram_bytes} bytes is not a whole number of {PAGE_SIZE}-byte pages")
        ram_pages = ram_bytes // PAGE_SIZE
        slice_pages = int((ram_pages - PATTERN_GFN) * (1 - free)) // vcpus
        if slice_pages < _MIN_SLICE_PAGES:
            raise GuestError(
                f"RAM of {ram_bytes} bytes, {free:.0%} of it free, is too small for {vcpus} vCPUs, "
                f"each of which writes {_MIN_SLICE_PAGES} pages or more: give more RAM, or leave less of it free"
            )
        return cls(ram_pages, vcpus, slice_pages, scattered_stride(slice_pages), seed)

    def first_gfn(self, vcpu: int) -> int:
        return PATTERN_GFN + vcpu * self.slice_pages

    @property
    def end_gfn(self) -> int:
        """First gfn of free memory."""
        return PATTERN_GFN + self.vcpus * self.slice_pages


@dataclass(frozen=True, slots=True)
class Status:
    """One vCPU's status page, read once."""

    round: int
    position: int
    steps: int
    errors: int
    bad_gfn: int
    ticks: int


@dataclass(frozen=True, slots=True)
class RamCheck:
    """What `check_ram` found. `faults` is empty for a consistent guest."""

    statuses: tuple[Status, ...]
    faults: tuple[str, ...]

    @property
    def consistent(self) -> bool:
        return not self.faults

    @property
    def activity(self) -> int:
        """A number that grows as long as the guest goes on: pages written and heartbeats of all vCPUs."""
        return sum(status.steps + status.ticks for status in self.statuses)


def scattered_stride(slice_pages: int) -> int:
    """A step near the golden ratio of the slice that visits every page once a round."""
    stride = max(1, int(slice_pages * 0.6180339887498949))
    while math.gcd(stride, slice_pages) != 1:
        stride += 1
    return stride


def page_content(gfns: NDArray[np.int64], counter: int, seed: int) -> NDArray[np.uint64]:
    """Content of pages `gfns` as round `counter` writes it: uint64 of shape (len(gfns), 512)."""
    content = np.empty((len(gfns), WORDS_PER_PAGE), dtype=np.uint64)
    unsigned = gfns.astype(np.uint64)
    with np.errstate(over="ignore"):
        content[:, 0] = unsigned
        content[:, 1] = counter
        x0 = unsigned * np.uint64(GFN_FACTOR) + np.uint64((seed + counter * COUNTER_FACTOR) % 2**64)
        np.multiply(x0[:, None], _FACTORS[None, :], out=content[:, 2:511])
        content[:, 2:511] += _INCREMENTS[None, :]
        content[:, 511] = content[:, :511].sum(axis=1, dtype=np.uint64)
    return content


def fill(words: NDArray[np.uint64], layout: Layout) -> None:
    """Write round 0 and the status pages into fresh RAM (uint64 of shape (pages, 512)), before any vCPU runs."""
    for vcpu in range(layout.vcpus):
        status = words[STATUS_GFN + vcpu]
        status[STATUS_WORD_MAGIC] = STATUS_MAGIC
        status[STATUS_WORD_ROUND] = 1
        status[STATUS_WORD_SEED] = layout.seed
        status[STATUS_WORD_FIRST_GFN] = layout.first_gfn(vcpu)
        status[STATUS_WORD_SLICE_PAGES] = layout.slice_pages
        status[STATUS_WORD_STRIDE] = layout.stride
        status[STATUS_WORD_VCPUS] = layout.vcpus
    for gfns in _blocks(np.arange(PATTERN_GFN, layout.end_gfn, dtype=np.int64)):
        words[gfns[0] : gfns[-1] + 1] = page_content(gfns, 0, layout.seed)


def read_status(words: NDArray[np.uint64], vcpu: int) -> Status:
    """One vCPU's status page. Of a running guest it is a moment's view."""
    page = words[STATUS_GFN + vcpu, :8].copy()
    return Status(
        round=int(page[STATUS_WORD_ROUND]),
        position=int(page[STATUS_WORD_POSITION]),
        steps=int(page[STATUS_WORD_STEPS]),
        errors=int(page[STATUS_WORD_ERRORS]),
        bad_gfn=int(page[STATUS_WORD_BAD_GFN]),
        ticks=int(page[STATUS_WORD_TICKS]),
    )


def check_ram(words: NDArray[np.uint64], vcpus: int) -> RamCheck:
    """Check every byte above gfn 63, and every status page, of a guest whose vCPUs are parked."""
    faults: list[str] = []
    statuses = tuple(read_status(words, vcpu) for vcpu in range(vcpus))
    end = PATTERN_GFN
    for vcpu, status in enumerate(statuses):
        page = words[STATUS_GFN + vcpu]
        first, pages, stride = (
            int(page[word]) for word in (STATUS_WORD_FIRST_GFN, STATUS_WORD_SLICE_PAGES, STATUS_WORD_STRIDE)
        )
        if int(page[STATUS_WORD_MAGIC]) != STATUS_MAGIC or int(page[STATUS_WORD_VCPUS]) != vcpus:
            faults.append(f"vCPU {vcpu}: its status page is lost")
            continue
        if first != end or not 0 <= status.position < pages <= len(words) - first:
            faults.append(f"vCPU {vcpu}: its status page does not fit RAM")
            continue
        if status.errors:
            faults.append(
                f"vCPU {vcpu}: the guest itself found {status.errors} wrong pages, last gfn {status.bad_gfn}"
            )
        if status.steps != (status.round - 1) * pages + status.position:
            faults.append(f"vCPU {vcpu}: its count of pages written does not fit its round and position")
        faults += _check_slice(words, vcpu, status, first, pages, stride, int(page[STATUS_WORD_SEED]))
        end = first + pages
    for gfns in _blocks(np.arange(end, len(words), dtype=np.int64)):
        used = np.flatnonzero(np.bitwise_or.reduce(words[gfns[0] : gfns[-1] + 1], axis=1))
        if used.size:
            faults.append(f"{used.size} pages of free memory are not zero, first gfn {int(gfns[used[0]])}")
    return RamCheck(statuses, tuple(faults))


def _check_slice(
    words: NDArray[np.uint64], vcpu: int, status: Status, first: int, pages: int, stride: int, seed: int
) -> Iterator[str]:
    this_round = np.zeros(pages, dtype=bool)
    this_round[(np.arange(status.position, dtype=np.int64) * stride) % pages] = True
    offsets = np.arange(pages, dtype=np.int64)
    for counter, chosen in ((status.round, this_round), (status.round - 1, ~this_round)):
        for gfns in _blocks(first + offsets[chosen]):
            wrong = np.flatnonzero(np.any(words[gfns] != page_content(gfns, counter, seed), axis=1))
            for gfn in gfns[wrong[:1]].tolist():
                yield (
                    f"vCPU {vcpu}: {wrong.size} pages differ from round {counter}, first gfn {gfn}, "
                    f"which holds gfn {int(words[gfn, 0])} of round {int(words[gfn, 1])}"
                )


def _blocks(gfns: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    for start in range(0, len(gfns), _BLOCK_PAGES):
        yield gfns[start : start + _BLOCK_PAGES]


def _lcg_closed_form() -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Word 2 + i is x0 * factors[i] + increments[i]: the recurrence unrolled once, so that numpy can do pages at a time."""
    factors, increments = [1], [0]
    for _ in range(508):
        factors.append(factors[-1] * LCG_FACTOR % 2**64)
        increments.append((increments[-1] * LCG_FACTOR + LCG_INCREMENT) % 2**64)
    return np.array(factors, dtype=np.uint64), np.array(increments, dtype=np.uint64)


_FACTORS, _INCREMENTS = _lcg_closed_form()
