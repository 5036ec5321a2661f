"""How much of the hypervisor's device state went by: the order of its parts, which both SVSMs check alike.

The SVSM only carries it. It belongs to the host at either side, comes from one and is given out to the other, and nothing
of it is ever taken for the guest's: it reaches neither RAM nor a vCPU, and no digest of the guest has it. What binds it is
what binds every bundle of channel 0: its counter, its tag, and the channel's transcript, which the manifest carries.
"""

from __future__ import annotations

from typing import NamedTuple

from ..errors import MalformedData
from ..wire.device_state import parse_device_part_untrusted


class Carried(NamedTuple):
    """The parts so far: each begins where the one before it ended, and all name the same total. None of any is complete."""

    total_bytes: int = 0
    end: int = 0

    @property
    def begun(self) -> bool:
        return self.end > 0

    @property
    def complete(self) -> bool:
        return self.end == self.total_bytes

    def after_untrusted(self, payload: bytes | memoryview) -> Carried:
        """How it stands once this part went by, too. Raises MalformedData for any part but the next."""
        part = parse_device_part_untrusted(payload)
        if self.begun and part.total_bytes != self.total_bytes:
            raise MalformedData(f"part of a device state of {part.total_bytes} bytes, not {self.total_bytes}")
        if part.offset != self.end:
            raise MalformedData(f"part of a device state from {part.offset} on where {self.end} is next")
        return Carried(part.total_bytes, part.end)
