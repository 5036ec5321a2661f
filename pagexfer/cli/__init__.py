"""The command: options, progress and reports around the library's calls."""

from .commands import main

__all__ = ["main"]
