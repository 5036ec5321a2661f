"""An emulated processor that makes reports, and the attestor that works with them."""

from __future__ import annotations

import hashlib
import secrets
from typing import TYPE_CHECKING, Final

from ...wire.handshake import AttestorKind
from ..policy import MinimumTcb, Policy
from ..snp import Evidence
from ..snp.attestor import SnpAttestor
from .reports import default_tcb, signed_report

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from ..snp import Product
    from .authority import EmulatedAuthority

# Of the SVSM that every emulated guest was launched with.
EMULATED_MEASUREMENT: Final = hashlib.sha384(b"pagexfer emulated SVSM").digest()


class EmulatedProvider:
    """Reports of one processor with a random chip id, so that no two providers are the same machine."""

    def __init__(self, authority: EmulatedAuthority, **fields: int | bytes) -> None:
        """`fields` are fields of the report that differ from an ordinary one's (`reports.FIELDS`)."""
        self._product = authority.product
        self._leaf = authority.vcek(secrets.token_bytes(authority.product.chip_id_bytes))
        self._table = authority.table(self._leaf)
        self._fields = {
            "measurement": EMULATED_MEASUREMENT,
            "report_id": secrets.token_bytes(32),
            **fields,
        }

    def evidence(self, report_data: bytes, *, vmpl: int) -> Evidence:
        fields = {"report_data": report_data, "vmpl": vmpl, **self._fields}
        return Evidence(signed_report(self._product, self._leaf, **fields), self._table)


class EmulatedAttestor(SnpAttestor):
    """Insecure: `SnpAttestor` with reports that anybody can make who has the authority's file.

    `policy` is for the peer, `strict_policy` where it is None. The rest is as with `SnpAttestor`.
    """

    def __init__(
        self,
        authority: EmulatedAuthority,
        policy: Policy | None = None,
        *,
        now: Callable[[], datetime],
        on_refused: Callable[[str], None] = lambda _line: None,
    ) -> None:
        super().__init__(
            EmulatedProvider(authority),
            strict_policy(authority.product) if policy is None else policy,
            roots=(authority.root,),
            now=now,
            on_refused=on_refused,
        )

    @property
    def kind(self) -> AttestorKind:
        return AttestorKind.EMULATED


def strict_policy(product: Product) -> Policy:
    """What every emulated guest meets, and nothing more: all defaults, one product, measurement and TCB."""
    return Policy(
        measurements=frozenset({EMULATED_MEASUREMENT}),
        minimum_tcb=(MinimumTcb(product, None, default_tcb(product)),),
        products=frozenset({product}),
    )
