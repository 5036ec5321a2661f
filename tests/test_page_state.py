"""The state word of a page: fields that neither overlap nor leave a gap."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagexfer.wire.page_state import (
    ALL_PERMISSIONS,
    EXECUTE_SUPERVISOR,
    EXECUTE_USER,
    PERMISSION_BITS,
    PRIVATE,
    READ,
    SHADOW_STACK,
    SHARED,
    SIZE_2M,
    STATE_BITS,
    STATE_MASK,
    VALIDATED,
    VMSA,
    WRITE,
    permissions,
    vmpl_shift,
)

FLAGS = (SIZE_2M, VALIDATED, SHARED, VMSA)
VMPLS = (1, 2, 3)


def test_fields_fill_the_word_once() -> None:
    fields = [*FLAGS, *(31 << vmpl_shift(vmpl) for vmpl in VMPLS)]
    assert sum(fields) == STATE_MASK  # a sum of disjoint fields is their union
    assert [1 << bit for bit in range(4)] == list(FLAGS)
    assert STATE_MASK.bit_length() == STATE_BITS == 19


def test_permission_bits() -> None:
    bits = (READ, WRITE, EXECUTE_USER, EXECUTE_SUPERVISOR, SHADOW_STACK)
    assert bits == (1, 2, 4, 8, 16)
    assert len(bits) == PERMISSION_BITS
    assert READ | WRITE | EXECUTE_USER | EXECUTE_SUPERVISOR == ALL_PERMISSIONS


@given(st.integers(0, STATE_MASK), st.sampled_from(VMPLS), st.integers(0, 31))
def test_permissions_of_a_vmpl_stand_alone(state: int, vmpl: int, mask: int) -> None:
    shift = vmpl_shift(vmpl)
    changed = state & ~(31 << shift) | mask << shift
    assert permissions(changed, vmpl) == mask
    others = [other for other in VMPLS if other != vmpl]
    assert [permissions(changed, other) for other in others] == [
        permissions(state, other) for other in others
    ]


@pytest.mark.parametrize("vmpl", [-1, 0, 4])
def test_other_vmpls_have_no_field(vmpl: int) -> None:
    with pytest.raises(ValueError, match="VMPL 1 to 3"):
        vmpl_shift(vmpl)


def test_a_private_page() -> None:
    assert PRIVATE == 0xF2
    assert [permissions(PRIVATE, vmpl) for vmpl in VMPLS] == [ALL_PERMISSIONS, 0, 0]
    assert PRIVATE & VALIDATED
    assert not PRIVATE & (SHARED | VMSA | SIZE_2M)
