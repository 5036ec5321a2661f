"""Files that a command line names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ..attestation.snp.certificates import parse_crls_untrusted
from ..errors import MalformedData, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

MAX_FILE_BYTES: Final = 1 << 16


def read_file(path: Path, what: str, limit_bytes: int = MAX_FILE_BYTES) -> bytes:
    """All of a file of at most `limit_bytes`. Raises UsageError where it cannot be read, or is too large to be `what`."""
    try:
        with path.open("rb") as file:
            data = file.read(limit_bytes + 1)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    if len(data) > limit_bytes:
        raise UsageError(f"{path} has more than {limit_bytes} bytes: not a {what}")
    return data


def read_crls(paths: Iterable[Path]) -> list[bytes]:
    """Files of revocation lists as they are. Raises UsageError, which names the one that is none."""
    files = [(path, read_file(path, "CRL")) for path in paths]
    for path, data in files:
        try:
            parse_crls_untrusted(data, str(path))
        except MalformedData as error:
            raise UsageError(str(error)) from None
    return [data for _, data in files]
