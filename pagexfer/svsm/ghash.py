"""GHASH of many pages from the GHASH of each: arithmetic in GCM's field (NIST SP 800-38D, section 6.3).

GHASH of blocks A1 … Am is the polynomial A1·H^m + … + Am·H. So the value of a run of pages is the sum of each page's own
value times a power of H that says how many pages come after it: to compare a run in one fast call, no page of it has to be
hashed again. Sums are XOR. All of it works on arrays: one call composes thousands of pages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

BLOCK_BYTES: Final = 16

_BITS: Final = 128
# x^128 = x^7 + x^2 + x + 1, with the coefficient of x^0 in the highest bit.
_REDUCTION: Final = 0xE1 << 120


class RunComposer:
    """Composes values of units of `unit_blocks` blocks into those of runs of 2^`levels` units, under the hash key `subkey`.

    A value is without the length block and without the mask that GMAC adds: zero for a unit of zeros. Both numbers of
    units and of blocks are powers of two.
    """

    def __init__(self, subkey: bytes, unit_blocks: int, levels: int) -> None:
        power = int.from_bytes(subkey, "big")
        for _ in range(unit_blocks.bit_length() - 1):
            power = multiply(power, power)
        self._by_power = []
        for _ in range(levels):
            self._by_power.append(_multiplier(power))
            power = multiply(power, power)

    def compose(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Values of whole runs, uint64 of shape (n, 2), from those of their units, shape (n · 2^levels, 2)."""
        for times_power in self._by_power:
            pairs = values.reshape(-1, 2, 2)
            values = times_power(pairs[:, 0])
            values ^= pairs[:, 1]
        return values


def multiply(left: int, right: int) -> int:
    """The product of two elements, each a block read as a big-endian number."""
    product = 0
    for bit in reversed(range(_BITS)):
        if left >> bit & 1:
            product ^= right
        right = _times_x(right)
    return product


def _times_x(element: int) -> int:
    return element >> 1 ^ (_REDUCTION if element & 1 else 0)


def _multiplier(factor: int) -> Callable[[NDArray[np.uint64]], NDArray[np.uint64]]:
    """Multiplication of many elements by `factor`: one look-up for each byte, in a table of 256 products."""
    tables = []
    for _ in range(BLOCK_BYTES):
        products = np.zeros((1, 2), dtype=np.uint64)
        of_bits = []
        for _ in range(8):
            of_bits.append(np.frombuffer(factor.to_bytes(BLOCK_BYTES, "big"), dtype=np.uint64))
            factor = _times_x(factor)
        for of_bit in reversed(of_bits):  # the highest bit of a byte is the lowest power of x
            products = np.concatenate([products, products ^ of_bit])
        tables.append(products)

    def times_factor(elements: NDArray[np.uint64]) -> NDArray[np.uint64]:
        octets = np.ascontiguousarray(elements).view(np.uint8).reshape(-1, BLOCK_BYTES)
        # Indices of the kind that take wants, and together for each table: it would convert them one call at a time.
        indices = np.ascontiguousarray(octets.T).astype(np.intp)
        total: NDArray[np.uint64] = tables[0].take(indices[0], axis=0)
        addend = np.empty_like(total)
        for products, index in zip(tables[1:], indices[1:], strict=True):
            products.take(index, axis=0, out=addend, mode="clip")
            total ^= addend
        return total

    return times_factor
