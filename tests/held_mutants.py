"""Mutations of what a bundle that takes long to be sealed must keep from happening, and how a name is replaced."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING
from unittest.mock import patch

from pagexfer.svsm.source import SourceSvsm

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import ExitStack

    from pagexfer.svsm.export import Exported


def replaced(owner: object, name: str, new: object) -> Callable[[ExitStack], None]:
    def apply(stack: ExitStack) -> None:
        stack.enter_context(patch.object(owner, name, new))

    return apply


def as_if_nothing_were_sealed(name: str) -> Callable[[ExitStack], None]:
    """For one method of the source."""
    method = getattr(SourceSvsm, name)

    def blind(svsm: SourceSvsm, *arguments: object) -> object:
        sealing, svsm._sealing = svsm._sealing, 0
        try:
            return method(svsm, *arguments)
        finally:
            svsm._sealing = sealing

    return replaced(SourceSvsm, name, blind)


def leaves_an_ended_session(stack: ExitStack) -> None:
    """A bundle's session is looked at before it is sealed, and not once more after it."""
    export, require = SourceSvsm.export, SourceSvsm._require_epoch
    looked = threading.local()

    def export_after_one_look(
        svsm: SourceSvsm, channel: int, start: int, stop: int, out: memoryview
    ) -> Exported:
        looked.at = False
        try:
            return export(svsm, channel, start, stop, out)
        finally:
            looked.at = None

    def look_once(svsm: SourceSvsm) -> None:
        if not getattr(looked, "at", None):
            require(svsm)
        if getattr(looked, "at", None) is False:
            looked.at = True

    stack.enter_context(patch.object(SourceSvsm, "export", export_after_one_look))
    stack.enter_context(patch.object(SourceSvsm, "_require_epoch", look_once))
