"""A part of the hypervisor's device state, as the payload of a DEVICE_STATE bundle: a header, then bytes nobody here reads.

The device state is the host's and stays that: a destination's SVSM gives it out to its own host and takes nothing from it.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from ..errors import MalformedData
from .slot import Field

# Header of a part, which a host writes: `slot_header` has it for C
PART_FIELDS: Final = (
    Field("total_bytes", "I", "of the whole device state"),
    Field("offset", "I", "of this part's first byte in it"),
)
_PART: Final = struct.Struct("<" + "".join(field.code for field in PART_FIELDS))
PART_HEADER_BYTES: Final = 8
assert _PART.size == PART_HEADER_BYTES

# A state of 1 MiB costs one bundle, and a part fits a slot buffer of 2 MiB; where buffers are smaller, parts are.
MAX_DEVICE_STATE_PART_BYTES: Final = 1 << 20
# Device state of a large machine is some tens of MiB (each virtio device some KiB, a VGA's RAM 16 MiB).
MAX_DEVICE_STATE_BYTES: Final = 1 << 28


class DevicePart(NamedTuple):
    """Where a part stands in the device state."""

    total_bytes: int
    offset: int
    part_bytes: int

    @property
    def end(self) -> int:
        """Offset of the first byte behind the part."""
        return self.offset + self.part_bytes

    def pack_header(self) -> bytes:
        """The header; the part's bytes follow it."""
        return _PART.pack(self.total_bytes, self.offset)


def parse_device_part_untrusted(payload: bytes | memoryview) -> DevicePart:
    """Place of a part. Raises MalformedData where it is empty, over a cap, or not within the total."""
    part_bytes = len(payload) - PART_HEADER_BYTES
    if not 0 < part_bytes <= MAX_DEVICE_STATE_PART_BYTES:
        raise MalformedData(f"part of a device state with a payload of {len(payload)} bytes")
    total_bytes, offset = _PART.unpack_from(payload)
    part = DevicePart(total_bytes, offset, part_bytes)
    if total_bytes > MAX_DEVICE_STATE_BYTES:
        raise MalformedData(
            f"device state of {total_bytes} bytes is over the cap of {MAX_DEVICE_STATE_BYTES}"
        )
    if part.end > total_bytes:
        raise MalformedData(f"part of a device state that ends at {part.end} of {total_bytes} bytes")
    return part
