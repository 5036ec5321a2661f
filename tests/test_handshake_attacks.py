"""The handshake under attack: each field flipped, each message replayed, reflected, dropped, or from another session."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import pytest

from pagexfer.attestation.insecure import EmulatedAttestor, EmulatedProvider
from pagexfer.attestation.insecure.attestor import strict_policy
from pagexfer.attestation.insecure.reports import with_signature
from pagexfer.attestation.snp import AMD_ROOTS, Product, find_provider, parse_report_untrusted
from pagexfer.attestation.snp.bits import GuestPolicyBit
from pagexfer.errors import AttestationError, MalformedData, RefusalCode, UsageError
from pagexfer.testing.snp_ca import AT
from pagexfer.wire.handshake import (
    DESTINATION_HELLO_BYTES,
    SOURCE_HELLO_BYTES,
    AttestorKind,
    pack_established,
    parse_hello_untrusted,
)
from pagexfer.wire.slot import SessionStatus as State

from .handshakes import (
    KINDS,
    OTHER_PSK,
    Session,
    attempt,
    attestors,
    authority,
    destination,
    flipped,
    refused,
    rewritten,
    snp,
    source,
    source_handshake,
)
from .low_order import LOW_ORDER

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

INTEGRITY, AUTHENTICATION = RefusalCode.INTEGRITY, RefusalCode.AUTHENTICATION
POLICY, STATE = RefusalCode.POLICY, RefusalCode.STATE
P384_ORDER: Final = (
    0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFC7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973
)

# Fields of a hello: offset, size, and the codes with which a flipped bit is refused, by either side.
HELLO_FIELDS: Final[dict[str, tuple[int, int, set[RefusalCode]]]] = {
    "magic": (0, 4, {INTEGRITY}),
    "version": (4, 2, {INTEGRITY}),
    "role": (6, 1, {INTEGRITY}),
    "attestor kind": (7, 1, {INTEGRITY, AUTHENTICATION}),
    "nonce": (8, 32, {AUTHENTICATION}),
    "guest id": (40, 16, {AUTHENTICATION}),
    "RAM pages": (56, 8, {INTEGRITY, AUTHENTICATION}),
    "page size": (64, 4, {INTEGRITY}),
    "vCPUs": (68, 4, {INTEGRITY, AUTHENTICATION}),
    "channels": (72, 2, {INTEGRITY, AUTHENTICATION}),
    "freshness": (74, 1, {INTEGRITY, AUTHENTICATION}),
    "flags": (75, 1, {INTEGRITY, AUTHENTICATION}),
    "reserved": (76, 4, {INTEGRITY}),
    "session counter": (80, 8, {INTEGRITY, AUTHENTICATION}),
    "policy digest": (88, 48, {AUTHENTICATION}),
    "ledger key": (136, 32, {AUTHENTICATION}),
    "X25519": (168, 32, {AUTHENTICATION}),
}
# Every field of every message. Only a source's encapsulation key can be out of range, so that nobody can answer it.
FIELDS: Final = {
    **{(1, name): field for name, field in HELLO_FIELDS.items()},
    (1, "encapsulation key"): (200, 1184, {INTEGRITY, AUTHENTICATION}),
    **{(2, name): field for name, field in HELLO_FIELDS.items()},
    (2, "ciphertext"): (200, 1088, {AUTHENTICATION}),
    (2, "evidence"): (DESTINATION_HELLO_BYTES, None, {AUTHENTICATION}),
    (3, "confirmation"): (0, 48, {AUTHENTICATION}),
    (3, "evidence"): (48, None, {AUTHENTICATION}),
    (4, "session id"): (0, 16, {AUTHENTICATION}),
    (4, "confirmation"): (16, 48, {AUTHENTICATION}),
}
# Reports are verified for each attempt; of their long fields each 23rd byte is enough.
STRIDE: Final = {"psk": 1, "snp": 23, "emulated": 23}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def run_changed(kind: str, number: int, change: Callable[[bytes], bytes], *codes: RefusalCode) -> None:
    """A handshake in which message `number` arrives changed: refused, and the guest goes on at the source."""
    session = Session.of(kind)
    with refused(*codes):
        session.run(lambda each, data: change(data) if each == number else data)
    assert not session.is_established()
    assert (session.far.state is State.KEYED) is (number == 4)
    assert session.is_over()
    session.close()


# Flipped, truncated, lengthened


@pytest.mark.parametrize(("number", "name"), FIELDS, ids=lambda value: str(value))
def test_every_field_counts(kind: str, number: int, name: str) -> None:
    offset, size, codes = FIELDS[number, name]
    whole = Session.of(kind).until(number).sent[number]
    stop = len(whole) if size is None else offset + size
    stride = STRIDE[kind] if stop - offset > 4 else 1
    for place in range(offset, stop, stride):
        run_changed(kind, number, lambda data, at=place: flipped(data, at, 1 << at % 8), *codes)  # type: ignore[misc]


def test_the_fields_are_all_there_is() -> None:
    session = Session.of("psk")
    session.run()
    for number, message in session.sent.items():
        fields = [field for (each, _), field in FIELDS.items() if each == number]
        ends = [offset + (len(message) - offset if size is None else size) for offset, size, _ in fields]
        assert [offset for offset, _, _ in fields] == [0, *ends[:-1]]
        assert ends[-1] == len(message)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_messages_have_one_length(kind: str, number: int) -> None:
    message = Session.of(kind).until(number).sent[number]
    heads = {1: SOURCE_HELLO_BYTES, 2: DESTINATION_HELLO_BYTES, 3: 48, 4: 16}
    codes = INTEGRITY, AUTHENTICATION
    for length in {0, 1, heads[number] - 1, heads[number], len(message) - 1} - {len(message)}:
        run_changed(kind, number, lambda data, to=length: data[:to], *codes)  # type: ignore[misc]
    for tail in (b"\0", b"\xff", bytes(1 << 16), message):
        run_changed(kind, number, lambda data, more=tail: data + more, *codes)  # type: ignore[misc]


@pytest.mark.parametrize("number", [2, 3])
def test_another_valid_signature_of_the_same_report_is_refused(number: int) -> None:
    """(r, n - s) verifies wherever (r, s) does: the confirmations see what the signature does not."""
    start = (DESTINATION_HELLO_BYTES if number == 2 else 48) + 4

    def change(data: bytes) -> bytes:
        raw = data[start : start + 1184]
        report = parse_report_untrusted(raw)
        other = with_signature(raw, report.signature_r, P384_ORDER - report.signature_s)
        return data[:start] + other + data[start + 1184 :]

    session = Session.of("snp").until(number)
    arrives = change(session.sent[number])
    assert arrives != session.sent[number]
    if number == 2:
        session.step(3, arrives)  # the source cannot see it yet
        arrives = session.sent[3]
    with pytest.raises(AttestationError, match="source did not confirm"):
        session.step(4, arrives)
    assert session.far.state is State.IDLE
    assert session.is_over()


# Replayed, reflected, dropped, swapped


def test_replayed_messages_do_nothing(kind: str) -> None:
    """Each message a second time, right after the first: refused, or answered as a stranger's, and the session goes on."""
    session = Session.of(kind)
    for number in range(1, 6):
        session.send(number)
        arrived = session.sent.get(number - 1, b"")
        if number == 2:
            assert session.far.answer(9, arrived) != session.sent[2]
        elif number == 4:
            for attempt_number in (session.attempt, 9):
                with refused(STATE):
                    session.far.establish(attempt_number, arrived)
        elif number > 1:
            state = session.near.state
            with refused(STATE):
                session.step(number, arrived)
            assert session.near.state is state
    assert session.is_established()
    with refused(STATE):
        session.far.answer(9, session.sent[1])


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_recorded_messages_are_worth_nothing_later(kind: str, number: int) -> None:
    recorded = Session.of(kind)
    recorded.run()
    if number > 1:
        run_changed(kind, number, lambda _data: recorded.sent[number], AUTHENTICATION)
        return
    # Anybody can send a recorded hello; what comes after it is missing or old.
    far = destination(attestors(kind)[1])
    far.answer(1, recorded.sent[1])
    with refused(AUTHENTICATION):
        far.establish(1, recorded.sent[3])
    assert far.state is State.IDLE
    run_changed(kind, 1, lambda _data: recorded.sent[1], AUTHENTICATION)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_reflected_messages_are_refused(kind: str, number: int) -> None:
    """What a side said comes back to it in place of each message that it waits for."""
    session = Session.of(kind).until(number)
    message = session.sent[number]
    codes = INTEGRITY, AUTHENTICATION
    if number in (1, 3):  # the source's own
        if number == 3:
            session.send(4)
        with refused(*codes):
            session.step(3 if number == 1 else 5, message)
        assert session.near.state is State.ABORTED
        assert session.is_over()
        return
    far = session.far if number == 2 else destination(attestors(kind)[1])
    with refused(*codes):
        far.answer(8, message)
    far.answer(9, source_handshake(attestors(kind)[0]).hello())
    with refused(*codes):
        far.establish(9, message)
    assert far.state is State.IDLE


