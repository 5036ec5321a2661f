"""vCPU state of the simulated guest: its form in bytes, and what may be loaded."""

from __future__ import annotations

import struct
from dataclasses import astuple, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagexfer.errors import GateError, MalformedData
from pagexfer.guests.pattern import PATTERN_GFN, Layout
from pagexfer.guests.simulated_vcpu.registers import REGISTERS_BYTES, Registers, parse_registers_untrusted

_MIB = 1 << 20
_U64 = st.integers(0, 2**64 - 1)
_REGISTERS = st.builds(
    Registers, st.integers(0, 2**16 - 1), _U64, _U64, _U64, _U64, _U64, _U64, _U64, _U64, _U64, _U64, _U64
)


@given(registers=_REGISTERS)
def test_registers_come_back_from_bytes(registers: Registers) -> None:
    assert parse_registers_untrusted(registers.to_bytes()) == registers


@given(
    data=st.binary(max_size=REGISTERS_BYTES + 1)
    | st.binary(min_size=REGISTERS_BYTES, max_size=REGISTERS_BYTES)
)
def test_any_other_bytes_are_malformed(data: bytes) -> None:
    with pytest.raises(MalformedData):
        parse_registers_untrusted(data)


def test_every_header_and_reserved_byte_counts() -> None:
    state = Registers.at_boot(Layout.plan(_MIB, 1), 0).to_bytes()
    for position in (*range(6), *range(REGISTERS_BYTES - 32, REGISTERS_BYTES)):
        damaged = bytearray(state)
        damaged[position] ^= 1
        with pytest.raises(MalformedData):
            parse_registers_untrusted(bytes(damaged))


def test_registers_layout_is_fixed() -> None:
    registers = Registers(2, *range(11, 22))
    assert registers.to_bytes() == struct.pack("<4sHH11Q32s", b"VREG", 1, 2, *range(11, 22), bytes(32))
    assert astuple(registers) == (2, *range(11, 22))


_LAYOUT = Layout.plan(_MIB, 2)
_MIDWAY = replace(
    Registers.at_boot(_LAYOUT, 1),
    round=3,
    position=5,
    index=5 * _LAYOUT.stride % _LAYOUT.slice_pages,
    steps=2 * _LAYOUT.slice_pages + 5,
)


def test_sound_registers_fit() -> None:
    _MIDWAY.check_fits(_LAYOUT.ram_pages, 1)
    Registers.at_boot(_LAYOUT, 0).check_fits(_LAYOUT.ram_pages, 0)


@pytest.mark.parametrize(
    "change",
    [
        {"vcpu": 0},
        {"round": 0},
        {"round": 4},
        {"position": 6},
        {"position": _LAYOUT.slice_pages, "steps": 3 * _LAYOUT.slice_pages, "index": 0},
        {"index": 0},
        {"steps": 0},
        {"round": 2**63, "steps": (2**63 - 1) * _LAYOUT.slice_pages + 5},
        {"first_gfn": PATTERN_GFN},
        {"slice_pages": 0},
        {"slice_pages": 2**40},
        {"stride": 0},
        {"stride": _LAYOUT.slice_pages + _LAYOUT.stride},
        {"stride": 2, "index": 10},
    ],
)
def test_unsound_registers_do_not_fit(change: dict[str, int]) -> None:
    with pytest.raises(GateError, match="state of vCPU"):
        replace(_MIDWAY, **change).check_fits(_LAYOUT.ram_pages, 1)


def test_registers_of_a_larger_guest_do_not_fit() -> None:
    with pytest.raises(GateError, match="outside of RAM"):
        _MIDWAY.check_fits(_LAYOUT.ram_pages // 2, 1)
