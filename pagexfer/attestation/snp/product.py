"""Processor products, and the TCB_VERSION of each: the one place that knows which byte is which part."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from ...errors import MalformedData

TCB_BYTES: Final = 8

PARTS: Final = ("fmc", "bootloader", "tee", "snp", "microcode")

# TCB_VERSION in report order: byte index of each part; the other bytes are zero (AMD 56860, TCB_VERSION).
# The numbers are `structVersion` of the leaf certificates.
_LAYOUTS: Final = {
    0: {"bootloader": 0, "tee": 1, "snp": 6, "microcode": 7},
    1: {"fmc": 0, "bootloader": 1, "tee": 2, "snp": 3, "microcode": 7},
}


class Product(enum.Enum):
    """A product as AMD's certificates name it. Bergamo and Siena have certificates of Genoa."""

    MILAN = "Milan"
    GENOA = "Genoa"
    TURIN = "Turin"

    @property
    def tcb_layout(self) -> int:
        """Number of the TCB layout, the same as `structVersion` of the product's leaf certificates."""
        return 1 if self is Product.TURIN else 0

    @property
    def chip_id_bytes(self) -> int:
        """Significant bytes of a chip id; the rest of the field of 64 bytes is zero."""
        return 8 if self is Product.TURIN else 64


# CPUID (family, first model, last model) of each product.
_MODELS: Final = (
    (0x19, 0x00, 0x0F, Product.MILAN),
    (0x19, 0x10, 0x1F, Product.GENOA),
    (0x19, 0xA0, 0xAF, Product.GENOA),
    (0x1A, 0x00, 0x11, Product.TURIN),
)


@dataclass(frozen=True, slots=True)
class Cpuid:
    """What a report of version 3 and later says of the processor."""

    family: int
    model: int
    stepping: int

    @property
    def product(self) -> Product | None:
        """The product of this model, None where this code does not know it."""
        for family, first, last, product in _MODELS:
            if self.family == family and first <= self.model <= last:
                return product
        return None

    def __str__(self) -> str:
        return f"family {self.family:#x} model {self.model:#x} stepping {self.stepping}"


@dataclass(frozen=True, slots=True)
class Tcb:
    """Security version numbers part by part, each 0 to 255. `fmc` is None where the product has none.

    There is no order between two of them: never compare them as one number, where a high microcode hides a low bootloader.
    """

    fmc: int | None
    bootloader: int
    tee: int
    snp: int
    microcode: int

    def parts(self) -> dict[str, int]:
        """The parts that the product has, in report order."""
        values = {part: getattr(self, part) for part in PARTS}
        return {part: value for part, value in values.items() if value is not None}

    def first_part_below(self, minimum: Tcb) -> str | None:
        """Name of the first part that is lower than in `minimum`, None where no part is.

        A part that one of the two lacks is lower: the two are then of different products.
        """
        own = self.parts()
        for part, least in minimum.parts().items():
            if own.get(part, -1) < least:
                return part
        return None

    def __str__(self) -> str:
        return " ".join(f"{part}={value}" for part, value in self.parts().items())


def parse_tcb_untrusted(raw: bytes, layout: int) -> Tcb:
    """A TCB_VERSION of 8 bytes in a layout, 0 or 1. Raises MalformedData where another byte than the parts is set."""
    places = _LAYOUTS.get(layout)
    if places is None or len(raw) != TCB_BYTES:
        raise MalformedData(f"TCB of {len(raw)} bytes in layout {layout}")
    if any(byte for index, byte in enumerate(raw) if index not in places.values()):
        raise MalformedData(f"TCB {raw.hex()} has reserved bytes set for layout {layout}")
    values = {part: raw[index] for part, index in places.items()}
    return Tcb(values.get("fmc"), values["bootloader"], values["tee"], values["snp"], values["microcode"])
