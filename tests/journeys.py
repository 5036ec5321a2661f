"""A guest of a few pages that moves again and again: each destination is the next move's source."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pagexfer.attestation import PskAttestor
from pagexfer.attestation.insecure import EmulatedAttestor
from pagexfer.attestation.policy import Policy, check_moves
from pagexfer.svsm.ledger import LedgerKey, append, next_body
from pagexfer.svsm.memory import GuestMemory
from pagexfer.testing import BytesGate, SvsmPair
from pagexfer.testing.snp_ca import AT
from pagexfer.wire.handshake import Role, parse_hello_untrusted
from pagexfer.wire.ledger import parse_ledger_untrusted

from .handshakes import authority
from .small_guests import ATTESTOR, Move

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pagexfer.attestation import Attestor
    from pagexfer.wire.ledger import Proofs, Record


class Journey:
    """`memory` and `gate` are the guest where it is now, `ledger` is what its last destination has."""

    def __init__(self) -> None:
        self.first = Move()
        self.memory, self.gate = self.first.guest.memory, self.first.guest.gate
        self.ledger = b""
        self._visited: list[GuestMemory] = []

    def next_pair(
        self, attestor: Attestor = ATTESTOR, destination_attestor: Attestor | None = None
    ) -> SvsmPair:
        self.to_memory = GuestMemory.allocate(self.memory.ram_bytes)
        self.to_gate = BytesGate.waiting(self.gate.vcpus)
        self._visited.append(self.to_memory)
        return SvsmPair(
            self.memory,
            self.gate,
            self.to_memory,
            self.to_gate,
            attestor,
            ledger=self.ledger,
            destination_attestor=destination_attestor,
        )

    def arrive(self, pair: SvsmPair) -> None:
        pair.migrate()
        self.ledger = pair.destination.ledger
        self.memory, self.gate = self.to_memory, self.to_gate

    def close(self) -> None:
        self.first.close()
        for memory in self._visited:
            memory.close()


def emulated(policy: Policy | None = None) -> EmulatedAttestor:
    """Of a machine of its own."""
    return EmulatedAttestor(authority(), policy, now=lambda: AT)


def forged(records: Sequence[Record], proofs: Proofs, guest_id: bytes | None = None) -> tuple[Record, ...]:
    """These records and one more, signed by new keys that its hellos name; the evidence stays what it was."""
    keys = LedgerKey(), LedgerKey()
    hellos = []
    for packed, key in zip((proofs.source_hello, proofs.destination_hello), keys, strict=True):
        hello = parse_hello_untrusted(packed)
        hellos.append(replace(hello, ledger_key=key.public, guest_id=guest_id or hello.guest_id).pack())
    proofs = replace(proofs, source_hello=hellos[0], destination_hello=hellos[1])
    body = next_body(records, proofs, b"manifest")
    return parse_ledger_untrusted(append(records, body, proofs, keys[0].sign(Role.SOURCE, body), keys[1]))


class Limited(PskAttestor):
    """A pre-shared key under a policy that lets a guest move twice."""

    def check_move(self, move: int) -> None:
        check_moves(Policy(measurements=None, minimum_tcb=None, maximum_moves=2), move)
