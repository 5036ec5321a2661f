"""A hostile host for whoever writes an engine or an SVSM: all between them is the attacker's, and nothing may go wrong.

`HostileHost().run_seeds(range(1000))` drives real SVSMs through their slots, where the attacker is the host, and raises
`Violation` with the shortest schedule that reproduces it. `python -m pagexfer.testing.hostile` prints what was tried.
`proxy.HostileProxy` does the network's part of it to engines over TCP.
"""

from .runner import HostileHost, Report, fails_alike
from .schedule import ATTACKS, Act, Schedule, Step, Tracking, as_python, make_schedule
from .shrink import shrink
from .violation import Violation

__all__ = [
    "ATTACKS",
    "Act",
    "HostileHost",
    "Report",
    "Schedule",
    "Step",
    "Tracking",
    "Violation",
    "as_python",
    "fails_alike",
    "make_schedule",
    "shrink",
]
