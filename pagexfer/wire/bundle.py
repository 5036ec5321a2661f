"""The bundle: one sealed record of up to 512 pages, and the only thing that carries guest data between two SVSMs.

    header (64 bytes) · entries (8 bytes each) · payload · tag (16 bytes)

Header and entries are the associated data of the AEAD and travel in clear, the payload alone is encrypted. So a host
can schedule by page number, and a run of pages is sealed straight from RAM. Integers are little endian.
"""

from __future__ import annotations

import enum
import struct
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from ..errors import MalformedData
from .constants import (
    GCM_NONCE_BYTES,
    GFN_BITS,
    MAX_BUNDLE_ENTRIES,
    MAX_BUNDLE_PAYLOAD_BYTES,
    MAX_CHANNELS,
    PAGE_SIZE,
    PROTOCOL_VERSION,
    TAG_BYTES,
)
from .page_state import SHARED, STATE_MASK, VALIDATED

if TYPE_CHECKING:
    from numpy.typing import NDArray

BUNDLE_MAGIC: Final = int.from_bytes(b"PGXB", "little")


class BundleKind(enum.IntEnum):
    """What a bundle carries. Wire numbers: never reused, 0 invalid."""

    PAGES = 1
    VCPU_STATE = 2
    EPOCH_TOKEN = 3
    MANIFEST = 4
    READY = 5
    START_TOKEN = 6
    RUNNING = 7
    ABORT_TOKEN = 8
    CHANNEL_OPEN = 9
    LEDGER = 10
    CHANNEL_STATE = 11
    DEVICE_STATE = 12
    PAGES_ZSTD = 13


class Direction(enum.IntEnum):
    """Which way a bundle goes; each way has keys of its own, so nothing can be reflected."""

    FORWARD = 1  # source to destination
    BACKWARD = 2


class Operation(enum.IntEnum):
    """What an entry says of its page."""

    DATA = 1  # the next 4096 payload bytes
    ZERO = 2  # the page is zero; no payload
    DROP = 3  # the guest gave the page up (neither validated nor shared); no payload


# Header:
#   offset  size  field
#        0     4  magic "PGXB"
#        4     2  version
#        6     1  kind
#        7     1  direction
#        8    16  session id
#       24     2  channel
#       26     2  incarnation
#       28     4  epoch
#       32     8  counter
#       40     4  entry count
#       44     4  payload bytes
#       48    16  reserved, zero
_HEADER: Final = struct.Struct("<IHBB16sHHIQII16s")
HEADER_BYTES: Final = 64
assert _HEADER.size == HEADER_BYTES
_KIND_OFFSET: Final = 6
assert struct.calcsize("<IH") == _KIND_OFFSET
assert struct.calcsize("<IHBB16s") == 24
assert struct.calcsize("<IHBB16sHHI") == 32
assert struct.calcsize("<IHBB16sHHIQII") == 48

_NONCE: Final = struct.Struct("<HHQ")
assert _NONCE.size == GCM_NONCE_BYTES

# Entry, one u64:
#   bits  0-39  gfn
#   bits 40-41  operation
#   bits 42-60  page state (wire.page_state)
#   bits 61-63  reserved, zero
ENTRY_BYTES: Final = 8
_OPERATION_SHIFT: Final = 40
_STATE_SHIFT: Final = 42
_RESERVED_SHIFT: Final = 61
_GFN_MASK: Final = (1 << GFN_BITS) - 1
_OPERATION_BITS: Final = _STATE_SHIFT - _OPERATION_SHIFT
_OPERATION_MASK: Final = (1 << _OPERATION_BITS) - 1
_UPPER_BITS: Final = _RESERVED_SHIFT - _OPERATION_SHIFT
_HAS_CONTENT: Final = VALIDATED | SHARED
# The operations as numpy scalars: comparing an array with an enum member costs as much as sealing a page.
DATA: Final = np.uint8(Operation.DATA)
ZERO: Final = np.uint8(Operation.ZERO)
DROP: Final = np.uint8(Operation.DROP)
assert GFN_BITS == _OPERATION_SHIFT
assert STATE_MASK << _STATE_SHIFT < 1 << _RESERVED_SHIFT