def test_evidence_and_confirmation_cannot_be_reflected(kind: str) -> None:
    """Parts of a side's own messages, put together as the other side's would be."""
    session = Session.of(kind).until(3)
    own_evidence = session.sent[2][DESTINATION_HELLO_BYTES:]
    with refused(AUTHENTICATION):
        session.step(4, session.sent[3][:48] + own_evidence)
    session = Session.of(kind).until(4)
    with refused(AUTHENTICATION):
        session.step(5, pack_established(session.sent[4][:16], session.sent[3][:48]))
    session = Session.of(kind).until(2)
    own_hello = session.sent[1][:200] + session.sent[2][200:DESTINATION_HELLO_BYTES]
    with refused(INTEGRITY):
        session.step(3, own_hello + session.sent[2][DESTINATION_HELLO_BYTES:])


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_dropped_messages_leave_the_guest_where_it_is(kind: str, number: int) -> None:
    """The next message arrives in place of the dropped one, or nothing does."""
    session = Session.of(kind).until(number)
    if number in (2, 4):
        assert session.near.state is (State.PREPARED if number == 2 else State.PROVED)
    else:
        assert session.far.state is State.IDLE
    later = Session.of(kind)
    later.run()
    if number == 1:
        with refused(STATE):
            session.far.establish(1, later.sent[3])
    elif number == 2:
        with refused(INTEGRITY):
            session.near.establish(later.sent[4])
    assert session.is_over()


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_messages_of_two_sessions_cannot_be_swapped(kind: str, number: int) -> None:
    one, two = Session.of(kind).until(number), Session.of(kind).until(number)
    one.sent[number], two.sent[number] = two.sent[number], one.sent[number]
    for session in (one, two):
        # A hello that changes places is answered; only its own source can tell.
        failing = 3 if number == 1 else number + 1
        for step in range(number + 1, failing):
            session.send(step)
        with refused(AUTHENTICATION):
            session.send(failing)
        assert not session.is_established()
        assert session.is_over()


