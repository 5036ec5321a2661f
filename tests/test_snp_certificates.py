"""The chain from a signing key to the pinned root: real ones, and every way in which a made one can be wrong."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.padding import MGF1, PSS
from cryptography.hazmat.primitives.hashes import SHA256, SHA384
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from pagexfer.attestation.insecure.certificates import (
    CSP_ID,
    amd_name,
    amd_pss,
    der_integer,
    der_string,
    issue,
)
from pagexfer.attestation.insecure.reports import default_tcb
from pagexfer.attestation.snp import (
    AMD_ROOTS,
    Product,
    Root,
    SigningKey,
    Tcb,
    parse_certificate_table_untrusted,
    parse_endorsements_untrusted,
)
from pagexfer.attestation.snp.certificates import Endorsements, check_chain
from pagexfer.attestation.snp.leaf import parse_leaf_untrusted
from pagexfer.errors import AttestationError, MalformedData
from pagexfer.testing.snp_ca import AT, VALID, SnpTestCa

from . import snp_data
from .snp_data import authority, endorsements, needs_data

if TYPE_CHECKING:
    from pagexfer.attestation.insecure.certificates import Leaf

MILAN = Product.MILAN
EARLIER = (AT - timedelta(days=90), AT - timedelta(days=60))
LATER = (AT + timedelta(days=1), AT + timedelta(days=20))


@pytest.fixture
def ca() -> SnpTestCa:
    return authority(MILAN)


def check(ca: SnpTestCa, what: Endorsements, key: SigningKey = SigningKey.VCEK, at: datetime = AT) -> None:
    check_chain(what, key, at=at, roots=[ca.root])


def refused(ca: SnpTestCa, what: Endorsements, why: str, key: SigningKey = SigningKey.VCEK) -> None:
    with pytest.raises(AttestationError, match=why):
        check(ca, what, key)


def with_intermediate(ca: SnpTestCa, certificate: x509.Certificate, leaf: Leaf | None = None) -> Endorsements:
    good = endorsements(ca, leaf or ca.leaf())
    return Endorsements(good.leaf, certificate, good.root)


def intermediate(
    ca: SnpTestCa,
    *,
    name: str = "SEV-Milan",
    is_ca: bool = True,
    ca_bit: bool = True,
    sign: bool = True,
    pss: PSS | None = None,
) -> x509.Certificate:
    """An ASK like the authority's own, but for what is given."""
    return issue(
        amd_name(name),
        ca.intermediate_keys[SigningKey.VCEK].public_key(),
        ca.root_certificate.subject,
        ca.root_key,
        ca=is_ca,
        ca_bit=ca_bit,
        key_cert_sign=sign,
        valid=VALID,
        pss=pss,
    )


@needs_data
@pytest.mark.parametrize("kind", ["vcek", "vlek"])
@pytest.mark.parametrize("product", ["milan", "genoa", "turin"])
def test_a_real_intermediate_and_its_root_hold(kind: str, product: str) -> None:
    """As far as the leaf, for which there is no certificate of that product and kind: one of another kind stands in."""
    wrong = snp_data.leaf("milan-v3-vlek", "vlek") if kind == "vcek" else snp_data.leaf("milan-v3-a", "vcek")
    chain = parse_endorsements_untrusted(wrong, snp_data.chain(kind, product), None)
    with pytest.raises(AttestationError, match=f"expected 'SEV-{kind.upper()}'"):
        check_chain(chain, SigningKey[kind.upper()], at=AT, roots=AMD_ROOTS)


@needs_data
@pytest.mark.parametrize(("name", "kind", "product"), snp_data.REAL)
def test_a_real_leaf_holds_in_its_time_only(name: str, kind: str, product: str) -> None:
    chain = parse_endorsements_untrusted(snp_data.leaf(name, kind), snp_data.chain(kind, product), None)
    key = SigningKey[kind[:4].upper()]
    first, last = chain.leaf.not_valid_before_utc, chain.leaf.not_valid_after_utc
    for at in (first, last):
        assert check_chain(chain, key, at=at, roots=AMD_ROOTS)[0].product.value.lower() == product
    for at in (first - timedelta(seconds=1), last + timedelta(seconds=1)):
        with pytest.raises(AttestationError, match="is valid from"):
            check_chain(chain, key, at=at, roots=AMD_ROOTS)


