"""Emulated SNP: the authority's file, processors of their own, and reports that meet its strict policy alone."""

from __future__ import annotations

import stat
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from pagexfer.attestation.insecure import EmulatedAttestor, EmulatedAuthority, EmulatedProvider
from pagexfer.attestation.insecure.attestor import strict_policy
from pagexfer.attestation.insecure.reports import default_tcb
from pagexfer.attestation.policy_digest import policy_digest
from pagexfer.attestation.snp import Product
from pagexfer.errors import PolicyRefused, UsageError
from pagexfer.testing.snp_ca import AT
from pagexfer.wire.handshake import AttestorKind

from .handshakes import authority

if TYPE_CHECKING:
    from pathlib import Path

DATA = bytes(range(64))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "test-ca"
    authority().save(path)
    return path


def attestor(authority: EmulatedAuthority) -> EmulatedAttestor:
    return EmulatedAttestor(authority, now=lambda: AT)


def test_both_sides_know_each_other_by_one_file(file: Path) -> None:
    near, far = attestor(EmulatedAuthority.load(file)), attestor(EmulatedAuthority.load(file))
    by_near, by_far = near.verify(far.evidence(DATA), DATA), far.verify(near.evidence(DATA), DATA)
    assert by_near.kind is by_far.kind is AttestorKind.EMULATED
    assert by_near.subject == "emulated SEV-SNP guest on Genoa"
    assert by_near.details["chip_id"] != by_far.details["chip_id"]
    assert by_near.details["report_id"] != by_far.details["report_id"]
    assert EmulatedAuthority.load(file).root == authority().root


@pytest.mark.parametrize("product", Product)
def test_every_product_can_be_emulated(product: Product) -> None:
    made = EmulatedAuthority.generate(product, now=AT)
    claims = attestor(made).verify(attestor(made).evidence(DATA), DATA)
    assert claims.details["product"] == product.value
    assert claims.details["reported_tcb"] == default_tcb(product).parts()


def test_only_the_owner_can_read_the_file_and_it_is_not_overwritten(file: Path) -> None:
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    before = file.read_bytes()
    with pytest.raises(UsageError, match="File exists"):
        authority().save(file)
    assert file.read_bytes() == before


def test_the_roots_key_is_not_in_the_file(file: Path) -> None:
    assert file.read_bytes().count(b"PRIVATE KEY-----") == 2  # begin and end of one
    assert file.read_bytes().count(b"BEGIN CERTIFICATE") == 2


def test_a_file_that_is_no_authority_is_refused(file: Path, tmp_path: Path) -> None:
    good = file.read_bytes()
    key, *certificates = good.split(b"-----BEGIN CERTIFICATE-----")
    for name, content in {
        "empty": b"",
        "noise": bytes(range(256)),
        "key alone": key,
        "no key": good[len(key) :],
        "one certificate": key + b"-----BEGIN CERTIFICATE-----" + certificates[0],
        "damaged": good.replace(b"MI", b"ZZ"),
    }.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(UsageError, match="make-test-ca"):
            EmulatedAuthority.load(path)
    with pytest.raises(UsageError, match="No such file"):
        EmulatedAuthority.load(tmp_path / "none")


def test_an_authority_ends_after_a_year() -> None:
    old = EmulatedAuthority.generate(Product.MILAN, now=AT - timedelta(days=366))
    with pytest.raises(UsageError, match="is valid from"):
        attestor(old)


def test_the_policy_is_strict_unless_given() -> None:
    ours = attestor(authority())
    policy = strict_policy(Product.GENOA)
    assert ours.policy_digest == policy_digest(policy)
    assert policy.measurements
    assert policy.minimum_tcb
    for fields in ({"measurement": bytes(48)}, {"vmpl": 1}, {"policy": 0xB0000}, {"launch_tcb": bytes(8)}):
        provider = EmulatedProvider(authority(), **fields)
        peer = attestor(authority())
        peer._provider = provider
        with pytest.raises(PolicyRefused):
            ours.verify(peer.evidence(DATA), DATA)
