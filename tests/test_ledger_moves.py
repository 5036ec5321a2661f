"""The ledger in a move: how it travels, who signs what when, and what either side refuses."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from pagexfer.attestation.insecure.attestor import strict_policy
from pagexfer.attestation.policy import check_report_data
from pagexfer.attestation.snp import Product
from pagexfer.attestation.snp.attestor import as_claims, verify_evidence
from pagexfer.errors import (
    IntegrityError,
    KeyPoisoned,
    LedgerRefused,
    LocalProtocolError,
    MalformedData,
    PolicyRefused,
    RemoteProtocolError,
    ReplayError,
)
from pagexfer.svsm.ledger import (
    LedgerKey,
    check_next,
    next_body,
    verify_chain,
)
from pagexfer.svsm.source import SourceSvsm
from pagexfer.testing import SvsmPair
from pagexfer.testing.snp_ca import AT
from pagexfer.wire.bundle import BundleKind
from pagexfer.wire.constants import FINAL_EPOCH
from pagexfer.wire.handshake import Role
from pagexfer.wire.ledger import (
    MAX_LEDGER_BYTES,
    Record,
    pack_ledger,
    parse_ledger_untrusted,
)
from pagexfer.wire.slot import SessionStatus as State

from .handshakes import authority
from .journeys import Journey, Limited, emulated, forged
from .rule_breaking import destination_is_dead, refused, sealed_by_source
from .small_guests import ATTESTOR, Move
from .wire_vectors import data_of, load

if TYPE_CHECKING:
    from pagexfer.attestation import Claims
    from pagexfer.svsm.ledger import Evidence

CHAIN = parse_ledger_untrusted(data_of(load("ledger")["ledgers"][2]))


def test_three_moves_make_a_chain_of_three() -> None:
    journey = Journey()
    before = journey.memory.words.copy()
    pairs = []
    for number in range(1, 4):
        pair = journey.next_pair()
        journey.arrive(pair)
        pairs.append(pair)
        moves = verify_chain(
            parse_ledger_untrusted(journey.ledger), lambda item: ATTESTOR.verify(item.data, item.report_data)
        )
        assert [move.record.body.move for move in moves] == list(range(1, number + 1))
        assert moves[-1].record.body.manifest_digest == hashlib.sha384(pair.source._manifest).digest()
        assert moves[-1].terms.freshness is pair.source.freshness
    assert np.array_equal(journey.memory.words, before)
    assert journey.gate.running
    assert len({move.terms.guest_id for move in moves}) == 1
    assert (
        len(
            {
                key
                for move in moves
                for key in (move.terms.source_ledger_key, move.terms.destination_ledger_key)
            }
        )
        == 6
    )
    journey.close()


def by_reports(evidence: Evidence) -> Claims:
    claims = verify_evidence(evidence.data, at=AT, roots=(authority().root,), crl=None)
    check_report_data(claims, evidence.report_data)
    return as_claims(evidence.kind, claims)


def test_reports_show_that_the_guest_left_from_where_it_arrived() -> None:
    first, second, third = emulated(), emulated(), emulated()
    journey = Journey()
    journey.arrive(journey.next_pair(first, second))
    journey.arrive(journey.next_pair(second, third))
    one, two = verify_chain(parse_ledger_untrusted(journey.ledger), by_reports)
    assert (one.continuous, two.continuous) == (None, True)
    assert len({side.details["report_id"] for side in (one.source, two.source, two.destination) if side}) == 3
    assert one.record.body.source_policy_digest == first.policy_digest
    journey.close()


def test_reports_show_that_the_guest_left_from_somewhere_else() -> None:
    journey = Journey()
    journey.arrive(journey.next_pair(emulated(), emulated()))
    journey.arrive(journey.next_pair(emulated(), emulated()))
    with pytest.raises(LedgerRefused, match="certified_chip") as caught:
        verify_chain(parse_ledger_untrusted(journey.ledger), by_reports)
    assert (caught.value.rule, caught.value.move) == ("continuity", 2)
    journey.close()


def test_an_attestors_policy_limits_the_moves() -> None:
    policy = replace(strict_policy(Product.GENOA), maximum_moves=0)
    pair = Journey().next_pair(emulated(), emulated(policy))
    pair.handshake()
    pair.open_channels()
    with pytest.raises(PolicyRefused, match="maximum_moves refuses: found 1, wanted at most 0"):
        pair.ledger()


def test_a_move_without_an_end_leaves_no_record() -> None:
    move = Move()
    move.pair.until_manifest()
    move.pair.manifest()
    move.pair.ready()
    with pytest.raises(LocalProtocolError):
        _ = move.pair.destination.ledger
    move.pair.send(move.pair.seal_answer(BundleKind.ABORT_TOKEN))
    with pytest.raises(LocalProtocolError):
        _ = move.pair.destination.ledger
    # The guest goes on at its source, and its next move is its first.
    again = Journey()
    again.memory, again.gate = move.guest.memory, move.guest.gate
    again.arrive(again.next_pair())
    assert len(parse_ledger_untrusted(again.ledger)) == 1
    move.close()
    again.close()


def open_to_ledger(move: Move) -> SvsmPair:
    move.pair.handshake()
    move.pair.open_channels()
    return move.pair


GOOD = pack_ledger(CHAIN)


@pytest.mark.parametrize(
    ("ledger", "error"),
    [
        (b"no ledger", MalformedData),
        (GOOD[:-1], MalformedData),
        (GOOD[:-1] + bytes([GOOD[-1] ^ 1]), LedgerRefused),
        (pack_ledger(CHAIN[1:]), LedgerRefused),
        (GOOD, LedgerRefused),  # a good one, of another guest
    ],
    ids=["other bytes", "cut", "flipped", "first record missing", "another guest's"],
)
def test_a_destination_refuses_a_ledger_that_is_none_of_this_guest(
    ledger: bytes, error: type[RemoteProtocolError]
) -> None:
    move = Move()
    pair = open_to_ledger(move)
    refused(move, sealed_by_source(pair, BundleKind.LEDGER, ledger), error)
    move.close()


def test_a_second_ledger_is_refused() -> None:
    move = Move()
    pair = open_to_ledger(move)
    pair.ledger()
    with pytest.raises(LocalProtocolError):
        pair.ledger()
    refused(move, sealed_by_source(pair, BundleKind.LEDGER, b""), ReplayError)
    move.close()


def test_a_source_keeps_its_manifest_until_the_ledger_was_sent() -> None:
    move = Move()
    pair = open_to_ledger(move)
    pair.epoch()
    pair.park()
    pair.epoch()
    pair.vcpus()
    with pytest.raises(LocalProtocolError, match="ledger"):
        pair.manifest()
    pair.ledger()
    pair.manifest()
    with pytest.raises(LocalProtocolError, match="manifest"):
        pair.source.ledger(memoryview(bytearray(1000)))
    move.close()


def test_a_destination_that_got_no_ledger_refuses_the_manifest() -> None:
    move = Move()
    pair = open_to_ledger(move)
    pair.epoch()
    pair.park()
    pair.epoch()
    pair.vcpus()
    manifest = sealed_by_source(pair, BundleKind.MANIFEST, pair.destination._own_manifest().pack(), epoch=3)
    refused(move, manifest, IntegrityError)
    move.close()


def test_another_ledger_than_the_manifest_says() -> None:
    journey = Journey()
    journey.arrive(journey.next_pair())
    pair = journey.next_pair()
    pair.until_manifest()
    # The source's own word of what it sent, and of what it should have sent, differ: the destination has the former.
    pair.source._ledger = b""
    with pytest.raises(IntegrityError):
        pair.manifest()
    assert pair.destination.state is State.FAILED
    journey.close()


@pytest.mark.parametrize("signed", ["another key", "another role", "another move", "none"])
def test_a_start_token_without_the_sources_signature_never_starts_the_guest(signed: str) -> None:
    move = Move()
    pair = move.pair
    pair.until_manifest()
    pair.manifest()
    pair.ready()
    session = pair.source._session
    assert session is not None
    body = next_body([], session.proofs, pair.source._manifest)
    signature = {
        "another key": lambda: LedgerKey().sign(Role.SOURCE, body),
        "another role": lambda: session.ledger_key.sign(Role.DESTINATION, body),
        "another move": lambda: session.ledger_key.sign(Role.SOURCE, replace(body, move=2)),
        "none": lambda: bytes(64),
    }[signed]()
    token = sealed_by_source(
        pair, BundleKind.START_TOKEN, pair.source._manifest + signature, epoch=FINAL_EPOCH
    )
    with pytest.raises(LedgerRefused, match="source_signature"):
        pair.deliver(token)
    destination_is_dead(move)
    with pytest.raises(LocalProtocolError):
        _ = pair.destination.ledger
    move.close()


def test_keys_are_gone_after_a_move_and_after_a_failure() -> None:
    for step in ("migrate", "fail"):
        move = Move()
        move.pair.until_manifest()
        sessions = [move.pair.source._session, move.pair.destination._session]
        if step == "migrate":
            move.pair.manifest()
            move.pair.ready()
            move.pair.start()
            move.pair.running()
            move.pair.finish()
        else:
            move.pair.source.abort()
            move.pair.destination.fail()
        for session in sessions:
            assert session is not None
            with pytest.raises(KeyPoisoned):
                session.ledger_key.sign(Role.SOURCE, CHAIN[0].body)
        move.close()


# Limits


def test_a_guest_moves_as_often_as_the_policy_allows() -> None:
    limited = Limited(b"a pre-shared key of 32 bytes ...")
    journey = Journey()
    for _ in range(2):
        journey.arrive(journey.next_pair(limited))
    # The source sees it before it says anything, and the guest goes on.
    pair = journey.next_pair(limited)
    with pytest.raises(PolicyRefused, match="maximum_moves refuses: found 3, wanted at most 2"):
        pair.handshake()
    assert pair.source.state is State.IDLE
    assert journey.gate.running
    # A source with another policy gets as far as the destination's.
    pair = SvsmPair(
        journey.memory, journey.gate, journey.to_memory, journey.to_gate, ATTESTOR, ledger=journey.ledger
    )
    pair.destination._attestor = limited
    pair.handshake()
    pair.open_channels()
    with pytest.raises(PolicyRefused, match="maximum_moves"):
        pair.ledger()
    assert pair.destination.state is State.FAILED
    pair.source.abort()
    assert journey.gate.running
    journey.close()


def test_a_ledger_without_room_for_one_more_record_is_refused_before_the_move() -> None:
    proofs = CHAIN[0].proofs
    assert check_next(b"", proofs) == 1
    check_next(b"", replace(proofs, source_evidence=bytes(1 << 16)))
    records: tuple[Record, ...] = ()
    big = replace(proofs, source_evidence=bytes(1 << 16), destination_evidence=bytes(1 << 16))
    while len(pack_ledger(records)) <= MAX_LEDGER_BYTES - 140_000:
        records = forged(records, big)
    ledger = pack_ledger(records)
    check_next(ledger, replace(proofs, source_evidence=b"e"))
    room = MAX_LEDGER_BYTES - len(ledger)
    fits = room - len(pack_ledger([replace(CHAIN[0], proofs=replace(proofs, source_evidence=b"e"))])) + 16 + 1
    check_next(ledger, replace(proofs, source_evidence=bytes(fits)))
    with pytest.raises(LedgerRefused, match="room"):
        check_next(ledger, replace(proofs, source_evidence=bytes(fits + 1)))


def test_a_source_takes_no_ledger_but_its_guests() -> None:
    move = Move()
    guest = move.guest
    for ledger, guest_id, error in (
        (b"no ledger", bytes(16), MalformedData),
        (pack_ledger(CHAIN[1:]), CHAIN[0].body.guest_id, LedgerRefused),
        (GOOD, bytes(16), LocalProtocolError),
    ):
        with pytest.raises(error):
            SourceSvsm(guest.memory, guest.gate, guest.tracker, ATTESTOR, guest_id, ledger=ledger)
    SourceSvsm(guest.memory, guest.gate, guest.tracker, ATTESTOR, CHAIN[0].body.guest_id, ledger=GOOD)
    move.close()
