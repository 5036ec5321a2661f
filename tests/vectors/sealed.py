"""Vectors of all that is authenticated: handshake, key schedule, tokens, bundles.

HKDF and every layout are written out by hand from docs/protocol.md.
"""

from __future__ import annotations

import hashlib
import hmac
import struct

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from .parts import Json, bad, noise, patched

PAGE = 4096
FINAL_EPOCH = 0xFFFFFFFF
PRIVATE = 2 | 15 << 4  # validated; VMPL1 reads, writes, executes as user and supervisor


def sha384(data: bytes) -> bytes:
    return hashlib.sha384(data).digest()


def hkdf_extract(salt: bytes, secret: bytes) -> bytes:
    """RFC 5869, section 2.2, with SHA-384."""
    return hmac.new(salt, secret, hashlib.sha384).digest()


def hkdf_expand(key: bytes, info: bytes, length: int) -> bytes:
    """RFC 5869, section 2.3, with SHA-384."""
    output, block, number = b"", b"", 0
    while len(output) < length:
        number += 1
        block = hmac.new(key, block + info + bytes([number]), hashlib.sha384).digest()
        output += block
    return output[:length]


# Handshake


def hello(**changes: int | bytes) -> tuple[Json, bytes]:
    """A hello's fields and its 80 bytes."""
    fields: dict[str, int | bytes] = {
        "role": 1,
        "attestor": 1,
        "nonce": noise("source nonce", 32),
        "guest_id": noise("guest id", 16),
        "ram_pages": 65536,
        "vcpus": 4,
        "channels": 8,
        "freshness": 1,
        **changes,
    }
    packed = struct.pack(
        "<4sHBB32s16sQIIHB5s",
        b"PGXH",
        1,
        fields["role"],
        fields["attestor"],
        fields["nonce"],
        fields["guest_id"],
        fields["ram_pages"],
        PAGE,
        fields["vcpus"],
        fields["channels"],
        fields["freshness"],
        bytes(5),
    )
    return {key: value.hex() if isinstance(value, bytes) else value for key, value in fields.items()}, packed


def handshake() -> Json:
    _, source = hello()
    _, destination = hello(role=2, nonce=noise("destination nonce", 32))
    valid = [
        {"name": name, "fields": fields, "bytes": packed.hex()}
        for name, (fields, packed) in {
            "source": hello(),
            "destination": hello(role=2, nonce=noise("destination nonce", 32)),
            "smallest": hello(
                ram_pages=1, vcpus=1, channels=1, nonce=bytes(32), guest_id=bytes(16), freshness=3
            ),
            "largest": hello(ram_pages=1 << 40, vcpus=4096, channels=1024, nonce=b"\xff" * 32, freshness=2),
        }.items()
    ]
    changes = {
        "magic": (0, b"PGXB"),
        "version 0": (4, b"\0\0"),
        "version 2": (4, b"\2\0"),
        "role 0": (6, b"\0"),
        "role 3": (6, b"\3"),
        "attestor 0": (7, b"\0"),
        "attestor 255": (7, b"\xff"),
        "no RAM": (56, bytes(8)),
        "RAM over 2^40 pages": (56, struct.pack("<Q", (1 << 40) + 1)),
        "page size 2 MiB": (64, struct.pack("<I", 1 << 21)),
        "no vCPU": (68, bytes(4)),
        "vCPUs over the cap": (68, struct.pack("<I", 4097)),
        "no channel": (72, bytes(2)),
        "channels over the cap": (72, struct.pack("<H", 1025)),
        "freshness 0": (74, b"\0"),
        "freshness 255": (74, b"\xff"),
        **{f"reserved byte {index}": (75 + index, b"\1") for index in range(5)},
    }
    evidence = noise("evidence", 48)
    return {
        "hellos": valid,
        "refused_hellos": [bad(name, patched(source, *change)) for name, change in changes.items()]
        + [bad("empty", b""), bad("trailing byte", source + b"\0")],
        "replies": [
            {
                "name": "hello and evidence",
                "bytes": (destination + evidence).hex(),
                "hello": destination.hex(),
                "evidence": evidence.hex(),
            }
        ],
        "refused_replies": [
            bad("empty", b""),
            bad("no evidence", destination),
            bad("evidence over 64 KiB", destination + bytes((1 << 16) + 1)),
        ],
    }


# Key schedule


def psk_secret(psk: bytes) -> bytes:
    return hkdf_extract(b"pagexfer v1 psk", psk)


def contribution_of(psk: bytes) -> bytes:
    return hkdf_expand(psk_secret(psk), b"pagexfer v1 psk contribution", 48)


def transcript_of(source: bytes, destination: bytes) -> bytes:
    return sha384(b"pagexfer v1 transcript" + source + destination)


def session_of(transcript: bytes) -> bytes:
    return sha384(b"pagexfer v1 session id" + transcript)[:16]


def report_data(label: bytes, transcript: bytes) -> bytes:
    return label + sha384(b"pagexfer v1 evidence" + transcript)


def traffic_key(secret: bytes, session: bytes, direction: int, channel: int, incarnation: int) -> bytes:
    info = b"pagexfer v1 traffic key" + session + struct.pack("<BHH", direction, channel, incarnation)
    return hkdf_expand(secret, info, 32)


