"""Vectors of what is sealed: tokens and bundles. Layouts are written out by hand from docs/protocol.md."""

from __future__ import annotations

import struct

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from .agreed import (
    KEM_SECRET,
    PAGE,
    PSK,
    SESSION,
    SESSION_SECRET,
    TRANSCRIPT,
    X25519_SECRET,
    contribution_of,
    sha384,
    traffic_key,
)
from .frames import frame_of_one_page
from .parts import Json, bad, coded, noise, patched

FINAL_EPOCH = 0xFFFFFFFF
PRIVATE = 2 | 15 << 4  # validated; VMPL1 reads, writes, executes as user and supervisor


# Tokens


def manifest(channels: int) -> tuple[Json, bytes]:
    records = [
        {
            "channel": channel,
            "incarnation": channel % 3,
            "bundles": 1 + 1000 * channel,
            "transcript": noise(f"transcript {channel}", 48).hex(),
        }
        for channel in range(channels)
    ]
    digests = {
        name: noise(name, 48) for name in ("content_digest", "state_digest", "vcpu_digest", "ledger_digest")
    }
    packed = struct.pack("<QIIBBH", 65536, 7, 4, 1, 0, channels) + b"".join(digests.values())
    for channel in range(channels):
        packed += struct.pack("<HHQ", channel, channel % 3, 1 + 1000 * channel)
        packed += noise(f"transcript {channel}", 48)
    fields: Json = {"ram_pages": 65536, "last_epoch": 7, "vcpus": 4, "freshness": 1}
    return fields | {name: digest.hex() for name, digest in digests.items()} | {"channels": records}, packed


def channel_records(channel: int) -> bytes:
    """Records of the first two incarnations of a channel."""
    return b"".join(
        struct.pack("<HHQ", channel, incarnation, bundles) + noise(f"transcript {incarnation}", 48)
        for incarnation, bundles in ((0, 77), (1, 1))
    )


def table_digest(label: bytes, words: list[int]) -> str:
    """The digest over a table with one word a page, word by word as docs/protocol.md says it."""
    outer = label + struct.pack("<Q", len(words))
    for first in range(0, len(words), 4096):
        runs, before = b"", None
        for page, word in enumerate(words[first : first + 4096]):
            if word != before:
                runs += struct.pack("<QQ", page, word)
            before = word
        outer += sha384(runs)
    return sha384(outer).hex()


def tables() -> list[Json]:
    """Guests as the bundles that brought their pages, in order: first gfn, pages, stride, channel, incarnation, counter."""
    cases: dict[str, tuple[int, list[tuple[int, int, int, int, int, int]], dict[int, int]]] = {
        "one page": (1, [(0, 1, 1, 0, 0, 1)], {}),
        "one region": (4096, [(0, 4096, 1, 3, 0, 77)], {4095: 4}),
        "one page more": (4097, [(0, 4096, 1, 3, 0, 77), (4096, 1, 1, 3, 0, 77)], {4096: 4}),
        "several bundles": (
            10000,
            [
                (0, 512, 1, 0, 0, 1),
                (512, 9488, 1, 1023, 0xFFFF, (1 << 32) - 2),
                (4090, 12, 1, 1, 2, 3),
                (1, 400, 7, 2, 0, 9),
                (8191, 1, 1, 0, 0, 2),
                (8192, 1, 1, 0, 0, 2),
            ],
            {0: 1, 17: 0, 18: 0, 8191: 0x7FFFF, 8192: 0x7FFFF, 9999: 8},
        ),
    }
    described: list[Json] = []
    for name, (pages, bundles, other_states) in cases.items():
        carriers, states = [0] * pages, [PRIVATE] * pages
        for first, count, stride, channel, incarnation, counter in bundles:
            for gfn in range(first, first + count * stride, stride):
                carriers[gfn] = channel << 48 | incarnation << 32 | (counter + 1)
        for gfn, state in other_states.items():
            states[gfn] = state
        assert all(carriers)
        described.append(
            {
                "name": name,
                "pages": pages,
                "bundles": [list(fields) for fields in bundles],
                "other_states": [[gfn, state] for gfn, state in other_states.items()],
                "content_digest": table_digest(b"pagexfer v1 content", carriers),
                "state_digest": table_digest(b"pagexfer v1 page states", states),
            }
        )
    return described