@needs_data
@pytest.mark.parametrize("name", ["neg-vcek-hwid-der", "neg-vcek-hwid-raw"])
def test_a_leaf_that_amd_did_not_sign_is_refused(name: str) -> None:
    leaf = (snp_data.DATA / f"{name}.der").read_bytes()
    chain = parse_endorsements_untrusted(leaf, snp_data.chain("vcek", "milan"), None)
    assert parse_leaf_untrusted(chain.leaf).hwid == bytes(range(64))
    with pytest.raises(AttestationError, match="signature of SEV-VCEK does not verify"):
        check_chain(chain, SigningKey.VCEK, at=chain.leaf.not_valid_before_utc, roots=AMD_ROOTS)


@needs_data
def test_the_real_crl_holds_in_its_time_only() -> None:
    crl = (snp_data.DATA / "crl-milan-2023.der").read_bytes()
    leaf = snp_data.leaf("milan-v2-a", "vcek")
    chain = parse_endorsements_untrusted(leaf, snp_data.chain("vcek", "milan"), crl)
    check_chain(chain, SigningKey.VCEK, at=datetime(2023, 6, 1, tzinfo=UTC), roots=AMD_ROOTS)
    with pytest.raises(AttestationError, match="the CRL is valid from"):
        check_chain(chain, SigningKey.VCEK, at=datetime(2024, 6, 1, tzinfo=UTC), roots=AMD_ROOTS)
    genoa = parse_endorsements_untrusted(
        snp_data.leaf("genoa-v5-a", "vcek"), snp_data.chain("vcek", "genoa"), crl
    )
    with pytest.raises(AttestationError, match="another issuer"):
        check_chain(genoa, SigningKey.VCEK, at=datetime(2026, 1, 1, tzinfo=UTC), roots=AMD_ROOTS)


@needs_data
def test_a_real_certificate_table_has_a_chain_that_holds() -> None:
    table = parse_certificate_table_untrusted((snp_data.DATA / "milan-v3-a.auxblob.bin").read_bytes())
    assert table.vcek is not None
    assert table.intermediate is not None
    assert table.root is not None
    chain = parse_endorsements_untrusted(table.vcek, [table.root, table.intermediate], table.crl)
    check_chain(chain, SigningKey.VCEK, at=AT, roots=AMD_ROOTS)
    assert chain.leaf.fingerprint(SHA256()).hex().startswith("19dcd4d63d12deb8")


def test_a_made_chain_of_either_kind_holds(ca: SnpTestCa) -> None:
    for kind in SigningKey:
        check(ca, endorsements(ca, ca.leaf(kind)), kind)


def test_a_chain_in_any_order(ca: SnpTestCa) -> None:
    leaf = ca.leaf()
    parts = [ca.intermediates[SigningKey.VCEK], ca.root_certificate]
    for order in (parts, parts[::-1]):
        for encoding in (Encoding.DER, Encoding.PEM):
            encoded = [certificate.public_bytes(encoding) for certificate in order]
            check(ca, parse_endorsements_untrusted(leaf.certificate, encoded, None))


def test_a_root_that_is_not_pinned_is_refused(ca: SnpTestCa) -> None:
    leaf = ca.leaf()
    with pytest.raises(AttestationError, match="not one of the pinned roots"):
        check_chain(endorsements(ca, leaf), SigningKey.VCEK, at=AT, roots=AMD_ROOTS)
    twin = SnpTestCa(MILAN)  # same names, another key
    refused(ca, endorsements(twin, twin.leaf()), "not one of the pinned roots")


def test_an_intermediate_of_another_authority_is_refused(ca: SnpTestCa) -> None:
    other = SnpTestCa(MILAN)
    good = endorsements(ca, ca.leaf())
    stranger = Endorsements(good.leaf, other.intermediates[SigningKey.VCEK], good.root)
    refused(ca, stranger, "signature of SEV-Milan does not verify")
    refused(
        ca, with_intermediate(ca, good.intermediate, other.leaf()), "signature of SEV-VCEK does not verify"
    )


def test_an_intermediate_in_the_place_of_the_root_is_refused(ca: SnpTestCa) -> None:
    """An ASK is signed by the pinned root too: being signed by it makes no root."""
    good = endorsements(ca, ca.leaf())
    refused(ca, Endorsements(good.leaf, good.intermediate, good.intermediate), "not one of the pinned roots")


