"""Vectors of all that no key protects: slot registers, frames, control messages, journal. Every byte is written by hand."""

from __future__ import annotations

import hashlib
import struct

from .parts import Json, bad, coded, noise, patched

# Slot

_PAGE = 4096


def identity(**changes: int | bytes) -> bytes:
    """The first 64 bytes of a register page."""
    fields: dict[str, int | bytes] = {
        "magic": b"PGXSLOT3",
        "version": 3,
        "slot_id": 5,
        "buffers": 2,
        "shift": 20,
        "headroom": 64,
        **changes,
    }
    return struct.pack("<8sHHHHH46s", *fields.values(), bytes(46))


def page_with(offset: int, line: bytes) -> bytes:
    """A register page of the slot above with one more line written."""
    return patched(patched(bytes(_PAGE), 0, identity()), offset, line)


def data_words() -> list[Json]:
    """Words of host and SVSM for one buffer, and the state that both sides read from them."""
    free, filling, ready, draining = 1, 2, 3, 4
    top, half = (1 << 24) - 1, 1 << 23
    cases = [
        ("formatted", (0, free), (0, free), "FREE"),
        ("host provides: filling", (1, filling), (0, free), "FILLING"),
        ("host provides: ready", (1, ready), (0, free), "READY"),
        ("host provides: draining", (1, ready), (1, draining), "DRAINING"),
        ("host provides: released", (1, ready), (1, free), "FREE"),
        ("host provides: withdrawn", (1, free), (0, free), "FREE"),
        ("SVSM provides next: filling", (1, ready), (2, filling), "FILLING"),
        ("SVSM provides: ready", (0, free), (1, ready), "READY"),
        ("SVSM provides: draining", (1, draining), (1, ready), "DRAINING"),
        ("SVSM provides: released", (1, free), (1, ready), "FREE"),
        ("last turn before the wrap", (top, ready), (top, draining), "DRAINING"),
        ("wrapped: host newer", (0, filling), (top, free), "FILLING"),
        ("wrapped: SVSM newer", (top, free), (0, ready), "READY"),
        ("host 2^23 - 1 turns ahead", (half - 1, ready), (0, free), "READY"),
        ("SVSM 2^23 turns ahead", (0, free), (half, ready), "READY"),
        ("unknown state counts as taken", (1, 9), (0, free), "FILLING"),
        ("state 0 counts as taken", (1, 0), (0, free), "FILLING"),
    ]
    return [
        {
            "name": name,
            "host": struct.pack("<I", host[0] << 8 | host[1]).hex(),
            "svsm": struct.pack("<I", svsm[0] << 8 | svsm[1]).hex(),
            "state": state,
        }
        for name, host, svsm, state in cases
    ]


def command_line(
    sequence: int, command: int, buffer: int, argument: int, argument2: int, length: int
) -> Json:
    line = struct.pack("<IHHQQI36s", sequence, command, buffer, argument, argument2, length, bytes(36))
    return {
        "fields": [sequence, command, buffer, argument, argument2, length],
        **coded(page_with(64, line)),
    }


def status_line(*fields: int) -> Json:
    """Sequence, status, error code (0: none), session status, buffer, length, result, second result."""
    line = struct.pack("<IHHHHIQQ32s", *fields, bytes(32))
    return {"fields": list(fields), **coded(page_with(128, line))}


def exchange() -> list[Json]:
    """A register page after each step of two commands: the host's package comes in, then the SVSM's goes out."""
    free, ready = 1, 3
    taken = struct.pack("<IHHQQI36s", 1, 5, 0, 0, 0, 100, bytes(36))
    done = struct.pack("<IHHHHIQQ32s", 1, 1, 0, 4, 0xFFFF, 0, 8, 0, bytes(32))
    asked = struct.pack("<IHHQQI36s", 2, 4, 0xFFFF, 512, 64, 0, bytes(36))
    given = struct.pack("<IHHHHIQQ32s", 2, 2, 0, 4, 0, 4192, 1, 0, bytes(32))
    steps: list[tuple[str, list[tuple[int, bytes]]]] = [
        ("formatted", [(192, struct.pack("<II", free, free)), (256, struct.pack("<II", free, free))]),
        ("host: IMPORT, package in buffer 0", [(192, struct.pack("<I", 1 << 8 | ready)), (64, taken)]),
        ("SVSM: OK, buffer 0 drained", [(256, struct.pack("<I", 1 << 8 | free)), (128, done)]),
        ("host: EXPORT", [(64, asked)]),
        ("SVSM: INCOMPLETE, package in buffer 0", [(256, struct.pack("<I", 2 << 8 | ready)), (128, given)]),
        ("host: buffer 0 drained", [(192, struct.pack("<I", 2 << 8 | free))]),
    ]
    page, pages = page_with(0, identity()), []
    for name, changes in steps:
        for offset, change in changes:
            page = patched(page, offset, change)
        pages.append({"name": name, **coded(page)})
    return pages


