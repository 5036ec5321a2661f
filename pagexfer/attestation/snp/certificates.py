"""The chain from a signing key to AMD's root: VCEK <- ASK <- ARK, or VLEK <- ASVK <- ARK, with CRL and dates.

Why not a general verifier: AMD's leaf certificates have serial 0 and no key identifiers, and its signatures are RSASSA-PSS,
which `cryptography.x509.verification` does not take. So each rule stands here. The signature scheme is ours to fix, not
the certificate's to state: PSS with SHA-384, MGF1 with SHA-384 and 48 bytes of salt, or nothing.
"""

from __future__ import annotations

import hmac
import itertools
import re
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.padding import MGF1, PSS
from cryptography.hazmat.primitives.hashes import SHA256, SHA384
from cryptography.utils import CryptographyDeprecationWarning
from cryptography.x509.oid import ExtensionOID, NameOID, SignatureAlgorithmOID

from ...errors import AttestationError, MalformedData
from .report import SigningKey

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from .roots import Root

MAX_FILE_BYTES: Final = 1 << 16

_PEM_MARK: Final = b"-----BEGIN"
_PEM_CRL: Final = re.compile(rb"-----BEGIN X509 CRL-----.+?-----END X509 CRL-----", re.DOTALL)
_SALT_BYTES: Final = 48
_UNDERSTOOD_CRITICAL: Final = (ExtensionOID.BASIC_CONSTRAINTS, ExtensionOID.KEY_USAGE)
# What the library raises for bytes that it cannot read; not all of it is a ValueError.
_UNREADABLE: Final = (
    ValueError,
    TypeError,  # a name with a BIT STRING in it
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
    UnsupportedAlgorithm,
)

_Extension = TypeVar("_Extension", x509.BasicConstraints, x509.KeyUsage)


@dataclass(frozen=True, slots=True)
class Endorsements:
    """What speaks for a report: the leaf of its key, the intermediate, the root, and CRLs of any root."""

    leaf: x509.Certificate
    intermediate: x509.Certificate
    root: x509.Certificate
    crls: tuple[x509.CertificateRevocationList, ...] = ()

    @property
    def crls_of_root(self) -> list[x509.CertificateRevocationList]:
        """Those that name this root as their issuer."""
        return [crl for crl in self.crls if crl.issuer == self.root.subject]

    @property
    def valid_from(self) -> datetime:
        """When the last of the three certificates began to be valid."""
        return max(part.not_valid_before_utc for part in (self.leaf, self.intermediate, self.root))

    @property
    def valid_until(self) -> datetime:
        """When the first of them ends to be."""
        return min(part.not_valid_after_utc for part in (self.leaf, self.intermediate, self.root))


class EndorsementNames(NamedTuple):
    """What errors call the three parts."""

    leaf: str = "the leaf"
    chain: str = "the chain"
    crl: str = "the revocation list"


def parse_endorsements_untrusted(
    leaf: bytes,
    chain: bytes | Sequence[bytes],
    crl: bytes | Sequence[bytes] | None,
    names: EndorsementNames = EndorsementNames(),  # noqa: B008 (immutable)
) -> Endorsements:
    """Certificates from bytes, each PEM or DER; `chain` is one PEM text or the two of them, in any order.

    `crl` is of whatever roots: the chain needs one of its own root, where there are any at all.
    Raises MalformedData where they cannot be read or are not two, one of which names itself as issuer.
    """
    chain_parts = (chain,) if isinstance(chain, bytes) else chain
    pair = [certificate for part in chain_parts for certificate in _load_untrusted(part, names.chain)]
    roots = [certificate for certificate in pair if certificate.subject == certificate.issuer]
    if len(pair) != 2 or len(roots) != 1:
        raise MalformedData(f"{names.chain} is not two certificates, ASK or ASVK and ARK")
    leaves = _load_untrusted(leaf, names.leaf)
    if len(leaves) != 1:
        raise MalformedData(f"{names.leaf} is {len(leaves)} certificates, expected one")
    intermediate = pair[1] if pair[0] is roots[0] else pair[0]
    crl_parts = () if crl is None else (crl,) if isinstance(crl, bytes) else crl
    crls = tuple(part for data in crl_parts for part in parse_crls_untrusted(data, names.crl))
    return Endorsements(leaves[0], intermediate, roots[0], crls)


