"""The key exchange: vectors, low-order points, keys out of range, implicit rejection, one use."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from pagexfer.errors import KeyPoisoned, MalformedData
from pagexfer.svsm import exchange
from pagexfer.svsm.exchange import SourceExchange, answer_exchange

from .low_order import LOW_ORDER
from .wire_vectors import Vector, load

VECTOR: Vector = load("key_schedule")["exchanges"][0]


def value(name: str) -> bytes:
    return bytes.fromhex(VECTOR[name])


def source() -> SourceExchange:
    return SourceExchange(
        X25519PrivateKey.from_private_bytes(value("x25519_source")),
        MLKEM768PrivateKey.from_seed_bytes(value("mlkem_seed")),
    )


def test_source_of_vector() -> None:
    ours = source()
    assert ours.x25519_public == value("x25519_source_public")
    assert ours.encapsulation_key == value("encapsulation_key")
    shared = ours.finish(value("x25519_destination_public"), value("ciphertext"))
    assert shared.reveal() == value("x25519_secret") + value("kem_secret")


def test_destination_with_the_x25519_key_of_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encapsulation draws random numbers; that the source takes the same secret from it is the other half of the check."""

    class Fixed(X25519PrivateKey):
        @classmethod
        def generate(cls) -> X25519PrivateKey:
            return X25519PrivateKey.from_private_bytes(value("x25519_destination"))

    monkeypatch.setattr(exchange, "X25519PrivateKey", Fixed)
    public, ciphertext, shared = answer_exchange(value("x25519_source_public"), value("encapsulation_key"))
    assert public == value("x25519_destination_public")
    assert shared.reveal()[:32] == value("x25519_secret")
    assert source().finish(public, ciphertext).reveal() == shared.reveal()


def test_every_exchange_is_another() -> None:
    ours = SourceExchange.fresh()
    answers = [answer_exchange(ours.x25519_public, ours.encapsulation_key) for _ in range(2)]
    for part in range(2):
        assert answers[0][part] != answers[1][part]
    assert answers[0][2].reveal() != answers[1][2].reveal()
    assert SourceExchange.fresh().encapsulation_key != ours.encapsulation_key
    assert SourceExchange.fresh().x25519_public != ours.x25519_public


@pytest.mark.parametrize("point", LOW_ORDER, ids=lambda point: point[:4].hex())
def test_a_point_of_low_order_is_refused_by_both(point: bytes) -> None:
    with pytest.raises(MalformedData, match="low order"):
        answer_exchange(point, value("encapsulation_key"))
    with pytest.raises(MalformedData, match="low order"):
        source().finish(point, value("ciphertext"))


@pytest.mark.parametrize("offset", [0, 381, 382, 764, 1149])
def test_an_encapsulation_key_out_of_range_is_refused(offset: int) -> None:
    """The modulus check of FIPS 203, section 7.2: 12 bits that encode 4095, where 3328 is the most."""
    key = bytearray(value("encapsulation_key"))
    key[offset : offset + 3] = b"\xff\xff\xff"
    with pytest.raises(MalformedData, match="encapsulation key"):
        answer_exchange(value("x25519_source_public"), bytes(key))


@pytest.mark.parametrize("size", [0, 1087, 1089])
def test_a_ciphertext_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(MalformedData, match="another size"):
        source().finish(value("x25519_destination_public"), bytes(size))


def test_another_ciphertext_gives_another_secret_and_no_error() -> None:
    flipped = bytearray(value("ciphertext"))
    flipped[500] ^= 1
    shared = source().finish(value("x25519_destination_public"), bytes(flipped)).reveal()
    assert shared[:32] == value("x25519_secret")
    assert shared[32:] != value("kem_secret")


@pytest.mark.parametrize("good", [True, False])
def test_private_keys_are_used_once(*, good: bool) -> None:
    ours = source()
    if good:
        ours.finish(value("x25519_destination_public"), value("ciphertext"))
    else:
        with pytest.raises(MalformedData):
            ours.finish(bytes(32), value("ciphertext"))
    assert ours._keys is None
    with pytest.raises(KeyPoisoned):
        ours.finish(value("x25519_destination_public"), value("ciphertext"))
    dropped = source()
    dropped.drop()
    with pytest.raises(KeyPoisoned):
        dropped.finish(value("x25519_destination_public"), value("ciphertext"))