def test_a_pin_of_another_product_is_refused(ca: SnpTestCa) -> None:
    pin = Root(Product.GENOA, ca.root.sha256)
    with pytest.raises(AttestationError, match="common name 'ARK-Milan', expected 'ARK-Genoa'"):
        check_chain(endorsements(ca, ca.leaf()), SigningKey.VCEK, at=AT, roots=[pin])


@pytest.mark.parametrize("key", SigningKey)
def test_a_leaf_of_the_other_kind_is_refused(ca: SnpTestCa, key: SigningKey) -> None:
    other = SigningKey.VLEK if key is SigningKey.VCEK else SigningKey.VCEK
    refused(ca, endorsements(ca, ca.leaf(other)), "has the common name", key)
    renamed = ca.leaf(other, name=f"SEV-{key.name}")
    mixed = Endorsements(endorsements(ca, renamed).leaf, ca.intermediates[key], ca.root_certificate)
    refused(ca, mixed, "names another issuer", key)
    forged = ca.leaf(other, name=f"SEV-{key.name}", issuer=ca.intermediates[key])
    mixed = Endorsements(endorsements(ca, forged).leaf, ca.intermediates[key], ca.root_certificate)
    refused(ca, mixed, "does not verify under its issuer's key", key)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"name": "SEV-Genoa"}, "common name 'SEV-Genoa'"),
        ({"name": "ARK-Milan"}, "common name 'ARK-Milan'"),
        ({"is_ca": False}, "may not sign certificates"),
        ({"ca_bit": False}, "may not sign certificates"),
        ({"sign": False}, "may not sign certificates"),
        ({"pss": amd_pss(salt_bytes=32)}, "does not verify"),
        ({"pss": PSS(MGF1(SHA256()), 48)}, "does not verify"),
    ],
)
def test_a_wrong_intermediate_is_refused(
    ca: SnpTestCa, change: dict[str, str | bool | PSS], why: str
) -> None:
    check(ca, with_intermediate(ca, intermediate(ca)))
    refused(ca, with_intermediate(ca, intermediate(ca, **change)), why)  # type: ignore[arg-type]


def test_an_intermediate_signed_by_another_scheme_is_refused(ca: SnpTestCa) -> None:
    builder = x509.CertificateBuilder(
        ca.root_certificate.subject,
        amd_name("SEV-Milan"),
        ca.intermediate_keys[SigningKey.VCEK].public_key(),
        1,
        *VALID,
    )
    pkcs1 = builder.sign(ca.root_key, SHA384())
    refused(ca, with_intermediate(ca, pkcs1), "not RSASSA-PSS")


def test_a_leaf_on_another_curve_is_refused(ca: SnpTestCa) -> None:
    refused(ca, endorsements(ca, ca.leaf(curve=ec.SECP256R1())), "not on P-384")


def test_a_leaf_with_another_salt_is_refused(ca: SnpTestCa) -> None:
    refused(ca, endorsements(ca, ca.leaf(pss=amd_pss(salt_bytes=47))), "does not verify")


def test_a_leaf_that_is_a_ca_is_refused(ca: SnpTestCa) -> None:
    name = amd_name("SEV-VCEK")
    issuer = ca.intermediates[SigningKey.VCEK].subject
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    leaf = issue(name, key, issuer, ca.intermediate_keys[SigningKey.VCEK], ca=True, valid=VALID)
    refused(ca, Endorsements(leaf, ca.intermediates[SigningKey.VCEK], ca.root_certificate), "is one of a CA")


def test_an_unknown_critical_extension_is_refused(ca: SnpTestCa) -> None:
    key = ca.intermediate_keys[SigningKey.VCEK]
    subject, oid = ca.intermediates[SigningKey.VCEK].subject, x509.ObjectIdentifier("1.3.6.1.4.1.3704.9")
    builder = x509.CertificateBuilder(ca.root_certificate.subject, subject, key.public_key(), 1, *VALID)
    builder = builder.add_extension(x509.UnrecognizedExtension(oid, b"?"), critical=True)
    certificate = builder.sign(ca.root_key, SHA384(), rsa_padding=amd_pss())
    refused(ca, with_intermediate(ca, certificate), "unknown critical extension")