def slot() -> Json:
    package = (1 << 20) - 64
    u32, u64 = (1 << 32) - 1, (1 << 64) - 1
    refused_status = {
        "status 0": (1, 0, 0, 1, 0xFFFF, 0, 0, 0),
        "status 4": (1, 4, 0, 1, 0xFFFF, 0, 0, 0),
        "error 255": (1, 3, 255, 1, 0xFFFF, 0, 0, 0),
        "session status 0": (1, 1, 0, 0, 0xFFFF, 0, 0, 0),
        "session status 255": (1, 1, 0, 255, 0xFFFF, 0, 0, 0),
        "buffer 2 of 2": (1, 1, 0, 1, 2, 0, 0, 0),
        "package longer than a buffer": (1, 1, 0, 1, 0, package + 1, 0, 0),
    }
    refused_commands = {
        "buffer 2 of 2": (1, 5, 2, 0, 0, 0),
        "package longer than a buffer": (1, 5, 1, 0, 0, package + 1),
        "2^32 - 1 bytes": (1, 5, 0, 0, 0, u32),
    }
    refused_identities = {
        "magic": identity(magic=b"PGXSLOT2"),
        "version 2": identity(version=2),
        "headroom 0": identity(headroom=0),
        "one buffer": identity(buffers=1),
        "nine buffers": identity(buffers=9),
        "buffers of 32 KiB": identity(shift=15),
        "buffers of 8 MiB": identity(shift=23),
        "first reserved byte": patched(identity(), 18, b"\1"),
        "last reserved byte": patched(identity(), 63, b"\1"),
    }
    return {
        "identities": [
            {
                "name": f"slot {slot_id:#x}",
                "fields": [slot_id, buffers, 1 << shift],
                **coded(patched(bytes(_PAGE), 0, identity(slot_id=slot_id, buffers=buffers, shift=shift))),
            }
            for slot_id, buffers, shift in [(5, 2, 20), (0, 2, 16), (0xFFFF, 8, 22)]
        ],
        "refused_identities": [
            *(bad(name, patched(bytes(_PAGE), 0, line)) for name, line in refused_identities.items()),
            bad("shorter than a page", patched(bytes(_PAGE), 0, identity())[:-1]),
        ],
        "formatted": coded(patched(page_with(192, struct.pack("<II", 1, 1)), 256, struct.pack("<II", 1, 1))),
        "commands": [
            {"name": "EXPORT", **command_line(1, 4, 0xFFFF, 4096, 512, 0)},
            {"name": "IMPORT", **command_line(u32, 5, 1, 0, 0, package)},
            {"name": "STATE of vCPU 3", **command_line(8, 7, 0xFFFF, 3, 0, 0)},
            {"name": "STATE with a part of the device state", **command_line(9, 7, 0, 0, 0, 108)},
            {"name": "unknown command", **command_line(7, 999, 0xFFFF, u64, u64, u32)},
        ],
        "refused_commands": [
            bad(name, page_with(64, struct.pack("<IHHQQI", *fields)))
            for name, fields in refused_commands.items()
        ]
        + [bad(f"reserved byte {index}", page_with(64 + index, b"\1")) for index in (28, 63)],
        "statuses": [
            {"name": "OK with package", **status_line(1, 1, 0, 4, 1, package, 128, 3)},
            {"name": "INCOMPLETE", **status_line(2, 2, 0, 4, 0xFFFF, 0, 1, 4)},
            {"name": "REFUSED, integrity", **status_line(u32, 3, 4, 12, 0xFFFF, 0, u64, u64)},
        ],
        "refused_statuses": [
            bad(name, page_with(128, struct.pack("<IHHHHIQQ", *fields)))
            for name, fields in refused_status.items()
        ]
        + [
            bad(
                f"reserved byte {index}",
                patched(
                    page_with(128, struct.pack("<IHHHHIQQ", 1, 1, 0, 1, 0xFFFF, 0, 0, 0)), 128 + index, b"\1"
                ),
            )
            for index in (32, 63)
        ],
        "data_words": data_words(),
        "exchange": exchange(),
    }


