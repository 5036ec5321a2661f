"""Where a guest gets its report, against stand-ins for the kernel: its files and its ioctl need a machine with SEV-SNP."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pagexfer.attestation.insecure.reports import FIELDS, REPORT_BYTES
from pagexfer.attestation.snp import (
    CertificateTable,
    Product,
    SigningKey,
    find_provider,
    parse_certificate_table_untrusted,
)
from pagexfer.attestation.snp.providers import SevGuestProvider, TsmProvider
from pagexfer.errors import AttestationError, MalformedData, UsageError

from .snp_data import authority

if TYPE_CHECKING:
    from pagexfer.testing.snp_ca import SnpTestCa

DATA = bytes(range(64))
CHAIN = CertificateTable(vcek=b"the leaf", intermediate=b"the intermediate", root=b"the root")
# A host's: padded to whole pages, with a list that we take from nobody.
TABLE = replace(CHAIN, crl=b"a list").pack().ljust(0x3000, b"\0")


@pytest.fixture
def ca() -> SnpTestCa:
    return authority(Product.MILAN)


class ConfigFs:
    """configfs-tsm as linux/Documentation/ABI/testing/configfs-tsm tells: attributes appear and go with their directory."""

    def __init__(self, root: Path, ca: SnpTestCa, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.provider, self.other_writes = root, "sev_guest", 0
        self.ca, self.leaf = ca, ca.leaf()
        self.report_data: bytes | None = None
        self.vmpl: int | None = None
        self.table = TABLE
        root.mkdir()
        real_mkdir, real_write = Path.mkdir, os.write

        def mkdir(path: Path) -> None:
            real_mkdir(path)
            for name in ("inblob", "outblob", "privlevel"):
                (path / name).touch()
            (path / "auxblob").write_bytes(self.table)
            (path / "provider").write_text(self.provider + "\n")
            (path / "generation").write_text("0\n")

        def write(descriptor: int, data: bytes) -> int:
            size = real_write(descriptor, data)
            self.written(Path(os.readlink(f"/proc/self/fd/{descriptor}")).parent)
            return size

        monkeypatch.setattr(Path, "mkdir", mkdir)
        monkeypatch.setattr(Path, "rmdir", shutil.rmtree)
        monkeypatch.setattr(os, "write", write)

    def written(self, entry: Path) -> None:
        generation = int((entry / "generation").read_text()) + 1 + self.other_writes
        (entry / "generation").write_text(f"{generation}\n")
        data = (entry / "inblob").read_bytes()
        if len(data) == 64:
            vmpl = int((entry / "privlevel").read_text()) if self.vmpl is None else self.vmpl
            raw = self.ca.report(self.leaf, report_data=self.report_data or data, vmpl=vmpl)
            (entry / "outblob").write_bytes(raw)


@pytest.fixture
def configfs(tmp_path: Path, ca: SnpTestCa, monkeypatch: pytest.MonkeyPatch) -> ConfigFs:
    return ConfigFs(tmp_path / "report", ca, monkeypatch)


def field(raw: bytes, name: str) -> bytes:
    offset, size = FIELDS[name]
    return raw[offset : offset + size]


def test_configfs_gives_a_report_and_the_table(configfs: ConfigFs, tmp_path: Path) -> None:
    provider = find_provider(tsm=configfs.root, device=tmp_path / "none")
    evidence = provider.evidence(DATA, vmpl=2)
    assert (field(evidence.report, "report_data"), field(evidence.report, "vmpl")) == (DATA, b"\2\0\0\0")
    assert evidence.table == CHAIN.pack()
    assert not list(configfs.root.iterdir())


def test_of_a_table_the_chain_of_the_report_is_kept(configfs: ConfigFs) -> None:
    """Evidence stays in the guest's ledger for good: padding would be most of it."""
    provider = TsmProvider(configfs.root)
    configfs.table = b""
    assert provider.evidence(DATA, vmpl=0).table == b""
    configfs.table = bytes(0x4000)
    assert provider.evidence(DATA, vmpl=0).table == b""
    both = replace(CHAIN, vlek=b"another leaf")
    configfs.table = both.pack()
    assert parse_certificate_table_untrusted(provider.evidence(DATA, vmpl=0).table) == CHAIN
    configfs.leaf = configfs.ca.leaf(SigningKey.VLEK)
    assert parse_certificate_table_untrusted(provider.evidence(DATA, vmpl=0).table) == replace(
        both, vcek=None
    )
    configfs.table = b"no table at all"
    with pytest.raises(MalformedData, match="certificate table"):
        provider.evidence(DATA, vmpl=0)


def test_another_writer_in_configfs_is_noticed(configfs: ConfigFs) -> None:
    configfs.other_writes = 1
    with pytest.raises(AttestationError, match="another process"):
        TsmProvider(configfs.root).evidence(DATA, vmpl=0)
    assert not list(configfs.root.iterdir())


