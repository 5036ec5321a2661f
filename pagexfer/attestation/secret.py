"""A type for key material, so that it does not end up where text goes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from ..errors import KeyPoisoned

if TYPE_CHECKING:
    from typing_extensions import Buffer


class Secret:
    """Secret bytes with a redacted repr that are neither pickled nor copied.

    `wipe` overwrites the bytes that this object owns, as best effort: the interpreter and libraries may have made copies
    that no Python code can reach, and a running process's memory is the SVSM's own protection to give.
    """

    __slots__ = ("_data",)

    def __init__(self, data: Buffer) -> None:
        self._data = bytearray(data)

    def reveal(self) -> bytes:
        """The bytes themselves. Raises KeyPoisoned after `wipe`."""
        if not self._data:
            raise KeyPoisoned("the secret was wiped")
        return bytes(self._data)

    def wipe(self) -> None:
        """Overwrite and forget."""
        self._data[:] = bytes(len(self._data))
        self._data.clear()

    def __repr__(self) -> str:
        return "Secret([REDACTED])"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Secret cannot be pickled or copied")
