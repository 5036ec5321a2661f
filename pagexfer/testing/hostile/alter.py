"""Bundles that only a source with the right key could have made, and that no right source makes.

This is the one thing that the attacker of the security contract cannot do. Rules that guard against a source that is
authentic and wrong (R1, R3, R6) would else never be asked: the tag comes before them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ...wire.bundle import ENTRY_BYTES, HEADER_BYTES, BundleKind, Direction, nonce
from ...wire.constants import FINAL_EPOCH, GFN_BITS, PAGE_SIZE
from .ledger import stream_of

if TYPE_CHECKING:
    from ..pair import Message
    from .ledger import CipherLedger
    from .schedule import Step

_GFN_MASK: Final = (1 << GFN_BITS) - 1
_KINDS: Final = tuple(BundleKind)


def altered(ledger: CipherLedger, message: Message, taken: set[int], step: Step) -> Message | None:
    """`message` with one thing changed, sealed again under its own key and number; None where there is nothing to change.

    `taken` are gfns that came in this epoch already: one way is to bring one of them again.
    """
    header = message.header
    key = ledger.keys.get(stream_of(header))
    if key is None or header.direction is not Direction.FORWARD:
        return None
    data = message.data
    entries = data[HEADER_BYTES : header.aad_bytes]
    number = nonce(header.channel, header.incarnation, header.counter)
    payload = bytearray(AESGCM(key).decrypt(number, data[header.aad_bytes :], data[: header.aad_bytes]))
    ways = ["epoch", "kind"] + ["payload"] * 2 * bool(payload) + ["gfn"] * 3 * bool(entries and taken)
    match ways[step.x % len(ways)]:
        case "epoch":
            epochs = (max(1, header.epoch - 1), min(header.epoch + 1, FINAL_EPOCH), FINAL_EPOCH)
            header = header._replace(epoch=epochs[step.y % 3])
        case "kind":
            header = header._replace(kind=_KINDS[step.y % len(_KINDS)])
        case "payload":
            payload[step.y % len(payload)] ^= 1 << step.z % 8
        case _:
            gfn = sorted(taken)[step.y % len(taken)]
            first = int.from_bytes(entries[:ENTRY_BYTES], "little")
            entries = (first & ~_GFN_MASK | gfn).to_bytes(ENTRY_BYTES, "little")
            del payload[PAGE_SIZE if first >> GFN_BITS & 3 == 1 else 0 :]
            header = header._replace(entry_count=1, payload_bytes=len(payload))
    aad = header.pack() + entries
    changed = aad + AESGCM(key).encrypt(number, bytes(payload), aad)
    same = changed == data
    return None if same else replace(message, data=changed)
