"""The SNP attestor: its evidence's framing, what it refuses and tells, and what it needs of this machine."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import struct
from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from pagexfer.attestation.insecure import EmulatedProvider
from pagexfer.attestation.insecure.attestor import strict_policy
from pagexfer.attestation.insecure.certificates import CSP_ID
from pagexfer.attestation.policy import Policy
from pagexfer.attestation.policy_digest import policy_digest
from pagexfer.attestation.snp import (
    CertificateTable,
    Evidence,
    Product,
    Root,
    SigningKey,
    parse_certificate_table_untrusted,
)
from pagexfer.attestation.snp.attestor import SVSM_VMPL, SnpAttestor
from pagexfer.attestation.snp.framing import pack_evidence, parse_evidence_untrusted
from pagexfer.attestation.snp.table import MAX_TABLE_BYTES
from pagexfer.errors import AttestationError, MalformedData, PolicyRefused, UsageError
from pagexfer.testing.snp_ca import AT, SnpTestCa
from pagexfer.wire.handshake import MAX_EVIDENCE_BYTES, AttestorKind

from .handshakes import authority, snp
from .snp_data import authority as full_authority
from .wire_vectors import is_refused, only_whole

DATA = bytes(range(64))
POLICY = strict_policy(Product.GENOA)


class Told:
    """A provider that gives whatever it was told to."""

    def __init__(self, evidence: Evidence) -> None:
        self._evidence = evidence

    def evidence(self, report_data: bytes, *, vmpl: int) -> Evidence:
        del report_data, vmpl
        return self._evidence


def evidence(report_data: bytes = DATA, **fields: int | bytes) -> Evidence:
    return EmulatedProvider(authority(), **fields).evidence(report_data, vmpl=0)


def with_table(change: CertificateTable) -> bytes:
    return pack_evidence(dataclasses.replace(evidence(), table=change.pack()))


# Framing


def test_framing_by_hand() -> None:
    report, table = bytes(range(256)) * 4 + bytes(160), b"a table"
    packed = struct.pack("<I", 1184) + report + struct.pack("<I", 7) + table
    assert pack_evidence(Evidence(report, table)) == packed
    assert parse_evidence_untrusted(packed) == Evidence(report, table)
    only_whole(parse_evidence_untrusted, packed)
    only_whole(parse_evidence_untrusted, pack_evidence(Evidence(report, b"")))


@pytest.mark.parametrize(
    ("report_bytes", "table_bytes"), [(0, 7), (1183, 7), (1185, 7), (1216, 7), (1184, 6), (1184, 0xFFFFFFFF)]
)
def test_other_lengths_are_refused(report_bytes: int, table_bytes: int) -> None:
    packed = struct.pack("<I", report_bytes) + bytes(1184) + struct.pack("<I", table_bytes) + bytes(7)
    is_refused(parse_evidence_untrusted, packed)


def test_a_report_with_its_prefix_is_refused() -> None:
    prefixed = struct.pack("<II24x", 0, 1184) + bytes(1184)
    is_refused(parse_evidence_untrusted, pack_evidence(Evidence(prefixed, b"")))


def test_a_table_has_a_cap() -> None:
    assert parse_evidence_untrusted(pack_evidence(Evidence(bytes(1184), bytes(MAX_TABLE_BYTES))))
    is_refused(parse_evidence_untrusted, pack_evidence(Evidence(bytes(1184), bytes(MAX_TABLE_BYTES + 1))))


@given(st.binary(max_size=100) | st.integers(1180, 1300).map(bytes))
def test_noise_is_malformed_data_or_evidence(data: bytes) -> None:
    with contextlib.suppress(MalformedData):
        assert pack_evidence(parse_evidence_untrusted(data)) == data


def test_a_table_round_trips() -> None:
    for table in (
        CertificateTable(),
        CertificateTable(vcek=b"\x30\x82\x00\x01x", intermediate=b"-----BEGIN a", root=b"-----BEGIN r"),
        CertificateTable(vlek=b"-----BEGIN v", crl=b"-----BEGIN c"),
    ):
        assert parse_certificate_table_untrusted(table.pack()) == table


# This side


def test_evidence_is_over_the_report_data_at_vmpl_0() -> None:
    ours, peer = snp(), snp()
    packed = ours.evidence(DATA)
    assert len(packed) < MAX_EVIDENCE_BYTES // 2
    assert parse_evidence_untrusted(packed).report[0x50:0x90] == DATA
    assert peer.verify(packed, DATA).details["vmpl"] == SVSM_VMPL == 0
    assert ours.kind is AttestorKind.SNP
    assert ours.contribution().reveal() == bytes(48)
    assert ours.policy_digest == policy_digest(POLICY)


def test_a_machine_whose_own_report_nobody_could_verify_says_so() -> None:
    good = evidence(bytes(64))
    table = parse_certificate_table_untrusted(good.table)
    for bad, why in (
        (Evidence(good.report, b""), "does not hold the chain"),
        (Evidence(good.report[:-1], good.table), "report of 1183 bytes"),
        (Evidence(good.report, dataclasses.replace(table, vcek=b"\x30\x82x").pack()), "not a certificate"),
    ):
        with pytest.raises(UsageError, match=f"no peer could verify.*{why}"):
            SnpAttestor(Told(bad), POLICY, roots=(authority().root,), now=lambda: AT)
    with pytest.raises(UsageError, match="not one of the pinned roots"):
        SnpAttestor(Told(good), POLICY, now=lambda: AT)


# The peer


@pytest.mark.parametrize(
    "missing", [{"vcek": None}, {"intermediate": None}, {"root": None}], ids=lambda change: next(iter(change))
)
def test_a_chain_that_is_not_whole_is_refused(missing: dict[str, None]) -> None:
    table = dataclasses.replace(parse_certificate_table_untrusted(evidence().table), **missing)
    with pytest.raises(AttestationError, match="does not hold the chain"):
        snp().verify(with_table(table), DATA)


def test_a_leaf_of_the_other_kind_is_not_taken() -> None:
    table = parse_certificate_table_untrusted(evidence().table)
    with pytest.raises(AttestationError, match="does not hold the chain"):
        snp().verify(with_table(dataclasses.replace(table, vcek=None, vlek=table.vcek)), DATA)


def test_a_report_under_a_vlek_takes_the_vlek() -> None:
    ca = full_authority(Product.GENOA)
    leaf = ca.leaf(SigningKey.VLEK)
    intermediate = ca.intermediates[SigningKey.VLEK].public_bytes(Encoding.PEM)
    root = ca.root_certificate.public_bytes(Encoding.PEM)
    table = CertificateTable(vlek=leaf.certificate, intermediate=intermediate, root=root).pack()
    policy = dataclasses.replace(
        POLICY,
        measurements=None,
        vlek_providers=None,
        allow_masked_chip_id=True,
        allow_same_machine=True,
    )
    report = ca.report(leaf, report_data=DATA)
    ours = SnpAttestor(Told(Evidence(report, table)), policy, roots=(ca.root,), now=lambda: AT)
    details = ours.verify(pack_evidence(Evidence(report, table)), DATA).details
    assert (details["signing_key"], details["csp_id"]) == ("VLEK", CSP_ID)


@pytest.mark.parametrize("days", [-2, 366])
def test_certificates_are_of_the_time_that_the_clock_says(days: int) -> None:
    ours, packed = snp(), pack_evidence(evidence())
    ours._now = lambda: AT + timedelta(days=days)
    with pytest.raises(AttestationError, match="is valid from"):
        ours.verify(packed, DATA)


def test_the_clock_is_the_systems_unless_told_otherwise() -> None:
    now = inspect.signature(SnpAttestor).parameters["now"].default()
    assert abs(now - datetime.now(UTC)) < timedelta(minutes=1)


def test_a_revocation_list_is_the_operators() -> None:
    ca = full_authority(Product.GENOA)
    leaf = ca.leaf()
    intermediate = ca.intermediates[SigningKey.VCEK].public_bytes(Encoding.PEM)
    root = ca.root_certificate.public_bytes(Encoding.PEM)
    serial = ca.intermediates[SigningKey.VCEK].serial_number
    # The peer's table says that nothing is revoked; the operator knows better.
    table = CertificateTable(leaf.certificate, None, intermediate, root, ca.crl()).pack()
    sent = Evidence(ca.report(leaf, report_data=DATA), table)
    policy = dataclasses.replace(POLICY, measurements=None, allow_same_machine=True)

    def attestor(crl: bytes | None, *, require: bool) -> SnpAttestor:
        judging = dataclasses.replace(policy, require_crl=require)
        return SnpAttestor(Told(sent), judging, roots=(ca.root,), now=lambda: AT, crl=crl)

    assert attestor(None, require=False).verify(pack_evidence(sent), DATA).details["crl_checked"] is False
    with pytest.raises(PolicyRefused, match="require_crl"):
        attestor(None, require=True).verify(pack_evidence(sent), DATA)
    assert attestor(ca.crl(), require=True).verify(pack_evidence(sent), DATA).details["crl_checked"] is True
    revoking = attestor(None, require=False)
    revoking._crl = ca.crl(serial)
    with pytest.raises(AttestationError, match="is revoked"):
        revoking.verify(pack_evidence(sent), DATA)


def test_machines_of_two_products_and_a_crl_of_each() -> None:
    """Each side has lists of both roots, or of the peer's alone: its own report needs none."""
    genoa, turin = full_authority(Product.GENOA), full_authority(Product.TURIN)
    policy = Policy(measurements=None, minimum_tcb=None, require_crl=True)

    def told(ca: SnpTestCa) -> Told:
        leaf = ca.leaf()
        chain = (ca.intermediates[SigningKey.VCEK], ca.root_certificate)
        ders = (part.public_bytes(Encoding.DER) for part in chain)
        table = CertificateTable(leaf.certificate, None, *ders).pack()
        return Told(Evidence(ca.report(leaf, report_data=DATA), table))

    def attestor(ca: SnpTestCa, *crls: bytes) -> SnpAttestor:
        return SnpAttestor(told(ca), policy, roots=(genoa.root, turin.root), now=lambda: AT, crl=crls)

    peer = attestor(turin).evidence(DATA)
    for crls in ((turin.crl(),), (genoa.crl(), turin.crl())):
        assert attestor(genoa, *crls).verify(peer, DATA).details["crl_checked"] is True
    with pytest.raises(AttestationError, match="give one of ARK-Turin"):
        attestor(genoa, genoa.crl()).verify(peer, DATA)
    serial = turin.intermediates[SigningKey.VCEK].serial_number
    with pytest.raises(AttestationError, match="is revoked"):
        attestor(genoa, genoa.crl(), turin.crl(serial)).verify(peer, DATA)


