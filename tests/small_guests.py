"""Two guests of a few pages each for tests of the trusted side, and an in-memory pair of SVSMs over them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from pagexfer.attestation import PskAttestor
from pagexfer.dirty.byte_map import ByteMapTracker
from pagexfer.dirty.content import ContentTracker
from pagexfer.svsm.memory import GuestMemory
from pagexfer.svsm.page_digest import fresh_digest
from pagexfer.testing import BytesGate, SvsmPair
from pagexfer.testing.tracker import SteppedMarks
from pagexfer.wire.constants import PAGE_SIZE, WORDS_PER_PAGE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from pagexfer.dirty import DirtyTracker
    from pagexfer.svsm.compression import Compressor

PAGES: Final = 200  # no whole number of bitmap words
VCPUS: Final = 2
ATTESTOR: Final = PskAttestor(b"a pre-shared key of 32 bytes ...")


class SmallGuest:
    """A running guest whose vCPUs are the test itself: `write` stores a page, then marks it.

    With `step_pages` its tracker is asked for as many pages at a time.
    """

    def __init__(self, pages: int = PAGES, vcpus: int = VCPUS, step_pages: int = 0) -> None:
        self.memory = GuestMemory.allocate(pages * PAGE_SIZE)
        self.memory.launch()
        self.gate = BytesGate([b"state of vCPU %d" % vcpu for vcpu in range(vcpus)], running=True)
        self._marks: NDArray[np.uint8] = np.zeros(pages, dtype=np.uint8)
        self.tracker: DirtyTracker = (
            SteppedMarks(self._marks, step_pages) if step_pages else ByteMapTracker(self._marks)
        )
        rng = np.random.default_rng(1)
        self.memory.words[: pages // 2] = rng.integers(
            1, 2**63, (pages // 2, WORDS_PER_PAGE), dtype=np.uint64
        )

    def write(self, gfn: int, word: int) -> None:
        self.memory.words[gfn] = word
        self._marks[gfn] = 1


class Move:
    """A small guest, where it goes, and the pair that moves it."""

    def __init__(
        self,
        pages: int = PAGES,
        vcpus: int = VCPUS,
        *,
        channels: int = 2,
        tracked: bool = True,
        audit: bool = False,
        compared: bool = False,
        step_pages: int = 0,
        compressor: Compressor | None = None,
    ) -> None:
        """With `compared`, what changed is found by comparing RAM with what was sent, and no mark of the guest counts."""
        self.guest = SmallGuest(pages, vcpus, step_pages)
        self.memory = GuestMemory.allocate(pages * PAGE_SIZE)
        self.gate = BytesGate.waiting(vcpus)
        tracker = ContentTracker(self.guest.memory.words, fresh_digest()) if compared else self.guest.tracker
        self.pair = SvsmPair(
            self.guest.memory,
            self.guest.gate,
            self.memory,
            self.gate,
            ATTESTOR,
            tracker=tracker if tracked else None,
            audit=audit,
            compressor=compressor,
            accept_compression=compressor is not None,
            channels=channels,
        )

    def arrived(self) -> bool:
        """Whether the destination has what the source has: RAM, page states, vCPU states."""
        return (
            np.array_equal(self.memory.words, self.guest.memory.words)
            and np.array_equal(self.memory.states, self.guest.memory.states)
            and self.gate.states == self.guest.gate.states
        )

    def close(self) -> None:
        self.guest.memory.close()
        self.memory.close()


def a_move() -> Iterator[Move]:
    """Body of a fixture."""
    move = Move()
    yield move
    move.close()
