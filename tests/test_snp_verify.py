"""Verification of reports: every real one, what only a test authority can make, and every field changed."""

from __future__ import annotations

import contextlib
import dataclasses
import struct
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from pagexfer.attestation.insecure.certificates import CSP_ID, der_integer, der_string
from pagexfer.attestation.insecure.reports import (
    CPUID,
    FIELDS,
    REPORT_BYTES,
    SIGNED_BYTES,
    default_tcb,
    pack_tcb,
    sign,
    with_signature,
)
from pagexfer.attestation.snp import (
    AMD_ROOTS,
    Product,
    SigningKey,
    Tcb,
    parse_endorsements_untrusted,
    parse_report_untrusted,
    verify_report,
)
from pagexfer.attestation.snp.describe import describe_claims
from pagexfer.errors import AttestationError, MalformedData, UsageError
from pagexfer.testing.snp_ca import AT, SnpTestCa

from . import snp_data
from .snp_data import authority, endorsements, needs_data, verified

if TYPE_CHECKING:
    from pagexfer.attestation.insecure.certificates import Leaf
    from pagexfer.attestation.snp import SnpClaims

P384_ORDER = (
    0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFC7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973
)


@pytest.fixture(params=Product)
def ca(request: pytest.FixtureRequest) -> SnpTestCa:
    return authority(request.param)


def refused(ca: SnpTestCa, leaf: Leaf, raw: bytes, why: str) -> None:
    with pytest.raises(AttestationError, match=why):
        verified(ca, leaf, raw)


def real_claims(name: str, kind: str, product: str, raw: bytes | None = None) -> SnpClaims:
    chain = parse_endorsements_untrusted(snp_data.leaf(name, kind), snp_data.chain(kind, product), None)
    at = chain.leaf.not_valid_before_utc
    return verify_report(snp_data.report(name) if raw is None else raw, chain, at=at)


@needs_data
@pytest.mark.parametrize(("name", "kind", "product"), snp_data.REAL)
def test_a_real_report_verifies(name: str, kind: str, product: str) -> None:
    listed = snp_data.listed(name)
    claims = real_claims(name, kind, product)
    assert claims.product.value.lower() == product
    assert claims.signing_key is SigningKey[kind[:4].upper()]
    for field in ("current_tcb", "reported_tcb", "committed_tcb", "launch_tcb"):
        assert listed[field].endswith(f"({getattr(claims, field)})")
    if claims.signing_key is SigningKey.VLEK:
        assert (claims.chip, claims.csp_id) == (None, "CN=cc-us-east-2.amazonaws.com")
    else:
        assert claims.chip == claims.report.chip_id[: 8 if product == "turin" else 64]
    assert describe_claims(claims)["reported_tcb"] == claims.reported_tcb.parts()


@needs_data
@pytest.mark.parametrize(("name", "kind", "product"), snp_data.REAL)
def test_a_real_report_with_any_field_changed_is_refused(name: str, kind: str, product: str) -> None:
    raw = snp_data.report(name)
    for offset, size in FIELDS.values():
        for byte in (offset, offset + size - 1):
            for bit in (0x01, 0x80):
                changed = raw[:byte] + bytes([raw[byte] ^ bit]) + raw[byte + 1 :]
                with pytest.raises((AttestationError, MalformedData)):
                    real_claims(name, kind, product, changed)


@needs_data
def test_a_real_report_of_another_chip_is_refused() -> None:
    for name in ("milan-v2-azure", "milan-v3-azure", "genoa-v3-azure"):
        with pytest.raises(AttestationError):
            real_claims("milan-v3-a", "vcek", "milan", snp_data.report(name))


@needs_data
def test_a_real_report_and_certificates_of_two_products_are_refused() -> None:
    leaf = snp_data.leaf("milan-v3-a", "vcek")
    chain = parse_endorsements_untrusted(leaf, snp_data.chain("vcek", "genoa"), None)
    with pytest.raises(AttestationError, match="names another issuer"):
        verify_report(snp_data.report("milan-v3-a"), chain, at=AT)


