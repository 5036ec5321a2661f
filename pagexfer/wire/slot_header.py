"""The slot's layout as a C header, from the one definition in `slot`.

python -m pagexfer.wire.slot_header > docs/pgx_slot.h
"""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING, Final

from ..errors import RefusalCode
from . import device_state, slot

if TYPE_CHECKING:
    import enum

_C_TYPES: Final = {"Q": "uint64_t", "I": "uint32_t", "H": "uint16_t"}
_LINES: Final = {
    "identity": (slot.IDENTITY_OFFSET, slot.IDENTITY_FIELDS),
    "command": (slot.COMMAND_OFFSET, slot.COMMAND_FIELDS),
    "status": (slot.STATUS_OFFSET, slot.STATUS_FIELDS),
}
_STRUCTS: Final = {
    **{f"{name}_line": fields for name, (_, fields) in _LINES.items()},
    "device_part": device_state.PART_FIELDS,  # begins the package of STATE, before the part's bytes
}
_DATA_LINES: Final = {"host_data": slot.HOST_DATA_OFFSET, "svsm_data": slot.SVSM_DATA_OFFSET}
_ENUMS: Final[dict[str, type[enum.IntEnum]]] = {
    "command": slot.Command,
    "slot_status": slot.SlotStatus,
    "refusal": RefusalCode,
    "session": slot.SessionStatus,
    "buffer_state": slot.BufferState,
}
_CONSTANTS: Final = {
    "SLOT_VERSION": slot.SLOT_VERSION,
    "REGISTER_PAGE_BYTES": slot.REGISTER_PAGE_BYTES,
    "HEADROOM_BYTES": slot.HEADROOM_BYTES,
    "MIN_BUFFERS": slot.MIN_BUFFERS,
    "MAX_BUFFERS": slot.MAX_BUFFERS,
    "MIN_BUFFER_SHIFT": slot.MIN_BUFFER_SHIFT,
    "MAX_BUFFER_SHIFT": slot.MAX_BUFFER_SHIFT,
    "NO_BUFFER": slot.NO_BUFFER,
    "CONTROL_SLOT": slot.CONTROL_SLOT,
    "MAX_DEVICE_STATE_PART_BYTES": device_state.MAX_DEVICE_STATE_PART_BYTES,
    "MAX_DEVICE_STATE_BYTES": device_state.MAX_DEVICE_STATE_BYTES,
}
_LINE_BYTES: Final = 64
_DATA_WORD: Final = (
    "/* The parts of a word of host_data or svsm_data, and the word of both. */",
    "#define PGX_BUFFER_STATE(word) ((uint32_t)(word) & 0xff)",
    "#define PGX_BUFFER_TURN(word) ((uint32_t)(word) >> 8)",
    "#define PGX_BUFFER_WORD(state, turn) ((uint32_t)(turn) << 8 | (uint32_t)(state))",
)


def header() -> str:
    """The whole header; what a peer must do with all this is in docs/protocol.md, section 4."""
    parts = [
        "/* Mailbox slot, version 3; docs/protocol.md, section 4, is normative. All integers are little endian.",
        "   A doorbell is an eventfd: a write that would block (EAGAIN) finds it rung already, and is done.",
        "   C99 or later, C++11 or later, also freestanding. Made by python -m pagexfer.wire.slot_header. */",
        "#ifndef PGX_SLOT_H",
        "#define PGX_SLOT_H",
        "",
        "#include <stddef.h>",
        "#include <stdint.h>",
        "",
        f"#define PGX_SLOT_MAGIC UINT64_C({slot.SLOT_MAGIC:#x}) /* PGXSLOT3 */",
        *(f"#define PGX_{name} {value}" for name, value in _CONSTANTS.items()),
        "",
        "/* Where the lines are in the register page. */",
        *(f"#define PGX_{name.upper()}_OFFSET {offset}" for name, offset in _offsets().items()),
        "",
        *_DATA_WORD,
        "",
        *(line for name, members in _ENUMS.items() for line in _enum(name, members)),
        *(line for name, fields in _STRUCTS.items() for line in _struct(name, fields)),
        *_register_page(),
        "/* An array of a negative size where a layout moved: C99 has no static assertion. */",
        "#define PGX_CHECK(name, holds) typedef char pgx_check_##name[(holds) ? 1 : -1]",
        "",
        *(line for name, fields in _STRUCTS.items() for line in _checks(name, fields)),
        *(
            _check(
                f"registers_{name}", f"offsetof(struct pgx_registers, {name}) == PGX_{name.upper()}_OFFSET"
            )
            for name in _offsets()
        ),
        _check("registers", "sizeof(struct pgx_registers) == PGX_REGISTER_PAGE_BYTES"),
        "#undef PGX_CHECK",
        "",
        "#endif",
    ]
    return "\n".join(parts) + "\n"


def _offsets() -> dict[str, int]:
    return {**{name: offset for name, (offset, _) in _LINES.items()}, **_DATA_LINES}


def _enum(name: str, members: type[enum.IntEnum]) -> list[str]:
    lines = [f"    PGX_{name.upper()}_{member.name} = {member.value}," for member in members]
    return [f"enum pgx_{name} {{", *lines, "};", ""]


def _struct(name: str, fields: tuple[slot.Field, ...]) -> list[str]:
    return [f"struct pgx_{name} {{", *(_member(field) for field in fields), "};", ""]


def _member(field: slot.Field) -> str:
    comment = f" /* {field.says} */" if field.says else ""
    if array := re.fullmatch(r"(\d+)s", field.code):
        return f"    uint8_t {field.name}[{array[1]}];{comment}"
    return f"    {_C_TYPES[field.code]} {field.name};{comment}"


def _register_page() -> list[str]:
    lines = [f"    struct pgx_{name}_line {name}; /* at {offset} */" for name, (offset, _) in _LINES.items()]
    words = f"[{_LINE_BYTES // 4}]"
    lines += [
        f"    uint32_t {name}{words}; /* at {offset}: a word for each buffer, bits 0-7 state, bits 8-31 turn */"
        for name, offset in _DATA_LINES.items()
    ]
    end = max(_DATA_LINES.values()) + _LINE_BYTES
    return [
        "struct pgx_registers {",
        *lines,
        f"    uint8_t reserved[{slot.REGISTER_PAGE_BYTES - end}];",
        "};",
        "",
    ]


def _checks(name: str, fields: tuple[slot.Field, ...]) -> list[str]:
    checks, offset = [], 0
    for field in fields:
        place = f"offsetof(struct pgx_{name}, {field.name}) == {offset}"
        checks.append(_check(f"{name}_{field.name}", place))
        offset += struct.calcsize("<" + field.code)
    return [*checks, _check(name, f"sizeof(struct pgx_{name}) == {offset}")]


def _check(name: str, holds: str) -> str:
    return f"PGX_CHECK({name}, {holds});"


if __name__ == "__main__":
    print(header(), end="")