def test_expired_certificates_are_refused(ca: SnpTestCa) -> None:
    refused(ca, endorsements(ca, ca.leaf(valid=EARLIER)), "SEV-VCEK is valid from")
    old = SnpTestCa(MILAN, valid=EARLIER)
    refused(old, endorsements(old, old.leaf()), "ARK-Milan is valid from")
    check(old, endorsements(old, old.leaf(valid=EARLIER)), at=EARLIER[1])


def test_a_crl_revokes_the_intermediate_and_nothing_else(ca: SnpTestCa) -> None:
    leaf = ca.leaf()
    serial = ca.intermediates[SigningKey.VCEK].serial_number
    check(ca, endorsements(ca, leaf, ca.crl()))
    pem = x509.load_der_x509_crl(ca.crl(serial + 1)).public_bytes(Encoding.PEM)
    check(ca, endorsements(ca, leaf, pem))
    refused(ca, endorsements(ca, leaf, ca.crl(7, serial)), f"serial {serial:#x} is revoked")
    refused(ca, endorsements(ca, leaf, ca.crl(ca.root_certificate.serial_number)), "is revoked")


def test_a_crl_of_another_authority_is_refused(ca: SnpTestCa) -> None:
    refused(ca, endorsements(ca, ca.leaf(), SnpTestCa(MILAN).crl()), "signature of CRL does not verify")
    refused(ca, endorsements(ca, ca.leaf(), authority(Product.GENOA).crl()), "another issuer")


def test_crls_are_chosen_by_their_issuer(ca: SnpTestCa) -> None:
    """Of several roots, several of one root, in any form and order; all of a PEM file count."""
    leaf, serial = ca.leaf(), ca.intermediates[SigningKey.VCEK].serial_number
    other, good, revoking = authority(Product.GENOA).crl(serial), ca.crl(), ca.crl(serial)
    pems = [x509.load_der_x509_crl(crl).public_bytes(Encoding.PEM) for crl in (other, good, revoking)]
    for crls in (
        [other, good],
        [good, other],
        [pems[0], good],
        b"".join(pems[:2]),
        b"text\n".join(pems[1::-1]),
    ):
        found = endorsements(ca, leaf, crls)
        assert len(found.crls) == 2
        check(ca, found)
    for crls in ([good, revoking], [revoking, good], b"".join(pems), [other, b"".join(pems[1:])]):
        refused(ca, endorsements(ca, leaf, crls), "is revoked")
    refused(ca, endorsements(ca, leaf, [other, other]), "another issuer .* give one of ARK-Milan")
    # An outdated list beside a new one is no fault; what it revoked stays revoked.
    check(ca, endorsements(ca, leaf, [ca.crl(valid=EARLIER), good, ca.crl(valid=LATER)]))
    refused(ca, endorsements(ca, leaf, [ca.crl(serial, valid=EARLIER), good]), "is revoked")
    refused(ca, endorsements(ca, leaf, [good, SnpTestCa(MILAN).crl()]), "signature of CRL does not verify")


def test_a_pem_file_of_crls_has_nothing_else_in_it(ca: SnpTestCa) -> None:
    pem = x509.load_der_x509_crl(ca.crl()).public_bytes(Encoding.PEM)
    for wrong in (
        pem + pem[:-10],
        pem + ca.chain(SigningKey.VCEK),
        ca.chain(SigningKey.VCEK),
        pem[:30] + pem,
    ):
        with pytest.raises(MalformedData, match="CRL"):
            endorsements(ca, ca.leaf(), wrong)


def test_a_crl_out_of_its_time_is_refused(ca: SnpTestCa) -> None:
    """Over, or not begun: a list of the future is none that anybody has today."""
    refused(ca, endorsements(ca, ca.leaf(), ca.crl(valid=EARLIER)), "fetch a new one")
    refused(ca, endorsements(ca, ca.leaf(), ca.crl(valid=LATER)), "the CRL is valid from")
    check(ca, endorsements(ca, ca.leaf(), ca.crl(valid=LATER)), at=LATER[0])


