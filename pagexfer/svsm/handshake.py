"""The handshake, sans-I/O: two hellos, evidence of both sides over them, and proof of both that they have the same keys.

    source       -> destination   hello
    destination  -> source        hello · evidence over the transcript
    source       -> destination   confirmation · evidence over the transcript
    destination  -> source        session id · confirmation

Each side's evidence covers both hellos, and with them the ephemeral keys, under a label of its role: it cannot be sent back
or moved to another session. The confirmations cover the evidence too, so that both sides end with the same four messages
or without a session. Every handshake is one-shot: what it holds is gone after its last step, and after any that fails.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from ..errors import (
    AttestationError,
    CompressionRefused,
    GeometryError,
    KeyPoisoned,
    LocalProtocolError,
    MalformedData,
    RemoteProtocolError,
)
from ..wire.constants import NONCE_BYTES, PAGE_SIZE
from ..wire.handshake import (
    Hello,
    Role,
    pack_established,
    parse_established_untrusted,
    parse_hello_untrusted,
    split_proof_untrusted,
    split_reply_untrusted,
)
from ..wire.ledger import Proofs
from .exchange import SourceExchange, answer_exchange
from .keys import KeySchedule, proved_digest, report_data, transcript_digest
from .ledger import LedgerKey

if TYPE_CHECKING:
    from ..attestation import Attestor, Claims
    from ..attestation.secret import Secret
    from ..wire.handshake import Freshness

# As many strangers may have begun a handshake at once.
MAX_ATTEMPTS: Final = 64


@dataclass(frozen=True, slots=True)
class Established:
    """What a side has after the handshake.

    `hello` is its own and `peer_hello` the other's, `proofs` are both hellos and both pieces of evidence as they were sent,
    `ledger_key` the private key to the own hello's ledger key.
    """

    keys: KeySchedule
    peer: Claims
    hello: Hello
    peer_hello: Hello
    proofs: Proofs
    ledger_key: LedgerKey

    @property
    def channels(self) -> int:
        return self.hello.channels

    @property
    def freshness(self) -> Freshness:
        return self.hello.freshness

    @property
    def compressed(self) -> bool:
        return self.hello.compressed


class SourceHandshake:
    """One handshake at the source: `hello`, `prove`, `confirm`, each once and in this order."""

    def __init__(
        self,
        attestor: Attestor,
        guest_id: bytes,
        ram_pages: int,
        vcpus: int,
        channels: int,
        freshness: Freshness,
        session_counter: int,
        compressed: bool,
    ) -> None:
        self._attestor = attestor
        self._exchange = SourceExchange.fresh()
        self._ledger_key = LedgerKey()
        self._own = Hello(
            Role.SOURCE,
            attestor.kind,
            secrets.token_bytes(NONCE_BYTES),
            guest_id,
            ram_pages,
            vcpus,
            channels,
            freshness,
            session_counter,
            attestor.policy_digest,
            self._ledger_key.public,
            self._exchange.x25519_public,
            self._exchange.encapsulation_key,
            compressed,
        )
        self._proved = b""
        self._session: Established | None = None
        self._confirmed = False

    def hello(self) -> bytes:
        """The first message."""
        return self._own.pack()

    def prove(self, reply: bytes) -> bytes:
        """Check the destination's reply; returns the third message: this side's confirmation and evidence.

        Raises MalformedData or AttestationError, and KeyPoisoned where it was called before.
        """
        packed, evidence = split_reply_untrusted(reply)
        peer = parse_hello_untrusted(packed)
        if peer.role is not Role.DESTINATION or peer.attestor is not self._attestor.kind:
            raise AttestationError("the peer is no destination with this kind of evidence")
        transcript = transcript_digest(self._own.pack(), packed)
        claims = self._attestor.verify(evidence, report_data(Role.DESTINATION, transcript))
        if _terms(peer) != _terms(self._own):
            raise MalformedData("the destination answered for another guest or other terms")
        # Whether the guests fit is the destination's to say: once it has this evidence, neither side is a stranger.
        own = self._attestor.evidence(report_data(Role.SOURCE, transcript))
        # Nothing fails between these and `wipe`, which knows the session.
        shared = self._exchange.finish(peer.x25519, peer.kem)
        keys = _schedule(shared, self._attestor, transcript)
        self._proved = proved_digest(transcript, evidence, own)
        proofs = Proofs(self._own.pack(), packed, own, evidence)
        self._session = Established(keys, claims, self._own, peer, proofs, self._ledger_key)
        return keys.confirmation(Role.SOURCE, self._proved) + own

    def confirm(self, message: bytes) -> Established:
        """Check the destination's last message.

        Raises MalformedData or AttestationError, and KeyPoisoned without `prove` or where it was called before.
        """
        session = self._session
        if session is None or self._confirmed:
            raise KeyPoisoned("nothing is to be confirmed in this handshake")
        self._confirmed = True
        named, confirmation = parse_established_untrusted(message)
        session.keys.check_confirmation(Role.DESTINATION, self._proved, confirmation)
        if named != session.keys.session:
            raise AttestationError("the destination names another session")
        return session

    def wipe(self) -> None:
        """Forget everything that a key could be made of."""
        self._exchange.drop()
        self._ledger_key.drop()
        if self._session is not None:
            self._session.keys.wipe()


class DestinationAttempt:
    """One handshake at the destination, from a source's hello on. Many may be open; each works once.

    Raises MalformedData or AttestationError for a hello that cannot be answered.
    """

    def __init__(
        self,
        attestor: Attestor,
        hello: bytes,
        ram_pages: int,
        vcpus: int,
        *,
        accept_compression: bool = False,
    ) -> None:
        self._attestor = attestor
        self._accept_compression = accept_compression
        self._source = parse_hello_untrusted(hello)
        if self._source.role is not Role.SOURCE or self._source.attestor is not attestor.kind:
            raise AttestationError("the peer is no source with this kind of evidence")
        x25519, ciphertext, self._shared = answer_exchange(self._source.x25519, self._source.kem)
        self._ledger_key = LedgerKey()
        self._own = replace(
            self._source,
            role=Role.DESTINATION,
            nonce=secrets.token_bytes(NONCE_BYTES),
            ram_pages=ram_pages,
            vcpus=vcpus,
            policy_digest=attestor.policy_digest,
            ledger_key=self._ledger_key.public,
            x25519=x25519,
            kem=ciphertext,
        )
        self._transcript = transcript_digest(hello, self._own.pack())
        try:
            self._evidence = attestor.evidence(report_data(Role.DESTINATION, self._transcript))
        except BaseException:  # as where the firmware is asked too often
            self.wipe()
            raise

    def reply(self) -> bytes:
        """The second message: this side's hello and evidence."""
        return self._own.pack() + self._evidence

    def finish(self, message: bytes) -> tuple[Established, bytes]:
        """Check the source's evidence and confirmation; returns the session and the last message.

        Raises MalformedData or AttestationError, GeometryError or CompressionRefused once the peer has proved itself, and
        KeyPoisoned where it was called before.
        """
        try:
            return self._finish(message)
        finally:
            self.wipe()

    def wipe(self) -> None:
        """Forget what a key could be made of."""
        self._shared.wipe()

    def _finish(self, message: bytes) -> tuple[Established, bytes]:
        confirmation, evidence = split_proof_untrusted(message)
        claims = self._attestor.verify(evidence, report_data(Role.SOURCE, self._transcript))
        keys = _schedule(self._shared, self._attestor, self._transcript)
        proved = proved_digest(self._transcript, self._evidence, evidence)
        try:
            keys.check_confirmation(Role.SOURCE, proved, confirmation)
            _check_geometry(source=self._source, destination=self._own)
            if self._source.compressed and not self._accept_compression:
                raise CompressionRefused("the source would send compressed pages")
        except RemoteProtocolError:
            keys.wipe()
            raise
        proofs = Proofs(self._source.pack(), self._own.pack(), evidence, self._evidence)
        session = Established(keys, claims, self._own, self._source, proofs, self._ledger_key)
        return session, pack_established(keys.session, keys.confirmation(Role.DESTINATION, proved))


