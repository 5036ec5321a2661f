"""Parsing of SNP reports, TCBs and certificate tables: real ones as they are listed, made ones field by field, noise."""

from __future__ import annotations

import contextlib
import re
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagexfer.attestation.insecure.reports import FIELDS, REPORT_BYTES, default_tcb, pack_report, pack_tcb
from pagexfer.attestation.snp import (
    CertificateTable,
    Product,
    Tcb,
    parse_certificate_table_untrusted,
    parse_report_untrusted,
)
from pagexfer.attestation.snp.describe import describe_report
from pagexfer.attestation.snp.product import Cpuid, parse_tcb_untrusted
from pagexfer.attestation.snp.report import PREFIX
from pagexfer.errors import MalformedData

from . import snp_data
from .snp_data import needs_data

BASE: dict[str, int | bytes] = {"version": 5, "policy": 0x30000, "cpuid": bytes([0x19, 0x11, 1])}
PLAIN = pack_report(BASE)
VCEK_GUID = bytes.fromhex("63da758de6644564adc5f4b93be8accd")
ARK_GUID = bytes.fromhex("c0b406a4a80349529743 3fb6014cd0ae")


def set_byte(raw: bytes, offset: int, value: int) -> bytes:
    return raw[:offset] + bytes([value]) + raw[offset + 1 :]


def as_listed(value: str) -> str:
    """A value of INDEX.md as hex or number, without the explanation in brackets."""
    if match := re.fullmatch(r"(zero|0xff) x(\d+)", value):
        return ("00" if match[1] == "zero" else "ff") * int(match[2])
    return value.partition(" ")[0]


@needs_data
@pytest.mark.parametrize("name", snp_data.NAMES)
def test_a_real_report_has_the_fields_that_are_listed(name: str) -> None:
    listed = snp_data.listed(name)
    report = parse_report_untrusted(snp_data.report(name))
    for field in ("family_id", "image_id", "report_data", "measurement", "host_data", "id_key_digest"):
        assert getattr(report, field).hex() == as_listed(listed[field]), field
    for field in ("author_key_digest", "report_id", "report_id_ma", "chip_id"):
        assert getattr(report, field).hex() == as_listed(listed[field]), field
    for field in ("current_tcb", "reported_tcb", "committed_tcb", "launch_tcb"):
        assert getattr(report, field).hex() == as_listed(listed[field]), field
    for field in ("version", "guest_svn", "policy", "vmpl", "signature_algo", "platform_info", "key_info"):
        assert getattr(report, field) == int(as_listed(listed[field]), 0), field
    for field in ("current_version", "committed_version"):
        assert str(getattr(report, field)) == listed[field], field
    for field in ("launch_mit_vector", "current_mit_vector"):
        vector = listed[field]
        assert getattr(report, field) == (None if vector.startswith("absent") else int(vector, 16)), field
    assert (report.signature_r, report.signature_s) == (int(listed["sig_r"], 16), int(listed["sig_s"], 16))
    shown = (
        "absent (v2)"
        if report.cpuid is None
        else re.sub(r"stepping (\d+)", r"stepping 0x\1", str(report.cpuid))
    )
    assert shown == listed["cpuid_fms"]
    assert report.raw == snp_data.report(name)


@needs_data
@pytest.mark.parametrize("name", snp_data.NAMES)
def test_a_real_tcb_has_the_parts_that_are_listed(name: str) -> None:
    listed = snp_data.listed(name)
    layout = 1 if name.startswith("turin") else 0
    for field in ("current_tcb", "reported_tcb", "committed_tcb", "launch_tcb"):
        raw, _, parts = listed[field].partition(" ")
        assert f"({parse_tcb_untrusted(bytes.fromhex(raw), layout)})" == parts


# Not every value will do for the others: each has its own test.
@pytest.mark.parametrize("name", sorted(FIELDS.keys() - {"version", "policy", "key_info"}))
def test_a_field_stands_at_its_offset(name: str) -> None:
    offset, size = FIELDS[name]
    value = bytes(range(1, size + 1))
    report = parse_report_untrusted(pack_report(BASE | {name: value}))
    found = getattr(report, name)
    assert report.raw[offset : offset + size] == value
    if isinstance(found, int):
        found = found.to_bytes(size, "little")
    elif isinstance(found, Cpuid):
        found = bytes([found.family, found.model, found.stepping])
    elif not isinstance(found, bytes):
        found = bytes(reversed(found))
    assert found == value


