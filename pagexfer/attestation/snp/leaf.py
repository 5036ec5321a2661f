"""What the leaf certificate of a signing key says beyond X.509: AMD's own extensions (AMD 57230).

Extensions under 1.3.6.1.4.1.3704.1:

    .1                    structVersion   INTEGER    0 Milan and Genoa, 1 Turin
    .2                    productName     IA5String  "Milan-B0", "Genoa", "Turin"
    .3.1 .3.2 .3.3 .3.8   security version numbers of bootloader, TEE, SNP, microcode   INTEGER
    .3.9                  the same of the FMC, structVersion 1 only
    .4                    hwID            raw bytes without any DER, 64 or 8; VCEK only
    .5                    cspID           IA5String  VLEK only
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cryptography import x509

from ...errors import MalformedData
from .product import Tcb

_PREFIX: Final = "1.3.6.1.4.1.3704.1."
_STRUCT_VERSION: Final = "1"
_PRODUCT_NAME: Final = "2"
_HWID: Final = "4"
_CSP_ID: Final = "5"
_SPL: Final = {"bootloader": "3.1", "tee": "3.2", "snp": "3.3", "microcode": "3.8"}
_SPL_FMC: Final = "3.9"
_SPL_RESERVED: Final = ("3.4", "3.5", "3.6", "3.7")

_TAG_INTEGER: Final = 0x02
_TAG_OCTET_STRING: Final = 0x04
_TAG_IA5_STRING: Final = 0x16
_HWID_BYTES: Final = {0: 64, 1: 8}  # by structVersion


@dataclass(frozen=True, slots=True)
class LeafClaims:
    """AMD's extensions of a VCEK (`hwid` set) or VLEK (`csp_id` set)."""

    struct_version: int
    product_name: str
    tcb: Tcb
    hwid: bytes | None
    csp_id: str | None


def parse_leaf_untrusted(certificate: x509.Certificate) -> LeafClaims:
    """The extensions of a leaf. Raises MalformedData where one is missing, twice there or coded otherwise."""
    values = _extension_values_untrusted(certificate)
    struct_version = _integer(values, _STRUCT_VERSION)
    if struct_version not in _HWID_BYTES:
        raise MalformedData(f"leaf certificate with structVersion {struct_version}: 0 and 1 are known")
    if any(_integer(values, tail) for tail in _SPL_RESERVED if tail in values):
        raise MalformedData("leaf certificate with a reserved security version set")
    if (_SPL_FMC in values) != (struct_version == 1):
        raise MalformedData(f"leaf certificate of structVersion {struct_version} with or without FMC version")
    parts = {part: _integer(values, tail) for part, tail in _SPL.items()}
    fmc = _integer(values, _SPL_FMC) if _SPL_FMC in values else None
    return LeafClaims(
        struct_version,
        _string(values, _PRODUCT_NAME),
        Tcb(fmc, **parts),
        _hwid(values[_HWID], _HWID_BYTES[struct_version]) if _HWID in values else None,
        _string(values, _CSP_ID) if _CSP_ID in values else None,
    )


def _extension_values_untrusted(certificate: x509.Certificate) -> dict[str, bytes]:
    """Raw octets of AMD's extensions by the tail of their OID."""
    try:
        extensions = list(certificate.extensions)
    except (ValueError, x509.DuplicateExtension) as error:
        raise MalformedData(f"leaf certificate with unreadable extensions: {error}") from None
    return {
        extension.oid.dotted_string.removeprefix(_PREFIX): extension.value.value
        for extension in extensions
        if isinstance(extension.value, x509.UnrecognizedExtension)
        and extension.oid.dotted_string.startswith(_PREFIX)
    }


def _integer(values: dict[str, bytes], tail: str) -> int:
    """A DER INTEGER from 0 to 255: one octet, or two of which the first is zero and the second has its top bit set."""
    content = _content(values, tail, _TAG_INTEGER)
    short = len(content) == 1 and content[0] < 0x80
    long = len(content) == 2 and content[0] == 0 and content[1] >= 0x80
    if not short and not long:
        raise MalformedData(f"extension {_PREFIX}{tail} is no DER INTEGER from 0 to 255")
    return content[-1]


def _string(values: dict[str, bytes], tail: str) -> str:
    content = _content(values, tail, _TAG_IA5_STRING)
    if not all(0x20 <= byte < 0x7F for byte in content):
        raise MalformedData(f"extension {_PREFIX}{tail} is not printable")
    return content.decode("ascii")


def _content(values: dict[str, bytes], tail: str, tag: int) -> bytes:
    """Content octets of a DER value in short form: a header of two bytes and nothing after it."""
    value = values.get(tail)
    if value is None:
        raise MalformedData(f"leaf certificate without extension {_PREFIX}{tail}: not a VCEK or VLEK")
    if not 2 < len(value) < 0x80 + 2 or value[0] != tag or value[1] != len(value) - 2:
        raise MalformedData(f"extension {_PREFIX}{tail} does not have the coding that AMD gives it")
    return value[2:]


def _hwid(value: bytes, size: int) -> bytes:
    """Raw by its exact length first: a raw one may begin with any byte, also one that looks like a DER tag."""
    if len(value) == size:
        return value
    if len(value) == size + 2 and value[:2] == bytes([_TAG_OCTET_STRING, size]):
        return value[2:]
    raise MalformedData(f"hwID of {len(value)} bytes, expected {size}")
