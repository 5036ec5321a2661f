"""Vectors of how two sides agree: handshake and key schedule.

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

from .parts import Json, bad, noise, patched

PAGE = 4096


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
        "compressed": False,
        **changes,
    }
    packed = struct.pack(
        "<4sHBB32s16sQIIHBB4sQ48s32s32s",
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
        fields["compressed"],
        bytes(4),
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
                ledger_key=bytes([2, *bytes(31)]),  # 0 and 1 are of small order
                x25519=bytes(32),
                kem=bytes(1184),
            ),
            "compressed": hello(compressed=True),
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
        **{f"reserved flag {bit}": (75, bytes([1 << bit])) for bit in range(1, 8)},
        **{f"reserved byte {index}": (76 + index, b"\1") for index in range(4)},
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