@pytest.mark.parametrize(
    ("packed", "why"),
    [
        (b"", "SNP evidence of 0 bytes"),
        (bytes(48), "SNP evidence of 48 bytes"),
        (pack_evidence(Evidence(bytes(1184), b"")), "report of version 0"),
        (pack_evidence(Evidence(evidence().report, b"\1" * 24)), "without an end"),
    ],
)
def test_malformed_evidence_proves_nothing_and_the_operator_is_told(packed: bytes, why: str) -> None:
    """To a handshake it is all the same: the peer did not prove who it is."""
    told: list[str] = []
    ours = snp()
    ours._on_refused = told.append
    with pytest.raises(AttestationError, match=why) as caught:
        ours.verify(packed, DATA)
    assert told == [str(caught.value)]


_JUDGE, _GENUINE = snp(), pack_evidence(evidence())


@given(
    st.lists(st.tuples(st.integers(0, len(_GENUINE) - 1), st.integers(0, 255)), min_size=1, max_size=4),
    st.integers(0, len(_GENUINE)),
)
def test_changed_evidence_gives_the_same_claims_or_an_attestation_error(
    changes: list[tuple[int, int]], end: int
) -> None:
    """Only bytes that nobody signs can change unseen here; the key confirmation covers those, too."""
    data = bytearray(_GENUINE)
    for offset, value in changes:
        data[offset] = value
    for changed in (bytes(data), bytes(data[:end])):
        with contextlib.suppress(AttestationError):
            assert _JUDGE.verify(changed, DATA) == _JUDGE.verify(_GENUINE, DATA)


