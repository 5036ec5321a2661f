"""Vectors of compressed pages: zstd frames of raw and run-length blocks, written by hand from RFC 8878."""

from __future__ import annotations

import struct

from .parts import Json, noise

PAGE = 4096
MAGIC = b"\x28\xb5\x2f\xfd"
RAW, RUN, COMPRESSED, RESERVED = range(4)


def head(pages: int) -> bytes:
    """The one header of a frame of so many pages."""
    size = pages * PAGE
    if pages <= 16:
        return MAGIC + struct.pack("<BH", 0x60, size - 256)
    return MAGIC + struct.pack("<BI", 0xA0, size)


def block(kind: int, size: int, content: bytes, *, last: bool = True) -> bytes:
    """RFC 8878, 3.1.1.2: last block 1 bit, type 2 bits, size 21 bits; then the content."""
    return (last | kind << 1 | size << 3).to_bytes(3, "little") + content


def runs(*parts: tuple[bytes, int]) -> list[Json]:
    return [{"bytes": content.hex(), "times": times} for content, times in parts]


def frame_of_one_page() -> bytes:
    return head(1) + block(RUN, PAGE, b"A")


def frames() -> Json:
    page = noise("page of a frame", PAGE)
    one = frame_of_one_page()
    many = b"".join(block(RUN, 1 << 17, bytes([n]), last=n == 15) for n in range(16))
    valid: dict[str, tuple[int, list[Json], bytes]] = {
        "one page": (1, runs((b"A", PAGE)), one),
        "a page as it is and one of a run": (
            2,
            runs((page, 1), (b"B", PAGE)),
            head(2) + block(RAW, PAGE, page, last=False) + block(RUN, PAGE, b"B"),
        ),
        "16 pages": (16, runs((b"C", 1 << 16)), head(16) + block(RUN, 1 << 16, b"C")),
        "17 pages": (17, runs((b"D", 17 * PAGE)), head(17) + block(RUN, 17 * PAGE, b"D")),
        "512 pages": (512, runs(*((bytes([n]), 1 << 17) for n in range(16))), head(512) + many),
    }
    refused: dict[str, tuple[int, bytes]] = {
        "empty": (1, b""),
        "header alone": (1, head(1)),
        "truncated block header": (1, one[:9]),
        "truncated block": (1, one[:-1]),
        "truncated in a page": (2, head(2) + block(RAW, PAGE, page, last=False)[:-1]),
        "no last block": (1, head(1) + block(RUN, PAGE, b"A", last=False)),
        "trailing byte": (1, one + b"\0"),
        "second frame": (1, one + one),
        "two frames of a page for two pages": (2, one + one),
        "skippable frame before": (1, b"\x50\x2a\x4d\x18" + bytes(4) + one),
        "skippable frame behind": (1, one + b"\x50\x2a\x4d\x18" + bytes(4)),
        "magic": (1, b"\x27" + one[1:]),
        "frame of fewer pages": (2, one),
        "frame of more pages": (1, head(2) + block(RUN, 2 * PAGE, b"A")),
        "content size 0": (1, MAGIC + struct.pack("<BH", 0x60, 0) + one[7:]),
        "content longer than its size": (
            1,
            head(1) + block(RUN, PAGE, b"A", last=False) + block(RUN, PAGE, b"A"),
        ),
        "content a thousand times its size": (
            1,
            head(1) + block(RUN, PAGE, b"A", last=False) * 999 + block(RUN, PAGE, b"A"),
        ),
        "content shorter than its size": (1, head(1) + block(RUN, PAGE - 1, b"A")),
        "block larger than the window": (1, head(1) + block(RUN, PAGE + 1, b"A")),
        "reserved block type": (1, head(1) + block(RESERVED, PAGE, b"A")),
        "compressed block of nonsense": (1, head(1) + block(COMPRESSED, 64, noise("nonsense", 64))),
        "checksum": (1, MAGIC + b"\x64" + one[5:] + bytes(4)),
        "reserved bit": (1, MAGIC + b"\x68" + one[5:]),
        "unused bit": (1, MAGIC + b"\x70" + one[5:]),
        "dictionary": (1, MAGIC + struct.pack("<BBH", 0x61, 1, PAGE - 256) + one[7:]),
        "window of its own": (1, MAGIC + struct.pack("<BBH", 0x40, 0x10, PAGE - 256) + one[7:]),
        "window of 2 GiB": (1, MAGIC + struct.pack("<BBH", 0x40, 0xA8, PAGE - 256) + one[7:]),
        "no content size": (1, MAGIC + struct.pack("<BB", 0x00, 0x10) + one[7:]),
        "content size in 4 bytes for one page": (1, MAGIC + struct.pack("<BI", 0xA0, PAGE) + one[7:]),
        "content size in 8 bytes": (1, MAGIC + struct.pack("<BQ", 0xE0, PAGE) + one[7:]),
    }
    return {
        "frames": [
            {"name": name, "pages": pages, "content": content, "bytes": frame.hex()}
            for name, (pages, content, frame) in valid.items()
        ],
        "refused_frames": [
            {"name": name, "pages": pages, "bytes": frame.hex(), "error": "MalformedData"}
            for name, (pages, frame) in refused.items()
        ],
    }
