"""The roots of trust: AMD's root keys (ARK), pinned by what their certificates hash to.

An intermediate is never pinned: AMD replaced one already. The root is never taken from a message on its own word.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from .product import Product


@dataclass(frozen=True, slots=True)
class Root:
    """An ARK: product, SHA-256 of its DER certificate, and serial numbers of intermediates known to be revoked.

    The last is for verifiers without a CRL: what AMD's CRLs said when this was written, and no replacement for one.
    """

    product: Product
    sha256: bytes
    revoked: frozenset[int] = frozenset()


AMD_ROOTS: Final = (
    Root(
        Product.MILAN,
        bytes.fromhex("69d063b45344d26a2e94e1f4210de49ef555308287d4c174445c95639a540bcd"),
    ),
    Root(
        Product.GENOA,
        bytes.fromhex("4c6598d19c18719c5dfd4a7d335f674e5bfe1d8f800cea2cf270c10d103db2f1"),
        revoked=frozenset({0x20001}),  # the first SEV-Genoa, on AMD's CRL of 2022-10-31
    ),
    Root(
        Product.TURIN,
        bytes.fromhex("1f084161a44bb6d93778a904877d4819cafa5d05ef4193b2ded9dd9c73dd3f6a"),
    ),
)
