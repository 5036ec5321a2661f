"""What we want of a peer whose report verified: the rules, their strict defaults, and the check of each.

A refusal names the rule, the value and the limit. `policy_file.py` reads a policy from a file, docs/policy.md documents it.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

from ..errors import AttestationError, PolicyRefused, UsageError
from .snp.bits import GuestPolicyBit, PlatformBit
from .snp.product import Product
from .snp.report import NO_MIGRATION_AGENT, REPORT_DATA_BYTES, SigningKey

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .snp.product import Tcb
    from .snp.report import Report
    from .snp.verify import SnpClaims

_SHOWN: Final = 4  # values of a set that a message names

_Bit = TypeVar("_Bit", PlatformBit, GuestPolicyBit)


@dataclass(frozen=True, slots=True)
class MinimumTcb:
    """The least that each part may be on one CPUID model of a product, or on all of them where `model` is None.

    Microcode numbers of two models of one product cannot be compared, so a limit without model fits few fleets.
    """

    product: Product
    model: int | None
    tcb: Tcb


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Rules for one peer. None in a rule for a set or a limit means that anything is accepted.

    The first two have no default: whom we trust and how old its firmware may be is never decided by leaving it out.
    """

    measurements: frozenset[bytes] | None
    minimum_tcb: tuple[MinimumTcb, ...] | None
    products: frozenset[Product] = frozenset(Product)
    allowed_chips: frozenset[bytes] | None = None
    denied_chips: frozenset[bytes] = frozenset()
    vlek_providers: frozenset[str] | None = frozenset()
    vmpls: frozenset[int] = frozenset({0})
    allow_debug: bool = False
    allow_migration_agent: bool = False
    allow_masked_chip_id: bool = False
    allow_same_machine: bool = False
    host_data: frozenset[bytes] | None = None
    family_ids: frozenset[bytes] | None = None
    image_ids: frozenset[bytes] | None = None
    id_keys: frozenset[bytes] | None = None
    author_keys: frozenset[bytes] | None = None
    minimum_guest_svn: int = 0
    required_platform_bits: frozenset[PlatformBit] = frozenset()
    forbidden_platform_bits: frozenset[PlatformBit] = frozenset()
    required_guest_policy_bits: frozenset[GuestPolicyBit] = frozenset()
    forbidden_guest_policy_bits: frozenset[GuestPolicyBit] = frozenset()
    required_mitigations: int = 0
    require_crl: bool = False
    maximum_moves: int | None = None
    allow_psk: bool = False


def check_policy(policy: Policy, claims: SnpClaims, *, own: SnpClaims | None, moves: int | None) -> None:
    """Check verified claims of a peer against a policy.

    `own` is what this side's own report says, `moves` the number that the coming move has in the guest's life; None where
    that is not known, as for a report in a file: the rules that need it are then not checked. Raises PolicyRefused.
    """
    _check_product(policy, claims)
    _check_guest(policy, claims.report)
    _check_minimum_tcb(policy, claims)
    _check_identity(policy, claims.report)
    _check_chip(policy, claims)
    _check_platform(policy, claims.report)
    if policy.require_crl and not claims.crl_checked:
        raise _refusal("require_crl", "no CRL was given", "a CRL of the root")
    if own is not None and not policy.allow_same_machine:
        _check_other_machine(claims, own)
    if moves is not None:
        check_moves(policy, moves)


def check_moves(policy: Policy, moves: int) -> None:
    """A guest may make the move that is number `moves` in its life. Raises PolicyRefused."""
    if policy.maximum_moves is not None and moves > policy.maximum_moves:
        raise _refusal("maximum_moves", moves, f"at most {policy.maximum_moves}")


def check_psk(policy: Policy) -> None:
    """A move may rest on a pre-shared key, which meets none of the other rules. Raises PolicyRefused."""
    if not policy.allow_psk:
        raise _refusal("allow_psk", "a pre-shared key, which proves no platform", "a report")


def check_report_data(claims: SnpClaims, expected: bytes) -> None:
    """The report covers exactly these 64 bytes. Raises AttestationError, UsageError where they are not 64."""
    if len(expected) != REPORT_DATA_BYTES:
        raise UsageError(f"report data has {REPORT_DATA_BYTES} bytes, not {len(expected)}")
    if not hmac.compare_digest(claims.report.report_data, expected):
        raise AttestationError(
            f"the report covers report_data {claims.report.report_data.hex()}, wanted {expected.hex()}"
        )


def _check_product(policy: Policy, claims: SnpClaims) -> None:
    if claims.product not in policy.products:
        raise _refusal(
            "products", claims.product.value, _one_of(product.value for product in policy.products)
        )
    if claims.signing_key is not SigningKey.VLEK or policy.vlek_providers is None:
        return
    if claims.csp_id not in policy.vlek_providers:
        raise _refusal("vlek_providers", repr(claims.csp_id), _one_of(policy.vlek_providers))


