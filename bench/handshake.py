"""What the handshake costs: python -m bench handshake [--json FILE] [--quick]

All four messages between two SVSMs in one thread, so a figure is the work of both sides together; on a network each side
waits two round trips besides. `psk` and `emulated` run in turn with their limit, the
key agreement alone: X25519 and ML-KEM-768 of both sides. "over psk" is what attestation adds, of which the target
is under 50 ms. `attestor` is made once a process, before the first handshake: one more report, verified by its own side.
Emulated reports are signed by this processor in software; how long a real firmware takes is not in here. All that is
random are keys and nonces, which are the system's: --seed changes nothing.
"""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from pagexfer.attestation import PskAttestor
from pagexfer.attestation.insecure import EmulatedAttestor, EmulatedAuthority
from pagexfer.attestation.snp import Product
from pagexfer.svsm.destination import DestinationSvsm
from pagexfer.svsm.exchange import SourceExchange, answer_exchange
from pagexfer.svsm.memory import GuestMemory
from pagexfer.svsm.source import SourceSvsm
from pagexfer.testing import BytesGate
from pagexfer.wire.constants import GUEST_ID_BYTES, PAGE_SIZE

from .measure import Case, alternate
from .options import finish, parse, parser
from .table import Table

if TYPE_CHECKING:
    from pagexfer.attestation import Attestor

CALLS: Final = 20
TARGET_MS: Final = 50.0
LIMIT: Final = "key agreement"


def handshake(near: Attestor, far: Attestor) -> None:
    """One whole handshake for a guest of one page."""
    source_memory, destination_memory = (GuestMemory.allocate(PAGE_SIZE) for _ in range(2))
    gate = BytesGate([b"state"], running=True)
    source = SourceSvsm(source_memory, gate, None, near, bytes(GUEST_ID_BYTES))
    destination = DestinationSvsm(destination_memory, BytesGate.waiting(1), far)
    reply = destination.answer(1, source.prepare(1))
    source.confirm(destination.establish(1, source.establish(reply)))
    source_memory.close()
    destination_memory.close()


def agree() -> None:
    """The key agreement of both sides, and nothing else."""
    source = SourceExchange.fresh()
    x25519_public, ciphertext, secret = answer_exchange(source.x25519_public, source.encapsulation_key)
    assert source.finish(x25519_public, ciphertext).reveal() == secret.reveal()


def cases() -> dict[str, Case]:
    """Each thing to measure, with one authority for all."""
    authority = EmulatedAuthority.generate(Product.GENOA, now=datetime.now(UTC))

    def attestor() -> EmulatedAttestor:
        return EmulatedAttestor(authority, now=lambda: datetime.now(UTC))

    psk = PskAttestor(bytes(range(32)))
    near, far = attestor(), attestor()
    return {
        LIMIT: Case(agree, calls=CALLS),
        "psk": Case(lambda: handshake(psk, psk), calls=CALLS),
        "emulated": Case(lambda: handshake(near, far), calls=CALLS),
        "attestor": Case(attestor, calls=CALLS),
    }


def main(argv: list[str] | None = None) -> None:
    options = parse(parser("handshake", __doc__, repeats=11), argv)
    spreads = {name: spread.scaled(1e3) for name, spread in alternate(cases(), options.repeats).items()}
    added = spreads["emulated"].median - spreads["psk"].median
    rows = [
        (
            name,
            *spread.cells(2),
            f"{spread.median / spreads[LIMIT].median:.2f}",
        )
        for name, spread in spreads.items()
    ]
    table = Table.of(
        "Handshake, both sides together",
        ("", "median ms", "min", "max", f"x {LIMIT}"),
        rows,
        f"Attestation adds {added:.2f} ms to a pre-shared key; the target is under {TARGET_MS:g} ms.",
    )
    figures = {name: asdict(spread) for name, spread in spreads.items()}
    finish(options, {"milliseconds": figures, "over_psk": added}, [table])


if __name__ == "__main__":
    main()
