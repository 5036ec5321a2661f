"""Vectors of the ledger: records of moves, their signatures and hashes, and what is no ledger.

Layouts and labels are written out by hand from docs/protocol.md; Ed25519 comes from the cryptography package.
"""

from __future__ import annotations

import struct

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from .agreed import PSK, evidence_of, hello, report_data, sha384, transcript_of
from .parts import Json, bad, noise, patched

HEADER = b"PGXLEDGR" + struct.pack("<H6s", 1, bytes(6))
SIDES = ("source", "destination")


def part(data: bytes) -> bytes:
    return struct.pack("<I", len(data)) + data


def ledger_key(side: str, move: int) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(noise(f"ledger key of the {side} of move {move}", 32))


def hellos(move: int) -> tuple[bytes, bytes]:
    """The pair of hellos of a move of the one guest."""
    packed = []
    for role, side in enumerate(SIDES, start=1):
        changes: dict[str, int | bytes] = {
            "role": role,
            "nonce": noise(f"nonce of the {side} of move {move}", 32),
            "policy_digest": noise(f"policy of the {side}", 48),
            "ledger_key": ledger_key(side, move).public_key().public_bytes_raw(),
        }
        if role == 2:
            changes["kem"] = noise(f"ciphertext of move {move}", 1088)
        packed.append(hello(**changes)[1])
    return packed[0], packed[1]


def body(move: int, previous: bytes, transcript: bytes, evidence: list[bytes], manifest: bytes) -> bytes:
    head = struct.pack("<4sHBBQ", b"PGXL", 1, 1, 0, move) + noise("guest id", 16)
    policies = [noise(f"policy of the {side}", 48) for side in SIDES]
    return head + previous + transcript + b"".join([*map(sha384, evidence), *policies, sha384(manifest)])


def record(move: int, previous: bytes) -> tuple[Json, bytes, bytes]:
    """A record's values, its bytes, and its hash."""
    source, destination = hellos(move)
    transcript = transcript_of(source, destination)
    evidence = [
        evidence_of(PSK, report_data(label, transcript))
        for label in (b"pagexfer src v01", b"pagexfer dst v01")
    ]
    manifest = noise(f"manifest of move {move}", 272)
    signed = body(move, previous, transcript, evidence, manifest)
    labels = b"pagexfer v1 ledger source", b"pagexfer v1 ledger destination"
    signatures = [
        ledger_key(side, move).sign(label + signed) for side, label in zip(SIDES, labels, strict=True)
    ]
    packed = signed + b"".join(signatures) + b"".join(map(part, (source, destination, *evidence)))
    record_hash = sha384(b"pagexfer v1 ledger record" + signed + b"".join(signatures))
    values: Json = {
        "move": move,
        "guest_id": noise("guest id", 16).hex(),
        "freshness": 1,
        "previous": previous.hex(),
        "transcript": transcript.hex(),
        "source_evidence": evidence[0].hex(),
        "destination_evidence": evidence[1].hex(),
        "source_policy_digest": noise("policy of the source", 48).hex(),
        "destination_policy_digest": noise("policy of the destination", 48).hex(),
        "manifest": manifest.hex(),
        "source_hello": source.hex(),
        "destination_hello": destination.hex(),
        "source_signature": signatures[0].hex(),
        "destination_signature": signatures[1].hex(),
        "hash": record_hash.hex(),
    }
    return values, part(packed), record_hash


def chain(moves: int) -> Json:
    previous, records, data = bytes(48), [], HEADER if moves else b""
    for move in range(1, moves + 1):
        values, packed, previous = record(move, previous)
        records.append(values)
        data += packed
    return {"name": f"{moves} moves", "bytes": data.hex(), "psk": PSK.hex(), "records": records}


def short_record(*parts: bytes) -> bytes:
    """One of the right form, whose signatures and proofs mean nothing."""
    return part(noise_body() + noise("signatures", 128) + b"".join(map(part, parts)))


def noise_body() -> bytes:
    return body(1, bytes(48), noise("transcript", 48), [b"s", b"d"], b"m")


def ledger() -> Json:
    parts = b"source hello", b"destination hello", b"source evidence", b"destination evidence"
    short = HEADER + short_record(*parts)
    changes = {
        "magic of another file": (0, b"PGXLEDGE"),
        "version 0": (8, b"\0\0"),
        "version 2": (8, b"\2\0"),
        **{f"reserved byte {index}": (10 + index, b"\1") for index in range(6)},
        "record of no bytes": (16, bytes(4)),
        "record one byte shorter": (16, struct.pack("<I", len(short) - 21)),
        "record one byte longer": (16, struct.pack("<I", len(short) - 19)),
        "record without its signatures": (16, struct.pack("<I", 368)),
        "record of 2^32 - 1 bytes": (16, b"\xff" * 4),
        "record magic": (20, b"PGXH"),
        "record version 0": (24, b"\0\0"),
        "record version 2": (24, b"\2\0"),
        "freshness 0": (26, b"\0"),
        "freshness 255": (26, b"\xff"),
        "reserved byte of a record": (27, b"\1"),
        "move 0": (28, bytes(8)),
        "first part empty": (516, bytes(4)),
        "first part one byte longer": (516, struct.pack("<I", len(parts[0]) + 1)),
        "first part one byte shorter": (516, struct.pack("<I", len(parts[0]) - 1)),
        "last part one byte shorter": (len(short) - len(parts[3]) - 4, struct.pack("<I", len(parts[3]) - 1)),
    }
    return {
        "ledgers": [chain(moves) for moves in (0, 1, 3)],
        "refused_ledgers": [bad(name, patched(short, *change)) for name, change in changes.items()]
        + [
            bad("header alone", HEADER),
            bad("trailing byte", short + b"\0"),
            bad("three parts", HEADER + short_record(*parts[:3])),
            bad("five parts", HEADER + short_record(*parts, b"more")),
            bad("empty last part", HEADER + short_record(*parts[:3], b"")),
            bad("evidence over 64 KiB", HEADER + short_record(*parts[:3], bytes((1 << 16) + 1))),
            bad("over 2 MiB - 4096", short + bytes((2 << 20) - 4096 - len(short) + 1)),
        ],
    }
