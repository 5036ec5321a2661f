"""All encodings of X25519 points whose shared secret is zero with every private key (RFC 7748, sections 5 and 6.1).

u = 0, 1, the two points of order 8, p - 1, and what reduces to those modulo p = 2^255 - 19, below 2^255.
"""

from __future__ import annotations

from typing import Final

_P: Final = 2**255 - 19
_ORDER_8: Final = (
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
)

LOW_ORDER: Final = tuple(
    u.to_bytes(32, "little") for u in (0, 1, *_ORDER_8, _P - 1, _P, _P + 1, 2**255, 2**255 + 1)
)
