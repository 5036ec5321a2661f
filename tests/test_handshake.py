"""The handshake as it should go: what both sides have then, in what order, and what one attempt may do to others."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Never

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from pagexfer.attestation import Claims, PskAttestor
from pagexfer.attestation.secret import Secret
from pagexfer.errors import (
    AttestationError,
    GeometryError,
    KeyPoisoned,
    LocalProtocolError,
    MalformedData,
    PagexferError,
    UsageError,
)
from pagexfer.svsm import exchange, keys
from pagexfer.svsm.handshake import MAX_ATTEMPTS
from pagexfer.wire import handshake as wire_handshake
from pagexfer.wire.bundle import Direction
from pagexfer.wire.constants import MAX_CHANNELS
from pagexfer.wire.handshake import (
    DESTINATION_HELLO_BYTES,
    SOURCE_HELLO_BYTES,
    AttestorKind,
    Freshness,
    parse_hello_untrusted,
)
from pagexfer.wire.ledger import Proofs
from pagexfer.wire.slot import SessionStatus as State

from .handshakes import (
    KINDS,
    Session,
    attempt,
    attestors,
    destination,
    flipped,
    rewritten,
    snp,
    source,
    source_handshake,
)
from .small_guests import VCPUS

if TYPE_CHECKING:
    from pagexfer.attestation.snp import Evidence


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_both_sides_have_the_same_session_and_keys(kind: str) -> None:
    session = Session.of(kind)
    session.run()
    assert session.is_established()
    near, far = session.near._session, session.far._session
    assert near is not None
    assert far is not None
    assert near.keys.session == far.keys.session == session.sent[4][:16]
    assert (near.channels, near.freshness) == (far.channels, far.freshness) == (2, Freshness.HOST_REPORTED)
    for direction in Direction:
        keys = [
            side.keys.traffic_key(direction, channel, 0).reveal()
            for channel in (0, 1)
            for side in (near, far)
        ]
        assert keys[0] == keys[1] != keys[2] == keys[3]


def test_both_sides_know_the_same_for_the_ledger(kind: str) -> None:
    session = Session.of(kind)
    session.run()
    near, far = session.near._session, session.far._session
    assert near is not None
    assert far is not None
    assert near.hello == far.peer_hello == parse_hello_untrusted(session.sent[1])
    assert far.hello == near.peer_hello == parse_hello_untrusted(session.sent[2][:DESTINATION_HELLO_BYTES])
    evidence = session.sent[3][48:], session.sent[2][DESTINATION_HELLO_BYTES:]
    hellos = session.sent[1], session.sent[2][:DESTINATION_HELLO_BYTES]
    assert near.proofs == far.proofs == Proofs(*hellos, *evidence)
    for side in (near, far):
        assert side.ledger_key.public == side.hello.ledger_key
    for hello, attestor in zip((near.hello, far.hello), attestors(kind), strict=True):
        assert hello.policy_digest == attestor.policy_digest
        assert any(hello.policy_digest) is (kind != "psk")
    assert (near.hello.policy_digest != far.hello.policy_digest) is (kind == "snp")


def test_each_side_has_the_claims_of_its_peer(kind: str) -> None:
    session = Session.of(kind)
    session.run()
    by_source, by_destination = session.near.peer, session.far.peer
    assert by_source.kind is by_destination.kind is AttestorKind[kind.upper()]
    if kind == "psk":
        assert by_source == Claims(AttestorKind.PSK, "holder of the pre-shared key", {})
        return
    assert ("emulated" in by_source.subject) is (kind == "emulated")
    assert by_source.details["product"] == "Genoa"
    assert by_source.details["vmpl"] == 0
    assert by_source.details["chip_id"] != by_destination.details["chip_id"]


def test_nothing_of_a_handshake_comes_twice() -> None:
    hellos = [parse_hello_untrusted(source_handshake().hello()) for _ in range(2)]
    answers = [
        parse_hello_untrusted(attempt(source_handshake().hello()).reply()[:DESTINATION_HELLO_BYTES])
        for _ in range(2)
    ]
    for one, other in (hellos, answers):
        for part in ("nonce", "ledger_key", "x25519", "kem"):
            assert getattr(one, part) != getattr(other, part), part


def test_sizes_of_the_messages() -> None:
    session = Session.of("psk")
    session.run()
    assert [len(session.sent[number]) for number in (1, 2, 3, 4)] == [
        SOURCE_HELLO_BYTES,
        DESTINATION_HELLO_BYTES + 48,
        48 + 48,
        64,
    ]


def test_session_counter_counts_the_sessions_of_a_guest() -> None:
    near = source()
    assert parse_hello_untrusted(near.prepare(1)).session_counter == 1
    near.abort()
    memory = near._memory
    for number in (2, 3):
        again = source()
        again._memory.close()
        again._memory = memory
        hello = again.prepare(1)
        assert parse_hello_untrusted(hello).session_counter == number
        reply = destination().answer(1, hello)
        assert parse_hello_untrusted(reply[:DESTINATION_HELLO_BYTES]).session_counter == number
        again.abort()


# Order


def test_source_seals_nothing_before_the_destination_confirmed_the_keys() -> None:
    session = Session.of("psk").until(4)
    assert session.far.state is State.KEYED
    assert session.near.state is State.PROVED
    out = memoryview(bytearray(1 << 16))
    for early in (
        lambda: session.near.open_channel(0, out),
        session.near.begin_epoch,
        session.near.park,
        lambda: session.near.peer,
    ):
        with pytest.raises(LocalProtocolError):
            early()
    session.send(5)
    assert session.near.open_channel(0, out)


def test_each_step_has_its_turn() -> None:
    session = Session.of("psk")
    for number in range(1, 6):
        for early in {1, 3, 5} - {number | 1}:  # the source acts on even numbers next
            with pytest.raises(LocalProtocolError):
                session.step(early, bytes(100))
        with pytest.raises(LocalProtocolError):
            session.far.establish(7, bytes(100))
        session.send(number)
    assert session.is_established()


@pytest.mark.parametrize("channels", [0, MAX_CHANNELS + 1, 1 << 16, 1 << 63])
def test_number_of_channels_out_of_range_changes_nothing(channels: int) -> None:
    near = source()
    with pytest.raises(LocalProtocolError):
        near.prepare(channels)
    assert near.state is State.IDLE
    assert parse_hello_untrusted(near.prepare(MAX_CHANNELS)).session_counter == 1


class _Mute:
    """A provider that gives no report any more."""

    def evidence(self, report_data: bytes, *, vmpl: int) -> Evidence:
        raise UsageError("the host is busy, try again")


@pytest.mark.parametrize("mute", ["source", "destination"])
def test_side_that_gets_no_report_of_its_own_ends_and_leaves_nothing(mute: str) -> None:
    near, far = snp(), snp()
    (near if mute == "source" else far)._provider = _Mute()
    session = Session(source(near), destination(far))
    with pytest.raises(UsageError, match="busy"):
        session.run()
    assert session.near.state is (State.ABORTED if mute == "source" else State.PREPARED)
    assert session.far.state is State.IDLE
    assert bool(session.far._attempts) is (mute == "source")
    assert session.is_over()


# Guests that do not fit


@pytest.mark.parametrize(("pages", "vcpus"), [(5, VCPUS), (4, VCPUS + 1)])
def test_guest_of_another_size_is_refused_by_the_destination_once_proved(pages: int, vcpus: int) -> None:
    session = Session(source(), destination(pages=pages, vcpus=vcpus)).until(3)
    with pytest.raises(GeometryError):
        session.send(4)
    assert session.far.state is State.FAILED
    with pytest.raises(LocalProtocolError):
        session.far.answer(2, session.sent[1])
    assert session.is_over()


@pytest.mark.parametrize("part", ["confirmation", "evidence"])
def test_guest_of_another_size_is_not_judged_before_the_source_proved_itself(part: str) -> None:
    session = Session(source(), destination(pages=5)).until(3)
    offset = 0 if part == "confirmation" else 50
    with pytest.raises(AttestationError):
        session.step(4, flipped(session.sent[3], offset))
    assert session.far.state is State.IDLE


@pytest.mark.parametrize(
    "change",
    [
        {"guest_id": bytes(16)},
        {"channels": 3},
        {"freshness": Freshness.SVSM_TRACKED},
        {"session_counter": 2},
        {"compressed": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_authentic_destination_that_changes_the_terms_is_refused(change: dict[str, object]) -> None:
    near = source_handshake()
    opened = rewritten(attempt(near.hello()), near.hello(), **change)
    with pytest.raises(MalformedData, match="other terms"):
        near.prove(opened.reply())


# Attempts at a destination


def test_attempt_is_used_once() -> None:
    session = Session.of("psk").until(3)
    with pytest.raises(AttestationError):
        session.step(4, flipped(session.sent[3], 0))
    with pytest.raises(LocalProtocolError):
        session.send(4)
    assert session.far.state is State.IDLE


def test_attempt_that_was_used_has_nothing_left() -> None:
    near = source_handshake()
    opened = attempt(near.hello())
    proof = near.prove(opened.reply())
    for bad in (b"", proof[:-1], flipped(proof, 1)):
        other = source_handshake()
        used = attempt(other.hello())
        proof_of_other = other.prove(used.reply())
        with pytest.raises(PagexferError):
            used.finish(bad)
        with pytest.raises(KeyPoisoned):
            used.finish(proof_of_other)
    assert opened.finish(proof)
    with pytest.raises(KeyPoisoned):
        opened.finish(proof)


def test_source_handshake_is_used_once() -> None:
    near = source_handshake()
    reply = attempt(near.hello()).reply()
    with pytest.raises(KeyPoisoned):
        near.confirm(bytes(64))
    near.prove(reply)
    with pytest.raises(KeyPoisoned):
        near.prove(reply)


def test_first_source_that_proves_itself_wins_and_the_others_end() -> None:
    far = destination()
    first, second = (Session(source(), far, attempt=number).until(3) for number in (1, 2))
    open_ones = list(far._attempts.values())
    second.send(4)
    second.send(5)
    assert second.is_established()
    for opened in open_ones:
        with pytest.raises(KeyPoisoned):
            opened._shared.reveal()
    with pytest.raises(LocalProtocolError):
        first.send(4)
    assert far.session == second.sent[4][:16]
    assert first.is_over()


def test_failed_stranger_leaves_the_other_attempts_alone() -> None:
    session = Session.of("psk").until(2)
    session.far.answer(2, source_handshake().hello())
    with pytest.raises(AttestationError):
        session.far.establish(2, bytes(96))
    for bad in (b"", bytes(SOURCE_HELLO_BYTES), b"GET / HTTP/1.1\r\n"):
        with pytest.raises(PagexferError):
            session.far.answer(3, bad)
    assert list(session.far._attempts) == [1]
    for number in (3, 4, 5):
        session.send(number)
    assert session.is_established()


def test_strangers_are_bounded_and_push_nobody_out() -> None:
    session = Session(source(), destination(), attempt=0).until(2)
    far = session.far
    for number in range(1, MAX_ATTEMPTS):
        far.answer(number, source_handshake().hello())
    with pytest.raises(LocalProtocolError, match="64 handshakes are open"):
        far.answer(MAX_ATTEMPTS, source_handshake().hello())
    dropped = far._attempts[5]
    far.forget(5)
    far.forget(5)
    with pytest.raises(KeyPoisoned):
        dropped._shared.reveal()
    far.answer(MAX_ATTEMPTS, source_handshake().hello())
    for number in (3, 4, 5):
        session.send(number)
    assert session.is_established()


@pytest.mark.parametrize("sign", [0, 1])
@pytest.mark.parametrize("key", sorted(wire_handshake._SMALL_ORDER))
def test_a_ledger_key_of_small_order_is_refused(key: bytes, sign: int) -> None:
    """Under it there are signatures that hold for every message, by OpenSSL's reading at least."""
    point = key[:-1] + bytes([key[-1] | sign << 7])
    hello = wire_handshake.parse_hello_untrusted(source_handshake().hello())
    with pytest.raises(MalformedData, match="small order"):
        destination().answer(1, replace(hello, ledger_key=point).pack())


