"""What tests of SNP attestation share: the folder of real reports where it is there, and a test authority per product."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pagexfer.attestation.snp import parse_endorsements_untrusted, verify_report
from pagexfer.testing.snp_ca import AT, SnpTestCa

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pagexfer.attestation.insecure.certificates import Leaf
    from pagexfer.attestation.snp import Endorsements, Product, SnpClaims

DATA = Path(os.environ.get("PAGEXFER_SNP_DATA", Path(__file__).parents[2] / "shared" / "snp"))

needs_data = pytest.mark.skipif(
    not (DATA / "INDEX.md").is_file(), reason=f"no real reports in {DATA}: set PAGEXFER_SNP_DATA"
)

# Report, leaf certificate, product.
REAL = [
    ("milan-v2-a", "vcek", "milan"),
    ("milan-v2-debug", "vcek", "milan"),
    ("milan-v2-azure", "vcek", "milan"),
    ("milan-v2-vlek", "vlek", "milan"),
    ("milan-v3-a", "vcek", "milan"),
    ("milan-v3-azure", "vcek", "milan"),
    ("milan-v3-azure", "vcek2", "milan"),
    ("milan-v3-vlek", "vlek", "milan"),
    ("genoa-v3-azure", "vcek", "genoa"),
    ("genoa-v5-a", "vcek", "genoa"),
    ("turin-v5-a", "vcek", "turin"),
]
NAMES = sorted({name for name, _, _ in REAL})


def report(name: str) -> bytes:
    return (DATA / f"{name}.report.bin").read_bytes()


def leaf(name: str, kind: str) -> bytes:
    return (DATA / f"{name}.{kind}.der").read_bytes()


def chain(kind: str, product: str) -> bytes:
    return (DATA / f"chain-{kind[:4]}-{product}.pem").read_bytes()


def listed(name: str) -> dict[str, str]:
    """The fields of a report as INDEX.md lists them: name and the rest of the line."""
    section = (DATA / "INDEX.md").read_text().split(f"### {name}\n")[1]
    lines = section.split("```")[1].strip().splitlines()
    return {field: value.strip() for field, _, value in (line.partition(" ") for line in lines)}


@functools.cache
def authority(product: Product) -> SnpTestCa:
    """One authority for all tests: making its keys takes a while."""
    return SnpTestCa(product)


def endorsements(ca: SnpTestCa, leaf: Leaf, crl: bytes | Sequence[bytes] | None = None) -> Endorsements:
    return parse_endorsements_untrusted(leaf.certificate, ca.chain(leaf.kind), crl)


def verified(ca: SnpTestCa, leaf: Leaf, raw: bytes, crl: bytes | None = None) -> SnpClaims:
    """Claims of a report of a test authority, at the time at which its certificates are valid."""
    return verify_report(raw, endorsements(ca, leaf, crl), at=AT, roots=[ca.root])
