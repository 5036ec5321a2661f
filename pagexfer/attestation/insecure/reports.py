"""Reports made field by field and signed with any key."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384

from ..snp import Product, Tcb

if TYPE_CHECKING:
    from .certificates import Leaf

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


def signed_report(product: Product, leaf: Leaf, **fields: int | bytes) -> bytes:
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
        values["cpuid"] = CPUID[product]
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
