"""The digest that names a policy in a handshake and in a guest's ledger (docs/policy.md).

    policy digest = SHA-384("pagexfer v1 policy" || canonical JSON)

It is of what the policy says, not of the file that said it: every rule with its value, defaults too, in one encoding.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from enum import Enum
from typing import TYPE_CHECKING, Final

from .policy import MinimumTcb
from .policy_file import ANY
from .snp.bits import GuestPolicyBit, PlatformBit

if TYPE_CHECKING:
    from .policy import Policy

_LABEL: Final = b"pagexfer v1 policy"


def policy_digest(policy: Policy) -> bytes:
    """48 bytes that two policies share only where each rule has the same value in both."""
    return hashlib.sha384(_LABEL + canonical_json(policy)).digest()


def canonical_json(policy: Policy) -> bytes:
    """Every rule under its key in a policy file: ASCII, keys sorted, no spaces, the items of a list sorted as JSON."""
    return _encoded({field.name: _plain(getattr(policy, field.name)) for field in fields(policy)})


def _plain(value: object) -> object:
    """A rule's value as a policy file has it; byte strings are hex in lower case."""
    match value:
        case None:
            return ANY
        case bytes():
            return value.hex()
        case PlatformBit() | GuestPolicyBit():
            return value.name
        case Enum():
            return value.value
        case MinimumTcb():
            model = {} if value.model is None else {"model": value.model}
            return {"product": value.product.value, **model, **value.tcb.parts()}
        case frozenset() | tuple():
            return sorted(map(_plain, value), key=_encoded)
        case _:
            return value


def _encoded(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode("ascii")
