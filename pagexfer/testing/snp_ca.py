"""A certificate authority that looks like AMD's, and reports signed under it: what no real machine gives a test.

Insecure by design: anybody can make one. A verifier takes its reports only where it is told to pin this authority's root.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.padding import MGF1, PSS
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256, SHA384
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from ..attestation.snp import AMD_ROOTS, Product, Root, SigningKey, Tcb

# A time at which everything made here is valid, so that no test looks at the clock.
AT: Final = datetime(2026, 6, 1, tzinfo=UTC)
VALID: Final = (AT - timedelta(days=30), AT + timedelta(days=30))

# Offset and size of every field of a report (AMD 56860), written out here once more: a check on the parser's own layout.
FIELDS: Final = {
    "version": (0x000, 4),
    "guest_svn": (0x004, 4),
    "policy": (0x008, 8),
    "family_id": (0x010, 16),
    "image_id": (0x020, 16),
    "vmpl": (0x030, 4),
    "signature_algo": (0x034, 4),
    "current_tcb": (0x038, 8),
    "platform_info": (0x040, 8),
    "key_info": (0x048, 4),
    "report_data": (0x050, 64),
    "measurement": (0x090, 48),
    "host_data": (0x0C0, 32),
    "id_key_digest": (0x0E0, 48),
    "author_key_digest": (0x110, 48),
    "report_id": (0x140, 32),
    "report_id_ma": (0x160, 32),
    "reported_tcb": (0x180, 8),
    "cpuid": (0x188, 3),
    "chip_id": (0x1A0, 64),
    "committed_tcb": (0x1E0, 8),
    "current_version": (0x1E8, 3),
    "committed_version": (0x1EC, 3),
    "launch_tcb": (0x1F0, 8),
    "launch_mit_vector": (0x1F8, 8),
    "current_mit_vector": (0x200, 8),
    "signature_r": (0x2A0, 48),
    "signature_s": (0x2E8, 48),
}
REPORT_BYTES: Final = 0x4A0
SIGNED_BYTES: Final = 0x2A0

CPUID: Final = {
    Product.MILAN: bytes([0x19, 0x01, 1]),
    Product.GENOA: bytes([0x19, 0x11, 1]),
    Product.TURIN: bytes([0x1A, 0x02, 1]),
}
CSP_ID: Final = "CN=test.example"

_AMD: Final = "1.3.6.1.4.1.3704.1."
_SERIALS: Final = {root.product: 0x10000 * number for number, root in enumerate(AMD_ROOTS, start=1)}
_RSA_BITS: Final = 2048  # AMD's have 4096; these sign nothing that matters, and are made anew in every run


@dataclass(frozen=True, slots=True)
class Leaf:
    """A signing key of a processor or a provider, with its certificate in DER."""

    key: ec.EllipticCurvePrivateKey
    certificate: bytes
    kind: SigningKey
    tcb: Tcb
    hwid: bytes | None


class SnpTestCa:
    """ARK, ASK and ASVK of one product. Pass `root` to the verifier as the only pin."""

    def __init__(self, product: Product, *, valid: tuple[datetime, datetime] = VALID) -> None:
        self.product = product
        self.root_key, self.intermediate_keys = _rsa_key(), {kind: _rsa_key() for kind in SigningKey}
        ark_name, serial = amd_name(f"ARK-{product.value}"), _SERIALS[product]
        self.root_certificate = issue(
            ark_name, self.root_key.public_key(), ark_name, self.root_key, serial=serial, ca=True, valid=valid
        )
        self.intermediates = {
            kind: issue(
                amd_name(f"SEV-{'VLEK-' if kind is SigningKey.VLEK else ''}{product.value}"),
                self.intermediate_keys[kind].public_key(),
                ark_name,
                self.root_key,
                serial=serial + (0x101 if kind is SigningKey.VLEK else 1),
                ca=True,
                valid=valid,
            )
            for kind in SigningKey
        }

    @property
    def root(self) -> Root:
        """What a verifier pins to accept reports of this authority."""
        return Root(self.product, self.root_certificate.fingerprint(SHA256()))

    def chain(self, kind: SigningKey) -> bytes:
        """ASK or ASVK, then ARK, in PEM."""
        certificates = (self.intermediates[kind], self.root_certificate)
        return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)

    def crl(self, *serials: int, valid: tuple[datetime, datetime] = VALID) -> bytes:
        """A CRL of the ARK in DER, with these serial numbers in it."""
        builder = x509.CertificateRevocationListBuilder(self.root_certificate.subject, *valid)
        for serial in serials:
            revoked = x509.RevokedCertificateBuilder(serial, valid[0])
            builder = builder.add_revoked_certificate(revoked.build())
        crl = builder.sign(self.root_key, SHA384(), rsa_padding=amd_pss())
        return crl.public_bytes(Encoding.DER)

    def leaf(
        self,
        kind: SigningKey = SigningKey.VCEK,
        *,
        tcb: Tcb | None = None,
        hwid: bytes | None = None,
        extensions: dict[str, bytes | None] | None = None,
        valid: tuple[datetime, datetime] = VALID,
        curve: ec.EllipticCurve | None = None,
        name: str | None = None,
        issuer: x509.Certificate | None = None,
        pss: PSS | None = None,
    ) -> Leaf:
        """A new VCEK or VLEK. `extensions` replaces some of AMD's by the tails of their OIDs, None leaves one out."""
        tcb = default_tcb(self.product) if tcb is None else tcb
        if kind is SigningKey.VCEK and hwid is None:
            hwid = bytes(range(1, self.product.chip_id_bytes + 1))
        key = ec.generate_private_key(ec.SECP384R1() if curve is None else curve)
        values = amd_extensions(self.product, kind, tcb, hwid) | (extensions or {})
        certificate = issue(
            amd_name(f"SEV-{kind.name}" if name is None else name),
            key.public_key(),
            (self.intermediates[kind] if issuer is None else issuer).subject,
            self.intermediate_keys[kind],
            valid=valid,
            extensions={tail: value for tail, value in values.items() if value is not None},
            pss=pss,
        )
        return Leaf(key, certificate.public_bytes(Encoding.DER), kind, tcb, hwid)

    def report(self, leaf: Leaf, **fields: int | bytes) -> bytes:
        """A report signed by a leaf's key: an ordinary one of version 5, but for the fields given."""
        tcb = pack_tcb(leaf.tcb)
        values: dict[str, int | bytes] = {
            "version": 5,
            "policy": 0x30000,
            "signature_algo": 1,
            "key_info": leaf.kind << 2,
            "measurement": b"\x11" * 48,
            "report_data": b"\x22" * 64,
            "report_id": b"\x33" * 32,
            "report_id_ma": b"\xff" * 32,
            "chip_id": (leaf.hwid or b"").ljust(64, b"\0"),
            "current_tcb": tcb,
            "reported_tcb": tcb,
            "committed_tcb": tcb,
            "launch_tcb": tcb,
            "current_version": bytes([61, 55, 1]),
            "committed_version": bytes([61, 55, 1]),
        }
        if fields.get("version") != 2:
            values["cpuid"] = CPUID[self.product]
        return sign(pack_report(values | fields), leaf.key)