def parse_crls_untrusted(data: bytes, what: str) -> list[x509.CertificateRevocationList]:
    """All CRLs in one file: one in DER, or any number in PEM. Raises MalformedData where there is anything else in it."""
    if len(data) > MAX_FILE_BYTES:
        raise MalformedData(f"{what} has {len(data)} bytes, at most {MAX_FILE_BYTES} are allowed")
    parts = [data]
    if _PEM_MARK in data:
        # The library loads the first one of a file and is silent about the others.
        parts = _PEM_CRL.findall(data)
        if len(parts) != data.count(_PEM_MARK):
            raise MalformedData(f"{what} has something else than CRLs in it, or a CRL without an end")
    return [_load_crl_untrusted(part, what) for part in parts]


def check_chain(
    endorsements: Endorsements,
    key: SigningKey,
    *,
    at: datetime,
    roots: Sequence[Root],
    whenever: bool = False,
) -> tuple[Root, ec.EllipticCurvePublicKey]:
    """Check root, intermediate, CRL and leaf, in this order, for a key of kind `key` at the time `at`.

    With `whenever` certificates may have been valid together at any time, and only the CRL has to be valid at `at`.
    Returns the pinned root and the leaf's public key. Raises AttestationError.
    """
    root = _pinned(endorsements.root, roots)
    product = root.product.value
    moment = None if whenever else at
    _check_ca(endorsements.root, f"ARK-{product}", endorsements.root, moment)
    name = f"SEV-VLEK-{product}" if key is SigningKey.VLEK else f"SEV-{product}"
    _check_ca(endorsements.intermediate, name, endorsements.root, moment)
    _check_revocation(endorsements, root, at)
    public_key = _check_leaf(endorsements.leaf, f"SEV-{key.name}", endorsements.intermediate, moment)
    first, last = endorsements.valid_from, endorsements.valid_until
    if first > last:
        raise AttestationError(
            f"its certificates were never valid together: one from {first}, one until {last}"
        )
    return root, public_key


def _load_untrusted(data: bytes, what: str) -> list[x509.Certificate]:
    if len(data) > MAX_FILE_BYTES:
        raise MalformedData(f"{what} has {len(data)} bytes, at most {MAX_FILE_BYTES} are allowed")
    with warnings.catch_warnings():
        # The leaf's serial is 0: the library warns, and will one day refuse.
        warnings.filterwarnings("ignore", "Parsed a serial number", CryptographyDeprecationWarning)
        try:
            if _PEM_MARK in data:
                certificates = x509.load_pem_x509_certificates(data)
            else:
                certificates = [x509.load_der_x509_certificate(data)]
            for certificate in certificates:
                _read_fields(certificate)
        except _UNREADABLE:
            raise MalformedData(f"{what} is not a certificate, DER or PEM") from None
    return certificates


def _read_fields(certificate: x509.Certificate) -> None:
    """Read each field that the checks use: the library parses some only when asked, and raises then."""
    _ = certificate.subject, certificate.issuer, certificate.version, certificate.extensions
    _ = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    _ = certificate.signature_algorithm_oid, certificate.public_key()


def _load_crl_untrusted(data: bytes, what: str) -> x509.CertificateRevocationList:
    try:
        crl = x509.load_pem_x509_crl(data) if _PEM_MARK in data else x509.load_der_x509_crl(data)
        _ = crl.issuer, crl.extensions, crl.last_update_utc, crl.next_update_utc, crl.signature_algorithm_oid
    except _UNREADABLE:
        raise MalformedData(f"{what} is not a CRL, DER or PEM") from None
    return crl


def _pinned(certificate: x509.Certificate, roots: Sequence[Root]) -> Root:
    fingerprint = certificate.fingerprint(SHA256())
    for root in roots:
        if hmac.compare_digest(fingerprint, root.sha256):
            return root
    raise AttestationError(f"the root certificate {fingerprint.hex()} is not one of the pinned roots")


def _check_ca(
    certificate: x509.Certificate, name: str, issuer: x509.Certificate, at: datetime | None
) -> None:
    _check_common(certificate, name, issuer, at)
    basic = _extension(certificate, x509.BasicConstraints)
    usage = _extension(certificate, x509.KeyUsage)
    if basic is None or not basic.ca or usage is None or not usage.key_cert_sign:
        raise AttestationError(f"the certificate {name} may not sign certificates")


def _check_leaf(
    certificate: x509.Certificate, name: str, issuer: x509.Certificate, at: datetime | None
) -> ec.EllipticCurvePublicKey:
    _check_common(certificate, name, issuer, at)
    basic = _extension(certificate, x509.BasicConstraints)
    if basic is not None and basic.ca:
        raise AttestationError(f"the certificate {name} is one of a CA")
    public_key = certificate.public_key()
    if not isinstance(public_key, ec.EllipticCurvePublicKey) or not isinstance(
        public_key.curve, ec.SECP384R1
    ):
        raise AttestationError(f"the key of the certificate {name} is not on P-384")
    return public_key


