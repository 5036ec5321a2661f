"""Multi-channel, parallel page-transfer engine for live-migrating confidential guests."""

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