def test_the_identity_is_a_key_for_every_message() -> None:
    identity = (1).to_bytes(32, "little")
    Ed25519PublicKey.from_public_bytes(identity).verify(identity + bytes(32), b"whatever")


def test_attempt_that_speaks_again_pushes_out_nobody_else() -> None:
    far = destination()
    for number in range(MAX_ATTEMPTS):
        far.answer(number, source_handshake().hello())
    replaced = far._attempts[MAX_ATTEMPTS - 1]
    far.answer(MAX_ATTEMPTS - 1, source_handshake().hello())
    assert 0 in far._attempts
    with pytest.raises(KeyPoisoned):
        replaced._shared.reveal()


def test_destination_that_ends_drops_its_attempts() -> None:
    far = destination()
    far.answer(1, source_handshake().hello())
    opened = far._attempts[1]
    far.fail()
    with pytest.raises(KeyPoisoned):
        opened._shared.reveal()


class _Busy(PskAttestor):
    """Has no evidence, or nothing to contribute."""

    def __init__(self, call: str) -> None:
        super().__init__(b"a pre-shared key of 32 bytes ...")
        setattr(self, call, self._fail)

    def _fail(self, *_arguments: object) -> Never:
        raise UsageError("the firmware is busy")


@pytest.mark.parametrize("call", ["evidence", "contribution"])
def test_a_side_whose_own_attestor_fails_leaves_no_secret(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    secrets: list[Secret] = []

    class Noted(Secret):
        def __init__(self, data: bytes) -> None:
            super().__init__(data)
            secrets.append(self)

    for module in (exchange, keys):
        monkeypatch.setattr(module, "Secret", Noted)
    near = source_handshake(_Busy(call))
    reply = attempt(near.hello()).reply()
    secrets.clear()
    with pytest.raises(UsageError):
        near.prove(reply)
    near.wipe()
    with pytest.raises((UsageError, AttestationError)):
        attempt(source_handshake().hello(), _Busy(call)).finish(bytes(96))
    for secret in secrets:
        with pytest.raises(KeyPoisoned):
            secret.reveal()


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_source_that_aborts_has_nothing_left(number: int) -> None:
    session = Session.of("psk").until(number)
    handshake = session.near._handshake
    assert handshake is not None
    session.near.abort()
    assert handshake._exchange._keys is None
    if handshake._session is not None:
        with pytest.raises(KeyPoisoned):
            handshake._session.keys.traffic_key(Direction.FORWARD, 0, 0)
    for step in (1, 3, 5):
        with pytest.raises(LocalProtocolError):
            session.step(step, session.sent.get(step - 1, b""))
