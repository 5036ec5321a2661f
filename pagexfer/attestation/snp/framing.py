"""SNP evidence as the handshake carries it: a report and the certificate table that came with it.

    report bytes u32, always 1184 · report · table bytes u32 · certificate table

Integers are little endian. The report is bare, without the firmware's prefix, so that it has one encoding.
"""

from __future__ import annotations

import struct
from typing import Final

from ...errors import MalformedData
from .providers import Evidence
from .report import REPORT_BYTES
from .table import MAX_TABLE_BYTES

_LENGTH: Final = struct.Struct("<I")
_HEAD_BYTES: Final = _LENGTH.size + REPORT_BYTES + _LENGTH.size


def pack_evidence(evidence: Evidence) -> bytes:
    """One piece of evidence; the report must be bare."""
    parts = evidence.report, evidence.table
    return b"".join(_LENGTH.pack(len(part)) + part for part in parts)


def parse_evidence_untrusted(data: bytes) -> Evidence:
    """Report and table, neither of them looked into. Raises MalformedData where the lengths are not exact."""
    if len(data) < _HEAD_BYTES:
        raise MalformedData(f"SNP evidence of {len(data)} bytes, at least {_HEAD_BYTES}")
    report_bytes = _LENGTH.unpack_from(data)[0]
    if report_bytes != REPORT_BYTES:
        raise MalformedData(f"SNP evidence with a report of {report_bytes} bytes, expected {REPORT_BYTES}")
    table_bytes = _LENGTH.unpack_from(data, _HEAD_BYTES - _LENGTH.size)[0]
    if table_bytes > MAX_TABLE_BYTES or _HEAD_BYTES + table_bytes != len(data):
        raise MalformedData(f"SNP evidence of {len(data)} bytes with a table of {table_bytes}")
    return Evidence(data[_LENGTH.size : _LENGTH.size + REPORT_BYTES], data[_HEAD_BYTES:])
