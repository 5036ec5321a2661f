"""Vectors of all that is authenticated: handshake, key schedule, tokens, bundles.

HKDF and every layout are written out by hand from docs/protocol.md. X25519, ML-KEM-768 and AES-GCM come from the
cryptography package. Encapsulation draws random numbers, so its ciphertext was made once and stands in ciphertext.hex.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
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


# Key exchange

X25519_SOURCE = noise("X25519 private key of the source", 32)
X25519_DESTINATION = noise("X25519 private key of the destination", 32)
MLKEM_SEED = noise("ML-KEM-768 seed", 64)  # d || z of FIPS 203, algorithm 16
CIPHERTEXT = bytes.fromhex((Path(__file__).parent / "ciphertext.hex").read_text())


def x25519_public(private: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


_KEM_KEY = MLKEM768PrivateKey.from_seed_bytes(MLKEM_SEED)
X25519_SECRET = X25519PrivateKey.from_private_bytes(X25519_SOURCE).exchange(
    X25519PrivateKey.from_private_bytes(X25519_DESTINATION).public_key()
)
KEM_SECRET = _KEM_KEY.decapsulate(CIPHERTEXT)


# Handshake


def hello(**changes: int | bytes) -> tuple[Json, bytes]:
    """A source's hello: its fields and its 1384 bytes."""
    fields: dict[str, int | bytes] = {
        "role": 1,
        "attestor": 1,
        "nonce": noise("source nonce", 32),
        "guest_id": noise("guest id", 16),
        "ram_pages": 65536,
        "vcpus": 4,
        "channels": 8,
        "freshness": 1,
        "session_counter": 3,
        "policy_digest": noise("policy of the source", 48),
        "ledger_key": noise("ledger key of the source", 32),
        "x25519": x25519_public(X25519_SOURCE),
        "kem": _KEM_KEY.public_key().public_bytes_raw(),
        **changes,
    }
    packed = struct.pack(
        "<4sHBB32s16sQIIHB5sQ48s32s32s",
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
        fields["session_counter"],
        fields["policy_digest"],
        fields["ledger_key"],
        fields["x25519"],
    )
    kem = fields["kem"]
    assert isinstance(kem, bytes)
    shown: Json = {key: value.hex() if isinstance(value, bytes) else value for key, value in fields.items()}
    return shown, packed + kem


def destination_hello() -> tuple[Json, bytes]:
    """The destination's answer to that hello: its fields and its 1288 bytes."""
    return hello(
        role=2,
        nonce=noise("destination nonce", 32),
        policy_digest=noise("policy of the destination", 48),
        ledger_key=noise("ledger key of the destination", 32),
        x25519=x25519_public(X25519_DESTINATION),
        kem=CIPHERTEXT,
    )


