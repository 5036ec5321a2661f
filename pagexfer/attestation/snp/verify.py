"""Verification of a report: from bytes that anybody may have sent to claims that AMD's root key stands behind.

One function does all of it, so that no caller can have the chain checked and not the report. What the claims are worth
to us is the policy's to say (`attestation.policy`). The checks stand in a fixed order: form of the report, product, chain
from the pinned root down, signature over the bytes received, then what the certificate says against the report.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384

from ...errors import AttestationError, UsageError
from .certificates import check_chain
from .leaf import LeafClaims, parse_leaf_untrusted
from .product import Product, Tcb, parse_tcb_untrusted
from .report import Report, SigningKey, parse_report_untrusted
from .roots import AMD_ROOTS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from .certificates import Endorsements
    from .roots import Root

_ECDSA_P384_SHA384: Final = 1


@dataclass(frozen=True, slots=True)
class SnpClaims:
    """What a verified report says. `report` has the fields as they stand; the rest needed the certificates.

    `chip` names the processor, 64 bytes or 8 (Turin): a VCEK's certificate does so even where the host had the report's
    chip id hidden. It is None where nothing names it. `csp_id` is whom AMD gave the VLEK to, None under a VCEK.
    From `valid_from` to `valid_until` all certificates are valid.
    """

    report: Report
    product: Product
    signing_key: SigningKey
    current_tcb: Tcb
    reported_tcb: Tcb
    committed_tcb: Tcb
    launch_tcb: Tcb
    chip: bytes | None
    csp_id: str | None
    crl_checked: bool
    valid_from: datetime
    valid_until: datetime

    @property
    def digest(self) -> bytes:
        """SHA-384 of the signed bytes. Not of the signature: a second valid one can be made from any by anybody."""
        return hashlib.sha384(self.report.signed).digest()


def verify_report(
    data: bytes,
    endorsements: Endorsements,
    *,
    at: datetime,
    roots: Sequence[Root] = AMD_ROOTS,
    whenever: bool = False,
) -> SnpClaims:
    """Verify a report (with or without its prefix) as of the time `at`, which has a time zone.

    With `whenever` as of any time at which its certificates were valid, for a report of the past; `at` is for the CRL then.
    Raises AttestationError where something does not hold, MalformedData where bytes are not what they should be.
    """
    if at.tzinfo is None:
        raise UsageError("the time of verification has no time zone")
    report = parse_report_untrusted(data)
    key = _signing_key(report)
    _check_known_product(report)
    root, public_key = check_chain(endorsements, key, at=at, roots=roots, whenever=whenever)
    _check_signature(report, public_key)
    leaf = parse_leaf_untrusted(endorsements.leaf)
    _check_product(report, leaf, root.product)
    claims = SnpClaims(
        report=report,
        product=root.product,
        signing_key=key,
        current_tcb=parse_tcb_untrusted(report.current_tcb, leaf.struct_version),
        reported_tcb=parse_tcb_untrusted(report.reported_tcb, leaf.struct_version),
        committed_tcb=parse_tcb_untrusted(report.committed_tcb, leaf.struct_version),
        launch_tcb=parse_tcb_untrusted(report.launch_tcb, leaf.struct_version),
        chip=_chip(report, leaf, key, root.product),
        csp_id=leaf.csp_id,
        crl_checked=bool(endorsements.crls),
        valid_from=endorsements.valid_from,
        valid_until=endorsements.valid_until,
    )
    _check_tcbs(claims, leaf)
    return claims


def _signing_key(report: Report) -> SigningKey:
    if report.signature_algo != _ECDSA_P384_SHA384:
        raise AttestationError(f"the report's signature algorithm is {report.signature_algo}, expected 1")
    if report.chip_key_masked or report.signing_key not in SigningKey.__members__.values():
        raise AttestationError(f"no VCEK or VLEK signed the report: its key info is {report.key_info:#x}")
    return SigningKey(report.signing_key)


def _check_known_product(report: Report) -> None:
    """Refuse a processor nobody here knows before its certificates are looked at."""
    if report.cpuid is not None and report.cpuid.product is None:
        raise AttestationError(f"the report is of an unknown processor: {report.cpuid}")


def _check_signature(report: Report, public_key: ec.EllipticCurvePublicKey) -> None:
    signature = encode_dss_signature(report.signature_r, report.signature_s)
    try:
        public_key.verify(signature, report.signed, ec.ECDSA(SHA384()))
    except InvalidSignature:
        raise AttestationError(
            "the report's signature does not verify under the leaf certificate's key"
        ) from None


def _check_product(report: Report, leaf: LeafClaims, product: Product) -> None:
    """Root, leaf and report are of one product. A report of version 2 names none, so there the certificates decide."""
    if report.cpuid is not None and report.cpuid.product is not product:
        raise AttestationError(f"the report is of {report.cpuid}, its certificates are of {product.value}")
    # A VCEK names a stepping too: "Milan-B0".
    if leaf.product_name.partition("-")[0] != product.value or leaf.struct_version != product.tcb_layout:
        raise AttestationError(
            f"the leaf certificate is of {leaf.product_name!r}, its root of {product.value}"
        )


def _chip(report: Report, leaf: LeafClaims, key: SigningKey, product: Product) -> bytes | None:
    """The processor's name. Raises AttestationError where certificate and report name two, or the key's kind is another."""
    size = product.chip_id_bytes
    named, rest = report.chip_id[:size], report.chip_id[size:]
    if any(rest):
        raise AttestationError(f"the report's chip id has more than the {size} bytes of {product.value}")
    if key is SigningKey.VLEK:
        if leaf.hwid is not None or leaf.csp_id is None:
            raise AttestationError("the leaf certificate is no VLEK: it names a chip, or no provider")
        return None if report.chip_id_masked else named
    if leaf.hwid is None or leaf.csp_id is not None:
        raise AttestationError("the leaf certificate is no VCEK: it names no chip, or a provider")
    if not report.chip_id_masked and named != leaf.hwid:
        raise AttestationError("the report is of another chip than the leaf certificate")
    return leaf.hwid


def _check_tcbs(claims: SnpClaims, leaf: LeafClaims) -> None:
    if leaf.tcb != claims.reported_tcb:
        raise AttestationError(
            f"the report's TCB is {claims.reported_tcb}, the leaf certificate's {leaf.tcb}"
        )
    for name, tcb in (("reported", claims.reported_tcb), ("committed", claims.committed_tcb)):
        part = claims.current_tcb.first_part_below(tcb)
        if part is not None:
            raise AttestationError(
                f"the {name} TCB ({tcb}) has a higher {part} than runs ({claims.current_tcb})"
            )
