"""What a guest says of its machine where there is nothing to say but its kind (`engine.hypervisor.DescribedHypervisor`)."""

from __future__ import annotations

from ..errors import GuestError


def describe_kind(kind: str) -> bytes:
    """A platform of which every one of that kind is like every other."""
    return kind.encode()


def check_kind(platform: bytes, kind: str) -> None:
    """Raises GuestError where a source's platform is not that of `kind`."""
    if platform != describe_kind(kind):
        raise GuestError(f"the source's guest is of another kind than the destination's, which is {kind}")
