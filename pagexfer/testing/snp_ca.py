"""A certificate authority that looks like AMD's, and reports signed under it: what no real machine gives a test.

It can make what `attestation.insecure` has no use for: VLEKs, CRLs, and every kind of wrong certificate. A verifier takes
its reports only where it is told to pin this authority's root.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256, SHA384
from cryptography.hazmat.primitives.serialization import Encoding

from ..attestation.insecure.certificates import (
    Leaf,
    amd_extensions,
    amd_name,
    amd_pss,
    issue,
    issue_intermediate,
    issue_root,
    rsa_key,
)
from ..attestation.insecure.reports import default_tcb, signed_report
from ..attestation.snp import Product, Root, SigningKey, Tcb

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.padding import PSS

    from ..attestation.insecure.certificates import Validity

# A time at which everything made here is valid, so that no test looks at the clock.
AT: Final = datetime(2026, 6, 1, tzinfo=UTC)
VALID: Final = (AT - timedelta(days=30), AT + timedelta(days=30))


class SnpTestCa:
    """ARK, ASK and ASVK of one product. Pass `root` to the verifier as the only pin."""

    def __init__(self, product: Product, *, valid: Validity = VALID) -> None:
        self.product = product
        self.root_key, self.intermediate_keys = rsa_key(), {kind: rsa_key() for kind in SigningKey}
        self.root_certificate = issue_root(product, self.root_key, valid)
        self.intermediates = {
            kind: issue_intermediate(product, kind, key, self.root_key, valid)
            for kind, key in self.intermediate_keys.items()
        }

    @property
    def root(self) -> Root:
        """What a verifier pins to accept reports of this authority."""
        return Root(self.product, self.root_certificate.fingerprint(SHA256()))

    def chain(self, kind: SigningKey) -> bytes:
        """ASK or ASVK, then ARK, in PEM."""
        certificates = (self.intermediates[kind], self.root_certificate)
        return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)

    def crl(self, *serials: int, valid: Validity = VALID) -> bytes:
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
        valid: Validity = VALID,
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
        return signed_report(self.product, leaf, **fields)
