"""The digest of a policy: vectors, one value for one meaning, another for every other rule."""

from __future__ import annotations

import dataclasses
import json

import pytest

from pagexfer.attestation.policy import Policy
from pagexfer.attestation.policy_digest import canonical_json, policy_digest
from pagexfer.attestation.policy_file import parse_policies

from .wire_vectors import Vector, load, name_of

VECTORS = load("policy")["policies"]


@pytest.mark.parametrize("vector", VECTORS, ids=name_of)
def test_digest_of_vector(vector: Vector) -> None:
    for policy in _policies(vector["file"]).values():
        assert canonical_json(policy).decode() == vector["canonical"]
        assert policy_digest(policy).hex() == vector["digest"]


@pytest.mark.parametrize("vector", VECTORS, ids=name_of)
def test_the_canonical_form_is_a_policy_file_of_the_same_policy(vector: Vector) -> None:
    policy = _policies(vector["file"])["source"]
    read = parse_policies({"version": 1, **json.loads(canonical_json(policy))}).source
    assert policy_digest(read) == policy_digest(policy)
    for field in dataclasses.fields(Policy):
        if field.name != "minimum_tcb":  # of which the order means nothing
            assert getattr(read, field.name) == getattr(policy, field.name)


@pytest.mark.parametrize("field", dataclasses.fields(Policy), ids=lambda field: field.name)
def test_every_rule_counts(field: dataclasses.Field[object]) -> None:
    one, other = (_policies(vector["file"])["source"] for vector in VECTORS)
    changed = dataclasses.replace(one, **{field.name: getattr(other, field.name)})
    assert policy_digest(changed) != policy_digest(one)


def test_rules_of_the_other_role_do_not_count() -> None:
    file = {**VECTORS[0]["file"], "source": {"allow_debug": True}}
    policies = parse_policies(file)
    assert policy_digest(policies.destination).hex() == VECTORS[0]["digest"]
    assert policy_digest(policies.source).hex() != VECTORS[0]["digest"]


def _policies(file: dict[str, object]) -> dict[str, Policy]:
    policies = parse_policies(dict(file))
    return {"destination": policies.destination, "source": policies.source}
