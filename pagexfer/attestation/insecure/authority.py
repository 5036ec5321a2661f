"""The authority of emulated reports: an ARK and an ASK that look like AMD's, in one file that both sides are given."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from ...errors import UsageError
from ..snp import CertificateTable, Product, Root, SigningKey
from .certificates import Leaf, amd_extensions, amd_name, issue, issue_intermediate, issue_root, rsa_key
from .reports import default_tcb

if TYPE_CHECKING:
    from datetime import datetime
    from pathlib import Path
    from typing import Self

MAX_FILE_BYTES: Final = 1 << 16

_LIFE: Final = timedelta(days=365)
_BEFORE: Final = timedelta(days=1)  # for a peer whose clock is behind


class EmulatedAuthority:
    """Issues VCEKs of processors that do not exist. A verifier that pins `root` believes all reports made with it."""

    def __init__(
        self,
        product: Product,
        key: rsa.RSAPrivateKey,
        intermediate: x509.Certificate,
        root: x509.Certificate,
    ) -> None:
        self.product = product
        self._key = key
        self._intermediate = intermediate
        self._root = root

    @classmethod
    def generate(cls, product: Product, *, now: datetime) -> Self:
        """A new authority, valid for a year from `now`. It takes some tenths of a second."""
        root_key, key = rsa_key(), rsa_key()
        valid = (now - _BEFORE, now + _LIFE)
        # The root's key ends here: nothing else is ever signed with it.
        return cls(
            product,
            key,
            issue_intermediate(product, SigningKey.VCEK, key, root_key, valid),
            issue_root(product, root_key, valid),
        )

    @classmethod
    def load(cls, path: Path) -> Self:
        """The authority in a file. Raises UsageError where it cannot be used."""
        try:
            with path.open("rb") as file:
                data = file.read(MAX_FILE_BYTES)
        except OSError as error:
            raise UsageError(f"cannot read the test CA in {path}: {error.strerror}") from None
        try:
            key = load_pem_private_key(data, None)
            certificates = x509.load_pem_x509_certificates(data)
            names = {certificate.subject.rfc4514_string(): certificate for certificate in certificates}
        except (ValueError, TypeError, UnsupportedAlgorithm):
            raise _unusable(path) from None
        for product in Product:
            root = names.get(amd_name(f"ARK-{product.value}").rfc4514_string())
            intermediate = names.get(amd_name(f"SEV-{product.value}").rfc4514_string())
            if root is not None and intermediate is not None and isinstance(key, rsa.RSAPrivateKey):
                return cls(product, key, intermediate, root)
        raise _unusable(path)

    def save(self, path: Path) -> None:
        """Write a new file that its owner alone may read. Raises UsageError where there is one already, or none can be."""
        key = self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        data = key + b"".join(part.public_bytes(Encoding.PEM) for part in (self._intermediate, self._root))
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(data)
            except BaseException:
                path.unlink()  # not in parts, which would be in the way of the next try
                raise
        except OSError as error:
            raise UsageError(f"cannot make the test CA in {path}: {error.strerror}") from None

    @property
    def root(self) -> Root:
        """What a verifier pins to accept reports of this authority."""
        return Root(self.product, self._root.fingerprint(SHA256()))

    def vcek(self, chip: bytes) -> Leaf:
        """The signing key of the processor with this id, 64 bytes or 8 (Turin), at the TCB that all of them have."""
        key, tcb = ec.generate_private_key(ec.SECP384R1()), default_tcb(self.product)
        extensions = amd_extensions(self.product, SigningKey.VCEK, tcb, chip)
        certificate = issue(
            amd_name("SEV-VCEK"),
            key.public_key(),
            self._intermediate.subject,
            self._key,
            valid=(self._intermediate.not_valid_before_utc, self._intermediate.not_valid_after_utc),
            extensions={tail: value for tail, value in extensions.items() if value is not None},
        )
        return Leaf(key, certificate.public_bytes(Encoding.DER), SigningKey.VCEK, tcb, chip)

    def table(self, leaf: Leaf) -> bytes:
        """The certificate table that a host would give with a report of this leaf."""
        chain = (part.public_bytes(Encoding.DER) for part in (self._intermediate, self._root))
        return CertificateTable(leaf.certificate, None, *chain).pack()


def _unusable(path: Path) -> UsageError:
    return UsageError(f"{path} is no test CA: make one with 'pagexfer attest make-test-ca'")
