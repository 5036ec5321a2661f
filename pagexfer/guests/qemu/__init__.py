"""Guests in a stock, unpatched QEMU: RAM by pagexfer, device state by QEMU's own migration stream."""

from .guest import QemuGuest

__all__ = ["QemuGuest"]
