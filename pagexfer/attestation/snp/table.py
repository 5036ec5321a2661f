"""The certificate table that a host gives along with a report (SNP_GET_EXT_REPORT, configfs auxblob).

Every byte of it is the host's word. It saves a download; it is no reason to trust anything, least of all its root.

    entries     GUID in text order 16 B, offset u32, length u32; the entry that is all zero ends them
    contents    certificates or a CRL, DER or PEM, at their offsets from the start of the table
"""

from __future__ import annotations

import struct
import uuid
from dataclasses import dataclass
from typing import Final

from ...errors import MalformedData

MAX_TABLE_BYTES: Final = 1 << 16  # four times what SNP_GET_EXT_REPORT can carry
MAX_ENTRIES: Final = 32

_ENTRY: Final = struct.Struct("<16sII")
assert _ENTRY.size == 24
_END: Final = bytes(_ENTRY.size)

_GUIDS: Final = {
    uuid.UUID("63da758d-e664-4564-adc5-f4b93be8accd"): "vcek",
    uuid.UUID("a8074bc2-a25a-483e-aae6-39c045a0b8a1"): "vlek",
    uuid.UUID("4ab7b379-bbac-4fe4-a02f-05aef327c782"): "intermediate",
    uuid.UUID("c0b406a4-a803-4952-9743-3fb6014cd0ae"): "root",
    uuid.UUID("92f81bc3-5811-4d3d-97ff-d19f88dc67ea"): "crl",
}


@dataclass(frozen=True, slots=True)
class CertificateTable:
    """Contents of a table by what the host says they are, DER or PEM, None where there is none."""

    vcek: bytes | None = None
    vlek: bytes | None = None
    intermediate: bytes | None = None  # ASK or ASVK
    root: bytes | None = None
    crl: bytes | None = None

    def pack(self) -> bytes:
        """The table as a host gives it."""
        contents = [(guid, content) for guid, name in _GUIDS.items() if (content := getattr(self, name))]
        entries, data = b"", b""
        header_bytes = (len(contents) + 1) * _ENTRY.size
        for guid, content in contents:
            entries += _ENTRY.pack(guid.bytes, header_bytes + len(data), len(content))
            data += content
        return entries + _END + data


def parse_certificate_table_untrusted(data: bytes) -> CertificateTable:
    """A table; an empty one has no bytes, or only zeros. Entries with unknown GUIDs are passed over.

    Raises MalformedData where an entry is out of bounds or twice there, or the entries have no end.
    """
    if len(data) > MAX_TABLE_BYTES:
        raise MalformedData(f"certificate table of {len(data)} bytes, at most {MAX_TABLE_BYTES}")
    entries = _entries_untrusted(data)
    header = (len(entries) + 1) * _ENTRY.size
    contents: dict[str, bytes] = {}
    for guid, offset, length in entries:
        if not header <= offset <= offset + length <= len(data):
            raise MalformedData(
                f"certificate table of {len(data)} bytes with an entry at {offset}, {length} bytes"
            )
        name = _GUIDS.get(uuid.UUID(bytes=guid))
        if name in contents:
            raise MalformedData(f"certificate table with two entries for the {name}")
        if name is not None and length:
            contents[name] = _without_padding(data[offset : offset + length])
    return CertificateTable(**contents)


def _entries_untrusted(data: bytes) -> list[tuple[bytes, int, int]]:
    entries: list[tuple[bytes, int, int]] = []
    for start in range(0, len(data), _ENTRY.size):
        raw = data[start : start + _ENTRY.size]
        if raw == _END:
            return entries
        if len(raw) < _ENTRY.size or len(entries) == MAX_ENTRIES:
            break
        entries.append(_ENTRY.unpack(raw))
    if data:
        raise MalformedData(f"certificate table of {len(data)} bytes without an end of its entries")
    return entries


def _without_padding(content: bytes) -> bytes:
    """Contents without zeros after their end. A DER value may itself end in a zero, so its own length decides."""
    if content[:2] != b"\x30\x82":
        return content.rstrip(b"\0")
    size = 4 + int.from_bytes(content[2:4], "big")
    return content if any(content[size:]) else content[:size]