def _check_common(
    certificate: x509.Certificate, name: str, issuer: x509.Certificate, at: datetime | None
) -> None:
    """What holds for every certificate of a chain: name, issuer's name and signature, and dates if `at` is given."""
    names = [attribute.value for attribute in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if names != [name]:
        shown = ", ".join(map(repr, names)) or "none"
        raise AttestationError(f"a certificate has the common name {shown}, expected {name!r}")
    if certificate.version is not x509.Version.v3 or certificate.issuer != issuer.subject:
        raise AttestationError(f"the certificate {name} names another issuer, or is not of X.509 version 3")
    _check_signature(
        certificate.signature,
        certificate.tbs_certificate_bytes,
        certificate.signature_algorithm_oid,
        issuer,
        name,
    )
    try:
        certificate.verify_directly_issued_by(issuer)
    except (
        ValueError,
        TypeError,
        InvalidSignature,
    ):  # the scheme is right: only a second one stated can be wrong
        raise AttestationError(f"the certificate {name} states two signature algorithms") from None
    for extension in certificate.extensions:
        if extension.critical and extension.oid not in _UNDERSTOOD_CRITICAL:
            raise AttestationError(
                f"the certificate {name} has the unknown critical extension {extension.oid}"
            )
    first, last = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if at is not None and not first <= at <= last:
        raise AttestationError(f"the certificate {name} is valid from {first} to {last}, not at {at}")


def _check_revocation(endorsements: Endorsements, root: Root, at: datetime) -> None:
    """No list of the root has its own serial number or the intermediate's, and one of them is valid at `at`.

    A list that is out of its time still revokes: what is revoked once stays so.
    """
    serial = endorsements.intermediate.serial_number
    if serial in root.revoked:
        raise AttestationError(f"the intermediate certificate with serial {serial:#x} is revoked")
    if not endorsements.crls:
        return
    crls = endorsements.crls_of_root
    if not crls:
        raise AttestationError(
            f"every CRL that was given is of another issuer than the root certificate: give one of ARK-{root.product.value}"
        )
    for crl in crls:
        _check_crl(crl, endorsements)
    newest = max(crls, key=lambda crl: crl.last_update_utc)
    if not any(_is_valid(crl, at) for crl in crls):
        first, last = newest.last_update_utc, newest.next_update_utc
        raise AttestationError(f"the CRL is valid from {first} to {last}, not at {at}: fetch a new one")
    for crl, number in itertools.product(crls, (serial, endorsements.root.serial_number)):
        if crl.get_revoked_certificate_by_serial_number(number) is not None:
            raise AttestationError(
                f"the certificate with serial {number:#x} is revoked by the CRL of {crl.last_update_utc}"
            )


def _is_valid(crl: x509.CertificateRevocationList, at: datetime) -> bool:
    last = crl.next_update_utc
    return last is not None and crl.last_update_utc <= at <= last


def _check_crl(crl: x509.CertificateRevocationList, endorsements: Endorsements) -> None:
    """It is the root's own word, and has nothing in it that would have to be understood."""
    _check_signature(
        crl.signature, crl.tbs_certlist_bytes, crl.signature_algorithm_oid, endorsements.root, "CRL"
    )
    usage = _extension(endorsements.root, x509.KeyUsage)
    if usage is None or not usage.crl_sign:
        raise AttestationError("the root certificate may not sign CRLs")
    critical = [extension.oid for extension in crl.extensions if extension.critical]
    if critical:
        raise AttestationError(f"the CRL has the unknown critical extension {critical[0]}")


def _check_signature(
    signature: bytes, signed: bytes, algorithm: x509.ObjectIdentifier, issuer: x509.Certificate, name: str
) -> None:
    public_key = issuer.public_key()
    if algorithm != SignatureAlgorithmOID.RSASSA_PSS or not isinstance(public_key, rsa.RSAPublicKey):
        raise AttestationError(f"the signature of {name} is not RSASSA-PSS")
    try:
        public_key.verify(signature, signed, PSS(MGF1(SHA384()), _SALT_BYTES), SHA384())
    except InvalidSignature:
        raise AttestationError(f"the signature of {name} does not verify under its issuer's key") from None


def _extension(certificate: x509.Certificate, kind: type[_Extension]) -> _Extension | None:
    values = (extension.value for extension in certificate.extensions)
    return next((value for value in values if isinstance(value, kind)), None)
