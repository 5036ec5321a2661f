"""The simulated guest: its vCPUs are processes that write over shared RAM, on any Linux machine."""

from .guest import SimulatedGuest

__all__ = ["SimulatedGuest"]
