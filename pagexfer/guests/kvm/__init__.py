"""A guest that really runs, in a small VMM over /dev/kvm."""

from .guest import KvmGuest
from .machine import unavailable_reason

__all__ = ["KvmGuest", "unavailable_reason"]
