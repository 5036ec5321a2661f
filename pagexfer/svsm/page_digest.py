"""The digest by which a `ContentTracker` compares RAM with what was sent, where freshness rests on it (R13).

A GMAC tag under a key made here, as the audit's are (`audit`), and for the same reason: whoever chooses what is in RAM
wins by two contents of one digest. Without the key he finds them with probability at most 8193 / 2^128 < 2^-114 for blocks
of 32 pages. A fast hash with a secret seed is no substitute: of XXH3 with 128 bits pairs of pages are known that differ in
two bits and collide under one seed in sixty. Neither key nor tag leaves the SVSM, which is why one nonce serves all.

A block of 128 KiB is hashed at about the speed of a copy; page by page the same takes two to three times as long.
"""

from __future__ import annotations

import secrets
from functools import partial
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ..wire.constants import GCM_NONCE_BYTES, KEY_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable


def fresh_digest() -> Callable[[memoryview], bytes]:
    """A digest of 16 bytes under a key of its own. Any thread may call it."""
    return partial(AESGCM(secrets.token_bytes(KEY_BYTES)).encrypt, bytes(GCM_NONCE_BYTES), b"")