# Those that carry pages.
PAGE_KINDS: Final = frozenset({BundleKind.PAGES, BundleKind.PAGES_ZSTD})
MAX_BUNDLE_BYTES: Final = (
    HEADER_BYTES + ENTRY_BYTES * MAX_BUNDLE_ENTRIES + MAX_BUNDLE_PAYLOAD_BYTES + TAG_BYTES
)
_NO_RESERVED: Final = bytes(16)
# Most bundles bring a run of pages that are all alike: then each entry is the first one and its place.
_PLACES: Final = np.arange(MAX_BUNDLE_ENTRIES, dtype="<u8")


class BundleHeader(NamedTuple):
    """A bundle's header, fields as on the wire."""

    kind: BundleKind
    direction: Direction
    session: bytes
    channel: int
    incarnation: int
    epoch: int
    counter: int
    entry_count: int
    payload_bytes: int

    def pack(self) -> bytes:
        """The 64 bytes of this header."""
        return _HEADER.pack(
            BUNDLE_MAGIC,
            PROTOCOL_VERSION,
            self.kind,
            self.direction,
            self.session,
            self.channel,
            self.incarnation,
            self.epoch,
            self.counter,
            self.entry_count,
            self.payload_bytes,
            _NO_RESERVED,
        )

    @property
    def aad_bytes(self) -> int:
        """Bytes of header and entries, which are authenticated and not encrypted."""
        return HEADER_BYTES + ENTRY_BYTES * self.entry_count

    @property
    def bundle_bytes(self) -> int:
        """Bytes of the whole bundle."""
        return self.aad_bytes + self.payload_bytes + TAG_BYTES


class Entries(NamedTuple):
    """The entries of a bundle of pages as columns: gfn (int64), operation (uint8), page state (uint32)."""

    gfns: NDArray[np.int64]
    operations: NDArray[np.uint8]
    states: NDArray[np.uint32]


def nonce(channel: int, incarnation: int, counter: int) -> bytes:
    """The 96-bit nonce of a bundle. It repeats what the key is already bound to, so that a mix-up of keys still shows."""
    return _NONCE.pack(channel, incarnation, counter)


def parse_header_untrusted(data: bytes, bundle_bytes: int) -> BundleHeader:
    """Header at the start of `data`, a private copy of (the beginning of) a bundle of `bundle_bytes` bytes.

    Raises MalformedData where any field is outside of its range or the sizes are not exact.
    """
    if bundle_bytes < HEADER_BYTES + TAG_BYTES or len(data) < HEADER_BYTES:
        raise MalformedData(f"bundle of {bundle_bytes} bytes is shorter than its header and tag")
    (
        magic,
        version,
        kind,
        direction,
        session,
        channel,
        incarnation,
        epoch,
        counter,
        entry_count,
        payload_bytes,
        reserved,
    ) = _HEADER.unpack_from(data)
    if magic != BUNDLE_MAGIC:
        raise MalformedData("not a bundle: wrong magic")
    if version != PROTOCOL_VERSION:
        raise MalformedData(f"bundle of version {version}, expected {PROTOCOL_VERSION}")
    if kind not in _KINDS or direction not in _DIRECTIONS:
        raise MalformedData(f"bundle of unknown kind {kind} or direction {direction}")
    if reserved != _NO_RESERVED:
        raise MalformedData("bundle with reserved bytes set")
    if channel >= MAX_CHANNELS or epoch == 0:
        raise MalformedData("bundle with channel or epoch out of range")
    if entry_count > MAX_BUNDLE_ENTRIES or payload_bytes > MAX_BUNDLE_PAYLOAD_BYTES:
        raise MalformedData("bundle over the limits of entries or payload")
    header = BundleHeader(
        _KINDS[kind],
        _DIRECTIONS[direction],
        session,
        channel,
        incarnation,
        epoch,
        counter,
        entry_count,
        payload_bytes,
    )
    if header.bundle_bytes != bundle_bytes:
        raise MalformedData(f"bundle of {bundle_bytes} bytes whose header says {header.bundle_bytes}")
    return header


def says_kind_untrusted(data: bytes | memoryview) -> int:
    """The kind that a bundle names in its header, which nobody has checked yet; 0 where there is no header."""
    return data[_KIND_OFFSET] if len(data) >= HEADER_BYTES else 0


