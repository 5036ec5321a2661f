"""Multi-channel, parallel page-transfer engine for live-migrating confidential guests."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .attestation import Attestor, Claims, PskAttestor
    from .engine.progress import AuditInfo, ChannelInfo, MigrationInfo, RamInfo, Status, ThrottleInfo
    from .engine.steering import MigrationParameters, Steering
    from .errors import Outcome, PagexferError, TransferAborted, UsageError
    from .guests.guest import Guest
    from .migration import MigrationReport, receive_guest, send_guest

__all__ = [
    "Attestor",
    "AuditInfo",
    "ChannelInfo",
    "Claims",
    "Guest",
    "MigrationInfo",
    "MigrationParameters",
    "MigrationReport",
    "Outcome",
    "PagexferError",
    "PskAttestor",
    "RamInfo",
    "Status",
    "Steering",
    "ThrottleInfo",
    "TransferAborted",
    "UsageError",
    "receive_guest",
    "send_guest",
]

# A name's module is loaded with its first use (PEP 562): the process of an isolated engine, which loads its own modules
# only, then has neither the SVSM's code nor a cipher.
_MODULES = {
    "attestation": ("Attestor", "Claims", "PskAttestor"),
    "engine.progress": ("AuditInfo", "ChannelInfo", "MigrationInfo", "RamInfo", "Status", "ThrottleInfo"),
    "engine.steering": ("MigrationParameters", "Steering"),
    "errors": ("Outcome", "PagexferError", "TransferAborted", "UsageError"),
    "guests.guest": ("Guest",),
    "migration": ("MigrationReport", "receive_guest", "send_guest"),
}

if not TYPE_CHECKING:  # a type checker knows the names, and that there are no others

    def __getattr__(name: str) -> object:
        for module, names in _MODULES.items():
            if name in names:
                return getattr(import_module(f".{module}", __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
