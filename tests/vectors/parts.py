"""What all vectors are made of."""

from __future__ import annotations

import hashlib

Json = dict[str, object]


def noise(label: str, length: int) -> bytes:
    """Bytes that look random and are the same in every run."""
    return hashlib.shake_256(label.encode()).digest(length)


def coded(data: bytes) -> Json:
    """`bytes` in hex, then `zeros` zero bytes where there are many at the end."""
    used = data.rstrip(b"\0")
    if len(data) - len(used) < 64:
        return {"bytes": data.hex()}
    return {"bytes": used.hex(), "zeros": len(data) - len(used)}


def bad(name: str, data: bytes) -> Json:
    """Bytes that are refused with MalformedData."""
    return {"name": name, **coded(data), "error": "MalformedData"}


def patched(data: bytes, offset: int, new: bytes) -> bytes:
    return data[:offset] + new + data[offset + len(new) :]