PSK = noise("pre-shared key", 32)
TRANSCRIPT = transcript_of(hello()[1], hello(role=2, nonce=noise("destination nonce", 32))[1])
SESSION = session_of(TRANSCRIPT)
SESSION_SECRET = hkdf_extract(TRANSCRIPT, contribution_of(PSK))
_STREAMS = [
    (1, 0, 0),
    (2, 0, 0),
    (1, 1, 0),
    (1, 0, 1),
    (1, 1, 1),
    (1, 1023, 0),
    (1, 0, 65535),
    (2, 1023, 65535),
]


def key_schedule() -> Json:
    psks = []
    for name, psk in {
        "16 bytes": noise("short", 16),
        "32 bytes": PSK,
        "4096 bytes": noise("long", 4096),
    }.items():
        reported = noise(f"report data {name}", 64)
        evidence_key = hkdf_expand(psk_secret(psk), b"pagexfer v1 psk evidence", 48)
        psks.append(
            {
                "name": name,
                "psk": psk.hex(),
                "secret": psk_secret(psk).hex(),
                "contribution": contribution_of(psk).hex(),
                "report_data": reported.hex(),
                "evidence": hmac.new(evidence_key, reported, hashlib.sha384).hexdigest(),
            }
        )
    source, destination = hello()[1], hello(role=2, nonce=noise("destination nonce", 32))[1]
    return {
        "psks": psks,
        "sessions": [
            {
                "name": "source and destination of handshake.json",
                "source_hello": source.hex(),
                "destination_hello": destination.hex(),
                "transcript": TRANSCRIPT.hex(),
                "session_id": SESSION.hex(),
                "report_data_source": report_data(b"pagexfer src v01", TRANSCRIPT).hex(),
                "report_data_destination": report_data(b"pagexfer dst v01", TRANSCRIPT).hex(),
                "psk": PSK.hex(),
                "contribution": contribution_of(PSK).hex(),
                "session_secret": SESSION_SECRET.hex(),
                "traffic_keys": [
                    {
                        "direction": direction,
                        "channel": channel,
                        "incarnation": incarnation,
                        "key": traffic_key(SESSION_SECRET, SESSION, direction, channel, incarnation).hex(),
                    }
                    for direction, channel, incarnation in _STREAMS
                ],
            }
        ],
    }


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
    digests = {name: noise(name, 48) for name in ("content_digest", "state_digest", "vcpu_digest")}
    packed = struct.pack("<QIIBBH", 65536, 7, 4, 1, 0, channels) + b"".join(digests.values())
    for channel in range(channels):
        packed += struct.pack("<HHQ", channel, channel % 3, 1 + 1000 * channel)
        packed += noise(f"transcript {channel}", 48)
    fields: Json = {"ram_pages": 65536, "last_epoch": 7, "vcpus": 4, "freshness": 1}
    return fields | {name: digest.hex() for name, digest in digests.items()} | {"channels": records}, packed


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
            bad("no channel", patched(two, 18, b"\0\0")[:164]),
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
}
Entry = tuple[int, int, int]  # gfn, operation, page state


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
    refused = []
    for name, (words, payload) in cases.items():
        place = (1, 0, 1, 1)
        aad = bundle_header(1, 1, place, len(words), payload) + struct.pack(f"<{len(words)}Q", *words)
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
        "kind 10": (6, b"\x0a"),
        "direction 0": (7, b"\0"),
        "direction 3": (7, b"\3"),
        "channel 1024": (24, struct.pack("<H", 1024)),
        "epoch 0": (28, bytes(4)),
        "no entry counted": (40, bytes(4)),
        "two entries counted": (40, struct.pack("<I", 2)),
        "513 entries": (40, struct.pack("<I", 513)),
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
            "contribution": contribution_of(PSK).hex(),
            "ram_pages": 65536,
        },
        "bundles": [
            bundle("channel open", "CHANNEL_OPEN", (0, 0, 1, 0)),
            bundle("channel open, last channel", "CHANNEL_OPEN", (1023, 0, 1, 0)),
            bundle("channel open, next incarnation", "CHANNEL_OPEN", (3, 1, 5, 0)),
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
            bundle("vCPU state", "VCPU_STATE", (0, 0, 8, 9), struct.pack("<I", 3) + noise("vcpu", 600)),
            bundle("epoch token", "EPOCH_TOKEN", (0, 0, 1, 6), struct.pack("<QQ", 500, 65536)),
            bundle("manifest", "MANIFEST", (0, 0, 8, 10), manifest_bytes),
            bundle("ready", "READY", (0, 0, FINAL_EPOCH, 0), digest, direction=2),
            bundle("start token", "START_TOKEN", (0, 0, FINAL_EPOCH, 11), manifest_bytes),
            bundle("running", "RUNNING", (0, 0, FINAL_EPOCH, 1), digest, direction=2),
            bundle("abort token", "ABORT_TOKEN", (0, 0, FINAL_EPOCH, 1), digest, direction=2),
        ],
        "refused_headers": header_refusals(),
        "refused_entries": entry_refusals(),
    }
