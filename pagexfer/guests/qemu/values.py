"""Typed access to what QMP returns, whose shape QEMU's schema promises and nobody here checks before."""

from __future__ import annotations

from ...errors import GuestError


def records(value: object) -> list[dict[str, object]]:
    """A list of objects. Raises GuestError for anything else."""
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise GuestError("QEMU returned something else than a list of objects")
    return value


def record(value: object) -> dict[str, object]:
    """An object. Raises GuestError for anything else."""
    return records([value])[0]


def text(value: object) -> str:
    """A string. Raises GuestError for anything else."""
    if not isinstance(value, str):
        raise GuestError("QEMU returned something else than a string")
    return value


def whole(value: object) -> int:
    """A number of bytes, an index. Raises GuestError for anything else."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise GuestError("QEMU returned something else than a whole number")
    return value
