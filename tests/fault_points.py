"""The named points of a migration of three channels at which tests have something go wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pagexfer.testing.proxy import at_bundle, at_frame
from pagexfer.wire.bundle import BundleKind
from pagexfer.wire.framing import FrameType

if TYPE_CHECKING:
    from collections.abc import Callable

    from pagexfer.testing.proxy import Frame

FAULT_POINTS: Final[dict[str, Callable[[], Callable[[Frame], bool]]]] = {
    "channel-open": lambda: at_bundle(BundleKind.CHANNEL_OPEN, 2),
    "mid-epoch": lambda: at_bundle(BundleKind.PAGES, 2),
    "first-barrier": lambda: at_frame(FrameType.BARRIER, channel=1),
    "last-barrier": lambda: at_frame(FrameType.BARRIER, 2, channel=2),
    "epoch-token": lambda: at_bundle(BundleKind.EPOCH_TOKEN),
    "last-epoch-token": lambda: at_bundle(BundleKind.EPOCH_TOKEN, 2),
    "device-state": lambda: at_bundle(BundleKind.DEVICE_STATE),
    "vcpu-state": lambda: at_bundle(BundleKind.VCPU_STATE, 2),
    "manifest": lambda: at_bundle(BundleKind.MANIFEST),
    "ready": lambda: at_bundle(BundleKind.READY),
    "start-token": lambda: at_bundle(BundleKind.START_TOKEN),
    "running": lambda: at_bundle(BundleKind.RUNNING),
}
