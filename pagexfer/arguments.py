"""Checks of what a program gives the library, before anything is connected or opened. Used by the front door of both sides.

Types are for programs that are checked for them. In others a wrong argument would come up in the middle of a move, as
whatever error the code has that meets it first. Each check says in one line which argument it is, what it must be and what
kind of thing it was: not its value, which may be a key.
"""

from __future__ import annotations

import inspect
import operator
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import SupportsIndex


def whole(name: str, value: SupportsIndex) -> int:
    """A whole number of any type."""
    try:
        return operator.index(value)
    except TypeError:
        raise _wrong(name, "a whole number", value) from None


def wholes(name: str, values: Iterable[SupportsIndex]) -> tuple[int, ...]:
    """Whole numbers of any type."""
    try:
        return tuple(operator.index(value) for value in values)
    except TypeError:
        raise _wrong(name, "a tuple of whole numbers", values) from None


def real(name: str, value: object) -> float:
    """A number of any type."""
    if not isinstance(value, Real):
        raise _wrong(name, "a number", value)
    return float(value)


def octets(name: str, value: bytes) -> bytes:
    """Bytes of any type."""
    if not isinstance(value, bytes | bytearray | memoryview):
        raise _wrong(name, "bytes", value)
    return bytes(value)


def text(name: str, value: object) -> None:
    """A string."""
    if not isinstance(value, str):
        raise _wrong(name, "a str", value)


def path(name: str, value: object) -> None:
    """A path as an object, which a string is not."""
    if not isinstance(value, Path):
        raise _wrong(name, "a pathlib.Path", value)


def flag(name: str, value: object) -> None:
    """Not just anything that counts as true, such as "no"."""
    if not isinstance(value, bool):
        raise _wrong(name, "True or False", value)


def function(name: str, value: object) -> None:
    """What can be called and has done its work when it returns."""
    if not callable(value) or inspect.iscoroutinefunction(value):
        raise _wrong(name, "a function, and not an async one", value)


def port(name: str, value: object, kind: str, members: Iterable[str]) -> None:
    """Something of the program's own that has what the protocol `kind` has."""
    if isinstance(value, type):
        raise UsageError(f"{name} must be {kind}, and is the class {value.__name__}")
    for member in members:
        if not hasattr(value, member):
            raise UsageError(f"{name} must be {kind}, and {type(value).__name__} has no {member}")


def _wrong(name: str, needed: str, value: object) -> UsageError:
    return UsageError(f"{name} must be {needed}, not {type(value).__name__}")