def test_certificates_of_the_past_are_valid_together_at_some_time(ca: SnpTestCa) -> None:
    roots = [ca.root]
    past = endorsements(ca, ca.leaf(valid=(VALID[0], VALID[0] + timedelta(days=1))))
    later = AT + timedelta(days=3650)
    check_chain(past, SigningKey.VCEK, at=later, roots=roots, whenever=True)
    assert (past.valid_from, past.valid_until) == (VALID[0], VALID[0] + timedelta(days=1))
    refused(ca, past, "SEV-VCEK is valid from")
    never = endorsements(ca, ca.leaf(valid=EARLIER))
    with pytest.raises(AttestationError, match="never valid together"):
        check_chain(never, SigningKey.VCEK, at=AT, roots=roots, whenever=True)
    # What a CRL says of today holds for what was signed before.
    for crl, why in ((ca.crl(), None), (ca.crl(valid=EARLIER), "fetch a new one")):
        old = endorsements(ca, ca.leaf(valid=(VALID[0], VALID[0] + timedelta(days=1))), crl)
        with contextlib.nullcontext() if why is None else pytest.raises(AttestationError, match=why):
            check_chain(old, SigningKey.VCEK, at=AT, roots=roots, whenever=True)


def test_a_crl_with_an_unknown_critical_extension_is_refused(ca: SnpTestCa) -> None:
    extension = x509.IssuingDistributionPoint(None, None, True, False, None, False, False)
    builder = x509.CertificateRevocationListBuilder(ca.root_certificate.subject, *VALID)
    builder = builder.add_extension(extension, critical=True)
    crl = builder.sign(ca.root_key, SHA384(), rsa_padding=amd_pss()).public_bytes(Encoding.DER)
    refused(ca, endorsements(ca, ca.leaf(), crl), "unknown critical extension")


def test_a_root_that_may_not_sign_crls(ca: SnpTestCa) -> None:
    name = ca.root_certificate.subject
    root = issue(name, ca.root_key.public_key(), name, ca.root_key, ca=True, crl_sign=False, valid=VALID)
    pin = Root(MILAN, root.fingerprint(SHA256()))
    good = endorsements(ca, ca.leaf(), ca.crl())
    check_chain(Endorsements(good.leaf, good.intermediate, root), SigningKey.VCEK, at=AT, roots=[pin])
    with pytest.raises(AttestationError, match="may not sign CRLs"):
        check_chain(
            Endorsements(good.leaf, good.intermediate, root, good.crls), SigningKey.VCEK, at=AT, roots=[pin]
        )


def test_a_second_signature_algorithm_is_refused(ca: SnpTestCa) -> None:
    """The one outside of the signed part is nobody's word, so it may not differ from the one inside."""
    leaf, crl = ca.leaf().certificate, ca.crl()
    chain = ca.chain(SigningKey.VCEK)
    refused(ca, parse_endorsements_untrusted(with_sha256_outside(leaf), chain, crl), "SEV-VCEK states two")
    with pytest.raises(MalformedData, match="not a CRL"):
        parse_endorsements_untrusted(leaf, chain, with_sha256_outside(crl))


def with_sha256_outside(signed: bytes) -> bytes:
    """A certificate or CRL with SHA-256 in place of SHA-384 in its last, unsigned algorithm identifier."""
    oid = bytes.fromhex("608648016503040202")
    return (oid[:-1] + b"\1").join(signed.rsplit(oid, 2))  # named twice: for the hash, and for its mask


def test_an_intermediate_that_was_revoked_is_refused_without_a_crl(ca: SnpTestCa) -> None:
    serial = ca.intermediates[SigningKey.VCEK].serial_number
    pin = Root(MILAN, ca.root.sha256, revoked=frozenset({serial}))
    with pytest.raises(AttestationError, match="is revoked"):
        check_chain(endorsements(ca, ca.leaf()), SigningKey.VCEK, at=AT, roots=[pin])
    assert {root.product: root.revoked for root in AMD_ROOTS}[Product.GENOA] == {0x20001}


@pytest.mark.parametrize("product", Product)
def test_the_extensions_of_a_leaf(product: Product) -> None:
    ca = authority(product)
    vcek = parse_leaf_untrusted(endorsements(ca, ca.leaf()).leaf)
    assert (vcek.tcb, vcek.hwid, vcek.csp_id) == (
        default_tcb(product),
        bytes(range(1, product.chip_id_bytes + 1)),
        None,
    )
    vlek = parse_leaf_untrusted(endorsements(ca, ca.leaf(SigningKey.VLEK)).leaf)
    assert (vlek.tcb, vlek.hwid, vlek.csp_id) == (default_tcb(product), None, CSP_ID)


