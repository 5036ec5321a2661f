"""The key schedule, the pre-shared key and the type that secrets have."""

from __future__ import annotations

import copy
import os
import pickle
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagexfer.attestation import PskAttestor
from pagexfer.attestation.psk import MAX_PSK_BYTES, MIN_PSK_BYTES, readable_by_others
from pagexfer.attestation.secret import Secret
from pagexfer.errors import AttestationError, KeyPoisoned, LocalProtocolError, UsageError
from pagexfer.svsm.keys import (
    KeySchedule,
    proved_digest,
    report_data,
    session_id,
    transcript_digest,
)
from pagexfer.wire.bundle import Direction
from pagexfer.wire.handshake import AttestorKind, Role

from .wire_vectors import Vector, load, name_of

if TYPE_CHECKING:
    from pathlib import Path

VECTORS = load("key_schedule")
SESSION = VECTORS["sessions"][0]


def schedule(vector: Vector = SESSION) -> KeySchedule:
    return schedule_of(*(bytes.fromhex(vector[part]) for part in ("shared", "contribution", "transcript")))


def schedule_of(shared: bytes, contribution: bytes, transcript: bytes) -> KeySchedule:
    return KeySchedule(Secret(shared), Secret(contribution), transcript)


# Pre-shared key


@pytest.mark.parametrize("vector", VECTORS["psks"], ids=name_of)
def test_psk_of_vector(vector: Vector) -> None:
    attestor = PskAttestor(bytes.fromhex(vector["psk"]))
    reported, evidence = bytes.fromhex(vector["report_data"]), bytes.fromhex(vector["evidence"])
    assert attestor.kind is AttestorKind.PSK
    assert attestor.contribution().reveal().hex() == vector["contribution"]
    assert attestor.evidence(reported) == evidence
    assert attestor.verify(evidence, reported).kind is AttestorKind.PSK


