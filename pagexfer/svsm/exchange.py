"""The key exchange: ephemeral X25519 (RFC 7748) and ML-KEM-768 (FIPS 203) together, so that breaking one gives nothing.

    source       -> destination   X25519 public key, encapsulation key
    destination  -> source        X25519 public key, ciphertext
    both                          X25519 secret || ML-KEM secret, 32 bytes each

Private keys live in OpenSSL, which wipes them when the object ends; what Python holds of them is dropped after one use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from ..attestation.secret import Secret
from ..errors import KeyPoisoned, MalformedData

if TYPE_CHECKING:
    from typing import Self


class SourceExchange:
    """The source's half: two private keys, for one use."""

    def __init__(self, x25519: X25519PrivateKey, kem: MLKEM768PrivateKey) -> None:
        self.x25519_public = x25519.public_key().public_bytes_raw()
        self.encapsulation_key = kem.public_key().public_bytes_raw()
        self._keys: tuple[X25519PrivateKey, MLKEM768PrivateKey] | None = x25519, kem

    @classmethod
    def fresh(cls) -> Self:
        return cls(X25519PrivateKey.generate(), MLKEM768PrivateKey.generate())

    def finish(self, x25519_public: bytes, ciphertext: bytes) -> Secret:
        """The shared secrets, 64 bytes; the private keys are gone whatever comes of it.

        Another ciphertext than was sent here gives another secret and no error (implicit rejection, FIPS 203), which the
        key confirmation shows. Raises MalformedData for a point that gives no secret, KeyPoisoned at the second use.
        """
        if self._keys is None:
            raise KeyPoisoned("the keys of this exchange were used or dropped")
        x25519, kem = self._keys
        self.drop()
        try:
            kem_secret = kem.decapsulate(ciphertext)
        except ValueError:
            raise MalformedData("an ML-KEM-768 ciphertext of another size") from None
        return Secret(_x25519_secret(x25519, x25519_public) + kem_secret)

    def drop(self) -> None:
        """Forget the private keys."""
        self._keys = None


def answer_exchange(x25519_public: bytes, encapsulation_key: bytes) -> tuple[bytes, bytes, Secret]:
    """The destination's half at once: its X25519 public key, the ciphertext, and the shared secrets, 64 bytes.

    No private key outlives the call. Raises MalformedData for a point that gives no secret, or an encapsulation key whose
    coefficients are out of range.
    """
    own = X25519PrivateKey.generate()
    shared = _x25519_secret(own, x25519_public)
    try:
        kem_secret, ciphertext = MLKEM768PublicKey.from_public_bytes(encapsulation_key).encapsulate()
    except ValueError:
        raise MalformedData("not an encapsulation key of ML-KEM-768") from None
    return own.public_key().public_bytes_raw(), ciphertext, Secret(shared + kem_secret)


def _x25519_secret(own: X25519PrivateKey, peer: bytes) -> bytes:
    """32 bytes, never all zero: a peer's point of low order would make the secret known to everybody."""
    try:
        return own.exchange(X25519PublicKey.from_public_bytes(peer))
    except ValueError:
        raise MalformedData("an X25519 public key of low order") from None
