"""Every rule that is taken out of the code is missed by the hostile host: the proof that its silence means something."""

from __future__ import annotations

import pytest

from .mutants import MUTATIONS, Mutation
from .mutations import hunt

# Four times what the slowest one takes; a run that has tried that many without finding it is blind to the rule.
_SCHEDULES = 2400


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.rule}: {m.what}")
def test_a_rule_that_does_not_hold_is_found(mutation: Mutation) -> None:
    found = hunt(mutation, _SCHEDULES)
    assert found is not None
    assert found.violation.rule in mutation.found_as


def test_every_rule_that_exists_is_taken_out_once() -> None:
    assert {mutation.rule for mutation in MUTATIONS} == {f"R{number}" for number in range(1, 14)}