def tokens() -> Json:
    totals = [(0, 0), (1, 512), (123456789, 987654321), ((1 << 64) - 1, (1 << 64) - 1)]
    two = manifest(2)[1]
    return {
        "epoch_totals": [
            {"name": f"{bundles} bundles", "bundles": bundles, "pages": pages, "bytes": packed.hex()}
            for bundles, pages in totals
            for packed in [struct.pack("<QQ", bundles, pages)]
        ],
        "tables": tables(),
        "refused_epoch_totals": [bad("empty", b""), bad("trailing byte", bytes(17))],
        "manifests": [
            {"name": f"{channels} channels", "fields": fields, "bytes": packed.hex()}
            for channels in (1, 2, 8)
            for fields, packed in [manifest(channels)]
        ],
        "refused_manifests": [
            bad("empty", b""),
            bad("reserved byte", patched(two, 17, b"\1")),
            bad("freshness 0", patched(two, 16, b"\0")),
            bad("freshness 255", patched(two, 16, b"\xff")),
            bad("no channel", patched(two, 18, b"\0\0")[:212]),
            bad("more channels than records", patched(two, 18, b"\3\0")),
            bad("fewer channels than records", patched(two, 18, b"\1\0")),
            bad("1025 channels", patched(two, 18, struct.pack("<H", 1025)) + bytes(1023 * 60)),
            bad("trailing byte", two + b"\0"),
        ],
    }


# Bundles

KINDS = {
    "PAGES": 1,
    "VCPU_STATE": 2,
    "EPOCH_TOKEN": 3,
    "MANIFEST": 4,
    "READY": 5,
    "START_TOKEN": 6,
    "RUNNING": 7,
    "ABORT_TOKEN": 8,
    "CHANNEL_OPEN": 9,
    "LEDGER": 10,
    "CHANNEL_STATE": 11,
    "DEVICE_STATE": 12,
    "PAGES_ZSTD": 13,
}
Entry = tuple[int, int, int]  # gfn, operation, page state


MIB = 1 << 20
MOST = 1 << 28
DEVICE_PARTS = [  # total, offset, bytes
    (1, 0, 1),
    (1900, 1000, 900),
    (MIB, 0, MIB),
    (MIB + 1, MIB, 1),
    (MOST, MOST - MIB, MIB),
    (MOST, 1, 5),
]
BAD_DEVICE_PARTS = {
    "no bytes of none": (0, 0, 0),
    "no bytes": (1, 0, 0),
    "no bytes at the end": (1, 1, 0),
    "bytes of none": (0, 0, 1),
    "behind the end": (1, 1, 1),
    "over the end": (8, 4, 5),
    "far behind the end": (8, (1 << 32) - 1, 1),
    "over 1 MiB": (MOST, 0, MIB + 1),
    "total over 2^28": (MOST + 1, 0, 1),
    "total of 2^32 - 1": ((1 << 32) - 1, 0, 1),
    "no word but the largest": ((1 << 32) - 1, (1 << 32) - 1, 1),
}


def bundle_header(
    kind: int, direction: int, place: tuple[int, int, int, int], entries: int, payload: int
) -> bytes:
    channel, incarnation, epoch, counter = place
    return (
        struct.pack("<4sHBB16sHH", b"PGXB", 1, kind, direction, SESSION, channel, incarnation)
        + struct.pack("<IQII", epoch, counter, entries, payload)
        + bytes(16)
    )


def seal(aad: bytes, direction: int, place: tuple[int, int, int, int], payload: bytes) -> bytes:
    channel, incarnation, _, counter = place
    key = traffic_key(SESSION_SECRET, SESSION, direction, channel, incarnation)
    return aad + AESGCM(key).encrypt(struct.pack("<HHQ", channel, incarnation, counter), payload, aad)