@pytest.mark.parametrize("version", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", SigningKey)
def test_a_made_report_verifies(ca: SnpTestCa, version: int, kind: SigningKey) -> None:
    leaf = ca.leaf(kind)
    raw = ca.report(leaf, version=version)
    claims = verified(ca, leaf, raw)
    assert (claims.product, claims.signing_key, claims.reported_tcb) == (ca.product, kind, leaf.tcb)
    assert (claims.chip, claims.csp_id) == (leaf.hwid, CSP_ID if kind is SigningKey.VLEK else None)
    assert claims.report == parse_report_untrusted(raw)
    assert not claims.crl_checked
    assert verified(ca, leaf, raw, ca.crl()).crl_checked
    with pytest.raises(AttestationError, match="not one of the pinned roots"):
        verify_report(raw, endorsements(ca, leaf), at=AT)


def test_a_prefix_changes_nothing(ca: SnpTestCa) -> None:
    leaf = ca.leaf()
    raw = ca.report(leaf)
    prefix = struct.pack("<II24x", 0, REPORT_BYTES)
    assert verified(ca, leaf, prefix + raw) == verified(ca, leaf, raw)


def test_every_byte_of_a_report_counts(ca: SnpTestCa) -> None:
    leaf = ca.leaf()
    raw = ca.report(leaf)
    for offset in range(REPORT_BYTES):
        changed = raw[:offset] + bytes([raw[offset] ^ 0x10]) + raw[offset + 1 :]
        with pytest.raises((AttestationError, MalformedData)):
            verified(ca, leaf, changed)


@pytest.mark.parametrize("algorithm", [0, 2, 0x101])
def test_another_signature_algorithm_is_refused(ca: SnpTestCa, algorithm: int) -> None:
    leaf = ca.leaf()
    refused(ca, leaf, ca.report(leaf, signature_algo=algorithm), f"signature algorithm is {algorithm}")


@pytest.mark.parametrize("info", [2, 7 << 2, 2 << 2, 2 | 1 << 2])
def test_a_report_that_no_known_key_signed_is_refused(ca: SnpTestCa, info: int) -> None:
    leaf = ca.leaf()
    refused(ca, leaf, ca.report(leaf, key_info=info), "no VCEK or VLEK signed")


@pytest.mark.parametrize("kind", SigningKey)
def test_key_info_must_agree_with_the_certificate(ca: SnpTestCa, kind: SigningKey) -> None:
    leaf = ca.leaf(kind)
    refused(ca, leaf, ca.report(leaf, key_info=(1 - kind) << 2), "common name")


@pytest.mark.parametrize("cpuid", [bytes([0x1A, 0x50, 0]), bytes([0x17, 1, 0]), bytes(3)])
def test_an_unknown_processor_is_refused(ca: SnpTestCa, cpuid: bytes) -> None:
    leaf = ca.leaf()
    refused(ca, leaf, ca.report(leaf, cpuid=cpuid), "unknown processor")


def test_a_processor_of_another_product_is_refused(ca: SnpTestCa) -> None:
    leaf = ca.leaf()
    for product in set(Product) - {ca.product}:
        refused(ca, leaf, ca.report(leaf, cpuid=CPUID[product]), "its certificates are of")


@pytest.mark.parametrize("version", [2, 5])
def test_a_leaf_of_another_product_is_refused(ca: SnpTestCa, version: int) -> None:
    """Names, and the coding of a TCB, which in version 2 nothing but the certificate tells."""
    other = Product.TURIN if ca.product is not Product.TURIN else Product.MILAN
    leaf = ca.leaf(extensions={"2": der_string("Venice")})
    refused(ca, leaf, ca.report(leaf, version=version), "the leaf certificate is of 'Venice'")
    extensions: dict[str, bytes | None] = {
        "1": der_integer(other.tcb_layout),
        "4": bytes(other.chip_id_bytes),
    }
    extensions["3.9"] = der_integer(0) if other is Product.TURIN else None
    leaf = ca.leaf(extensions=extensions)
    refused(ca, leaf, ca.report(leaf, version=version), "the leaf certificate is of")


def test_wrong_signatures_are_refused(ca: SnpTestCa) -> None:
    leaf = ca.leaf()
    raw = ca.report(leaf)
    report = parse_report_untrusted(raw)
    r, s = report.signature_r, report.signature_s
    for wrong in (
        (0, 0),
        (0, s),
        (r, 0),
        (s, r),
        (P384_ORDER, s),
        (r, P384_ORDER),
        (r, 2**384 - 1),
        (r ^ 1, s),
    ):
        refused(ca, leaf, with_signature(raw, *wrong), "signature does not verify")
    refused(ca, leaf, sign(raw, ec.generate_private_key(ec.SECP384R1())), "signature does not verify")
    too_long = bytearray(raw)
    too_long[0x2A0 + 48] = 1  # R of 49 bytes
    with pytest.raises(MalformedData):
        verified(ca, leaf, bytes(too_long))


def test_a_second_signature_of_the_same_report_has_the_same_digest(ca: SnpTestCa) -> None:
    """(r, n - s) verifies wherever (r, s) does, so only the signed part can be a report's name."""
    leaf = ca.leaf()
    raw = ca.report(leaf)
    report = parse_report_untrusted(raw)
    other = with_signature(raw, report.signature_r, P384_ORDER - report.signature_s)
    assert other != raw
    assert verified(ca, leaf, other).digest == verified(ca, leaf, raw).digest
    again = ca.report(leaf, vmpl=1)
    assert verified(ca, leaf, again).digest != verified(ca, leaf, raw).digest


def test_the_signed_bytes_are_the_received_ones(ca: SnpTestCa) -> None:
    leaf = ca.leaf()
    raw = ca.report(leaf, platform_info=0xFFFF_FFFF_FFFF_FFFF)  # bits nobody has a name for
    assert verified(ca, leaf, raw).report.signed == raw[:SIGNED_BYTES]


@pytest.mark.parametrize(
    ("product", "part"), [(product, part) for product in Product for part in default_tcb(product).parts()]
)
def test_the_certificate_is_of_exactly_the_reported_tcb(product: Product, part: str) -> None:
    ca, tcb = authority(product), default_tcb(product)
    for change in (-1, 1):
        reported = dataclasses.replace(tcb, **{part: tcb.parts()[part] + change})
        leaf = ca.leaf()
        high = pack_tcb(Tcb(None if reported.fmc is None else 255, 255, 255, 255, 255))
        raw = ca.report(leaf, reported_tcb=pack_tcb(reported), current_tcb=high)
        refused(ca, leaf, raw, "the report's TCB is .* the leaf certificate's")


@pytest.mark.parametrize("name", ["reported", "committed"])
def test_no_tcb_is_above_the_one_that_runs(ca: SnpTestCa, name: str) -> None:
    """Part by part: a higher microcode does not make up for a lower bootloader."""
    tcb = default_tcb(ca.product)
    current = Tcb(tcb.fmc, tcb.bootloader - 1, tcb.tee, tcb.snp, 255)
    leaf = ca.leaf(tcb=tcb if name == "reported" else current)
    fields = {"current_tcb": current, "reported_tcb": current, "committed_tcb": current} | {
        f"{name}_tcb": tcb
    }
    packed: dict[str, int | bytes] = {field: pack_tcb(value) for field, value in fields.items()}
    refused(ca, leaf, ca.report(leaf, **packed), f"the {name} TCB .* has a higher bootloader")


@pytest.mark.parametrize("name", ["current_tcb", "reported_tcb", "committed_tcb", "launch_tcb"])
def test_a_tcb_in_the_layout_of_another_product_is_refused(ca: SnpTestCa, name: str) -> None:
    other = Product.MILAN if ca.product is Product.TURIN else Product.TURIN
    leaf = ca.leaf()
    with pytest.raises(MalformedData, match="reserved bytes set for layout"):
        verified(ca, leaf, ca.report(leaf, **{name: pack_tcb(default_tcb(other))}))


def test_another_chip_is_refused(ca: SnpTestCa) -> None:
    leaf = ca.leaf()
    size = ca.product.chip_id_bytes
    for chip in (bytes([255, *range(2, size + 1)]), bytes([*range(1, size), 255])):
        refused(ca, leaf, ca.report(leaf, chip_id=chip.ljust(64, b"\0")), "another chip")


def test_a_long_chip_id_on_turin_is_refused() -> None:
    ca = authority(Product.TURIN)
    leaf = ca.leaf()
    chip = bytes(range(1, 9)) + bytes(55) + b"\1"
    refused(ca, leaf, ca.report(leaf, chip_id=chip), "more than the 8 bytes of Turin")
    hidden = bytes(63) + b"\1"
    refused(ca, leaf, ca.report(leaf, chip_id=hidden), "more than the 8 bytes of Turin")


def test_a_vcek_names_the_chip_that_the_host_hides(ca: SnpTestCa) -> None:
    leaf = ca.leaf()
    claims = verified(ca, leaf, ca.report(leaf, chip_id=bytes(64)))
    assert claims.report.chip_id_masked
    assert claims.chip == leaf.hwid


def test_a_vlek_may_come_with_a_chip_id(ca: SnpTestCa) -> None:
    leaf = ca.leaf(SigningKey.VLEK)
    chip = bytes(range(1, ca.product.chip_id_bytes + 1))
    assert verified(ca, leaf, ca.report(leaf, chip_id=chip.ljust(64, b"\0"))).chip == chip


def test_the_extensions_of_a_leaf_must_be_of_its_kind(ca: SnpTestCa) -> None:
    hwid = bytes(range(ca.product.chip_id_bytes))
    for kind, extensions in (
        (SigningKey.VCEK, {"4": None}),
        (SigningKey.VCEK, {"5": der_string(CSP_ID)}),
        (SigningKey.VLEK, {"4": hwid}),
        (SigningKey.VLEK, {"5": None}),
    ):
        leaf = ca.leaf(kind, extensions=dict[str, bytes | None](extensions))
        refused(ca, leaf, ca.report(leaf), f"the leaf certificate is no {kind.name}")


def test_verification_of_reports_that_a_policy_must_judge(ca: SnpTestCa) -> None:
    """They are authentic. What they say is not this function's to like."""
    leaf = ca.leaf()
    odd = ca.report(leaf, policy=0xF0000, vmpl=2, report_id_ma=b"\x44" * 32)
    report = verified(ca, leaf, odd).report
    assert (report.policy, report.vmpl, report.report_id_ma) == (0xF0000, 2, b"\x44" * 32)


def test_a_time_without_zone_is_a_mistake(ca: SnpTestCa) -> None:
    leaf = ca.leaf()
    with pytest.raises(UsageError, match="time zone"):
        verify_report(ca.report(leaf), endorsements(ca, leaf), at=datetime(2026, 6, 1), roots=[ca.root])
    late = datetime(2030, 1, 1, tzinfo=UTC)
    with pytest.raises(AttestationError, match="is valid from"):
        verify_report(ca.report(leaf), endorsements(ca, leaf), at=late, roots=[ca.root])


def test_the_pins_are_three_roots_of_three_products() -> None:
    assert {root.product for root in AMD_ROOTS} == set(Product)
    assert len({root.sha256 for root in AMD_ROOTS}) == len(AMD_ROOTS) == 3
    assert all(len(root.sha256) == 32 for root in AMD_ROOTS)


@given(st.data())
def test_whatever_a_genuine_key_signed_gives_claims_or_one_of_two_errors(data: st.DataObject) -> None:
    names = data.draw(
        st.sets(st.sampled_from(sorted(FIELDS.keys() - {"version", "signature_r", "signature_s"})))
    )
    fields = {
        name: data.draw(st.binary(min_size=FIELDS[name][1], max_size=FIELDS[name][1])) for name in names
    }
    version = data.draw(st.integers(2, 5))
    with contextlib.suppress(AttestationError, MalformedData):
        raw = authority(Product.GENOA).report(_LEAF, version=version, **fields)
        describe_claims(verified(authority(Product.GENOA), _LEAF, raw))


_LEAF = authority(Product.GENOA).leaf()
