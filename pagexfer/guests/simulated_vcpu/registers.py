"""The registers of a simulated vCPU: all that says how its workload goes on, and their form as bytes.

The registers are the authority when a vCPU resumes. Its status page says the same, but is only looked at: a
migration that loses vCPU state breaks the guest visibly, as it would a real one.
"""

from __future__ import annotations

import math
import struct
from dataclasses import astuple, dataclass
from typing import Final

from ...errors import GateError, MalformedData
from ..pattern import PATTERN_GFN, Layout, Status

# u32 magic "VREG", u16 version, u16 vCPU number, u64 x 11 in the order of `Registers`, 32 reserved bytes.
_FORM: Final = struct.Struct("<IHH11Q32x")
REGISTERS_BYTES: Final = 128
assert _FORM.size == REGISTERS_BYTES

_MAGIC: Final = 0x4745_5256
_VERSION: Final = 1
_RESERVED: Final = bytes(32)

# No guest lives to write 2^62 pages; above it the arithmetic of the pattern would wrap around.
_STEPS_LIMIT: Final = 1 << 62


@dataclass(frozen=True, slots=True)
class Registers:
    """State of one vCPU at a step boundary. `index` is the offset in its slice that the next step visits."""

    vcpu: int
    round: int
    position: int
    index: int
    steps: int
    ticks: int
    errors: int
    bad_gfn: int
    seed: int
    first_gfn: int
    slice_pages: int
    stride: int

    @classmethod
    def at_boot(cls, layout: Layout, vcpu: int) -> Registers:
        """Where a vCPU starts in RAM that `pattern.fill` has filled."""
        return cls(
            vcpu=vcpu,
            round=1,
            position=0,
            index=0,
            steps=0,
            ticks=0,
            errors=0,
            bad_gfn=0,
            seed=layout.seed,
            first_gfn=layout.first_gfn(vcpu),
            slice_pages=layout.slice_pages,
            stride=layout.stride,
        )

    def to_bytes(self) -> bytes:
        """The 128 bytes that travel as vCPU state."""
        return _FORM.pack(_MAGIC, _VERSION, *astuple(self))

    @property
    def status(self) -> Status:
        """What this vCPU's status page says at the same boundary."""
        return Status(self.round, self.position, self.steps, self.errors, self.bad_gfn, self.ticks)

    def check_fits(self, ram_pages: int, vcpu: int) -> None:
        """Raise GateError unless vCPU `vcpu` of a guest with `ram_pages` of RAM can go on from here."""
        if self.vcpu != vcpu:
            raise GateError(f"state of vCPU {self.vcpu} was given to vCPU {vcpu}")
        if self.first_gfn != PATTERN_GFN + vcpu * self.slice_pages:
            raise GateError(
                f"state of vCPU {vcpu} has its slice at gfn {self.first_gfn}, where it cannot begin"
            )
        if self.slice_pages < 1 or self.first_gfn + self.slice_pages > ram_pages:
            raise GateError(f"state of vCPU {vcpu} has its slice outside of RAM of {ram_pages} pages")
        if self.stride >= max(self.slice_pages, 2) or math.gcd(self.stride, self.slice_pages) != 1:
            raise GateError(f"state of vCPU {vcpu} has a stride that does not visit every page")
        if self.round < 1 or self.position >= self.slice_pages or self.steps >= _STEPS_LIMIT:
            raise GateError(f"state of vCPU {vcpu} has a round or a position that cannot be")
        done = (self.round - 1) * self.slice_pages + self.position
        if self.steps != done or self.index != self.position * self.stride % self.slice_pages:
            raise GateError(f"state of vCPU {vcpu} contradicts itself: its counts do not fit its position")


def parse_registers_untrusted(data: bytes) -> Registers:
    """Registers from bytes of any origin, not yet checked for sense. Raises only MalformedData."""
    if len(data) != REGISTERS_BYTES:
        raise MalformedData(f"simulated vCPU state has {REGISTERS_BYTES} bytes, not {len(data)}")
    magic, version, *values = _FORM.unpack(data)
    if magic != _MAGIC or version != _VERSION:
        raise MalformedData("simulated vCPU state has another magic or version")
    if data[-len(_RESERVED) :] != _RESERVED:
        raise MalformedData("simulated vCPU state has reserved bytes that are not zero")
    return Registers(*values)