def test_a_report_of_another_request_is_noticed(configfs: ConfigFs) -> None:
    configfs.report_data = bytes(64)
    with pytest.raises(AttestationError, match="not of the request"):
        TsmProvider(configfs.root).evidence(DATA, vmpl=0)


@pytest.mark.parametrize(("asked", "given"), [(0, 1), (2, 0), (2, 3)])
def test_a_report_at_another_vmpl_is_noticed(configfs: ConfigFs, asked: int, given: int) -> None:
    configfs.vmpl = given
    with pytest.raises(AttestationError, match="not of the request"):
        TsmProvider(configfs.root).evidence(DATA, vmpl=asked)
    configfs.vmpl = asked
    TsmProvider(configfs.root).evidence(DATA, vmpl=asked)


def test_configfs_of_another_platform(configfs: ConfigFs) -> None:
    configfs.provider = "tdx_guest"
    with pytest.raises(UsageError, match="tdx_guest"):
        TsmProvider(configfs.root).evidence(DATA, vmpl=0)


def test_configfs_that_gives_nothing(tmp_path: Path) -> None:
    """A plain directory: the attributes do not come."""
    with pytest.raises(UsageError, match="no report at VMPL 1"):
        TsmProvider(tmp_path).evidence(DATA, vmpl=1)
    assert not list(tmp_path.iterdir())


class Driver:
    """The ioctl as linux/include/uapi/linux/sev-guest.h lays it out."""

    def __init__(self, ca: SnpTestCa) -> None:
        self.ca, self.leaf = ca, ca.leaf()
        self.error, self.exit_info = 0, 0
        self.status = 0

    def ioctl(self, descriptor: int, request: int, argument: bytearray, mutate: bool) -> int:
        assert (request, mutate, len(argument)) == (0xC0205302, True, 32)
        version, asked, answered, _ = struct.unpack("<B7xQQQ", argument)
        assert version == 1
        data, vmpl, rest, table, length = struct.unpack("<64sI28sQI4x", ctypes.string_at(asked, 112))
        assert (rest, length) == (bytes(28), 0x4000)
        if self.error:
            struct.pack_into("<Q", argument, 24, self.exit_info)
            raise OSError(self.error, os.strerror(self.error))
        raw = self.ca.report(self.leaf, report_data=data, vmpl=vmpl)
        response = struct.pack("<II24x", self.status, REPORT_BYTES) + raw
        ctypes.memmove(answered, response, len(response))
        ctypes.memmove(table, TABLE, len(TABLE))
        return 0


@pytest.fixture
def driver(ca: SnpTestCa, monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver(ca)
    monkeypatch.setattr(fcntl, "ioctl", driver.ioctl)
    return driver


@pytest.mark.usefixtures("driver")
def test_the_ioctl_gives_a_bare_report_and_the_table(tmp_path: Path) -> None:
    device = tmp_path / "sev-guest"
    device.touch()
    evidence = find_provider(tsm=tmp_path / "none", device=device).evidence(DATA, vmpl=3)
    assert len(evidence.report) == REPORT_BYTES
    assert (field(evidence.report, "report_data"), field(evidence.report, "vmpl")) == (DATA, b"\3\0\0\0")
    assert evidence.table == CHAIN.pack()


@pytest.mark.parametrize(
    ("error", "exit_info", "why"),
    [
        (errno.EIO, 0x16, "firmware error 0x16, host error 0x0"),
        (errno.EIO, 1 << 32, "firmware error 0x0, host error 0x1"),
        (errno.EIO, 2 << 32, "the host is busy"),
        (errno.ENOTTY, 0, "restart the guest"),
        (errno.EACCES, 0, "Permission denied"),
    ],
)
def test_what_the_driver_refuses(driver: Driver, error: int, exit_info: int, why: str) -> None:
    driver.error, driver.exit_info = error, exit_info
    with pytest.raises(UsageError, match=why):
        SevGuestProvider(Path("/dev/null")).evidence(DATA, vmpl=0)


def test_a_device_that_is_no_sev_guest() -> None:
    with pytest.raises(UsageError, match="no report at VMPL 0 from /dev/null"):
        SevGuestProvider(Path("/dev/null")).evidence(DATA, vmpl=0)


@pytest.mark.parametrize(("data", "vmpl"), [(b"", 0), (bytes(63), 0), (bytes(65), 0), (DATA, 4), (DATA, -1)])
def test_a_request_that_is_none(data: bytes, vmpl: int, tmp_path: Path) -> None:
    for provider in (TsmProvider(tmp_path), SevGuestProvider(Path("/dev/null"))):
        with pytest.raises(UsageError, match="64 bytes and a VMPL"):
            provider.evidence(data, vmpl=vmpl)


def test_without_a_source_of_reports_the_error_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"neither .* nor .* run in an SEV-SNP guest"):
        find_provider(tsm=tmp_path / "tsm", device=tmp_path / "sev-guest")
