"""The attestor of SEV-SNP: this side's reports from the firmware, the peer's verified up to pinned roots under a policy."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from ...errors import AttestationError, MalformedData, PolicyRefused, UsageError
from ...wire.handshake import AttestorKind
from ..attestor import NOTHING, Claims
from ..policy import check_moves, check_policy, check_report_data
from ..policy_digest import policy_digest
from ..secret import Secret
from .certificates import parse_endorsements_untrusted
from .describe import describe_claims
from .framing import pack_evidence, parse_evidence_untrusted
from .report import REPORT_DATA_BYTES, SigningKey, parse_report_untrusted
from .roots import AMD_ROOTS
from .table import parse_certificate_table_untrusted
from .verify import SnpClaims, verify_report

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..policy import Policy
    from .certificates import Endorsements
    from .providers import Evidence, Provider
    from .roots import Root

# The VMPL of an SVSM. Reports that it asks for say so, and nothing below VMPL 0 gets one that does.
SVSM_VMPL: Final = 0

# What of a report says who the peer is; the rest is of use to whoever has the report itself.
_TOLD: Final = (
    "product",
    "version",
    "vmpl",
    "guest_svn",
    "policy",
    "policy_bits",
    "platform_bits",
    "signing_key",
    "measurement",
    "host_data",
    "family_id",
    "image_id",
    "report_id",
    "reported_tcb",
    "committed_tcb",
    "launch_tcb",
    "chip_id",
    "certified_chip",
    "csp_id",
    "crl_checked",
    "certificates_valid_from",
    "certificates_valid_until",
    "digest",
)


class SnpAttestor:
    """`provider` makes this side's reports; a peer's is judged under `policy`, the one for a peer in its role.

    `now` gives the time at which certificates must be valid. `crl` are the operator's revocation lists, one for each
    root that peers may have: what a peer sent would be of the peer's choice. This side's own report needs none.
    `on_refused` gets one line for each refusal: it is for this side's own operator, while the host learns a coarse
    code. Raises UsageError where this machine gives no report, or one that no peer could verify.
    """

    def __init__(
        self,
        provider: Provider,
        policy: Policy,
        *,
        roots: Sequence[Root] = AMD_ROOTS,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        crl: bytes | Sequence[bytes] | None = None,
        on_refused: Callable[[str], None] = lambda _line: None,
    ) -> None:
        self._provider = provider
        self._policy = policy
        self._roots = roots
        self._now = now
        self._crl = crl
        self._on_refused = on_refused
        self._own = self._own_claims()

    @property
    def kind(self) -> AttestorKind:
        return AttestorKind.SNP

    @property
    def policy_digest(self) -> bytes:
        return policy_digest(self._policy)

    def evidence(self, report_data: bytes) -> bytes:
        return pack_evidence(self._provider.evidence(report_data, vmpl=SVSM_VMPL))

    def verify(self, evidence: bytes, report_data: bytes) -> Claims:
        try:
            claims = self._verified(evidence, self._crl)
            # What is not of this handshake proves nothing of the peer, so it comes before the policy.
            check_report_data(claims, report_data)
            check_policy(self._policy, claims, own=self._own, moves=None)
        except AttestationError as error:
            self._on_refused(str(error))
            raise
        except MalformedData as error:
            self._on_refused(str(error))
            raise AttestationError(str(error)) from None
        return as_claims(self.kind, claims)

    def check_move(self, move: int) -> None:
        try:
            check_moves(self._policy, move)
        except PolicyRefused as error:
            self._on_refused(str(error))
            raise

    def contribution(self) -> Secret:
        return Secret(NOTHING)

    def _verified(self, evidence: bytes, crl: bytes | Sequence[bytes] | None) -> SnpClaims:
        return verify_evidence(evidence, at=self._now(), roots=self._roots, crl=crl)

    def _own_claims(self) -> SnpClaims:
        """Of a report over zeros, which is of no use to anybody: handshakes begin theirs with a label."""
        try:
            return self._verified(self.evidence(bytes(REPORT_DATA_BYTES)), None)
        except (AttestationError, MalformedData) as error:
            raise UsageError(f"no peer could verify this machine's own report: {error}") from None


def verify_evidence(
    data: bytes,
    *,
    at: datetime,
    roots: Sequence[Root],
    crl: bytes | Sequence[bytes] | None,
    whenever: bool = False,
) -> SnpClaims:
    """Evidence of a handshake, up to `roots` as of the time `at`; neither report data nor a policy is compared.

    `whenever` is as with `verify_report`, for evidence of an earlier handshake.
    Raises AttestationError or MalformedData.
    """
    evidence = parse_evidence_untrusted(data)
    return verify_report(evidence.report, _endorsements(evidence, crl), at=at, roots=roots, whenever=whenever)


def as_claims(kind: AttestorKind, claims: SnpClaims) -> Claims:
    """What is told of a peer whose evidence is of this kind."""
    described = describe_claims(claims)
    emulated = "" if kind is AttestorKind.SNP else "emulated "
    subject = f"{emulated}SEV-SNP guest on {claims.product.value}"
    return Claims(kind, subject, {name: described[name] for name in _TOLD})


def _endorsements(evidence: Evidence, crl: bytes | Sequence[bytes] | None) -> Endorsements:
    table = parse_certificate_table_untrusted(evidence.table)
    key = parse_report_untrusted(evidence.report).signing_key
    leaf = table.vlek if key == SigningKey.VLEK else table.vcek
    if leaf is None or table.intermediate is None or table.root is None:
        raise AttestationError("the certificate table does not hold the chain of the report's key")
    return parse_endorsements_untrusted(leaf, (table.intermediate, table.root), crl)