def pack_report(values: dict[str, int | bytes]) -> bytes:
    """The 1184 bytes of a report from its fields, numbers or bytes in report order; the rest is zero."""
    raw = bytearray(REPORT_BYTES)
    for name, value in values.items():
        offset, size = FIELDS[name]
        data = value.to_bytes(size, "little") if isinstance(value, int) else value
        if len(data) != size:
            raise ValueError(f"{name} has {size} bytes, not {len(data)}")
        raw[offset : offset + size] = data
    return bytes(raw)


def sign(raw: bytes, key: ec.EllipticCurvePrivateKey) -> bytes:
    """The report with a signature over its signed part as it is."""
    return with_signature(raw, *decode_dss_signature(key.sign(raw[:SIGNED_BYTES], ec.ECDSA(SHA384()))))


def with_signature(raw: bytes, r: int, s: int) -> bytes:
    """The report with these numbers as its signature."""
    signature = b"".join(number.to_bytes(48, "little").ljust(72, b"\0") for number in (r, s))
    return raw[:SIGNED_BYTES] + signature + raw[SIGNED_BYTES + len(signature) :]


def default_tcb(product: Product) -> Tcb:
    """A TCB like those of real machines. Microcode is above 127: such numbers take two octets in a certificate."""
    return Tcb(1 if product is Product.TURIN else None, bootloader=4, tee=2, snp=24, microcode=219)


def pack_tcb(tcb: Tcb) -> bytes:
    """A TCB in report order: with FMC as Turin has it, without as Milan and Genoa have it."""
    if tcb.fmc is None:
        return bytes([tcb.bootloader, tcb.tee, 0, 0, 0, 0, tcb.snp, tcb.microcode])
    return bytes([tcb.fmc, tcb.bootloader, tcb.tee, tcb.snp, 0, 0, 0, tcb.microcode])


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
    valid: tuple[datetime, datetime] = VALID,
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


def _rsa_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=_RSA_BITS)
