"""Pages in fewer bytes, for slow links: one Zstandard frame (RFC 8878) a bundle, if both sides' operators ask for it.

The source compresses before it seals, the destination decompresses after the tag held. So nothing that the host made ever
reaches the decompressor; but the host sees how long each bundle is, and with it how well its pages compress. What that
gives away is in docs/security.md, and why this is off by default.

There is one way to write a frame's header, and the bundle's entries say how many pages are in it. A receiver compares the
header with the one that must be there before it decompresses, so no dictionary, window, size or second frame is the
sender's to choose.
"""

from __future__ import annotations

import struct
from importlib.util import find_spec
from typing import TYPE_CHECKING, Final

import numpy as np

from ..errors import MalformedData, UsageError
from ..wire.bundle import DATA, BundleKind
from ..wire.constants import MAX_BUNDLE_PAYLOAD_BYTES, PAGE_SIZE

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from zstandard import ZstdCompressor, ZstdDecompressor

# From 10 on a level gives little more, and the engine's loop would stand still for tens of milliseconds a bundle.
MIN_LEVEL: Final = 1
MAX_LEVEL: Final = 9
DEFAULT_LEVEL: Final = 1

# A window over the largest payload makes every frame a single segment, whose window is its content.
_WINDOW_LOG: Final = (MAX_BUNDLE_PAYLOAD_BYTES - 1).bit_length()
_MAGIC: Final = b"\x28\xb5\x2f\xfd"
# Frame_Header_Descriptor: a single segment with its content size in 2 bytes or in 4; no checksum, no dictionary.
_SIZE_IN_2: Final = 0x60
_SIZE_IN_4: Final = 0xA0
_SIZE_2_OFFSET: Final = 256
_FRAME_2: Final = struct.Struct("<4sBH")
_FRAME_4: Final = struct.Struct("<4sBI")


def need_zstd() -> None:
    """Raises UsageError where the library that compresses is not installed."""
    if find_spec("zstandard") is None:
        raise UsageError("compression needs the package zstandard: pip install 'pagexfer[zstd]'")


class Compressor:
    """Compresses the pages of one session. Any thread may use it: a list's append and pop are atomic.

    It takes no decision on what is worth compressing: zstd itself finds out, at a tenth of what sealing and sending cost.
    """

    def __init__(self, level: int = DEFAULT_LEVEL) -> None:
        self._level = level
        # As many as threads compress at a time.
        self._free: list[ZstdCompressor] = []

    def compress(self, payload: memoryview) -> bytes:
        """One frame of whole pages, which may be longer than they are.

        `payload` is private memory. Guest RAM may be written meanwhile, and a frame of it could give a page that nobody
        wrote the content that another one had for a moment.
        """
        try:
            context = self._free.pop()
        except IndexError:
            context = self._context()
        frame = context.compress(payload)
        self._free.append(context)
        return frame

    def _context(self) -> ZstdCompressor:
        from zstandard import ZstdCompressionParameters, ZstdCompressor

        parameters = ZstdCompressionParameters.from_level(
            self._level,
            window_log=_WINDOW_LOG,
            write_content_size=1,
            write_checksum=0,
            write_dict_id=0,
        )
        return ZstdCompressor(compression_params=parameters)


class Decompressor:
    """Decompresses the pages of one session. Any thread may use it."""

    def __init__(self) -> None:
        self._free: list[ZstdDecompressor] = []

    def content_untrusted(
        self, kind: BundleKind, payload: memoryview, operations: NDArray[np.uint8]
    ) -> bytes | memoryview:
        """The DATA pages of an opened bundle of pages. Raises MalformedData where it has others than `operations` say."""
        if kind is BundleKind.PAGES:
            return payload
        return self.decompress_untrusted(payload, int(np.count_nonzero(operations == DATA)))

    def decompress_untrusted(self, frame: memoryview, pages: int) -> bytes:
        """The `pages` pages (1 to 512) that `frame` must hold; never makes more bytes than these have.

        Raises MalformedData where it is not one frame of exactly so many pages and nothing else.
        """
        from zstandard import ZstdDecompressor, ZstdError

        head = frame_head(pages)
        if frame[: len(head)] != head:
            raise MalformedData(f"compressed payload that is not a frame of {pages} pages")
        try:
            context = self._free.pop()
        except IndexError:
            context = ZstdDecompressor()
        try:
            content = context.decompress(frame, read_across_frames=False, allow_extra_data=False)
        except ZstdError:
            raise MalformedData("compressed payload that cannot be decompressed") from None
        if len(content) != pages * PAGE_SIZE:
            raise MalformedData("compressed payload of another size than its frame says")
        self._free.append(context)
        return content


def pack(payload: memoryview, compressor: Compressor | None) -> tuple[BundleKind, bytes | memoryview]:
    """Kind and payload of the bundle that is to carry the pages in `payload`: compressed where that is smaller."""
    if compressor is not None and payload:
        frame = compressor.compress(payload)
        if len(frame) < len(payload):
            return BundleKind.PAGES_ZSTD, frame
    return BundleKind.PAGES, payload


def frame_head(pages: int) -> bytes:
    """The header that a frame of so many pages has."""
    size = pages * PAGE_SIZE
    if size - _SIZE_2_OFFSET < 1 << 16:
        return _FRAME_2.pack(_MAGIC, _SIZE_IN_2, size - _SIZE_2_OFFSET)
    return _FRAME_4.pack(_MAGIC, _SIZE_IN_4, size)