def _check_guest(policy: Policy, report: Report) -> None:
    if report.vmpl not in policy.vmpls:
        raise _refusal("vmpls", report.vmpl, _one_of(map(str, policy.vmpls)))
    if not policy.allow_debug and report.policy >> GuestPolicyBit.DEBUG & 1:
        raise _refusal("allow_debug", f"guest policy {report.policy:#x} with DEBUG", "no DEBUG")
    if not policy.allow_migration_agent and report.policy >> GuestPolicyBit.MIGRATE_MA & 1:
        raise _refusal(
            "allow_migration_agent", f"guest policy {report.policy:#x} with MIGRATE_MA", "no MIGRATE_MA"
        )
    if not policy.allow_migration_agent and report.report_id_ma != NO_MIGRATION_AGENT:
        raise _refusal(
            "allow_migration_agent", f"report_id_ma {report.report_id_ma.hex()}", "no migration agent"
        )
    _check_bits(
        "guest_policy_bits",
        f"guest policy {report.policy:#x}",
        report.policy,
        policy.required_guest_policy_bits,
        policy.forbidden_guest_policy_bits,
    )
    if report.guest_svn < policy.minimum_guest_svn:
        raise _refusal("minimum_guest_svn", report.guest_svn, f"at least {policy.minimum_guest_svn}")


def _check_minimum_tcb(policy: Policy, claims: SnpClaims) -> None:
    """Reported, committed and launch: the key's, what the host can go back to, and what the guest started under."""
    if policy.minimum_tcb is None:
        return
    minimum = _minimum_for(policy.minimum_tcb, claims)
    for name in ("reported", "committed", "launch"):
        tcb: Tcb = getattr(claims, f"{name}_tcb")
        part = tcb.first_part_below(minimum)
        if part is not None:
            limit = f"at least {minimum.parts()[part]}"
            raise _refusal("minimum_tcb", f"{name} {part} {tcb.parts().get(part)}", limit)


def _minimum_for(minimums: tuple[MinimumTcb, ...], claims: SnpClaims) -> Tcb:
    """The limit for the report's own model where there is one, else the product's."""
    model = None if claims.report.cpuid is None else claims.report.cpuid.model
    for wanted in (model, None):
        for minimum in minimums:
            if minimum.product is claims.product and minimum.model == wanted:
                return minimum.tcb
    shown = "unknown model" if model is None else f"model {model:#x}"
    raise _refusal(
        "minimum_tcb", f"{claims.product.value} {shown}", "a processor that the policy has a limit for"
    )


def _check_identity(policy: Policy, report: Report) -> None:
    for rule, value, accepted in (
        ("measurements", report.measurement, policy.measurements),
        ("host_data", report.host_data, policy.host_data),
        ("family_ids", report.family_id, policy.family_ids),
        ("image_ids", report.image_id, policy.image_ids),
        ("id_keys", report.id_key_digest, policy.id_keys),
        ("author_keys", report.author_key_digest, policy.author_keys),
    ):
        if accepted is not None and value not in accepted:
            raise _refusal(rule, value.hex(), _one_of(item.hex() for item in accepted))
    if policy.author_keys is not None and not report.author_key_enabled:
        raise _refusal(
            "author_keys", "no author key in use", _one_of(item.hex() for item in policy.author_keys)
        )


def _check_chip(policy: Policy, claims: SnpClaims) -> None:
    """The lists hold for what names the chip, so hiding the id in the report gets nobody past them."""
    if claims.report.chip_id_masked and not policy.allow_masked_chip_id:
        raise _refusal("allow_masked_chip_id", "chip id hidden by the host", "a report that names its chip")
    name = "a chip that nothing names" if claims.chip is None else claims.chip.hex()
    if policy.allowed_chips is not None and claims.chip not in policy.allowed_chips:
        raise _refusal("allowed_chips", name, _one_of(chip.hex() for chip in policy.allowed_chips))
    if policy.denied_chips and (claims.chip is None or claims.chip in policy.denied_chips):
        raise _refusal("denied_chips", name, f"none of {len(policy.denied_chips)} denied")


def _check_platform(policy: Policy, report: Report) -> None:
    _check_bits(
        "platform_bits",
        f"platform_info {report.platform_info:#x}",
        report.platform_info,
        policy.required_platform_bits,
        policy.forbidden_platform_bits,
    )
    # As with the TCB: what is in force now, and what was when the guest started.
    for name, vector in (("current", report.current_mit_vector), ("launch", report.launch_mit_vector)):
        in_force = vector or 0
        if policy.required_mitigations & ~in_force:
            limit = f"all bits of {policy.required_mitigations:#x}"
            raise _refusal("required_mitigations", f"{name} {in_force:#x}", limit)


def _check_bits(
    rule: str, shown: str, bits: int, required: Iterable[_Bit], forbidden: Iterable[_Bit]
) -> None:
    for bit in sorted(required):
        if not bits >> bit & 1:
            raise _refusal(f"required_{rule}", shown, f"{bit.name} set")
    for bit in sorted(forbidden):
        if bits >> bit & 1:
            raise _refusal(f"forbidden_{rule}", shown, f"{bit.name} clear")


def _check_other_machine(claims: SnpClaims, own: SnpClaims) -> None:
    if claims.chip is None or own.chip is None:
        raise _refusal(
            "allow_same_machine", "a chip that nothing names", "a chip known to be another one than ours"
        )
    if claims.chip == own.chip:
        raise _refusal("allow_same_machine", claims.chip.hex(), "another chip than ours")


def _refusal(rule: str, value: object, limit: str) -> PolicyRefused:
    return PolicyRefused(f"the policy's rule {rule} refuses: found {value}, wanted {limit}")


def _one_of(values: Iterable[str]) -> str:
    shown = sorted(values)
    if not shown:
        return "none at all"
    rest = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return f"one of {', '.join(shown[:_SHOWN])}{rest}"
