"""Handshakes message by message, between small guests, with every kind of attestor that runs here."""

from __future__ import annotations

import functools
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

import pytest

from pagexfer.attestation import PskAttestor
from pagexfer.attestation.insecure import EmulatedAttestor, EmulatedAuthority, EmulatedProvider
from pagexfer.attestation.insecure.attestor import strict_policy
from pagexfer.attestation.snp import Product
from pagexfer.attestation.snp.attestor import SnpAttestor
from pagexfer.errors import PagexferError
from pagexfer.svsm.destination import DestinationSvsm
from pagexfer.svsm.handshake import DestinationAttempt, SourceHandshake
from pagexfer.svsm.keys import report_data, transcript_digest
from pagexfer.svsm.memory import GuestMemory
from pagexfer.svsm.service import refusal_code
from pagexfer.svsm.source import SourceSvsm
from pagexfer.testing import BytesGate
from pagexfer.testing.snp_ca import AT
from pagexfer.wire.constants import PAGE_SIZE
from pagexfer.wire.handshake import Freshness, Role
from pagexfer.wire.slot import SessionStatus as State

from .small_guests import ATTESTOR, VCPUS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pagexfer.attestation import Attestor
    from pagexfer.attestation.policy import Policy
    from pagexfer.errors import RefusalCode
    from pagexfer.svsm.compression import Compressor

GUEST_ID: Final = bytes(range(16))
OTHER_PSK: Final = PskAttestor(b"another key of at least 16 bytes")
KINDS: Final = ("psk", "snp", "emulated")
MESSAGES: Final = (1, 2, 3, 4)


@functools.cache
def authority() -> EmulatedAuthority:
    """One for all tests: making its keys takes a while."""
    return EmulatedAuthority.generate(Product.GENOA, now=AT)


def snp(policy: Policy | None = None, provider: EmulatedProvider | None = None) -> SnpAttestor:
    """An SNP attestor whose root of trust is the emulated one."""
    return SnpAttestor(
        EmulatedProvider(authority()) if provider is None else provider,
        strict_policy(Product.GENOA) if policy is None else policy,
        roots=(authority().root,),
        now=lambda: AT,
    )


@functools.cache
def attestors(kind: str) -> tuple[Attestor, Attestor]:
    """A source's and a destination's that accept each other."""
    match kind:
        case "psk":
            return ATTESTOR, ATTESTOR
        case "snp":
            # Two policies, so that nobody takes the peer's for his own.
            return snp(), snp(replace(strict_policy(Product.GENOA), denied_chips=frozenset({bytes(64)})))
        case _:
            return (
                EmulatedAttestor(authority(), now=lambda: AT),
                EmulatedAttestor(authority(), now=lambda: AT),
            )


def source(
    attestor: Attestor = ATTESTOR,
    pages: int = 4,
    vcpus: int = VCPUS,
    compressor: Compressor | None = None,
) -> SourceSvsm:
    gate = BytesGate([b"x"] * vcpus, running=True)
    memory = GuestMemory.allocate(pages * PAGE_SIZE)
    return SourceSvsm(memory, gate, None, attestor, GUEST_ID, compressor=compressor)


def destination(
    attestor: Attestor = ATTESTOR, pages: int = 4, vcpus: int = VCPUS, *, accept_compression: bool = False
) -> DestinationSvsm:
    memory = GuestMemory.allocate(pages * PAGE_SIZE)
    gate = BytesGate.waiting(vcpus)
    return DestinationSvsm(memory, gate, attestor, accept_compression=accept_compression)


def source_handshake(attestor: Attestor = ATTESTOR) -> SourceHandshake:
    return SourceHandshake(attestor, GUEST_ID, 4, VCPUS, 2, Freshness.HOST_REPORTED, 1, compressed=False)


def attempt(hello: bytes, attestor: Attestor = ATTESTOR) -> DestinationAttempt:
    return DestinationAttempt(attestor, hello, 4, VCPUS)


def flipped(data: bytes, offset: int, bits: int = 1) -> bytes:
    changed = bytearray(data)
    changed[offset] ^= bits
    return bytes(changed)


def rewritten(opened: DestinationAttempt, source_hello: bytes, **changes: object) -> DestinationAttempt:
    """An authentic destination that answers something else: its hello changed, and its evidence made over that."""
    opened._own = replace(opened._own, **changes)  # type: ignore[arg-type]  # known fields
    opened._transcript = transcript_digest(source_hello, opened._own.pack())
    opened._evidence = opened._attestor.evidence(report_data(Role.DESTINATION, opened._transcript))
    return opened


@dataclass
class Session:
    """A source, a destination, and the four messages between them as they were sent."""

    near: SourceSvsm
    far: DestinationSvsm
    attempt: int = 1
    sent: dict[int, bytes] = field(default_factory=dict)

    @classmethod
    def of(cls, kind: str) -> Session:
        near, far = attestors(kind)
        return cls(source(near), destination(far))

    def send(self, number: int) -> bytes:
        """Have the side whose turn it is make message `number` from the one before, as that was sent."""
        return self.step(number, self.sent.get(number - 1, b""))

    def step(self, number: int, arrives: bytes) -> bytes:
        """What a side answers to `arrives`; for 5, which is no message, the source takes the last one."""
        match number:
            case 1:
                message = self.near.prepare(2)
            case 2:
                message = self.far.answer(self.attempt, arrives)
            case 3:
                message = self.near.establish(arrives)
            case 4:
                message = self.far.establish(self.attempt, arrives)
            case _:
                self.near.confirm(arrives)
                return b""
        self.sent[number] = message
        return message

    def until(self, number: int) -> Session:
        """All messages up to `number` are sent, and those before it have arrived."""
        for each in range(1, number + 1):
            self.send(each)
        return self

    def run(self, change: Callable[[int, bytes], bytes] = lambda _number, data: data) -> None:
        """The whole handshake, each message changed on its way. Raises what a side refuses it with."""
        for number in range(1, 6):
            arrives = change(number - 1, self.sent[number - 1]) if number > 1 else b""
            self.step(number, arrives)

    def is_established(self) -> bool:
        return self.near.state is State.KEYED and self.far.state is State.KEYED

    def is_over(self) -> bool:
        """After a refusal: the source's guest goes on, the destination's never ran, and nobody can go on with this."""
        if self.near.state is not State.ABORTED:
            self.near.abort()
        handshake = self.near._handshake
        return (
            self.near._gate.parked() == 0
            and isinstance(self.far._gate, BytesGate)
            and not self.far._gate.running
            and self.near._streams is None
            and (handshake is None or handshake._exchange._keys is None)
        )

    def close(self) -> None:
        self.near._memory.close()
        self.far._memory.close()


@contextmanager
def refused(*codes: RefusalCode) -> Iterator[None]:
    """What happens inside is refused with one of the codes, all that the host learns."""
    with pytest.raises(PagexferError) as caught:
        yield
    assert refusal_code(caught.value) in codes, caught.value