def test_proofs_of_two_attempts_at_one_destination_cannot_be_swapped(kind: str) -> None:
    attestor, other = attestors(kind)
    far = destination(other)
    one, two = (Session(source(attestor), far, attempt=number).until(3) for number in (1, 2))
    with refused(AUTHENTICATION):
        one.step(4, two.sent[3])
    with refused(AUTHENTICATION):
        two.step(4, one.sent[3])
    assert far.state is State.IDLE
    assert one.is_over()
    assert two.is_over()


def test_two_destinations_cannot_both_have_the_session(kind: str) -> None:
    """The hello goes to two; the source takes one reply, and the other destination gets no proof that it takes."""
    attestor, other = attestors(kind)
    near, first, second = source(attestor), destination(other), destination(other)
    hello = near.prepare(2)
    reply, _ = first.answer(1, hello), second.answer(1, hello)
    proof = near.establish(reply)
    with refused(AUTHENTICATION):
        second.establish(1, proof)
    near.confirm(first.establish(1, proof))
    assert (first.state, second.state) == (State.KEYED, State.IDLE)


# A peer that is authentic, or nearly so, and evil


@pytest.mark.parametrize("point", LOW_ORDER, ids=lambda point: point[:4].hex())
def test_low_order_point_of_a_source_is_refused_and_leaves_no_trace(point: bytes) -> None:
    far = destination()
    hello = replace(parse_hello_untrusted(source_handshake().hello()), x25519=point)
    with refused(INTEGRITY):
        far.answer(1, hello.pack())
    assert not far._attempts


