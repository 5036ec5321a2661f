"""RAM that is written to the files of a machine's memory backends, against what their mapping shows."""

from __future__ import annotations

import fcntl
import os
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagexfer.errors import PageStateError
from pagexfer.guests.qemu.backends import Backend, data_gfns, map_backends, writer
from pagexfer.svsm.memory import GuestMemory
from pagexfer.wire.constants import PAGE_SIZE, WORDS_PER_PAGE

if TYPE_CHECKING:
    from collections.abc import Iterator

HUGE_BYTES = 2 << 20


@contextmanager
def backend_files(*pages: int) -> Iterator[tuple[Backend, ...]]:
    with ExitStack() as stack:
        made = []
        for number, count in enumerate(pages):
            fd = os.memfd_create("backend", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            stack.callback(os.close, fd)
            os.ftruncate(fd, count * PAGE_SIZE)
            made.append(Backend(f"m{number}", count * PAGE_SIZE, PAGE_SIZE, fd))
        yield tuple(made)


def memory_of(backends: tuple[Backend, ...]) -> GuestMemory:
    memory = GuestMemory.over(map_backends(backends), lambda: data_gfns(backends), writer(backends))
    memory.launch()
    return memory


def allocated(backends: tuple[Backend, ...]) -> int:
    """Pages that have memory behind them."""
    return sum(os.fstat(backend.fd).st_blocks for backend in backends) * 512 // PAGE_SIZE


@settings(max_examples=50)
@given(
    pages=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    span=st.tuples(st.integers(0, 26), st.integers(0, 26)),
)
def test_content_arrives_where_the_mapping_has_it(pages: list[int], span: tuple[int, int]) -> None:
    total = sum(pages)
    start, stop = sorted(gfn % (total + 1) for gfn in span)
    content = np.random.default_rng(1).integers(1, 1 << 63, (stop - start, WORDS_PER_PAGE), dtype=np.uint64)
    with backend_files(*pages) as backends:
        memory = memory_of(backends)
        if start < stop:
            memory.write(range(start, stop), content)
        assert np.array_equal(memory.words[start:stop], content)
        assert not memory.words[:start].any()
        assert not memory.words[stop:].any()


@settings(max_examples=50)
@given(gfns=st.sets(st.integers(0, 199), min_size=1))
@pytest.mark.parametrize("prealloc", [False, True])
def test_scattered_pages_arrive_by_file_or_mapping(prealloc: bool, gfns: set[int]) -> None:
    """As few runs as are stored one by one, or more."""
    where = np.array(sorted(gfns))
    content = np.random.default_rng(1).integers(1, 1 << 63, (len(where), WORDS_PER_PAGE), dtype=np.uint64)
    with backend_files(70, 130) as backends:
        if prealloc:
            for backend in backends:
                os.posix_fallocate(backend.fd, 0, backend.size)
        memory = memory_of(backends)
        memory.write(where, content)
        assert np.array_equal(memory.words[where], content)
        assert np.count_nonzero(memory.words[:, 0]) == len(where)


def test_no_page_is_provided_before_it_is_written() -> None:
    with backend_files(64) as backends:
        memory = memory_of(backends)
        assert memory.prefault(0, 64 * PAGE_SIZE)
        memory.write(range(3, 5), np.ones((2, WORDS_PER_PAGE), dtype=np.uint64))
        assert allocated(backends) == 2
        memory.zero(np.arange(64))  # the two may differ from zero now, the others do not
        assert allocated(backends) == 2
        assert not memory.words[3:5].any()


def test_a_file_without_room_refuses_the_page_and_kills_nobody() -> None:
    """As a memory file system that is full does; here a file that may not grow any more."""
    with backend_files(8) as backends:
        memory = memory_of(backends)
        os.ftruncate(backends[0].fd, 4 * PAGE_SIZE)
        fcntl.fcntl(backends[0].fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
        for gfns in (range(6, 8), np.array([1, 6])):
            with pytest.raises(PageStateError, match="cannot be written: Operation not permitted"):
                memory.write(gfns, np.ones((2, WORDS_PER_PAGE), dtype=np.uint64))


def test_the_writer_has_descriptors_of_its_own_as_long_as_it_lives() -> None:
    """A thread that hangs in it may come back when the backends' numbers are other files'."""
    with backend_files(4) as backends:
        before = len(os.listdir("/proc/self/fd"))
        write = writer(backends)
        assert write is not None
        other = os.memfd_create("other", os.MFD_CLOEXEC)
        words = map_backends(backends)
        kept = os.dup(backends[0].fd)
        os.dup2(other, backends[0].fd)
        write(2, memoryview(bytes([7]) * PAGE_SIZE))
        assert words[2, 0] == 0x0707070707070707
        assert os.fstat(other).st_size == 0
        os.close(other)
        os.close(kept)
        del write
        assert len(os.listdir("/proc/self/fd")) == before


def test_huge_pages_are_written_by_their_mapping() -> None:
    assert writer((Backend("m0", HUGE_BYTES, HUGE_BYTES, -1),)) is None
