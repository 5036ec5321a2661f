"""The handshake, sans-I/O: two hellos, two pieces of evidence over both, then keys.

    source       -> destination   hello
    destination  -> source        hello · evidence over the transcript
    source       -> destination   evidence over the transcript

Each side's evidence covers both hellos with a label of its role, so it confirms what the other side sees and cannot be
sent back. Nonces are fresh for every attempt: an attempt that ends leaves nothing that a later one accepts.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..errors import AttestationError, GeometryError, MalformedData
from ..wire.constants import NONCE_BYTES, PAGE_SIZE
from ..wire.handshake import Freshness, Hello, Role, parse_hello_untrusted, split_reply_untrusted
from .keys import KeySchedule, report_data, transcript_digest

if TYPE_CHECKING:
    from ..attestation import Attestor, Claims


@dataclass(frozen=True, slots=True)
class Established:
    """What both sides have after the handshake."""

    keys: KeySchedule
    peer: Claims
    channels: int
    freshness: Freshness
    guest_id: bytes


def source_hello(
    attestor: Attestor, guest_id: bytes, ram_pages: int, vcpus: int, channels: int, freshness: Freshness
) -> Hello:
    """A source's hello with a fresh nonce."""
    nonce = secrets.token_bytes(NONCE_BYTES)
    return Hello(Role.SOURCE, attestor.kind, nonce, guest_id, ram_pages, vcpus, channels, freshness)


def finish_source(attestor: Attestor, hello: Hello, reply: bytes) -> tuple[Established, bytes]:
    """Check the destination's reply; returns the session and this side's evidence.

    Raises MalformedData or AttestationError.
    """
    packed, evidence = split_reply_untrusted(reply)
    peer = parse_hello_untrusted(packed)
    if peer.role is not Role.DESTINATION or peer.attestor is not attestor.kind:
        raise AttestationError("the peer is no destination with this kind of evidence")
    transcript = transcript_digest(hello.pack(), packed)
    claims = attestor.verify(evidence, report_data(Role.DESTINATION, transcript))
    if (peer.guest_id, peer.channels, peer.freshness) != (hello.guest_id, hello.channels, hello.freshness):
        raise MalformedData("the destination answered for another guest or other terms")
    # Whether the guests fit is the destination's to say: once it has this evidence, neither side is a stranger.
    keys = KeySchedule(attestor.contribution(), transcript)
    own = attestor.evidence(report_data(Role.SOURCE, transcript))
    return Established(keys, claims, hello.channels, hello.freshness, hello.guest_id), own


class DestinationAttempt:
    """One handshake at the destination, from a source's hello on. Many may be open; each works once.

    Raises MalformedData or AttestationError for a hello that cannot be answered.
    """

    def __init__(self, attestor: Attestor, hello: bytes, ram_pages: int, vcpus: int) -> None:
        self._attestor = attestor
        self._source = parse_hello_untrusted(hello)
        if self._source.role is not Role.SOURCE or self._source.attestor is not attestor.kind:
            raise AttestationError("the peer is no source with this kind of evidence")
        self._own = replace(
            self._source,
            role=Role.DESTINATION,
            nonce=secrets.token_bytes(NONCE_BYTES),
            ram_pages=ram_pages,
            vcpus=vcpus,
        )
        self._transcript = transcript_digest(hello, self._own.pack())

    def reply(self) -> bytes:
        """This side's hello and evidence."""
        return self._own.pack() + self._attestor.evidence(report_data(Role.DESTINATION, self._transcript))

    def finish(self, evidence: bytes) -> Established:
        """Check the source's evidence. Raises AttestationError, or GeometryError once the peer has proved itself."""
        claims = self._attestor.verify(evidence, report_data(Role.SOURCE, self._transcript))
        _check_geometry(source=self._source, destination=self._own)
        keys = KeySchedule(self._attestor.contribution(), self._transcript)
        source = self._source
        return Established(keys, claims, source.channels, source.freshness, source.guest_id)


def _check_geometry(source: Hello, destination: Hello) -> None:
    if source.ram_pages != destination.ram_pages:
        raise GeometryError(
            f"RAM size differs: source {_mib(source.ram_pages)}, destination {_mib(destination.ram_pages)}"
        )
    if source.vcpus != destination.vcpus:
        raise GeometryError(f"vCPUs differ: source {source.vcpus}, destination {destination.vcpus}")


def _mib(pages: int) -> str:
    return f"{pages * PAGE_SIZE / 2**20:g} MiB"
