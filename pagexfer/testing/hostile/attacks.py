"""All that the attacker of the security contract can do, by act."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from .hypervisor import HYPERVISOR
from .network import NETWORK
from .schedule import Act
from .sessions import SESSIONS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .schedule import Step
    from .world import World

Attack = Callable[["World", "Step"], bool]


def attack(world: World, step: Step) -> bool:
    """Do what the step says; whether there was anything to do it to."""
    return _ATTACKS[step.act](world, step)


def _wait(_world: World, _step: Step) -> bool:
    """Handshake messages are tampered with where they are carried (`honest`)."""
    return False


_ATTACKS: Final[Mapping[Act, Attack]] = {**NETWORK, **HYPERVISOR, **SESSIONS, Act.HANDSHAKE: _wait}
