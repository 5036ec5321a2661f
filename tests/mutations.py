"""The rules of protocol.md taken out of the running code one by one, and how fast the hostile host finds each.

    python -m tests.mutations [--schedules 3000] [--seed 1]

What the hostile host then reports has to be a violation; a mutation that it does not find would be a rule that nothing
watches.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pagexfer.testing.hostile import HostileHost, Violation, make_schedule

from .mutants import MUTATIONS

if TYPE_CHECKING:
    from .mutants import Mutation


@dataclass(frozen=True, slots=True)
class Found:
    """How many schedules it took, and what was violated."""

    schedules: int
    violation: Violation


def hunt(mutation: Mutation, schedules: int, seed: int = 1) -> Found | None:
    """Run schedules against the broken code until one is violated, at most `schedules`; None where none is."""
    with mutation.applied():
        host = HostileHost()
        for number in range(schedules):
            try:
                host.run(make_schedule(seed + number))
            except Violation as violation:
                return Found(number + 1, violation)
    return None


def main() -> None:
    """Hunt every mutation and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--schedules", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    print("rule  mutation                                            schedules  violated")
    for mutation in MUTATIONS:
        found = hunt(mutation, options.schedules, options.seed)
        end = "     none" if found is None else f"{found.schedules:9}  {found.violation}"
        print(f"{mutation.rule:4}  {mutation.what:51} {end}", flush=True)


if __name__ == "__main__":
    main()