def pack_entries(gfns: NDArray[np.int64], operations: NDArray[np.uint8], states: NDArray[np.uint32]) -> bytes:
    """Entries as on the wire. `gfns` are strictly ascending."""
    count = len(gfns)
    is_run = 0 < count <= MAX_BUNDLE_ENTRIES and int(gfns[-1]) - int(gfns[0]) == count - 1
    if is_run and _alike(operations) and _alike(states):
        upper = int(states[0]) << _OPERATION_BITS | int(operations[0])
        return _run(upper << _OPERATION_SHIFT | int(gfns[0]), count)
    entries = states.astype(np.uint64)
    entries <<= _OPERATION_BITS
    entries |= operations
    entries <<= _OPERATION_SHIFT
    entries |= gfns.view(np.uint64)
    return entries.astype("<u8", copy=False).tobytes()


def parse_entries_untrusted(data: bytes, header: BundleHeader, pages: int) -> Entries:
    """Entries of a bundle of pages for a guest of `pages` pages; `data` is what stands between its header and payload.

    Raises MalformedData where `data` is not exactly the entries that the header counts, a gfn is out of range or not above
    the one before it, an operation is unknown or does not fit the page's state, a reserved bit is set, there are more DATA
    pages than a bundle may have, or the payload is not exactly these: in PAGES_ZSTD, not smaller than they are.
    """
    count = header.entry_count
    if not data or len(data) != ENTRY_BYTES * count:
        raise MalformedData(f"{header.kind.name} bundle of {count} entries in {len(data)} bytes")
    first = int.from_bytes(data[:ENTRY_BYTES], "little")
    entries = _run_untrusted(first, count) if data == _run(first, count) else _columns_untrusted(data)
    # Also where the numbers of a run leave their field: no guest has so many pages.
    if int(entries.gfns[-1]) >= pages:
        raise MalformedData("entries out of RAM")
    data_bytes = int(np.count_nonzero(entries.operations == DATA)) * PAGE_SIZE
    if data_bytes > MAX_BUNDLE_PAYLOAD_BYTES:  # which a compressed payload does not show
        raise MalformedData(f"{data_bytes // PAGE_SIZE} DATA pages in one bundle")
    if header.kind is BundleKind.PAGES_ZSTD:
        if not 0 < header.payload_bytes < data_bytes:
            raise MalformedData("compressed payload is not smaller than the DATA pages")
    elif header.payload_bytes != data_bytes:
        raise MalformedData("payload is not exactly the DATA pages")
    return entries


def _run(first: int, count: int) -> bytes:
    """Entries of `count` consecutive pages that are all like `first`."""
    return (_PLACES[:count] + np.uint64(first)).tobytes()


def _run_untrusted(first: int, count: int) -> Entries:
    upper = first >> _OPERATION_SHIFT
    _check_upper_untrusted(upper)
    gfn = first & _GFN_MASK
    return Entries(
        np.arange(gfn, gfn + count),
        np.full(count, upper & _OPERATION_MASK, dtype=np.uint8),
        np.full(count, upper >> _OPERATION_BITS, dtype=np.uint32),
    )


def _columns_untrusted(data: bytes) -> Entries:
    raw = np.frombuffer(data, dtype="<u8")
    upper = (raw >> _OPERATION_SHIFT).astype(np.uint32)
    for distinct in set(upper.tolist()):  # pages differ in few ways
        _check_upper_untrusted(distinct)
    gfns = (raw & np.uint64(_GFN_MASK)).astype(np.int64)
    if (gfns[1:] <= gfns[:-1]).any():
        raise MalformedData("entries that are not in ascending order")
    return Entries(gfns, (upper & _OPERATION_MASK).astype(np.uint8), upper >> np.uint32(_OPERATION_BITS))


def _check_upper_untrusted(upper: int) -> None:
    """An entry without its gfn."""
    if upper >> _UPPER_BITS:
        raise MalformedData("entry with reserved bits set")
    operation, state = upper & _OPERATION_MASK, upper >> _OPERATION_BITS
    if not operation:
        raise MalformedData("entry with unknown operation")
    if (operation == Operation.DROP) == bool(state & _HAS_CONTENT):
        raise MalformedData("entry whose operation does not fit its page state")


def _alike(column: NDArray[np.uint8] | NDArray[np.uint32]) -> bool:
    return column.tobytes() == column[:1].tobytes() * len(column)


_KINDS: Final = {int(kind): kind for kind in BundleKind}
_DIRECTIONS: Final = {int(direction): direction for direction in Direction}
