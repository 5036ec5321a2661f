"""The handshake under attack: every field flipped, replays, reflections, swapped attempts, strangers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pagexfer.attestation import PskAttestor
from pagexfer.errors import (
    AttestationError,
    GeometryError,
    LocalProtocolError,
    MalformedData,
    PagexferError,
    RemoteProtocolError,
)
from pagexfer.svsm.destination import MAX_ATTEMPTS, DestinationSvsm
from pagexfer.svsm.handshake import DestinationAttempt, finish_source, source_hello
from pagexfer.svsm.keys import transcript_digest
from pagexfer.svsm.memory import GuestMemory
from pagexfer.svsm.source import SourceSvsm
from pagexfer.testing import BytesGate
from pagexfer.wire.bundle import Direction
from pagexfer.wire.constants import MAX_CHANNELS, PAGE_SIZE
from pagexfer.wire.handshake import HELLO_BYTES, Freshness, Hello
from pagexfer.wire.slot import SessionStatus as State

from .small_guests import ATTESTOR, VCPUS

OTHER_PSK = PskAttestor(b"another key of at least 16 bytes")
GUEST_ID = bytes(range(16))


def source(pages: int = 4, vcpus: int = VCPUS, attestor: PskAttestor = ATTESTOR) -> SourceSvsm:
    gate = BytesGate([b"x"] * vcpus, running=True)
    return SourceSvsm(GuestMemory.allocate(pages * PAGE_SIZE), gate, None, attestor, GUEST_ID)


def destination(pages: int = 4, vcpus: int = VCPUS, attestor: PskAttestor = ATTESTOR) -> DestinationSvsm:
    return DestinationSvsm(GuestMemory.allocate(pages * PAGE_SIZE), BytesGate.waiting(vcpus), attestor)


def hello(attestor: PskAttestor = ATTESTOR) -> Hello:
    return source_hello(attestor, GUEST_ID, 4, VCPUS, 2, Freshness.SVSM_TRACKED)


def attempt(packed: bytes, attestor: PskAttestor = ATTESTOR) -> DestinationAttempt:
    return DestinationAttempt(attestor, packed, 4, VCPUS)


def flipped(data: bytes, offset: int) -> bytes:
    return data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :]


def test_both_sides_have_the_same_session_and_keys() -> None:
    own = hello()
    opened = attempt(own.pack())
    near, evidence = finish_source(ATTESTOR, own, opened.reply())
    far = opened.finish(evidence)
    assert near.keys.session == far.keys.session
    assert (near.channels, near.freshness) == (far.channels, far.freshness) == (2, Freshness.SVSM_TRACKED)
    for direction in Direction:
        keys = [
            side.keys.traffic_key(direction, channel, 0).reveal()
            for channel in (0, 1)
            for side in (near, far)
        ]
        assert keys[0] == keys[1] != keys[2] == keys[3]


def test_nonces_are_fresh_each_time() -> None:
    own = hello()
    assert hello().nonce != own.nonce
    replies = {attempt(own.pack()).reply() for _ in range(3)}
    assert len(replies) == 3


@pytest.mark.parametrize("offset", range(HELLO_BYTES))
def test_every_byte_of_the_sources_hello_counts(offset: int) -> None:
    own = hello()
    with pytest.raises(RemoteProtocolError):
        finish_source(ATTESTOR, own, attempt(flipped(own.pack(), offset)).reply())


def test_every_byte_of_the_reply_counts() -> None:
    own = hello()
    reply = attempt(own.pack()).reply()
    assert len(reply) == HELLO_BYTES + 48
    for offset in range(len(reply)):
        with pytest.raises(RemoteProtocolError):
            finish_source(ATTESTOR, own, flipped(reply, offset))
    for other in (b"", reply[:-1], reply + b"\0", reply[:HELLO_BYTES]):
        with pytest.raises(RemoteProtocolError):
            finish_source(ATTESTOR, own, other)


def test_every_byte_of_the_sources_evidence_counts() -> None:
    own = hello()
    opened = attempt(own.pack())
    evidence = finish_source(ATTESTOR, own, opened.reply())[1]
    for offset in range(len(evidence)):
        with pytest.raises(AttestationError):
            opened.finish(flipped(evidence, offset))
    for other in (b"", evidence[:-1], evidence + b"\0"):
        with pytest.raises(AttestationError):
            opened.finish(other)


def test_reply_to_another_attempt_is_refused() -> None:
    first, second = hello(), hello()
    with pytest.raises(AttestationError):
        finish_source(ATTESTOR, second, attempt(first.pack()).reply())


def test_evidence_for_another_attempt_is_refused() -> None:
    own = hello()
    one, two = attempt(own.pack()), attempt(own.pack())
    evidence = finish_source(ATTESTOR, own, one.reply())[1]
    with pytest.raises(AttestationError):
        two.finish(evidence)
    assert one.finish(evidence)


def test_evidence_cannot_be_reflected() -> None:
    """The destination's own evidence, over the same transcript, does not pass as the source's."""
    opened = attempt(hello().pack())
    with pytest.raises(AttestationError):
        opened.finish(opened.reply()[HELLO_BYTES:])


def test_roles_cannot_be_swapped() -> None:
    own = hello()
    with pytest.raises(AttestationError):
        attempt(attempt(own.pack()).reply()[:HELLO_BYTES])
    with pytest.raises(AttestationError):
        finish_source(ATTESTOR, own, own.pack() + bytes(48))


def test_other_pre_shared_key_is_refused_by_both() -> None:
    own = hello()
    with pytest.raises(AttestationError):
        finish_source(ATTESTOR, own, attempt(own.pack(), OTHER_PSK).reply())
    opened = attempt(own.pack())
    evidence = OTHER_PSK.evidence(bytes(64))
    with pytest.raises(AttestationError):
        opened.finish(evidence)


@pytest.mark.parametrize(
    "change", [{"guest_id": bytes(16)}, {"channels": 3}, {"freshness": Freshness.HOST_REPORTED}]
)
def test_authentic_destination_that_changes_the_terms_is_refused(change: dict[str, object]) -> None:
    own = hello()
    changed = replace(own, **change)  # type: ignore[arg-type]  # one known field each
    opened = attempt(changed.pack())
    opened._transcript = transcript_digest(own.pack(), opened._own.pack())
    with pytest.raises(MalformedData):
        finish_source(ATTESTOR, own, opened.reply())


@pytest.mark.parametrize(("pages", "vcpus"), [(5, VCPUS), (4, VCPUS + 1)])
def test_guest_of_another_size_is_refused_by_the_destination_once_proved(pages: int, vcpus: int) -> None:
    near, far = source(), destination(pages, vcpus)
    packed = near.prepare(1)
    evidence = near.establish(far.answer(1, packed))
    with pytest.raises(GeometryError):
        far.establish(1, evidence)
    assert far.state is State.FAILED
    with pytest.raises(LocalProtocolError):
        far.answer(2, packed)
    near.abort()
    assert near.state is State.ABORTED


# Through the SVSMs


def test_attempt_is_used_once() -> None:
    near, far = source(), destination()
    reply = far.answer(1, near.prepare(1))
    evidence = near.establish(reply)
    with pytest.raises(AttestationError):
        far.establish(1, flipped(evidence, 0))
    with pytest.raises(LocalProtocolError):
        far.establish(1, evidence)
    assert far.state is State.IDLE


def test_session_is_established_once() -> None:
    near, far = source(), destination()
    evidence = near.establish(far.answer(1, near.prepare(1)))
    far.establish(1, evidence)
    with pytest.raises(LocalProtocolError):
        far.establish(1, evidence)
    with pytest.raises(LocalProtocolError):
        far.answer(2, hello().pack())
    assert far.state is State.KEYED


def test_recorded_handshake_is_worth_nothing_later() -> None:
    near, far = source(), destination()
    packed = near.prepare(1)
    evidence = near.establish(far.answer(1, packed))
    later = destination()
    later.answer(1, packed)
    with pytest.raises(AttestationError):
        later.establish(1, evidence)
    assert later.state is State.IDLE


def test_failed_stranger_leaves_the_other_attempts_alone() -> None:
    near, far = source(), destination()
    reply = far.answer(1, near.prepare(1))
    far.answer(2, hello().pack())
    with pytest.raises(AttestationError):
        far.establish(2, bytes(48))
    for bad in (b"", bytes(HELLO_BYTES), b"GET / HTTP/1.1\r\n"):
        with pytest.raises(PagexferError):
            far.answer(3, bad)
    far.establish(1, near.establish(reply))
    assert far.state is State.KEYED


def test_strangers_are_bounded_and_push_out_the_oldest() -> None:
    near, far = source(), destination()
    reply = far.answer(0, near.prepare(1))
    for number in range(1, MAX_ATTEMPTS):
        far.answer(number, hello().pack())
    assert len(far._attempts) == MAX_ATTEMPTS
    far.answer(MAX_ATTEMPTS, hello().pack())
    assert list(far._attempts) == list(range(1, MAX_ATTEMPTS + 1))
    with pytest.raises(LocalProtocolError):
        far.establish(0, near.establish(reply))


def test_attempt_that_speaks_again_pushes_out_nobody_else() -> None:
    far = destination()
    for number in range(MAX_ATTEMPTS):
        far.answer(number, hello().pack())
    far.answer(MAX_ATTEMPTS - 1, hello().pack())
    assert 0 in far._attempts


@pytest.mark.parametrize("channels", [0, MAX_CHANNELS + 1, 1 << 16, 1 << 63])
def test_number_of_channels_out_of_range_changes_nothing(channels: int) -> None:
    near = source()
    with pytest.raises(LocalProtocolError):
        near.prepare(channels)
    assert near.state is State.IDLE
    assert near.prepare(MAX_CHANNELS)


def test_forged_reply_ends_the_source_and_its_guest_goes_on() -> None:
    near, far = source(), destination()
    reply = far.answer(1, near.prepare(1))
    with pytest.raises(AttestationError):
        near.establish(flipped(reply, HELLO_BYTES))
    assert near.state is State.ABORTED
    with pytest.raises(LocalProtocolError):
        near.establish(reply)