def bundle(
    name: str,
    kind: str,
    place: tuple[int, int, int, int],
    payload: bytes = b"",
    entries: tuple[Entry, ...] = (),
    direction: int = 1,
) -> Json:
    channel, incarnation, epoch, counter = place
    packed = b"".join(
        struct.pack("<Q", gfn | operation << 40 | state << 42) for gfn, operation, state in entries
    )
    aad = bundle_header(KINDS[kind], direction, place, len(entries), len(payload)) + packed
    return {
        "name": name,
        "kind": KINDS[kind],
        "direction": direction,
        "channel": channel,
        "incarnation": incarnation,
        "epoch": epoch,
        "counter": counter,
        "entries": [{"gfn": gfn, "operation": op, "state": state} for gfn, op, state in entries],
        "payload": payload.hex(),
        "nonce": struct.pack("<HHQ", channel, incarnation, counter).hex(),
        "aad": aad.hex(),
        "bytes": seal(aad, direction, place, payload).hex(),
    }


def entry_refusals() -> list[Json]:
    """PAGES bundles whose header is fine and whose entries are not."""
    page = 1 | 1 << 40 | PRIVATE << 42  # gfn 1, DATA
    zero = 2 | 2 << 40 | PRIVATE << 42
    cases: dict[str, tuple[list[int], int]] = {
        "no entries": ([], 0),
        "operation 0": ([page & ~(3 << 40)], 0),
        "operation 0 with payload": ([page & ~(3 << 40)], PAGE),
        "reserved bit 61": ([page | 1 << 61], PAGE),
        "reserved bit 62": ([page | 1 << 62], PAGE),
        "reserved bit 63": ([page | 1 << 63], PAGE),
        "gfn outside of RAM": ([65536 | 1 << 40 | PRIVATE << 42], PAGE),
        "highest gfn": ([((1 << 40) - 1) | 1 << 40 | PRIVATE << 42], PAGE),
        "same gfn twice": ([page, page], 2 * PAGE),
        "descending": ([zero, page], PAGE),
        "DATA of a page given up": ([1 | 1 << 40], PAGE),
        "ZERO of a page given up": ([1 | 2 << 40], 0),
        "DROP of a validated page": ([1 | 3 << 40 | PRIVATE << 42], 0),
        "DROP of a shared page": ([1 | 3 << 40 | 4 << 42], 0),
        "payload without DATA": ([zero], PAGE),
        "DATA without payload": ([page], 0),
        "payload of one byte too many": ([page], PAGE + 1),
        "payload of two pages for one": ([page], 2 * PAGE),
    }
    compressed: dict[str, tuple[list[int], int]] = {
        "compressed, no entries": ([], 12),
        "compressed to nothing": ([page], 0),
        "compressed to no less": ([page], PAGE),
        "compressed to more": ([page], PAGE + 1),
        "compressed without DATA": ([zero], 12),
    }
    refused = []
    for name, (words, payload) in {**cases, **compressed}.items():
        place = (1, 0, 1, 1)
        kind = KINDS["PAGES_ZSTD" if name in compressed else "PAGES"]
        aad = bundle_header(kind, 1, place, len(words), payload) + struct.pack(f"<{len(words)}Q", *words)
        refused.append(bad(name, seal(aad, 1, place, bytes(payload))))
    return refused


def header_refusals() -> list[Json]:
    whole = bytes.fromhex(
        str(bundle("", "PAGES", (1, 0, 1, 1), noise("payload", 16), ((1, 2, PRIVATE),))["bytes"])
    )
    changes = {
        "magic": (0, b"PGXH"),
        "version 0": (4, b"\0\0"),
        "version 2": (4, b"\2\0"),
        "kind 0": (6, b"\0"),
        "kind 255": (6, b"\xff"),
        "direction 0": (7, b"\0"),
        "direction 3": (7, b"\3"),
        "channel 1024": (24, struct.pack("<H", 1024)),
        "epoch 0": (28, bytes(4)),
        "no entry counted": (40, bytes(4)),
        "two entries counted": (40, struct.pack("<I", 2)),
        "4097 entries": (40, struct.pack("<I", 4097)),
        "2^32 - 1 entries": (40, b"\xff" * 4),
        "shorter payload": (44, struct.pack("<I", 15)),
        "longer payload": (44, struct.pack("<I", 17)),
        "payload over the cap": (44, struct.pack("<I", (2 << 20) + 1)),
        **{f"reserved byte {index}": (48 + index, b"\1") for index in range(16)},
    }
    return [bad(name, patched(whole, *change)) for name, change in changes.items()] + [
        bad("empty", b""),
        bad("header alone", whole[:64]),
        bad("trailing byte", whole + b"\0"),
    ]


