"""All slots of an in-memory pair, for tests that are the host."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from pagexfer.svsm.commands import destination_channel, destination_control, source_channel, source_control
from pagexfer.testing.slot import HostSlot
from pagexfer.wire.slot import CONTROL_SLOT

if TYPE_CHECKING:
    from pagexfer.testing import SvsmPair

__all__ = ["HostSlot", "HostSlots"]


class HostSlots(NamedTuple):
    """All slots of a pair with two channels."""

    source_control: HostSlot
    source_channels: tuple[HostSlot, HostSlot]
    destination_control: HostSlot
    destination_channels: tuple[HostSlot, HostSlot]

    @classmethod
    def of(cls, pair: SvsmPair) -> HostSlots:
        source, destination = pair.source, pair.destination
        return cls(
            HostSlot(CONTROL_SLOT, partial(source_control, svsm=source)),
            (
                HostSlot(0, partial(source_channel, svsm=source, channel=0)),
                HostSlot(1, partial(source_channel, svsm=source, channel=1)),
            ),
            HostSlot(CONTROL_SLOT, partial(destination_control, svsm=destination)),
            (
                HostSlot(0, partial(destination_channel, svsm=destination, channel=0)),
                HostSlot(1, partial(destination_channel, svsm=destination, channel=1)),
            ),
        )

    def each(self) -> list[HostSlot]:
        return [
            self.source_control,
            *self.source_channels,
            self.destination_control,
            *self.destination_channels,
        ]
