"""What a run raises where the security contract does not hold."""

from __future__ import annotations


class Violation(Exception):
    """A property did not hold. `rule` is the rule of protocol.md that it belongs to, as "R7"."""

    def __init__(self, rule: str, what: str) -> None:
        super().__init__(f"{rule}: {what}")
        self.rule = rule
        self.what = what