def bundles() -> Json:
    data = [noise(f"page {index}", PAGE) for index in range(2)]
    manifest_bytes = manifest(2)[1]
    digest = sha384(manifest_bytes)
    every_state = PRIVATE | 1 | 8 | 31 << 9 | 31 << 14
    return {
        "session": {
            "transcript": TRANSCRIPT.hex(),
            "session_id": SESSION.hex(),
            "shared": (X25519_SECRET + KEM_SECRET).hex(),
            "contribution": contribution_of(PSK).hex(),
            "ram_pages": 65536,
        },
        "bundles": [
            bundle("channel open", "CHANNEL_OPEN", (0, 0, 1, 0)),
            bundle("channel open, last channel", "CHANNEL_OPEN", (1023, 0, 1, 0)),
            bundle("channel open, next incarnation", "CHANNEL_OPEN", (3, 1, 1, 0)),
            bundle(
                "run of two pages", "PAGES", (1, 0, 1, 1), b"".join(data), ((7, 1, PRIVATE), (8, 1, PRIVATE))
            ),
            bundle(
                "data, zero, drop and every state bit",
                "PAGES",
                (2, 1, 3, 77),
                data[0],
                ((0, 2, PRIVATE), (5, 3, 0), (6, 3, 1 | 8), (4095, 1, every_state), (65535, 2, 4)),
            ),
            bundle(
                "512 zero pages",
                "PAGES",
                (7, 0, 2, (1 << 32) - 2),
                b"",
                tuple((gfn, 2, PRIVATE) for gfn in range(1024, 1536)),
            ),
            bundle(
                "a page in a frame, and one without",
                "PAGES_ZSTD",
                (1, 0, 1, 2),
                frame_of_one_page(),
                ((9, 1, PRIVATE), (10, 2, PRIVATE)),
            ),
            bundle("vCPU state", "VCPU_STATE", (0, 0, 8, 9), struct.pack("<I", 3) + noise("vcpu", 600)),
            bundle(
                "part of a device state",
                "DEVICE_STATE",
                (0, 0, 8, 7),
                struct.pack("<II", 1900, 1000) + noise("devices", 900),
            ),
            bundle("epoch token", "EPOCH_TOKEN", (0, 0, 1, 6), struct.pack("<QQ", 500, 65536)),
            bundle("manifest", "MANIFEST", (0, 0, 8, 10), manifest_bytes),
            bundle("ready", "READY", (0, 0, FINAL_EPOCH, 0), digest, direction=2),
            bundle(
                "start token", "START_TOKEN", (0, 0, FINAL_EPOCH, 11), manifest_bytes + noise("signature", 64)
            ),
            bundle("ledger", "LEDGER", (0, 0, 1, 1), noise("ledger", 4000)),
            bundle("ledger of a guest that never moved", "LEDGER", (0, 0, 1, 1)),
            bundle(
                "channel state of a channel that nothing came over",
                "CHANNEL_STATE",
                (1, 1, FINAL_EPOCH, 0),
                direction=2,
            ),
            bundle("channel state", "CHANNEL_STATE", (3, 2, FINAL_EPOCH, 0), channel_records(3), direction=2),
            bundle("running", "RUNNING", (0, 0, FINAL_EPOCH, 1), digest, direction=2),
            bundle("abort token", "ABORT_TOKEN", (0, 0, FINAL_EPOCH, 1), digest, direction=2),
        ],
        "refused_headers": header_refusals(),
        "refused_entries": entry_refusals(),
        "device_parts": [
            {
                "name": f"{size} bytes at {offset} of {total}",
                "total_bytes": total,
                "offset": offset,
                "part_bytes": size,
                **coded(
                    struct.pack("<II", total, offset)
                    + noise("part", 8)[: min(size, 8)]
                    + bytes(max(size - 8, 0))
                ),
            }
            for total, offset, size in DEVICE_PARTS
        ],
        "refused_device_parts": [
            bad(name, struct.pack("<II", total, offset) + bytes(size))
            for name, (total, offset, size) in BAD_DEVICE_PARTS.items()
        ]
        + [bad("empty", b""), bad("half a header", bytes(4)), bad("no header", bytes(7))],
    }
