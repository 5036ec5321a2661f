"""Certificates like AMD's, signed with any key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.padding import MGF1, PSS
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.x509.oid import NameOID

from ..snp import AMD_ROOTS, Product, SigningKey, Tcb

if TYPE_CHECKING:
    from datetime import datetime

CSP_ID: Final = "CN=test.example"

_AMD: Final = "1.3.6.1.4.1.3704.1."
_SERIALS: Final = {root.product: 0x10000 * number for number, root in enumerate(AMD_ROOTS, start=1)}
_RSA_BITS: Final = 2048  # AMD's have 4096; these sign nothing that matters

Validity = tuple["datetime", "datetime"]


@dataclass(frozen=True, slots=True)
class Leaf:
    """A signing key of a processor or a provider, with its certificate in DER."""

    key: ec.EllipticCurvePrivateKey
    certificate: bytes
    kind: SigningKey
    tcb: Tcb
    hwid: bytes | None


def issue_root(product: Product, key: rsa.RSAPrivateKey, valid: Validity) -> x509.Certificate:
    """An ARK, signed with its own key."""
    name = amd_name(f"ARK-{product.value}")
    return issue(name, key.public_key(), name, key, serial=_SERIALS[product], ca=True, valid=valid)


def issue_intermediate(
    product: Product, kind: SigningKey, key: rsa.RSAPrivateKey, root_key: rsa.RSAPrivateKey, valid: Validity
) -> x509.Certificate:
    """An ASK for VCEKs, or an ASVK for VLEKs."""
    vlek = kind is SigningKey.VLEK
    return issue(
        amd_name(f"SEV-{'VLEK-' if vlek else ''}{product.value}"),
        key.public_key(),
        amd_name(f"ARK-{product.value}"),
        root_key,
        serial=_SERIALS[product] + (0x101 if vlek else 1),
        ca=True,
        valid=valid,
    )


def amd_pss(*, salt_bytes: int = 48) -> PSS:
    """The padding of all of AMD's signatures."""
    return PSS(MGF1(SHA384()), salt_bytes)


def amd_name(common_name: str) -> x509.Name:
    """A name with the attributes that AMD's have."""
    return x509.Name(
        [
            x509.NameAttribute(NameOID.COUNTRY_NAME, "US"),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "pagexfer test"),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
        ]
    )


def amd_extensions(
    product: Product, kind: SigningKey, tcb: Tcb, hwid: bytes | None
) -> dict[str, bytes | None]:
    """AMD's extensions of a leaf by the tails of their OIDs (AMD 57230)."""
    name = "Milan-B0" if (product, kind) == (Product.MILAN, SigningKey.VCEK) else product.value
    spl = {"3.1": tcb.bootloader, "3.2": tcb.tee, "3.3": tcb.snp, "3.8": tcb.microcode}
    reserved = {"3.5": 0, "3.6": 0, "3.7": 0}
    third: dict[str, int] = {"3.4": 0} if tcb.fmc is None else {"3.9": tcb.fmc}
    return {
        "1": der_integer(product.tcb_layout),
        "2": der_string(name),
        **{tail: der_integer(value) for tail, value in (spl | reserved | third).items()},
        "4": hwid,
        "5": der_string(CSP_ID) if kind is SigningKey.VLEK else None,
    }


def der_integer(value: int) -> bytes:
    """A DER INTEGER from 0 to 255."""
    content = value.to_bytes(value.bit_length() // 8 + 1, "big")
    return bytes([2, len(content)]) + content


def der_string(value: str) -> bytes:
    """A DER IA5String of fewer than 128 characters."""
    return bytes([0x16, len(value)]) + value.encode("ascii")


def issue(
    subject: x509.Name,
    public_key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey,
    issuer: x509.Name,
    issuer_key: rsa.RSAPrivateKey,
    *,
    serial: int = 1,
    ca: bool = False,
    ca_bit: bool = True,
    key_cert_sign: bool = True,
    crl_sign: bool = True,
    valid: Validity,
    extensions: dict[str, bytes] | None = None,
    pss: PSS | None = None,
) -> x509.Certificate:
    """A certificate signed as AMD signs (AMD's leaves have serial 0, which the library does not write)."""
    builder = x509.CertificateBuilder(issuer, subject, public_key, serial, *valid)
    if ca:
        builder = builder.add_extension(x509.BasicConstraints(ca=ca_bit, path_length=None), critical=True)
        usage = dict.fromkeys(_USAGES, False) | {"key_cert_sign": key_cert_sign, "crl_sign": crl_sign}
        builder = builder.add_extension(x509.KeyUsage(**usage), critical=True)
    for tail, value in (extensions or {}).items():
        oid = x509.ObjectIdentifier(_AMD + tail)
        builder = builder.add_extension(x509.UnrecognizedExtension(oid, value), critical=False)
    return builder.sign(issuer_key, SHA384(), rsa_padding=amd_pss() if pss is None else pss)


def rsa_key() -> rsa.RSAPrivateKey:
    """A new RSA key, which takes some tenths of a second."""
    return rsa.generate_private_key(public_exponent=65537, key_size=_RSA_BITS)


_USAGES: Final = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)
