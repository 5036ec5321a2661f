"""The attestation report of SEV-SNP, versions 2 to 5 (AMD 56860, ATTESTATION_REPORT).

A parsed report keeps the bytes as they came: the signature covers those, never an encoding that we made ourselves.
Parsing says nothing of truth; `verify.py` does.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Final, NamedTuple

from ...errors import MalformedData
from .bits import POLICY_ALWAYS_ONE, POLICY_RESERVED
from .product import Cpuid

REPORT_BYTES: Final = 0x4A0
SIGNED_BYTES: Final = 0x2A0
REPORT_DATA_BYTES: Final = 64
CHIP_ID_BYTES: Final = 64
MEASUREMENT_BYTES: Final = 48
VERSIONS: Final = range(2, 6)
NO_MIGRATION_AGENT: Final = b"\xff" * 32

# Before a report as firmware and driver answer it (MSG_REPORT_RSP): status u32, size u32, 24 reserved bytes.
PREFIX: Final = struct.Struct("<II24s")
assert PREFIX.size == 32

# Signed part:
#   offset  size  field                      offset  size  field
#    0x000     4  version                     0x160    32  report_id_ma
#    0x004     4  guest_svn                   0x180     8  reported_tcb
#    0x008     8  policy                      0x188     3  cpuid family, model, stepping (version 3 and later)
#    0x010    16  family_id                   0x18B    21  reserved
#    0x020    16  image_id                    0x1A0    64  chip_id
#    0x030     4  vmpl                        0x1E0     8  committed_tcb
#    0x034     4  signature_algo              0x1E8     3  current build, minor, major
#    0x038     8  current_tcb                 0x1EB     1  reserved
#    0x040     8  platform_info               0x1EC     3  committed build, minor, major
#    0x048     4  key info                    0x1EF     1  reserved
#    0x04C     4  reserved                    0x1F0     8  launch_tcb
#    0x050    64  report_data                 0x1F8     8  launch_mit_vector (version 5)
#    0x090    48  measurement                 0x200     8  current_mit_vector (version 5)
#    0x0C0    32  host_data                   0x208   152  reserved
#    0x0E0    48  id_key_digest
#    0x110    48  author_key_digest
#    0x140    32  report_id
_HEAD: Final = struct.Struct("<IIQ16s16sII8sQI4s64s48s32s48s48s32s32s")
_TAIL: Final = struct.Struct("<8s3B21s64s8s3BB3BB8sQQ152s")
assert _HEAD.size == 0x180
assert _HEAD.size + _TAIL.size == SIGNED_BYTES

# Signature: R and S as little-endian numbers in 72 bytes each, of which P-384 uses 48; 368 reserved bytes, not signed.
_SIGNATURE: Final = struct.Struct("<48s24s48s24s368s")
assert SIGNED_BYTES + _SIGNATURE.size == REPORT_BYTES

# Key info: bit 0 AUTHOR_KEY_EN, bit 1 MASK_CHIP_KEY, bits 4:2 SIGNING_KEY, rest zero.
_KEY_INFO_BITS: Final = 5


class SigningKey(enum.IntEnum):
    """Values of SIGNING_KEY that sign; 7 is a report without signature."""

    VCEK = 0
    VLEK = 1


class FirmwareVersion(NamedTuple):
    """Version of the SNP firmware."""

    major: int
    minor: int
    build: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.build}"


@dataclass(frozen=True, slots=True)
class Report:
    """One report, 1184 bytes. TCBs are the 8 raw bytes: their layout depends on the product."""

    raw: bytes
    version: int
    guest_svn: int
    policy: int
    family_id: bytes
    image_id: bytes
    vmpl: int
    signature_algo: int
    current_tcb: bytes
    platform_info: int
    key_info: int
    report_data: bytes
    measurement: bytes
    host_data: bytes
    id_key_digest: bytes
    author_key_digest: bytes
    report_id: bytes
    report_id_ma: bytes
    reported_tcb: bytes
    cpuid: Cpuid | None  # None in version 2
    chip_id: bytes
    committed_tcb: bytes
    current_version: FirmwareVersion
    committed_version: FirmwareVersion
    launch_tcb: bytes
    launch_mit_vector: int | None  # None before version 5
    current_mit_vector: int | None
    signature_r: int
    signature_s: int

    @property
    def signed(self) -> bytes:
        """The bytes that the signature covers, as they were received."""
        return self.raw[:SIGNED_BYTES]

    @property
    def author_key_enabled(self) -> bool:
        """Whether `author_key_digest` means anything."""
        return bool(self.key_info & 1)

    @property
    def chip_key_masked(self) -> bool:
        """Whether the host had the signing key masked, so that there is no signature."""
        return bool(self.key_info & 2)

    @property
    def signing_key(self) -> int:
        """SIGNING_KEY: a `SigningKey`, or another number where nothing signed."""
        return self.key_info >> 2

    @property
    def chip_id_masked(self) -> bool:
        """Whether the host had the chip id hidden."""
        return not any(self.chip_id)


def parse_report_untrusted(data: bytes) -> Report:
    """A report, bare or after the 32 bytes of MSG_REPORT_RSP.

    Raises MalformedData where the size, the version or a field that must be zero does not fit.
    """
    raw = _without_prefix(bytes(data))
    version = int.from_bytes(raw[:4], "little")
    if version not in VERSIONS:
        raise MalformedData(
            f"report of version {version}: versions {VERSIONS[0]} to {VERSIONS[-1]} are known, "
            "and the meaning of another cannot be guessed"
        )
    _, svn, policy, family, image, vmpl, algorithm, current, platform, key_info, reserved_0, *identity = (
        _HEAD.unpack_from(raw)
    )
    reported, cpu_family, model, stepping, reserved_1, chip_id, committed, *firmware = _TAIL.unpack_from(
        raw, _HEAD.size
    )
    build, minor, major, reserved_2, *committed_firmware = firmware[:8]
    launch, launch_mitigations, current_mitigations, reserved_4 = firmware[8:]
    r, r_rest, s, s_rest, after = _SIGNATURE.unpack_from(raw, SIGNED_BYTES)
    zeros = {
        0x04C: reserved_0,
        0x18B: reserved_1,
        0x1EB: bytes([reserved_2]),
        0x1EF: bytes([committed_firmware[3]]),
        0x208: reserved_4,
        0x2D0: r_rest,
        0x318: s_rest,
        0x330: after,
    }
    if version < 3:
        zeros[0x188] = bytes([cpu_family, model, stepping])
    if version < 5:
        zeros[0x1F8] = raw[0x1F8:0x208]
    _check_zero(zeros)
    _check_bits(policy, key_info)
    data_, measurement, host_data, id_key, author_key, report_id, report_id_ma = identity
    return Report(
        raw=raw,
        version=version,
        guest_svn=svn,
        policy=policy,
        family_id=family,
        image_id=image,
        vmpl=vmpl,
        signature_algo=algorithm,
        current_tcb=current,
        platform_info=platform,
        key_info=key_info,
        report_data=data_,
        measurement=measurement,
        host_data=host_data,
        id_key_digest=id_key,
        author_key_digest=author_key,
        report_id=report_id,
        report_id_ma=report_id_ma,
        reported_tcb=reported,
        cpuid=Cpuid(cpu_family, model, stepping) if version >= 3 else None,
        chip_id=chip_id,
        committed_tcb=committed,
        current_version=FirmwareVersion(major, minor, build),
        committed_version=FirmwareVersion(*reversed(committed_firmware[:3])),
        launch_tcb=launch,
        launch_mit_vector=launch_mitigations if version >= 5 else None,
        current_mit_vector=current_mitigations if version >= 5 else None,
        signature_r=int.from_bytes(r, "little"),
        signature_s=int.from_bytes(s, "little"),
    )


def _without_prefix(data: bytes) -> bytes:
    if len(data) == REPORT_BYTES:
        return data
    if len(data) != PREFIX.size + REPORT_BYTES:
        raise MalformedData(
            f"report of {len(data)} bytes: it has {REPORT_BYTES}, or {PREFIX.size + REPORT_BYTES} with its prefix"
        )
    status, size, reserved = PREFIX.unpack_from(data)
    if status or size != REPORT_BYTES or any(reserved):
        raise MalformedData(f"prefix of a report with status {status:#x} and size {size}")
    return data[PREFIX.size :]


def _check_zero(fields: dict[int, bytes]) -> None:
    for offset, value in fields.items():
        if any(value):
            raise MalformedData(f"report with reserved bytes set in the field at {offset:#x}")


def _check_bits(policy: int, key_info: int) -> None:
    if policy & POLICY_RESERVED or not policy & POLICY_ALWAYS_ONE:
        raise MalformedData(f"report with guest policy {policy:#x}: bit 17 is one and bits 63:26 are zero")
    if key_info >> _KEY_INFO_BITS:
        raise MalformedData(f"report with key info {key_info:#x}: bits 31:5 are zero")