@given(st.integers(0, 48 * 8 - 1), st.integers(0, 64 * 8 - 1))
def test_other_evidence_key_or_report_data_is_refused(evidence_bit: int, data_bit: int) -> None:
    vector = VECTORS["psks"][1]
    attestor = PskAttestor(bytes.fromhex(vector["psk"]))
    reported, evidence = bytes.fromhex(vector["report_data"]), bytes.fromhex(vector["evidence"])
    flipped = bytearray(evidence)
    flipped[evidence_bit // 8] ^= 1 << evidence_bit % 8
    other_data = bytearray(reported)
    other_data[data_bit // 8] ^= 1 << data_bit % 8
    other_psk = bytes.fromhex(vector["psk"])[:-1]
    for verifier, shown, data in (
        (attestor, bytes(flipped), reported),
        (attestor, evidence, bytes(other_data)),
        (attestor, evidence[:-1], reported),
        (attestor, evidence + b"\0", reported),
        (attestor, b"", reported),
        (PskAttestor(other_psk), evidence, reported),
    ):
        with pytest.raises(AttestationError, match="same pre-shared key"):
            verifier.verify(shown, data)


@pytest.mark.parametrize("length", [0, MIN_PSK_BYTES - 1, MAX_PSK_BYTES + 1])
def test_a_psk_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(UsageError, match="16 to 4096 bytes"):
        PskAttestor(os.urandom(length))


@pytest.mark.parametrize("psk", [bytes(16), b"a" * 16, b"\xff" * 4096, b" " * 17, b" \t\r\n" * 8])
def test_a_psk_that_is_none_is_refused(psk: bytes) -> None:
    with pytest.raises(UsageError, match="openssl rand"):
        PskAttestor(psk)


@pytest.mark.parametrize(
    "key", [b"0123456789abcde\r", b"0123456789abcd\n\r", b" 123456789abcdef", b"0123456789abcde "]
)
def test_a_file_has_the_key_that_the_program_has(tmp_path: Path, key: bytes) -> None:
    """Bytes at the end of a binary key are the key's; only the newline that an editor adds is not."""
    path = tmp_path / "psk"
    path.write_bytes(key)
    assert PskAttestor.from_file(path).evidence(b"") == PskAttestor(key).evidence(b"")


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_psk_file_that_others_can_write_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "psk"
    path.write_bytes(b"0123456789abcdef")
    path.chmod(mode)
    with pytest.raises(UsageError, match="others can write"):
        PskAttestor.from_file(path)
    path.chmod(0o600)
    PskAttestor.from_file(path)


@pytest.mark.parametrize("ending", [b"", b"\n", b"\r\n"])
def test_psk_from_file(tmp_path: Path, ending: bytes) -> None:
    vector = VECTORS["psks"][0]
    path = tmp_path / "psk"
    key = b"0123456789abcdef0123456789abcdef"
    path.write_bytes(key + ending)
    reported = bytes.fromhex(vector["report_data"])
    assert PskAttestor.from_file(path).evidence(reported) == PskAttestor(key).evidence(reported)


def test_psk_from_an_unusable_file(tmp_path: Path) -> None:
    path = tmp_path / "psk"
    with pytest.raises(UsageError, match="No such file"):
        PskAttestor.from_file(path)
    path.write_bytes(bytes(MAX_PSK_BYTES + 100))
    with pytest.raises(UsageError, match="16 to 4096 bytes"):
        PskAttestor.from_file(path)
    path.write_bytes(b"short\n")
    with pytest.raises(UsageError, match="openssl rand"):
        PskAttestor.from_file(path)


def test_who_may_read_a_key_file(tmp_path: Path) -> None:
    path = tmp_path / "psk"
    path.touch()
    for mode, readable in ((0o600, False), (0o640, True), (0o604, True), (0o400, False)):
        path.chmod(mode)
        assert readable_by_others(path) is readable


# Key schedule


@pytest.mark.parametrize("vector", VECTORS["sessions"], ids=name_of)
def test_schedule_of_vector(vector: Vector) -> None:
    hellos = bytes.fromhex(vector["source_hello"]), bytes.fromhex(vector["destination_hello"])
    transcript = transcript_digest(*hellos)
    assert transcript.hex() == vector["transcript"]
    assert session_id(transcript).hex() == vector["session_id"]
    assert report_data(Role.SOURCE, transcript).hex() == vector["report_data_source"]
    assert report_data(Role.DESTINATION, transcript).hex() == vector["report_data_destination"]
    if vector["psk"] is not None:
        attestor = PskAttestor(bytes.fromhex(vector["psk"]))
        assert attestor.contribution().reveal().hex() == vector["contribution"]
    keys = schedule(vector)
    assert keys.session.hex() == vector["session_id"]
    assert keys._secret.reveal().hex() == vector["session_secret"]
    for expected in vector["traffic_keys"]:
        stream = Direction(expected["direction"]), expected["channel"], expected["incarnation"]
        assert keys.traffic_key(*stream).reveal().hex() == expected["key"]
    proved = proved_digest(
        transcript, bytes.fromhex(vector["destination_evidence"]), bytes.fromhex(vector["source_evidence"])
    )
    assert proved.hex() == vector["proved"]
    for role in Role:
        shown = vector[f"confirmation_{role.name.lower()}"]
        assert keys.confirmation(role, proved).hex() == shown
        keys.check_confirmation(role, proved, bytes.fromhex(shown))


def test_a_confirmation_is_of_one_role_one_handshake_and_one_secret() -> None:
    keys, proved = schedule(), bytes.fromhex(SESSION["proved"])
    shown = keys.confirmation(Role.SOURCE, proved)
    assert keys.confirmation(Role.DESTINATION, proved) != shown
    with pytest.raises(AttestationError, match="destination did not confirm"):
        keys.check_confirmation(Role.DESTINATION, proved, shown)
    for other_proved, wrong in ((bytes(48), shown), (proved, shown[:-1]), (proved, b""), (proved, bytes(48))):
        with pytest.raises(AttestationError, match="source did not confirm"):
            keys.check_confirmation(Role.SOURCE, other_proved, wrong)
    without = schedule(VECTORS["sessions"][1])
    with pytest.raises(AttestationError, match="source did not confirm"):
        without.check_confirmation(Role.SOURCE, proved, shown)


def test_evidence_is_confirmed_by_its_side() -> None:
    digest = proved_digest(bytes(48), b"one", b"two")
    assert (
        len({digest, proved_digest(bytes(48), b"two", b"one"), proved_digest(bytes(48), b"onet", b"wo")}) == 3
    )


@pytest.mark.parametrize(("shared", "contribution"), [(63, 49), (65, 47), (64, 47), (111, 1)])
def test_the_parts_of_the_input_have_one_size_each(shared: int, contribution: int) -> None:
    """Bytes that move from one part to another would be the same input."""
    with pytest.raises(LocalProtocolError):
        schedule_of(bytes(shared), bytes(contribution), bytes(48))


streams = st.tuples(st.sampled_from(Direction), st.integers(0, 0xFFFF), st.integers(0, 0xFFFF))


@given(streams, streams)
def test_each_stream_has_its_own_key(
    one: tuple[Direction, int, int], other: tuple[Direction, int, int]
) -> None:
    keys = schedule()
    same = keys.traffic_key(*one).reveal() == keys.traffic_key(*other).reveal()
    assert same is (one == other)


@given(st.binary(min_size=48, max_size=48), st.binary(min_size=48, max_size=48))
def test_each_transcript_has_its_own_session(one: bytes, other: bytes) -> None:
    parts = bytes.fromhex(SESSION["shared"]), bytes.fromhex(SESSION["contribution"])
    first, second = schedule_of(*parts, one), schedule_of(*parts, other)
    same_key = (
        first.traffic_key(Direction.FORWARD, 0, 0).reveal()
        == second.traffic_key(Direction.FORWARD, 0, 0).reveal()
    )
    assert (first.session == second.session) is same_key is (one == other)


@given(st.binary(min_size=64, max_size=64), st.binary(min_size=64, max_size=64))
def test_a_contribution_alone_is_no_key(one: bytes, other: bytes) -> None:
    """Forward secrecy: with transcript and pre-shared key known, the key is as unknown as what the exchange gave."""
    rest = bytes.fromhex(SESSION["contribution"]), bytes.fromhex(SESSION["transcript"])
    keys = [
        schedule_of(shared, *rest).traffic_key(Direction.FORWARD, 0, 0).reveal() for shared in (one, other)
    ]
    assert (keys[0] == keys[1]) is (one == other)


def test_a_transcript_says_who_is_who() -> None:
    hellos = bytes.fromhex(SESSION["source_hello"]), bytes.fromhex(SESSION["destination_hello"])
    assert transcript_digest(*hellos) != transcript_digest(*reversed(hellos))
    transcript = transcript_digest(*hellos)
    assert report_data(Role.SOURCE, transcript) != report_data(Role.DESTINATION, transcript)
    assert len(report_data(Role.SOURCE, transcript)) == 64


def test_a_wiped_schedule_gives_no_key() -> None:
    keys = schedule()
    keys.traffic_key(Direction.FORWARD, 0, 0)
    keys.wipe()
    with pytest.raises(KeyPoisoned):
        keys.traffic_key(Direction.FORWARD, 0, 0)
    with pytest.raises(KeyPoisoned):
        keys.confirmation(Role.SOURCE, bytes(48))


# Secret


def test_a_secret_shows_nothing() -> None:
    secret = Secret(b"hunter2hunter2")
    assert repr(secret) == str(secret) == f"{secret}" == "Secret([REDACTED])"
    assert "hunter2" not in repr([secret])
    assert secret.reveal() == b"hunter2hunter2"


def test_a_secret_is_neither_pickled_nor_copied() -> None:
    secret = Secret(b"hunter2hunter2")
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot be pickled or copied"):
            attempt(secret)


def test_wiping_overwrites_the_bytes() -> None:
    seen: list[bytes] = []

    class Watched(bytearray):
        def clear(self) -> None:
            seen.append(bytes(self))
            super().clear()

    theirs = bytearray(b"hunter2hunter2")
    secret = Secret(theirs)
    secret._data = Watched(secret._data)
    secret.wipe()
    assert seen == [bytes(14)]
    assert theirs == b"hunter2hunter2"  # what the caller gave stays the caller's to wipe
    with pytest.raises(KeyPoisoned, match="wiped"):
        secret.reveal()
    secret.wipe()