def test_report_data_is_compared_before_the_policy() -> None:
    ours = snp()
    bad = pack_evidence(evidence(measurement=bytes(48)))
    with pytest.raises(PolicyRefused, match="measurements"):
        ours.verify(bad, DATA)
    with pytest.raises(AttestationError, match="report_data") as caught:
        ours.verify(bad, bytes(64))
    assert not isinstance(caught.value, PolicyRefused)


def test_a_move_more_than_the_policy_allows_is_refused_and_the_operator_told() -> None:
    told: list[str] = []
    limited = SnpAttestor(
        EmulatedProvider(authority()),
        dataclasses.replace(POLICY, maximum_moves=3),
        roots=(authority().root,),
        now=lambda: AT,
        on_refused=told.append,
    )
    limited.check_move(3)
    snp().check_move(1 << 40)
    with pytest.raises(PolicyRefused, match="maximum_moves refuses: found 4, wanted at most 3") as caught:
        limited.check_move(4)
    assert told == [str(caught.value)]


def test_the_root_is_never_the_messages_own() -> None:
    ours = snp()
    ours._roots = (Root(Product.GENOA, bytes(32)),)
    with pytest.raises(AttestationError, match="not one of the pinned roots"):
        ours.verify(pack_evidence(evidence()), DATA)
