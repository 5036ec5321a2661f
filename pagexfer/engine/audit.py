"""The source engine's part in a digest audit: it asks for one step after the other, and measures what they take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from ..wire.slot import Command, SlotStatus
from .progress import AuditInfo

if TYPE_CHECKING:
    from .slots import Slot

# The quickest of some trials says what the audit takes once no vCPU runs beside it.
_TRIALS: Final = 3


async def predict_audit(control_slot: Slot, ram_pages: int) -> float:
    """Seconds that the audit of all RAM is expected to take, from trials on a part of it."""
    trials = []
    for _ in range(_TRIALS):
        began = trio.current_time()
        answer = await control_slot.command(Command.AUDIT)
        trials.append((trio.current_time() - began) / max(answer.result, 1))
    return min(trials) * ram_pages


async def audit(control_slot: Slot) -> AuditInfo:
    """Have the SVSM hash all of RAM: what that took, and the pages that it found changed and not reported."""
    began, found = trio.current_time(), 0
    while True:
        answer = await control_slot.command(Command.AUDIT)
        found += answer.result2
        await trio.lowlevel.checkpoint()
        if answer.status is not SlotStatus.INCOMPLETE:
            break
    return AuditInfo(1000 * (trio.current_time() - began), found)