class Attempts(dict[int, DestinationAttempt]):
    """Open handshakes of peers that proved nothing yet, by number: at most MAX_ATTEMPTS.

    One more is refused: a genuine source's would be as likely pushed out as a stranger's. So whoever has the connections
    says when one is over.
    """

    def keep(self, number: int, attempt: DestinationAttempt) -> None:
        """Another one is open, in place of the one with its number. Raises LocalProtocolError where there are too many."""
        self.drop(number)
        if len(self) >= MAX_ATTEMPTS:
            attempt.wipe()
            raise LocalProtocolError(f"{MAX_ATTEMPTS} handshakes are open: drop one")
        self[number] = attempt

    def take(self, number: int) -> DestinationAttempt:
        """The one with this number, which is not open any more. Raises LocalProtocolError where there is none."""
        attempt = self.pop(number, None)
        if attempt is None:
            raise LocalProtocolError("no such handshake is open")
        return attempt

    def drop_all(self) -> None:
        """Forget all of them."""
        for number in list(self):
            self.drop(number)

    def drop(self, number: int) -> None:
        """Forget the one with this number, if it is open."""
        attempt = self.pop(number, None)
        if attempt is not None:
            attempt.wipe()


def _terms(hello: Hello) -> tuple[bytes, int, Freshness, int, bool]:
    """What a destination repeats of the source's hello."""
    return hello.guest_id, hello.channels, hello.freshness, hello.session_counter, hello.compressed


def _schedule(shared: Secret, attestor: Attestor, transcript: bytes) -> KeySchedule:
    try:
        contribution = attestor.contribution()
        try:
            return KeySchedule(shared, contribution, transcript)
        finally:
            contribution.wipe()
    finally:
        shared.wipe()


def _check_geometry(source: Hello, destination: Hello) -> None:
    if source.ram_pages != destination.ram_pages:
        raise GeometryError(
            f"RAM size differs: source {_mib(source.ram_pages)}, destination {_mib(destination.ram_pages)}"
        )
    if source.vcpus != destination.vcpus:
        raise GeometryError(f"vCPUs differ: source {source.vcpus}, destination {destination.vcpus}")


def _mib(pages: int) -> str:
    return f"{pages * PAGE_SIZE / 2**20:g} MiB"
