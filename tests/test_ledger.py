"""The chain of a guest's moves: what two sides sign, and every way to change it that has to show."""

from __future__ import annotations

import copy
import hashlib
import pickle
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagexfer.attestation import Claims, PskAttestor
from pagexfer.errors import (
    AttestationError,
    KeyPoisoned,
    LedgerRefused,
    MalformedData,
    PolicyRefused,
    RemoteProtocolError,
)
from pagexfer.svsm.ledger import (
    LedgerKey,
    check_chain,
    next_body,
    record_hash,
    verify_chain,
)
from pagexfer.wire.handshake import AttestorKind, Role, parse_hello_untrusted
from pagexfer.wire.ledger import (
    Record,
    RecordBody,
    pack_ledger,
    parse_ledger_untrusted,
)

from .journeys import forged
from .wire_vectors import data_of, load

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pagexfer.svsm.ledger import Evidence

VECTORS = load("ledger")["ledgers"]
PSK = PskAttestor(bytes.fromhex(VECTORS[2]["psk"]))
CHAIN = parse_ledger_untrusted(data_of(VECTORS[2]))


def by_psk(evidence: Evidence) -> Claims:
    assert evidence.kind is AttestorKind.PSK
    return PSK.verify(evidence.data, evidence.report_data)


def rule_that_refuses(records: Sequence[Record]) -> tuple[str, int]:
    with pytest.raises(LedgerRefused) as caught:
        verify_chain(records, by_psk)
    assert f"rule {caught.value.rule} refuses move {caught.value.move}" in str(caught.value)
    return caught.value.rule, caught.value.move


def another_chain(moves: int = 2) -> tuple[Record, ...]:
    """A ledger like the vectors', of another guest, with keys of its own."""
    records: tuple[Record, ...] = ()
    for record in CHAIN[:moves]:
        records = forged(records, record.proofs, b"another guest   ")
    return records


# Against the vectors, which share no code with the library


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: str(vector["name"]))
def test_chain_of_vector(vector: dict[str, list[dict[str, str]]]) -> None:
    records = parse_ledger_untrusted(data_of(vector))
    moves = verify_chain(records, by_psk)
    assert [move.record for move in moves] == list(records)
    assert [record_hash(record).hex() for record in records] == [
        values["hash"] for values in vector["records"]
    ]
    for number, (record, values) in enumerate(zip(records, vector["records"], strict=True)):
        assert next_body(records[:number], record.proofs, bytes.fromhex(values["manifest"])) == record.body
    for move in moves:
        assert move.source == move.destination == Claims(AttestorKind.PSK, "holder of the pre-shared key")
        assert move.continuous is None


def test_evidence_that_nobody_can_verify_is_told_as_such() -> None:
    moves = verify_chain(CHAIN, lambda _evidence: None)
    assert {(move.source, move.destination, move.continuous) for move in moves} == {(None, None, None)}


def test_what_a_verifier_of_evidence_gets() -> None:
    seen: list[Evidence] = []
    verify_chain(CHAIN[:1], lambda evidence: seen.append(evidence))
    source, destination = seen
    proofs, body = CHAIN[0].proofs, CHAIN[0].body
    assert [(item.move, item.role, item.data) for item in seen] == [
        (1, Role.SOURCE, proofs.source_evidence),
        (1, Role.DESTINATION, proofs.destination_evidence),
    ]
    covered = hashlib.sha384(b"pagexfer v1 evidence" + body.transcript).digest()
    assert source.report_data == b"pagexfer src v01" + covered
    assert destination.report_data == b"pagexfer dst v01" + covered
    # Each side's evidence was judged under the other side's policy.
    assert source.policy_digest == body.destination_policy_digest
    assert destination.policy_digest == body.source_policy_digest


# Every change shows