def test_a_prefix_is_taken_off() -> None:
    prefixed = struct.pack("<II24x", 0, REPORT_BYTES) + PLAIN
    assert parse_report_untrusted(prefixed) == parse_report_untrusted(PLAIN)


@pytest.mark.parametrize(
    "prefix", [(0x16, 0, b""), (0, 0, b""), (1, REPORT_BYTES, b""), (0, REPORT_BYTES, b"\1")]
)
def test_a_prefix_of_no_report_is_refused(prefix: tuple[int, int, bytes]) -> None:
    with pytest.raises(MalformedData, match="prefix"):
        parse_report_untrusted(PREFIX.pack(*prefix) + PLAIN)


@pytest.mark.parametrize("size", [0, 4, 1183, 1185, 1215, 1217, 4000])
def test_another_size_is_refused(size: int) -> None:
    with pytest.raises(MalformedData, match=f"{size} bytes"):
        parse_report_untrusted((PLAIN * 4)[:size])


@pytest.mark.parametrize("version", [0, 1, 6, 0xFFFFFFFF])
def test_an_unknown_version_is_refused(version: int) -> None:
    with pytest.raises(MalformedData, match=f"version {version}"):
        parse_report_untrusted(pack_report(BASE | {"version": version}))


RESERVED = [
    *(0x04C, 0x04F, 0x18B, 0x19F, 0x1EB, 0x1EF, 0x208, 0x29F),
    *(0x2D0, 0x2E7, 0x318, 0x32F, 0x330, 0x49F),
]


@pytest.mark.parametrize("offset", RESERVED, ids=hex)
def test_a_reserved_byte_must_be_zero(offset: int) -> None:
    with pytest.raises(MalformedData, match="reserved"):
        parse_report_untrusted(set_byte(PLAIN, offset, 1))


def test_every_byte_is_a_field_or_reserved() -> None:
    named = {byte for start, size in FIELDS.values() for byte in range(start, start + size)}
    for offset in set(range(REPORT_BYTES)) - named:
        with pytest.raises(MalformedData):
            parse_report_untrusted(set_byte(PLAIN, offset, 0x80))


@pytest.mark.parametrize(
    ("version", "field"), [(2, "cpuid"), (2, "launch_mit_vector"), (4, "current_mit_vector")]
)
def test_fields_of_later_versions_are_reserved_in_earlier_ones(version: int, field: str) -> None:
    value = b"\0" * (FIELDS[field][1] - 1) + b"\1"
    earlier = BASE | {"version": version, "cpuid": BASE["cpuid"] if version > 2 else bytes(3)}
    assert parse_report_untrusted(pack_report(earlier)).current_mit_vector is None
    with pytest.raises(MalformedData, match="reserved"):
        parse_report_untrusted(pack_report(earlier | {field: value}))


@pytest.mark.parametrize("policy", [0, 1 << 16, 1 << 17 | 1 << 26, 1 << 17 | 1 << 63])
def test_a_guest_policy_with_reserved_bits_is_refused(policy: int) -> None:
    with pytest.raises(MalformedData, match="guest policy"):
        parse_report_untrusted(pack_report(BASE | {"policy": policy}))


@pytest.mark.parametrize(
    ("info", "author", "masked", "key"),
    [(0, False, False, 0), (0b10101, True, False, 5), (0b11110, False, True, 7)],
)
def test_key_info(info: int, author: bool, masked: bool, key: int) -> None:
    report = parse_report_untrusted(pack_report(BASE | {"key_info": info}))
    assert (report.author_key_enabled, report.chip_key_masked, report.signing_key) == (author, masked, key)
    with pytest.raises(MalformedData, match="key info"):
        parse_report_untrusted(pack_report(BASE | {"key_info": info | 0x20}))


@given(st.one_of(st.binary(max_size=1300), st.binary(min_size=1184, max_size=1184)))
def test_noise_is_malformed_data_or_a_report(data: bytes) -> None:
    with contextlib.suppress(MalformedData):
        assert parse_report_untrusted(data).raw in data


