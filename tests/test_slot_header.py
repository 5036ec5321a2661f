"""docs/pgx_slot.h is the slot that the code has, and a C compiler finds everything where the code does."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pagexfer.wire import slot
from pagexfer.wire.slot_header import header

from .wire_vectors import Vector, data_of, load, name_of

HEADER = Path(__file__).parent.parent / "docs" / "pgx_slot.h"
VECTORS = load("slot")
COMPILER = shutil.which("gcc") or ""

if TYPE_CHECKING:
    from collections.abc import Callable

needs_compiler = pytest.mark.skipif(not COMPILER, reason="no gcc here")

# Copies a register page and prints a command line, as a peer reads it.
PROGRAM = """
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include "pgx_slot.h"

int main(void) {
    struct pgx_registers page;
    memset(&page, 0, sizeof page);
    if (!fread(&page, 1, sizeof page, stdin) || page.identity.magic != PGX_SLOT_MAGIC) return 1;
    printf("%u %u %u %" PRIu64 " %" PRIu64 " %u", page.command.sequence, page.command.command,
           page.command.buffer, page.command.argument, page.command.argument2, page.command.length);
    return 0;
}
"""
# Uses every macro that has no struct behind it.
WORDS = """
#include "pgx_slot.h"

typedef char check[PGX_BUFFER_STATE(0x12345603u) == PGX_BUFFER_STATE_READY
                   && PGX_BUFFER_TURN(0x12345603u) == 0x123456
                   && PGX_BUFFER_WORD(PGX_BUFFER_STATE_READY, 0xff123456u) == 0x12345603u
                   && PGX_COMMAND_OFFSET == 64 && PGX_SVSM_DATA_OFFSET == 256 ? 1 : -1];
"""


def test_the_header_is_current() -> None:
    assert HEADER.read_text() == header()


@needs_compiler
@pytest.mark.parametrize("standard", ["c99", "c11", "c17"])
@pytest.mark.parametrize("place", ["hosted", "freestanding"])
def test_the_header_compiles(standard: str, place: str) -> None:
    alone = place == "freestanding"
    compile_c([f"-std={standard}", *(freestanding() if alone else []), "-x", "c", "-"], WORDS)


@needs_compiler
@pytest.mark.skipif(not shutil.which("g++"), reason="no g++ here")
@pytest.mark.parametrize("standard", ["c++11", "c++17"])
def test_the_header_compiles_as_c_plus_plus(standard: str) -> None:
    compile_c([f"-std={standard}", "-x", "c++", "-"], WORDS)


@needs_compiler
def test_a_layout_that_moved_does_not_compile() -> None:
    moved = header().replace("uint16_t slot_id;", "uint32_t slot_id;")
    assert moved != header()
    with pytest.raises(subprocess.CalledProcessError) as caught:
        compile_c(["-std=c99", "-x", "c", "-"], moved)
    assert "pgx_check_identity_line_buffers" in caught.value.stderr


@pytest.fixture(scope="module")
def read_command(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bytes], list[int]]:
    program = tmp_path_factory.mktemp("c") / "read"
    compile_c(["-std=c11", "-x", "c", "-", "-o", str(program)], PROGRAM)

    def read(page: bytes) -> list[int]:
        done = subprocess.run([program], input=page, capture_output=True, check=True, timeout=10)
        return [int(number) for number in done.stdout.split()]

    return read


@needs_compiler
@pytest.mark.parametrize("vector", VECTORS["commands"], ids=name_of)
def test_a_c_program_reads_the_vectors(vector: Vector, read_command: Callable[[bytes], list[int]]) -> None:
    assert read_command(data_of(vector)) == vector["fields"]


def test_every_field_is_in_its_struct() -> None:
    for fields, size in ((slot.IDENTITY_FIELDS, 64), (slot.COMMAND_FIELDS, 64), (slot.STATUS_FIELDS, 64)):
        assert sum(struct.calcsize("<" + field.code) for field in fields) == size


def freestanding() -> list[str]:
    """What the compiler alone brings, as for a kernel: no C library's headers."""
    where = [COMPILER, "-print-file-name=include"]
    own = subprocess.run(where, text=True, capture_output=True, check=True, timeout=60).stdout.strip()
    return ["-ffreestanding", "-nostdinc", "-isystem", own]


def compile_c(options: list[str], source: str) -> None:
    """A program where an output is named, a look at the source otherwise."""
    look = [] if "-o" in options else ["-fsyntax-only"]
    command = [COMPILER, "-Wall", "-Wextra", "-Werror", "-pedantic-errors", *look]
    command += ["-I", str(HEADER.parent), *options]
    subprocess.run(command, input=source, text=True, capture_output=True, check=True, timeout=60)