def test_security_versions_up_to_255(ca: SnpTestCa) -> None:
    tcb = Tcb(None, bootloader=127, tee=128, snp=255, microcode=0)
    assert parse_leaf_untrusted(endorsements(ca, ca.leaf(tcb=tcb)).leaf).tcb == tcb


@pytest.mark.parametrize("first", [0x02, 0x04, 0x16])
def test_a_raw_hwid_may_look_like_der(ca: SnpTestCa, first: int) -> None:
    hwid = bytes([first, 62, *range(62)])
    assert parse_leaf_untrusted(endorsements(ca, ca.leaf(hwid=hwid)).leaf).hwid == hwid


@pytest.mark.parametrize(
    "change",
    [
        {"1": None},
        {"1": der_integer(2)},
        {"1": der_integer(1)},
        {"2": None},
        {"2": b"\x0c\x05Milan"},
        {"2": der_string("Mi\nlan")},
        {"3.1": None},
        {"3.3": b"\x02\x01\x80"},
        {"3.3": b"\x02\x02\x00\x01"},
        {"3.3": b"\x02\x02\x01\x00"},
        {"3.3": b"\x02\x01\x01\x00"},
        {"3.3": b"\x02\x00"},
        {"3.3": b"\x04\x01\x01"},
        {"3.3": b""},
        {"3.5": der_integer(1)},
        {"3.9": der_integer(0)},
        {"4": bytes(8)},
        {"4": bytes(63)},
        {"4": b"\x04\x41" + bytes(65)},
        {"4": b"\x05\x40" + bytes(64)},
        {"5": b"\x16\x7fshort"},
    ],
)
def test_a_leaf_with_wrong_extensions_is_malformed(ca: SnpTestCa, change: dict[str, bytes | None]) -> None:
    certificate = endorsements(ca, ca.leaf(extensions=change)).leaf
    with pytest.raises(MalformedData):
        parse_leaf_untrusted(certificate)


def test_chains_and_leaves_that_are_none(ca: SnpTestCa) -> None:
    leaf, chain = ca.leaf().certificate, ca.chain(SigningKey.VCEK)
    root = ca.root_certificate.public_bytes(Encoding.PEM)
    for parts in (root, root + root, chain + root, chain.split(b"-----END")[0], b"", b"-----BEGIN nonsense"):
        with pytest.raises(MalformedData):
            parse_endorsements_untrusted(leaf, parts, None)
    for wrong in (b"", b"\x30\x00", chain, leaf + b"x", bytes(1 << 17)):
        with pytest.raises(MalformedData):
            parse_endorsements_untrusted(wrong, chain, None)
    for wrong in (b"", leaf, b"-----BEGIN X509 CRL-----", bytes(1 << 17)):
        with pytest.raises(MalformedData):
            parse_endorsements_untrusted(leaf, chain, wrong)


@given(st.data())
def test_a_changed_certificate_is_malformed_or_refused(data: st.DataObject) -> None:
    """One byte of leaf, ASK or CRL is another: nothing but our two errors comes out, and nothing verifies."""
    ca = authority(MILAN)
    files = [_LEAF.certificate, ca.intermediates[SigningKey.VCEK].public_bytes(Encoding.DER), _CRL]
    which = data.draw(st.integers(0, 2))
    raw = bytearray(files[which])
    # The octet before a signature tells how many bits at its end are unused: X.509 reads the same bytes either way.
    unused_bits = len(raw) - 256 - 1
    place = data.draw(st.integers(0, len(raw) - 1).filter(lambda offset: offset != unused_bits))
    raw[place] ^= data.draw(st.integers(1, 255))
    files[which] = bytes(raw)
    root = ca.root_certificate.public_bytes(Encoding.DER)
    with pytest.raises((MalformedData, AttestationError)):
        check(ca, parse_endorsements_untrusted(files[0], [files[1], root], files[2]))


@given(st.binary(max_size=300))
def test_noise_is_malformed(data: bytes) -> None:
    with contextlib.suppress(MalformedData):
        parse_endorsements_untrusted(data, [data, data], data)
        pytest.fail("noise was taken for certificates")


_LEAF = authority(MILAN).leaf()
_CRL = authority(MILAN).crl()