@given(st.integers(0, REPORT_BYTES - 1), st.integers(0, 255))
def test_a_changed_report_is_malformed_data_or_a_report_that_can_be_shown(offset: int, value: int) -> None:
    with contextlib.suppress(MalformedData):
        describe_report(parse_report_untrusted(set_byte(PLAIN, offset, value)))


@pytest.mark.parametrize("product", Product)
def test_a_tcb_round_trips(product: Product) -> None:
    tcb = default_tcb(product)
    assert parse_tcb_untrusted(pack_tcb(tcb), product.tcb_layout) == tcb


@pytest.mark.parametrize(("layout", "reserved"), [(0, (2, 3, 4, 5)), (1, (4, 5, 6))])
def test_a_tcb_with_reserved_bytes_is_refused(layout: int, reserved: tuple[int, ...]) -> None:
    for index in range(8):
        raw = set_byte(bytes(8), index, 1)
        if index in reserved:
            with pytest.raises(MalformedData, match="reserved"):
                parse_tcb_untrusted(raw, layout)
        else:
            assert sum(parse_tcb_untrusted(raw, layout).parts().values()) == 1


def test_tcbs_are_compared_part_by_part() -> None:
    old_bootloader = Tcb(None, bootloader=3, tee=0, snp=24, microcode=255)
    assert (
        old_bootloader.first_part_below(Tcb(None, bootloader=4, tee=0, snp=24, microcode=1)) == "bootloader"
    )
    assert old_bootloader.first_part_below(old_bootloader) is None
    assert old_bootloader.first_part_below(Tcb(0, bootloader=3, tee=0, snp=24, microcode=1)) == "fmc"


@pytest.mark.parametrize(
    ("family", "model", "product"),
    [
        (0x19, 0x01, Product.MILAN),
        (0x19, 0x0F, Product.MILAN),
        (0x19, 0x11, Product.GENOA),
        (0x19, 0xA0, Product.GENOA),
        (0x1A, 0x02, Product.TURIN),
        (0x1A, 0x11, Product.TURIN),
        (0x19, 0x20, None),
        (0x1A, 0x12, None),
        (0x1A, 0x50, None),
        (0x18, 0x01, None),
    ],
)
def test_products_by_cpuid(family: int, model: int, product: Product | None) -> None:
    assert Cpuid(family, model, 1).product is product


def table(*entries: tuple[bytes, int, bytes], tail: bytes = b"") -> bytes:
    header = b"".join(guid + struct.pack("<II", offset, len(data)) for guid, offset, data in entries)
    return header + bytes(24) + b"".join(data for _, _, data in entries) + tail


def test_a_certificate_table() -> None:
    ending_in_zero = b"\x30\x82\x00\x03\x01\x02\x00"
    raw = table((ARK_GUID, 96, b"-----BEGIN\0\0"), (b"?" * 16, 108, b"xy"), (VCEK_GUID, 110, ending_in_zero))
    expected = CertificateTable(vcek=ending_in_zero, root=b"-----BEGIN")
    assert parse_certificate_table_untrusted(raw + bytes(100)) == expected


@pytest.mark.parametrize("size", [0, 24, 4096])
def test_an_empty_certificate_table(size: int) -> None:
    assert parse_certificate_table_untrusted(bytes(size)) == CertificateTable()


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"\1" * 24, "without an end"),
        (b"\0" * 23, "without an end"),
        (b"\1" * 24 * 40 + bytes(24), "without an end"),
        (bytes(1 << 17), "at most"),
        (table((VCEK_GUID, 47, b"x"), tail=b"y"), "entry at 47"),
        (table((VCEK_GUID, 49, b"x")), "entry at 49"),
        (table((VCEK_GUID, 0xFFFFFFFF, b"x")), "entry at"),
        (table((VCEK_GUID, 72, b"x"), (VCEK_GUID, 73, b"y")), "two entries"),
    ],
)
def test_a_wrong_certificate_table_is_refused(raw: bytes, why: str) -> None:
    with pytest.raises(MalformedData, match=why):
        parse_certificate_table_untrusted(raw)


@given(st.binary(max_size=200))
def test_noise_is_malformed_data_or_a_table(data: bytes) -> None:
    with contextlib.suppress(MalformedData):
        parse_certificate_table_untrusted(data)