@pytest.mark.parametrize("point", LOW_ORDER, ids=lambda point: point[:4].hex())
def test_low_order_point_of_an_authentic_destination_is_refused(point: bytes) -> None:
    near = source_handshake()
    opened = rewritten(attempt(near.hello()), near.hello(), x25519=point)
    with pytest.raises(MalformedData, match="low order"):
        near.prove(opened.reply())


def test_ciphertext_changed_by_whoever_can_make_evidence_shows_in_the_confirmation(kind: str) -> None:
    """Implicit rejection: the source gets another secret and no error, and nothing that it then says is taken."""
    near_attestor, far_attestor = attestors(kind)
    near = source_handshake(near_attestor)
    opened = attempt(near.hello(), far_attestor)
    rewritten(opened, near.hello(), kem=flipped(opened._own.kem, 700))
    proof = near.prove(opened.reply())
    with pytest.raises(AttestationError, match="source did not confirm"):
        opened.finish(proof)


def test_source_that_does_not_have_the_keys_is_refused(kind: str) -> None:
    """Evidence of the right transcript, and no confirmation but a guessed one."""
    session = Session.of(kind).until(3)
    with refused(AUTHENTICATION):
        session.step(4, bytes(48) + session.sent[3][48:])


def test_encapsulation_key_out_of_range_is_refused_and_leaves_no_trace() -> None:
    far = destination()
    parsed = parse_hello_untrusted(source_handshake().hello())
    with refused(INTEGRITY):
        far.answer(1, replace(parsed, kem=b"\xff" * 1184).pack())
    assert not far._attempts


def test_other_pre_shared_key_is_refused_by_both() -> None:
    session = Session(source(), destination(OTHER_PSK)).until(2)
    with refused(AUTHENTICATION):
        session.send(3)
    assert session.is_over()
    near = source_handshake(OTHER_PSK)
    opened = attempt(near.hello())
    opened_by_thief = attempt(near.hello(), OTHER_PSK)
    with pytest.raises(AttestationError, match="same pre-shared key"):
        opened.finish(near.prove(opened_by_thief.reply()))


# Kinds and policies


@pytest.mark.parametrize("near", KINDS)
@pytest.mark.parametrize("far", KINDS)
def test_both_sides_need_the_same_kind(near: str, far: str) -> None:
    session = Session(source(attestors(near)[0]), destination(attestors(far)[1]))
    if near == far:
        session.run()
        assert session.is_established()
        return
    with refused(AUTHENTICATION):
        session.run()
    assert not session.far._attempts
    assert session.is_over()
    # A destination that lies about its kind is found out by its evidence.
    handshake = source_handshake(attestors(near)[0])
    hello = replace(parse_hello_untrusted(handshake.hello()), attestor=AttestorKind[far.upper()]).pack()
    opened = attempt(hello, attestors(far)[1])
    with pytest.raises(AttestationError, match="no destination with this kind"):
        handshake.prove(rewritten(opened, handshake.hello()).reply())
    rewritten(opened, handshake.hello(), attestor=AttestorKind[near.upper()])
    if {near, far} == {"snp", "emulated"}:  # here both have the same root, which nobody gives an SNP attestor
        assert handshake.prove(opened.reply())
        return
    with pytest.raises(AttestationError):
        handshake.prove(opened.reply())