# Frames


def framing() -> Json:
    caps = {1: 32, 2: 1 << 17, 3: 64 + 8 * 4096 + 512 * 4096 + 16, 4: 4}
    hello = struct.pack("<8sHBBHH16s", b"PAGEXFER", 1, 2, 0, 1023, 0, noise("session", 16))
    changes = {
        "magic": (0, b"pagexfer"),
        "version 0": (8, b"\0\0"),
        "version 2": (8, b"\2\0"),
        "purpose 0": (10, b"\0"),
        "purpose 3": (10, b"\3"),
        "reserved byte": (11, b"\1"),
        "channel 1024": (12, struct.pack("<H", 1024)),
        "reserved word": (14, b"\1\0"),
        "reserved word, high byte": (14, b"\0\1"),
    }
    lengths = [(kind, length) for kind, cap in caps.items() for length in (0, 1, cap)]
    return {
        "headers": [
            {
                "name": f"type {kind}, {length} bytes",
                "type": kind,
                "payload_bytes": length,
                "bytes": struct.pack("<IBBBB", length, kind, 0, 0, 0).hex(),
            }
            for kind, length in lengths
        ],
        "refused_headers": [
            *(
                bad(f"type {kind} over its cap", struct.pack("<IB3x", cap + 1, kind))
                for kind, cap in caps.items()
            ),
            bad("type 0", struct.pack("<IB3x", 0, 0)),
            bad("type 5, which is retired", struct.pack("<IB3x", 0, 5)),
            bad("type 6", struct.pack("<IB3x", 0, 6)),
            *(
                bad(f"reserved byte {index}", patched(struct.pack("<IB3x", 0, 2), 5 + index, b"\1"))
                for index in range(3)
            ),
            bad("empty", b""),
            bad("trailing byte", bytes([0, 0, 0, 0, 2, 0, 0, 0, 0])),
        ],
        "connection_hellos": [
            {
                "name": "control",
                "purpose": 1,
                "channel": 0,
                "session": bytes(16).hex(),
                "bytes": (b"PAGEXFER" + b"\1\0\1" + bytes(21)).hex(),
            },
            {
                "name": "last channel",
                "purpose": 2,
                "channel": 1023,
                "session": noise("session", 16).hex(),
                "bytes": hello.hex(),
            },
        ],
        "refused_connection_hellos": [
            *(bad(name, patched(hello, *change)) for name, change in changes.items()),
            bad("empty", b""),
            bad("trailing byte", hello + b"\0"),
        ],
        "barriers": [
            {"name": f"epoch {epoch}", "epoch": epoch, "bytes": struct.pack("<I", epoch).hex()}
            for epoch in (1, 2, 0x01020304, 0xFFFFFFFE)
        ],
        "refused_barriers": [bad("empty", b""), bad("trailing byte", bytes(5))],
    }


# Control messages: msgpack by hand


def text(value: str) -> bytes:
    data = value.encode()
    return (bytes([0xA0 | len(data)]) if len(data) < 32 else bytes([0xD9, len(data)])) + data


def binary(value: bytes) -> bytes:
    if len(value) < 256:
        return bytes([0xC4, len(value)]) + value
    return b"\xc5" + struct.pack(">H", len(value)) + value


def integer(value: int) -> bytes:
    """The shortest form of an unsigned integer."""
    if value < 128:
        return bytes([value])
    for code, form, top in ((0xCC, ">B", 1 << 8), (0xCD, ">H", 1 << 16), (0xCE, ">I", 1 << 32)):
        if value < top:
            return bytes([code]) + struct.pack(form, value)
    return b"\xcf" + struct.pack(">Q", value)


