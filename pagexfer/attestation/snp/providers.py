"""Where a guest gets its own report on Linux: configfs-tsm (kernel 6.7 and later), else the ioctl of /dev/sev-guest.

Both carry the firmware's answer and the host's certificate table. The host can withhold either; it can forge no report.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import secrets
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from ...errors import AttestationError, UsageError
from .report import PREFIX, REPORT_BYTES, REPORT_DATA_BYTES, SigningKey, parse_report_untrusted
from .table import CertificateTable, parse_certificate_table_untrusted

if TYPE_CHECKING:
    from .report import Report

TSM_REPORTS: Final = Path("/sys/kernel/config/tsm/report")
SEV_GUEST: Final = Path("/dev/sev-guest")
VMPLS: Final = range(4)

_TSM_PROVIDER: Final = "sev_guest"

# struct snp_guest_request_ioctl (linux/sev-guest.h): message version u8, 7 bytes of padding, address of the request u64,
# address of the response u64, firmware error u32, VMM error u32.
_GUEST_REQUEST: Final = struct.Struct("<B7xQQII")
assert _GUEST_REQUEST.size == 32
_SNP_GET_EXT_REPORT: Final = 0xC0205302  # _IOWR('S', 2, struct snp_guest_request_ioctl)

# struct snp_ext_report_req: report data, VMPL u32, 28 reserved bytes, address of the table u64, its length u32, padding.
_EXT_REPORT: Final = struct.Struct("<64sI28xQI4x")
assert _EXT_REPORT.size == 112
_RESPONSE_BYTES: Final = 4000
_TABLE_BYTES: Final = 0x4000  # the most that the driver takes

_VMM_BUSY: Final = 2


@dataclass(frozen=True, slots=True)
class Evidence:
    """A report of 1184 bytes and the certificate table that came with it, empty where there was none."""

    report: bytes
    table: bytes


class Provider(Protocol):
    """Something that has the firmware sign report data."""

    def evidence(self, report_data: bytes, *, vmpl: int) -> Evidence:
        """A report over 64 bytes, asked for as `vmpl`, the caller's own or a less privileged one.

        Raises UsageError where this machine does not give one, AttestationError or MalformedData where what it gives is not
        the report that was asked for.
        """
        ...


def find_provider(*, tsm: Path = TSM_REPORTS, device: Path = SEV_GUEST) -> Provider:
    """The best provider that this machine has. Raises UsageError where it has none."""
    if tsm.is_dir():
        return TsmProvider(tsm)
    if device.exists():
        return SevGuestProvider(device)
    raise UsageError(
        f"no SNP reports on this machine: neither {tsm} nor {device} is there; run in an SEV-SNP guest, "
        "with configfs mounted (Linux 6.7 and later) or the module sev-guest loaded"
    )


class TsmProvider:
    """configfs-tsm: a directory for each request, made and removed here."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def evidence(self, report_data: bytes, *, vmpl: int) -> Evidence:
        _check_request(report_data, vmpl)
        entry = self._root / f"pagexfer-{os.getpid()}-{secrets.token_hex(4)}"
        try:
            entry.mkdir()
            try:
                return self._request(entry, report_data, vmpl)
            finally:
                entry.rmdir()
        except (OSError, ValueError) as error:
            raise UsageError(f"no report at VMPL {vmpl} from {self._root}: {error}") from None

    def _request(self, entry: Path, report_data: bytes, vmpl: int) -> Evidence:
        provider = _read_text(entry / "provider")
        if provider != _TSM_PROVIDER:
            raise UsageError(f"{self._root} gives reports of {provider!r}, not of {_TSM_PROVIDER!r}")
        before = int(_read_text(entry / "generation"))
        _write(entry / "privlevel", str(vmpl).encode())
        _write(entry / "inblob", report_data)
        evidence = Evidence((entry / "outblob").read_bytes(), (entry / "auxblob").read_bytes())
        # The kernel counts writes, of which two are ours: another count is another writer's.
        if int(_read_text(entry / "generation")) != before + 2:
            raise AttestationError(f"another process wrote to {entry} during the request")
        return _checked(evidence, report_data, vmpl)


class SevGuestProvider:
    """The ioctl SNP_GET_EXT_REPORT of the sev-guest driver."""

    def __init__(self, device: Path) -> None:
        self._device = device

    def evidence(self, report_data: bytes, *, vmpl: int) -> Evidence:
        _check_request(report_data, vmpl)
        table = ctypes.create_string_buffer(_TABLE_BYTES)
        response = ctypes.create_string_buffer(_RESPONSE_BYTES)
        request = ctypes.create_string_buffer(
            _EXT_REPORT.pack(report_data, vmpl, ctypes.addressof(table), _TABLE_BYTES), _EXT_REPORT.size
        )
        argument = bytearray(
            _GUEST_REQUEST.pack(1, ctypes.addressof(request), ctypes.addressof(response), 0, 0)
        )
        try:
            descriptor = os.open(self._device, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.ioctl(descriptor, _SNP_GET_EXT_REPORT, argument, True)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise UsageError(self._explain(error, argument, vmpl)) from None
        answer = response.raw[: PREFIX.size + REPORT_BYTES]
        return _checked(Evidence(answer, table.raw), report_data, vmpl)

    def _explain(self, error: OSError, argument: bytearray, vmpl: int) -> str:
        *_, firmware, vmm = _GUEST_REQUEST.unpack(argument)
        told = f"no report at VMPL {vmpl} from {self._device}: {error.strerror}"
        if vmm == _VMM_BUSY:
            return f"{told}; the host is busy, try again"
        if firmware or vmm:
            return f"{told}; firmware error {firmware:#x}, host error {vmm:#x}"
        if error.errno == errno.ENOTTY:
            return f"{told}; it is no sev-guest device, or the driver gave up its key after a bad answer: restart the guest"
        return told


def _check_request(report_data: bytes, vmpl: int) -> None:
    if len(report_data) != REPORT_DATA_BYTES or vmpl not in VMPLS:
        raise UsageError(
            f"a report is asked for with {REPORT_DATA_BYTES} bytes and a VMPL from 0 to 3, "
            f"not with {len(report_data)} bytes and VMPL {vmpl}"
        )


def _checked(evidence: Evidence, report_data: bytes, vmpl: int) -> Evidence:
    """The evidence with its report bare, and of the table only what verifies it: both stay in the guest's ledger for good.

    Raises AttestationError where it is not the report that was asked for, MalformedData where either is none at all.
    """
    report = parse_report_untrusted(evidence.report)
    if report.report_data != report_data or report.vmpl != vmpl:
        raise AttestationError("the firmware's report is not of the request that was made")
    return Evidence(report.raw, _chain_of(report, evidence.table))


def _chain_of(report: Report, table: bytes) -> bytes:
    """A table of the report's chain alone: a host's is padded to pages, 16 KiB from the driver, and may have more in it."""
    parsed = parse_certificate_table_untrusted(table)
    kept = (
        replace(parsed, vcek=None, crl=None)
        if report.signing_key == SigningKey.VLEK
        else replace(parsed, vlek=None, crl=None)
    )
    return kept.pack() if kept != CertificateTable() else b""


def _read_text(path: Path) -> str:
    return path.read_text(encoding="ascii").strip()


def _write(path: Path, value: bytes) -> None:
    """One write of the whole value into an attribute that is there: each write counts."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, value)
    finally:
        os.close(descriptor)
