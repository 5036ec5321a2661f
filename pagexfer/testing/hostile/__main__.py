"""Thousands of schedules against real SVSMs: python -m pagexfer.testing.hostile [--schedules N] [--seed S]

Prints what was tried and what came of it. Where the security contract did not hold, it ends with exit code 1, the rule and
the shortest schedule that reproduces it.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Final

from ...errors import RefusalCode
from ...svsm.states import DESTINATION, SOURCE
from .runner import HostileHost, Report
from .schedule import ATTACKS, GUEST_ACTS
from .violation import Violation

_WIDTH: Final = 46


def main() -> int:
    """Run and print; returns the exit code."""
    parser = argparse.ArgumentParser(
        "python -m pagexfer.testing.hostile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--schedules", type=int, default=5000, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the first schedule, the next has one more")
    options = parser.parse_args()
    if options.schedules < 1:
        parser.error(f"--schedules is 1 or more, not {options.schedules}")
    host = HostileHost()
    began = time.monotonic()
    violation: Violation | None = None
    try:
        host.run_seeds(range(options.seed, options.seed + options.schedules))
    except Violation as caught:
        violation = caught
    print(table(host.report, violation))
    print(
        f"{time.monotonic() - began:.1f} s, seeds {options.seed} to {options.seed + host.report.schedules - 1}"
    )
    return 0 if violation is None else 1


def table(report: Report, violation: Violation | None = None) -> str:
    """The report for people."""
    tally = report.tally
    rows = [("schedules", report.schedules), ("commands to SVSMs", tally["commands"])]
    rows += [("bundles sealed, each with a nonce of its own", report.seals)]
    for name in ("migrations completed", "audits completed", "pages that an audit caught"):
        rows += [(name, tally[name])]
    lines = [_row(*row) for row in rows]
    lines += ["", "tried"]
    lines += [_row(f"  {act.value}", tally[act.value]) for act in (*ATTACKS, *GUEST_ACTS)]
    lines += ["", "refused"]
    lines += [_row(f"  {code.name}", tally[f"refused {code.name}"]) for code in RefusalCode]
    for side, states in (("source", SOURCE), ("destination", DESTINATION)):
        lines += ["", f"states that a {side} came to"]
        reached = dict.fromkeys(states.values())
        lines += [_row(f"  {state.name}", tally[f"{side} {state.name}"]) for state in reached]
    lines += ["", _row("violations", 0 if violation is None else 1)]
    if violation is not None:
        lines += [str(violation)]
    return "\n".join(lines)


def _row(name: str, count: int) -> str:
    return f"{name:{_WIDTH}}{count:10}"


if __name__ == "__main__":
    sys.exit(main())