def mapping(*items: bytes) -> bytes:
    assert len(items) % 2 == 0
    return bytes([0x80 | len(items) // 2]) + b"".join(items)


def message(kind: str, *items: bytes) -> bytes:
    return mapping(text("version"), b"\1", text("type"), text(kind), *items)


def control() -> Json:
    valid: list[tuple[str, str, dict[str, bytes | int | str]]] = [
        ("prepare", "Prepare", {"handshake": noise("hello", 1384)}),
        ("accept", "Accept", {"handshake": noise("reply", 128)}),
        ("accept", "Accept", {"handshake": noise("long reply", 300)}),
        ("confirm", "Confirm", {"handshake": noise("evidence", 48), "platform": b""}),
        ("confirm", "Confirm", {"handshake": noise("evidence", 48), "platform": noise("platform", 40)}),
        ("established", "Established", {"handshake": noise("established", 64)}),
        ("channels-open", "ChannelsOpen", {"channels": 8}),
        (
            "failed",
            "Failed",
            {"reason": "integrity", "message": "received data was damaged: größer als erwartet"},
        ),
    ]
    epochs = (1, 127, 128, 255, 256, 65535, 65536, (1 << 32) - 2)
    valid += [("epoch-closed", "EpochClosed", {"epoch": epoch}) for epoch in epochs]
    packed = [
        {
            "name": f"{kind} {index}",
            "class": class_name,
            "fields": {
                key: value.hex() if isinstance(value, bytes) else value for key, value in fields.items()
            },
            "bytes": message(
                kind, *(part for key, value in fields.items() for part in (text(key), packed_value(value)))
            ).hex(),
        }
        for index, (kind, class_name, fields) in enumerate(valid)
    ]
    return {"messages": packed, "refused": refused_messages()}


def packed_value(value: bytes | int | str) -> bytes:
    if isinstance(value, bytes):
        return binary(value)
    return text(value) if isinstance(value, str) else integer(value)


def refused_messages() -> list[Json]:
    epoch = text("epoch")
    good = message("epoch-closed", epoch, b"\2")
    version = text("version")
    kind = (text("type"), text("epoch-closed"))
    cases = {
        "empty": b"",
        "not msgpack": b"\xc1",
        "nil": b"\xc0",
        "a list": b"\x93\1\2\3",
        "an empty map": b"\x80",
        "a number": b"\1",
        "trailing byte": good + b"\0",
        "version 2": mapping(version, b"\2", *kind, epoch, b"\2"),
        "version true": mapping(version, b"\xc3", *kind, epoch, b"\2"),
        "version 1.0": mapping(version, b"\xcb" + struct.pack(">d", 1.0), *kind, epoch, b"\2"),
        "version is not first": mapping(*kind, version, b"\1", epoch, b"\2"),
        "no version": mapping(*kind, epoch, b"\2"),
        "no type": mapping(version, b"\1", epoch, b"\2"),
        "unknown type": message("epoch-opened", epoch, b"\2"),
        "type is a number": mapping(version, b"\1", text("type"), b"\6", epoch, b"\2"),
        "type as binary": mapping(version, b"\1", text("type"), binary(b"epoch-closed"), epoch, b"\2"),
        "key missing": message("epoch-closed"),
        "key of another message": message("epoch-closed", text("channels"), b"\2"),
        "a key too many": message("epoch-closed", epoch, b"\2", text("size"), b"\2"),
        "the same key twice": message("epoch-closed", epoch, b"\1", epoch, b"\2"),
        "version twice": mapping(version, b"\2", version, b"\1", *kind, epoch, b"\2"),
        "key is binary": message("epoch-closed", binary(b"epoch"), b"\2"),
        "key is a number": message("epoch-closed", b"\5", b"\2"),
        "negative number": message("epoch-closed", epoch, b"\xff"),
        "number true": message("epoch-closed", epoch, b"\xc3"),
        "number as text": message("epoch-closed", epoch, text("2")),
        "number as float": message("epoch-closed", epoch, b"\xcb" + struct.pack(">d", 2.0)),
        "number nil": message("epoch-closed", epoch, b"\xc0"),
        "bytes as text": message("prepare", text("handshake"), text("hello")),
        "bytes as list": message("prepare", text("handshake"), b"\x91\1"),
        "text as bytes": message("failed", text("reason"), binary(b"x"), text("message"), text("y")),
        "text that is not UTF-8": message("failed", text("reason"), b"\xa1\xff", text("message"), text("y")),
        "line break in text": message("failed", text("reason"), text("x"), text("message"), text("a\nb")),
        "escape in text": message("failed", text("reason"), text("\x1b[2J"), text("message"), text("y")),
        "text over 2000": message(
            "failed",
            text("reason"),
            text("x"),
            text("message"),
            b"\xda" + struct.pack(">H", 2001) + b"y" * 2001,
        ),
        "list that says it has 2^32 - 1 items": message(
            "prepare", text("handshake"), b"\xdd\xff\xff\xff\xff"
        ),
        "bytes that say they are 2^32 - 1": message("prepare", text("handshake"), b"\xc6\xff\xff\xff\xff"),
        "nested 2000 deep": message("prepare", text("handshake"), b"\x91" * 2000 + b"\0"),
        "extension": message("epoch-closed", epoch, b"\xd4\5\0"),
        "timestamp": message("epoch-closed", epoch, b"\xd6\xff\0\0\0\0"),
        "device-state, which is retired": message("device-state", text("size"), b"\0"),
        "over 128 KiB": message(
            "prepare", text("handshake"), b"\xc6" + struct.pack(">I", 1 << 17) + bytes(1 << 17)
        ),
    }
    return [bad(name, data) for name, data in cases.items()]


# Journal


def journal_record(
    role: int,
    status: int,
    *,
    magic: bytes = b"PGXJ",
    version: int = 2,
    session: bytes = b"",
    guest_id: bytes = b"",
    process: tuple[bytes, int, int, int] = (bytes(16), 0, 0, 0),
) -> bytes:
    """A record whose check holds, whatever its fields say."""
    body = struct.pack(
        "<4sHBB16s16s16sQQQ",
        magic,
        version,
        role,
        status,
        session or noise("session id", 16),
        guest_id or noise("guest id", 16),
        *process,
    )
    return body + hashlib.sha384(body).digest()


def journal() -> Json:
    """Source: KEYED 3, STARTED 6, FINISHED 7, ABORTED 8. Destination: KEYED 3, VERIFIED 10, RUNNING 11, FAILED 12."""
    kept = {1: (3, 6, 7, 8), 2: (3, 10, 11, 12)}
    started = journal_record(1, 6)
    process = (noise("boot id", 16), 4026531836, 4711, 1 << 33)
    foreign = {
        f"role {role}, status {status}": journal_record(role, status)
        for role in kept
        for status in range(14)
        if status not in kept[role]
    }
    return {
        "records": [
            {
                "name": f"role {role}, status {status}",
                "fields": {
                    "role": role,
                    "status": status,
                    "session": noise("session id", 16).hex(),
                    "guest_id": noise("guest id", 16).hex(),
                },
                **coded(journal_record(role, status)),
            }
            for role, statuses in kept.items()
            for status in statuses
        ],
        "records_with_a_process": [
            {
                "name": f"destination in another process, status {status}",
                "fields": {
                    "role": 2,
                    "status": status,
                    "session": noise("session id", 16).hex(),
                    "guest_id": noise("guest id", 16).hex(),
                    "process": [process[0].hex(), *process[1:]],
                },
                **coded(journal_record(2, status, process=process)),
            }
            for status in kept[2]
        ],
        "refused_records": [
            *(bad(name, data) for name, data in foreign.items()),
            bad("empty", b""),
            bad("all zero", bytes(128)),
            bad("role 0", journal_record(0, 3)),
            bad("role 3", journal_record(3, 3)),
            bad("status 255", journal_record(1, 255)),
            bad("magic", journal_record(1, 6, magic=b"PGXH")),
            bad("version 0", journal_record(1, 6, version=0)),
            bad("version 1", journal_record(1, 6, version=1)),
            bad("version 3", journal_record(1, 6, version=3)),
            bad("source in another process", journal_record(1, 6, process=process)),
            bad("process without an id", journal_record(2, 10, process=(process[0], 1, 0, 1))),
            bad("trailing byte", started + b"\0"),
            *(
                bad(f"byte {index} damaged", patched(started, index, bytes([started[index] ^ 1])))
                for index in (6, 7, 8, 24, 39, 40, 56, 64, 72, 79, 80, 127)
            ),
        ],
    }