def test_every_byte_of_a_ledger_counts() -> None:
    packed = bytearray(pack_ledger(CHAIN[:1]))
    for offset in range(len(packed)):
        packed[offset] ^= 1
        with pytest.raises((MalformedData, LedgerRefused)):
            verify_chain(parse_ledger_untrusted(bytes(packed)), by_psk)
        packed[offset] ^= 1
    assert verify_chain(parse_ledger_untrusted(bytes(packed)), by_psk)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_flip_in_a_chain_shows_without_its_evidence(data: st.DataObject) -> None:
    packed = bytearray(pack_ledger(CHAIN))
    bit = data.draw(st.integers(0, len(packed) * 8 - 1))
    packed[bit // 8] ^= 1 << bit % 8
    with pytest.raises((MalformedData, LedgerRefused)):
        check_chain(parse_ledger_untrusted(bytes(packed)))


FIELDS: dict[str, Callable[[RecordBody], object]] = {
    "move_number": lambda body: replace(body, move=body.move + 1),
    "previous_record": lambda body: replace(body, previous=bytes(47) + b"\1"),
    "transcript": lambda body: replace(body, transcript=bytes(48)),
    "evidence_digest": lambda body: replace(body, source_evidence_digest=bytes(48)),
    "evidence_digest of the destination": lambda body: replace(body, destination_evidence_digest=bytes(48)),
    "terms: guest": lambda body: replace(body, guest_id=bytes(16)),
    "terms: freshness": lambda body: replace(body, freshness=type(body.freshness)(3)),
    "terms: source's policy": lambda body: replace(body, source_policy_digest=bytes(48)),
    "terms: destination's policy": lambda body: replace(body, destination_policy_digest=bytes(48)),
    "source_signature: manifest": lambda body: replace(body, manifest_digest=bytes(48)),
}


@pytest.mark.parametrize("rule", FIELDS)
@pytest.mark.parametrize("move", [1, 3])
def test_each_field_of_a_body_is_checked_by_itself(rule: str, move: int) -> None:
    changed = FIELDS[rule](CHAIN[move - 1].body)
    assert isinstance(changed, RecordBody)
    records = list(CHAIN)
    records[move - 1] = replace(records[move - 1], body=changed)
    assert rule_that_refuses(records)[0] == rule.split()[0].rstrip(":")


@pytest.mark.parametrize(
    ("part", "rule"),
    [
        ("source_hello", "transcript"),
        ("destination_hello", "transcript"),
        ("source_evidence", "evidence_digest"),
        ("destination_evidence", "evidence_digest"),
    ],
)
def test_each_proof_belongs_to_its_record(part: str, rule: str) -> None:
    first, second = CHAIN[:2]
    proofs = replace(second.proofs, **{part: getattr(first.proofs, part)})
    assert rule_that_refuses([first, replace(second, proofs=proofs)]) == (rule, 2)


def test_hellos_that_are_none() -> None:
    first = CHAIN[0]
    for proofs in (
        replace(first.proofs, source_hello=b"hello"),
        replace(first.proofs, source_hello=first.proofs.destination_hello),
        replace(first.proofs, destination_hello=first.proofs.source_hello),
    ):
        assert rule_that_refuses([replace(first, proofs=proofs)]) == ("hellos", 1)


@pytest.mark.parametrize(
    "change", [{"guest_id": bytes(16)}, {"freshness": 3}, {"attestor": AttestorKind.SNP}], ids=str
)
def test_hellos_that_do_not_agree(change: dict[str, object]) -> None:
    first = CHAIN[0]
    hello = replace(parse_hello_untrusted(first.proofs.destination_hello), **change)  # type: ignore[arg-type]
    proofs = replace(first.proofs, destination_hello=hello.pack())
    assert rule_that_refuses([replace(first, proofs=proofs)]) == ("hellos", 1)
    with pytest.raises(MalformedData):
        next_body([], proofs, b"manifest")


def test_records_reordered_left_out_or_twice() -> None:
    first, second, third = CHAIN
    assert rule_that_refuses([second, first, third]) == ("move_number", 1)
    assert rule_that_refuses([first, third]) == ("move_number", 2)
    assert rule_that_refuses([second, third]) == ("move_number", 1)
    assert rule_that_refuses([first, first, third]) == ("move_number", 2)
    assert rule_that_refuses([first, second, second]) == ("move_number", 3)


def test_a_ledger_cut_off_at_its_end_is_a_ledger() -> None:
    """The limit that the documentation states: no chain shows that its last record is the newest."""
    assert len(verify_chain(CHAIN[:2], by_psk)) == 2


def test_records_of_another_guest() -> None:
    first, second = another_chain()
    assert len(check_chain([first, second])) == 2
    for records in ([CHAIN[0], second], [first, CHAIN[1], CHAIN[2]]):
        with pytest.raises(LedgerRefused) as caught:
            check_chain(records)
        assert caught.value.rule == "previous_record"


def test_a_record_of_another_guest_that_follows_the_chain() -> None:
    records = forged(CHAIN, CHAIN[0].proofs, b"another guest   ")
    with pytest.raises(LedgerRefused) as caught:
        check_chain(records)
    assert (caught.value.rule, caught.value.move) == ("guest_id", 4)
    assert len(check_chain(forged(CHAIN, CHAIN[0].proofs))) == 4


def test_signatures_swapped_or_by_another_key() -> None:
    first = CHAIN[0]
    swapped = replace(
        first, source_signature=first.destination_signature, destination_signature=first.source_signature
    )
    assert rule_that_refuses([swapped]) == ("source_signature", 1)
    twice = replace(first, destination_signature=first.source_signature)
    assert rule_that_refuses([twice]) == ("destination_signature", 1)
    other = replace(first, source_signature=LedgerKey().sign(Role.SOURCE, first.body))
    assert rule_that_refuses([other]) == ("source_signature", 1)
    other = replace(first, destination_signature=LedgerKey().sign(Role.DESTINATION, first.body))
    assert rule_that_refuses([other]) == ("destination_signature", 1)


def test_one_side_alone_cannot_sign_for_both() -> None:
    """A key that both hellos name still signs under the role's label."""
    key, same = LedgerKey(), LedgerKey()
    same._key, same.public = key._key, key.public  # type: ignore[misc]
    proofs = CHAIN[0].proofs
    hellos = [
        replace(parse_hello_untrusted(hello), ledger_key=key.public).pack()
        for hello in (proofs.source_hello, proofs.destination_hello)
    ]
    proofs = replace(proofs, source_hello=hellos[0], destination_hello=hellos[1])
    body = next_body([], proofs, b"manifest")
    signature = key.sign(Role.SOURCE, body)
    check_chain([Record(body, signature, same.sign(Role.DESTINATION, body), proofs)])
    with pytest.raises(LedgerRefused, match="destination_signature"):
        check_chain([Record(body, signature, signature, proofs)])


def test_signed_anew_by_keys_that_no_evidence_binds() -> None:
    """Whoever rewrites a ledger can make every signature; the evidence is what he cannot make."""
    records = another_chain()
    check_chain(records)
    assert rule_that_refuses(records) == ("evidence", 1)


def test_a_key_in_the_hello_that_is_no_point() -> None:
    proofs = CHAIN[0].proofs
    hello = replace(parse_hello_untrusted(proofs.source_hello), ledger_key=b"\x02" + bytes(31)).pack()
    proofs = replace(proofs, source_hello=hello)
    body = next_body([], proofs, b"manifest")
    with pytest.raises(LedgerRefused, match="source_signature"):
        check_chain([Record(body, bytes(64), bytes(64), proofs)])


# Continuity: the machine that got the guest is the one that gives it away


def claims_of(machines: dict[tuple[int, Role], dict[str, object]]) -> Callable[[Evidence], Claims | None]:
    def verify(evidence: Evidence) -> Claims | None:
        details = machines.get((evidence.move, evidence.role))
        return None if details is None else Claims(AttestorKind.SNP, "a guest", details)

    return verify


def machine(name: str) -> dict[str, object]:
    return {"certified_chip": 64 * name, "report_id": 32 * name}


A, B, C, D = map(machine, ("aa", "bb", "cc", "dd"))
WAY: dict[tuple[int, Role], dict[str, object]] = {
    (1, Role.SOURCE): A,
    (1, Role.DESTINATION): B,
    (2, Role.SOURCE): B,
    (2, Role.DESTINATION): C,
    (3, Role.SOURCE): C,
    (3, Role.DESTINATION): D,
}


def test_a_continuous_chain_is_told_as_such() -> None:
    assert [move.continuous for move in verify_chain(CHAIN, claims_of(WAY))] == [None, True, True]


@pytest.mark.parametrize(
    "left_from",
    [
        A,
        {**B, "certified_chip": "aa"},
        {**B, "report_id": "launched again"},
        {**B, "certified_chip": None} | {"report_id": "0"},
    ],
    ids=["another machine", "another chip", "another launch", "another launch on a chip that nothing names"],
)
def test_a_guest_that_left_from_where_it_never_arrived_is_refused(left_from: dict[str, object]) -> None:
    with pytest.raises(LedgerRefused) as caught:
        verify_chain(CHAIN, claims_of(WAY | {(2, Role.SOURCE): left_from}))
    assert (caught.value.rule, caught.value.move) == ("continuity", 2)


def test_continuity_where_not_all_is_known() -> None:
    chip_only: dict[str, object] = {"certified_chip": B["certified_chip"]}
    masked: dict[str, object] = {**B, "certified_chip": None}
    for left_from, expected in ((chip_only, True), (masked, True), ({}, None)):
        moves = verify_chain(CHAIN[:2], claims_of(WAY | {(2, Role.SOURCE): left_from}))
        assert moves[1].continuous is expected
    without = {key: value for key, value in WAY.items() if key != (1, Role.DESTINATION)}
    assert verify_chain(CHAIN[:2], claims_of(without))[1].continuous is None


def test_a_pre_shared_key_after_reports_is_refused_unless_asked_for() -> None:
    """It names no machine: the guest could have come from anywhere."""
    psk, machines = CHAIN[:2], claims_of(WAY)
    hellos = [
        replace(parse_hello_untrusted(hello), attestor=AttestorKind.SNP).pack()
        for hello in (psk[0].proofs.source_hello, psk[0].proofs.destination_hello)
    ]
    reports = replace(psk[0].proofs, source_hello=hellos[0], destination_hello=hellos[1])
    attested = forged((), reports)
    chain = forged(attested, psk[1].proofs)
    with pytest.raises(LedgerRefused) as caught:
        verify_chain(chain, machines)
    assert (caught.value.rule, caught.value.move) == ("continuity", 2)
    assert len(verify_chain(chain, machines, psk_after_reports=True)) == 2
    # A guest may begin with a pre-shared key and have reports from then on.
    assert len(verify_chain(forged(psk[:1], reports), machines)) == 2


@pytest.mark.parametrize("error", [AttestationError("no"), PolicyRefused("no"), MalformedData("no")])
def test_evidence_that_is_refused(error: RemoteProtocolError) -> None:
    def verify(evidence: Evidence) -> Claims | None:
        if (evidence.move, evidence.role) == (2, Role.DESTINATION):
            raise error
        return None

    with pytest.raises(LedgerRefused, match="the destination's evidence: no") as caught:
        verify_chain(CHAIN, verify)
    assert (caught.value.rule, caught.value.move) == ("evidence", 2)


# Keys


def test_a_ledger_key_signs_once() -> None:
    key = LedgerKey()
    key.sign(Role.SOURCE, CHAIN[0].body)
    with pytest.raises(KeyPoisoned):
        key.sign(Role.SOURCE, CHAIN[0].body)
    assert len(key.public) == 32


def test_a_dropped_ledger_key_signs_nothing() -> None:
    key = LedgerKey()
    key.drop()
    with pytest.raises(KeyPoisoned):
        key.sign(Role.SOURCE, CHAIN[0].body)


def test_a_ledger_key_does_not_leave() -> None:
    key = LedgerKey()
    assert repr(key) == f"LedgerKey({key.public.hex()}, [REDACTED])"
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            attempt(key)
