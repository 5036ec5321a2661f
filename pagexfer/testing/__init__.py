"""Helpers for tests of pagexfer and of what embeds it. Nothing here is for use with a guest that matters."""

from .gate import BytesGate
from .pair import Message, SvsmPair

__all__ = ["BytesGate", "Message", "SvsmPair"]