def handshake() -> Json:
    _, source = hello()
    _, destination = destination_hello()
    valid = [
        {"name": name, "fields": fields, "bytes": packed.hex()}
        for name, (fields, packed) in {
            "source": hello(),
            "destination": destination_hello(),
            "smallest": hello(
                ram_pages=1,
                vcpus=1,
                channels=1,
                nonce=bytes(32),
                guest_id=bytes(16),
                freshness=3,
                session_counter=1,
                policy_digest=bytes(48),
                ledger_key=bytes(32),
                x25519=bytes(32),
                kem=bytes(1184),
            ),
            "largest": hello(
                attestor=3,
                freshness=2,
                ram_pages=1 << 40,
                vcpus=4096,
                channels=1024,
                nonce=b"\xff" * 32,
                session_counter=(1 << 64) - 1,
            ),
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
        "session counter 0": (80, bytes(8)),
        "role of the other size": (6, b"\2"),
    }
    evidence, confirmation = noise("evidence", 48), noise("confirmation", 48)
    return {
        "hellos": valid,
        "refused_hellos": [bad(name, patched(source, *change)) for name, change in changes.items()]
        + [
            bad("empty", b""),
            bad("without KEM part", source[:200]),
            bad("trailing byte", source + b"\0"),
            bad("destination of a source's size", patched(destination, 6, b"\1")),
            bad("destination with trailing byte", destination + b"\0"),
        ],
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
        "proofs": [
            {
                "name": "confirmation and evidence",
                "bytes": (confirmation + evidence).hex(),
                "confirmation": confirmation.hex(),
                "evidence": evidence.hex(),
            }
        ],
        "refused_proofs": [
            bad("empty", b""),
            bad("no evidence", confirmation),
            bad("evidence over 64 KiB", confirmation + bytes((1 << 16) + 1)),
        ],
        "ends": [
            {
                "name": "session id and confirmation",
                "bytes": (noise("session", 16) + confirmation).hex(),
                "session": noise("session", 16).hex(),
                "confirmation": confirmation.hex(),
            }
        ],
        "refused_ends": [
            bad("empty", b""),
            bad("session id alone", noise("session", 16)),
            bad("trailing byte", noise("session", 16) + confirmation + b"\0"),
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


def evidence_of(psk: bytes, reported: bytes) -> bytes:
    key = hkdf_expand(psk_secret(psk), b"pagexfer v1 psk evidence", 48)
    return hmac.new(key, reported, hashlib.sha384).digest()


def confirmation(secret: bytes, session: bytes, label: bytes, proved: bytes) -> bytes:
    return hmac.new(hkdf_expand(secret, label + session, 48), proved, hashlib.sha384).digest()


PSK = noise("pre-shared key", 32)
TRANSCRIPT = transcript_of(hello()[1], destination_hello()[1])
SESSION = session_of(TRANSCRIPT)
SESSION_SECRET = hkdf_extract(TRANSCRIPT, X25519_SECRET + KEM_SECRET + contribution_of(PSK))
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
        psks.append(
            {
                "name": name,
                "psk": psk.hex(),
                "secret": psk_secret(psk).hex(),
                "contribution": contribution_of(psk).hex(),
                "report_data": reported.hex(),
                "evidence": evidence_of(psk, reported).hex(),
            }
        )
    return {
        "psks": psks,
        "exchanges": [
            {
                "name": "both ephemeral keys",
                "x25519_source": X25519_SOURCE.hex(),
                "x25519_source_public": x25519_public(X25519_SOURCE).hex(),
                "x25519_destination": X25519_DESTINATION.hex(),
                "x25519_destination_public": x25519_public(X25519_DESTINATION).hex(),
                "mlkem_seed": MLKEM_SEED.hex(),
                "encapsulation_key": _KEM_KEY.public_key().public_bytes_raw().hex(),
                "ciphertext": CIPHERTEXT.hex(),
                "x25519_secret": X25519_SECRET.hex(),
                "kem_secret": KEM_SECRET.hex(),
            }
        ],
        "sessions": [
            session("with the pre-shared key", PSK.hex(), contribution_of(PSK)),
            session("without a contribution", None, bytes(48)),
        ],
    }


def session(name: str, psk: str | None, contribution: bytes) -> Json:
    """The hellos of handshake.json, and all that follows from them and this contribution."""
    secret = hkdf_extract(TRANSCRIPT, X25519_SECRET + KEM_SECRET + contribution)
    reported = [report_data(label, TRANSCRIPT) for label in (b"pagexfer src v01", b"pagexfer dst v01")]
    if psk is None:
        evidence = [noise("evidence of the source", 3000), noise("evidence of the destination", 4000)]
    else:
        evidence = [evidence_of(bytes.fromhex(psk), data) for data in reported]
    proved = sha384(b"pagexfer v1 confirmation" + TRANSCRIPT + sha384(evidence[1]) + sha384(evidence[0]))
    return {
        "name": name,
        "source_hello": hello()[1].hex(),
        "destination_hello": destination_hello()[1].hex(),
        "transcript": TRANSCRIPT.hex(),
        "session_id": SESSION.hex(),
        "report_data_source": reported[0].hex(),
        "report_data_destination": reported[1].hex(),
        "psk": psk,
        "shared": (X25519_SECRET + KEM_SECRET).hex(),
        "contribution": contribution.hex(),
        "session_secret": secret.hex(),
        "source_evidence": evidence[0].hex(),
        "destination_evidence": evidence[1].hex(),
        "proved": proved.hex(),
        "confirmation_source": confirmation(secret, SESSION, b"pagexfer v1 source confirms", proved).hex(),
        "confirmation_destination": confirmation(
            secret, SESSION, b"pagexfer v1 destination confirms", proved
        ).hex(),
        "traffic_keys": [
            {
                "direction": direction,
                "channel": channel,
                "incarnation": incarnation,
                "key": traffic_key(secret, SESSION, direction, channel, incarnation).hex(),
            }
            for direction, channel, incarnation in _STREAMS
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
    digests = {
        name: noise(name, 48) for name in ("content_digest", "state_digest", "vcpu_digest", "ledger_digest")
    }
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
        "kind 255": (6, b"\xff"),
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
            "shared": (X25519_SECRET + KEM_SECRET).hex(),
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
            bundle(
                "start token", "START_TOKEN", (0, 0, FINAL_EPOCH, 11), manifest_bytes + noise("signature", 64)
            ),
            bundle("ledger", "LEDGER", (0, 0, 1, 1), noise("ledger", 4000)),
            bundle("ledger of a guest that never moved", "LEDGER", (0, 0, 1, 1)),
            bundle("running", "RUNNING", (0, 0, FINAL_EPOCH, 1), digest, direction=2),
            bundle("abort token", "ABORT_TOKEN", (0, 0, FINAL_EPOCH, 1), digest, direction=2),
        ],
        "refused_headers": header_refusals(),
        "refused_entries": entry_refusals(),
    }