@pytest.mark.parametrize("number", [0, 4, 255])
def test_unknown_kinds_are_refused(number: int) -> None:
    hello = bytearray(source_handshake().hello())
    hello[7] = number
    with refused(INTEGRITY):
        destination().answer(1, bytes(hello))


def test_emulated_reports_are_refused_by_whoever_pins_amds_roots() -> None:
    """Also where they come under the name of real ones: nobody takes them but who was given the authority's file."""
    strict = snp()
    strict._roots = AMD_ROOTS
    for near, far in ((snp(), strict), (strict, snp())):
        session = Session(source(near), destination(far))
        with pytest.raises(AttestationError, match="not one of the pinned roots"):
            session.run()
        assert session.is_over()


def test_emulated_reports_of_another_authority_are_refused() -> None:
    other = type(authority()).generate(Product.GENOA, now=AT)
    near, _ = attestors("emulated")
    session = Session(source(near), destination(EmulatedAttestor(other, now=lambda: AT)))
    with pytest.raises(AttestationError, match="not one of the pinned roots"):
        session.run()
    assert session.is_over()


@pytest.mark.parametrize("refusing", ["source", "destination"])
@pytest.mark.parametrize(
    ("rule", "fields"),
    [
        ("allow_debug", {"policy": 0x30000 | 1 << GuestPolicyBit.DEBUG}),
        ("allow_migration_agent", {"report_id_ma": bytes(32)}),
        ("measurements", {"measurement": bytes(48)}),
        ("vmpls", {"vmpl": 1}),
        ("allow_masked_chip_id", {"chip_id": bytes(64)}),
    ],
)
def test_policy_of_either_side_refuses(refusing: str, rule: str, fields: dict[str, int | bytes]) -> None:
    lines: list[str] = []
    judge = snp()
    judge._on_refused = lines.append
    judged = snp(provider=EmulatedProvider(authority(), **fields))
    near, far = (judge, judged) if refusing == "source" else (judged, judge)
    session = Session(source(near), destination(far))
    with refused(POLICY):
        session.run()
    assert len(lines) == 1
    assert f"rule {rule} refuses" in lines[0]
    assert session.far.state is State.IDLE
    assert session.is_over()


def test_a_peer_on_the_same_processor_is_refused_unless_allowed() -> None:
    provider = EmulatedProvider(authority())
    session = Session(source(snp(provider=provider)), destination(snp(provider=provider)))
    with refused(POLICY):
        session.run()
    relaxed = replace(strict_policy(Product.GENOA), allow_same_machine=True)
    session = Session(source(snp(relaxed, provider)), destination(snp(relaxed, provider)))
    session.run()
    assert session.is_established()


def test_a_policy_is_not_asked_about_evidence_of_another_handshake() -> None:
    """Such evidence proves nothing of the peer, so the code is not that of a policy."""
    judged = snp(provider=EmulatedProvider(authority(), measurement=bytes(48)))
    recorded = attempt(source_handshake(snp()).hello(), judged)
    near = source_handshake(snp())
    own = attempt(near.hello(), judged)
    with refused(AUTHENTICATION):
        near.prove(own.reply()[:DESTINATION_HELLO_BYTES] + recorded.reply()[DESTINATION_HELLO_BYTES:])


def test_a_machine_without_snp_says_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no SNP reports on this machine"):
        find_provider(tsm=tmp_path / "tsm", device=tmp_path / "sev-guest")
