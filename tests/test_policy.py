"""Policies: every rule accepts and refuses, and the defaults are strict."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING

import pytest

from pagexfer.attestation.insecure.certificates import CSP_ID
from pagexfer.attestation.insecure.reports import default_tcb, pack_tcb
from pagexfer.attestation.policy import MinimumTcb, Policy, check_policy, check_report_data
from pagexfer.attestation.snp import Product, SigningKey, Tcb
from pagexfer.attestation.snp.bits import GuestPolicyBit, PlatformBit
from pagexfer.errors import AttestationError, UsageError

from .snp_data import authority, verified

if TYPE_CHECKING:
    from pagexfer.attestation.snp import SnpClaims

OPEN = Policy(measurements=None, minimum_tcb=None)
DEBUG, MIGRATE_MA = 1 << 19, 1 << 18
CHIP = bytes(range(1, 65))


def genoa(**fields: int | bytes) -> SnpClaims:
    ca = authority(Product.GENOA)
    leaf = ca.leaf()
    return verified(ca, leaf, ca.report(leaf, **fields))


def genoa_under_a_vlek() -> SnpClaims:
    ca = authority(Product.GENOA)
    leaf = ca.leaf(SigningKey.VLEK)
    return verified(ca, leaf, ca.report(leaf))


def policy(**rules: object) -> Policy:
    return dataclasses.replace(OPEN, **rules)  # type: ignore[arg-type]


def check(
    rules: Policy, claims: SnpClaims, *, own: SnpClaims | None = None, moves: int | None = None
) -> None:
    check_policy(rules, claims, own=own, moves=moves)


def test_the_first_rules_have_no_default() -> None:
    with pytest.raises(TypeError, match="measurements"):
        Policy(minimum_tcb=None)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="minimum_tcb"):
        Policy(measurements=None)  # type: ignore[call-arg]


def test_an_ordinary_report_passes_the_defaults() -> None:
    check(OPEN, genoa())


# Rules, and a report that they refuse: the rule's name, the value found and the limit are in the message.
REFUSED: list[tuple[str, Policy, dict[str, int | bytes], str, str]] = [
    ("measurements", policy(measurements=frozenset({bytes(48)})), {}, "11" * 48, "00" * 48),
    ("measurements", policy(measurements=frozenset()), {}, "11" * 48, "none at all"),
    ("products", policy(products=frozenset({Product.TURIN})), {}, "Genoa", "Turin"),
    ("vmpls", OPEN, {"vmpl": 2}, "2", "one of 0"),
    ("vmpls", policy(vmpls=frozenset({2, 3})), {}, "0", "one of 2, 3"),
    ("allow_debug", OPEN, {"policy": 0x30000 | DEBUG}, "0xb0000", "no DEBUG"),
    ("allow_migration_agent", OPEN, {"policy": 0x30000 | MIGRATE_MA}, "0x70000", "no MIGRATE_MA"),
    ("allow_migration_agent", OPEN, {"report_id_ma": b"\x44" * 32}, "44" * 32, "no migration agent"),
    ("allow_migration_agent", OPEN, {"report_id_ma": bytes(32)}, "00" * 32, "no migration agent"),
    ("allow_masked_chip_id", OPEN, {"chip_id": bytes(64)}, "hidden", "names its chip"),
    ("allowed_chips", policy(allowed_chips=frozenset({bytes(64)})), {}, CHIP.hex(), "00" * 64),
    ("denied_chips", policy(denied_chips=frozenset({CHIP})), {}, CHIP.hex(), "none of 1 denied"),
    ("host_data", policy(host_data=frozenset({b"\1" * 32})), {}, "00" * 32, "01" * 32),
    ("family_ids", policy(family_ids=frozenset({b"\1" * 16})), {}, "00" * 16, "01" * 16),
    ("image_ids", policy(image_ids=frozenset({b"\1" * 16})), {}, "00" * 16, "01" * 16),
    ("id_keys", policy(id_keys=frozenset({b"\1" * 48})), {}, "00" * 48, "01" * 48),
    ("author_keys", policy(author_keys=frozenset({b"\1" * 48})), {}, "00" * 48, "01" * 48),
    ("author_keys", policy(author_keys=frozenset({bytes(48)})), {}, "no author key in use", "00" * 48),
    ("minimum_guest_svn", policy(minimum_guest_svn=70000), {"guest_svn": 69999}, "69999", "at least 70000"),
    (
        "required_platform_bits",
        policy(required_platform_bits=frozenset({PlatformBit.ALIAS_CHECK_COMPLETE})),
        {"platform_info": 0x5F},
        "0x5f",
        "ALIAS_CHECK_COMPLETE set",
    ),
    (
        "forbidden_platform_bits",
        policy(forbidden_platform_bits=frozenset({PlatformBit.SMT_EN})),
        {"platform_info": 0x25},
        "0x25",
        "SMT_EN clear",
    ),
    (
        "required_guest_policy_bits",
        policy(required_guest_policy_bits=frozenset({GuestPolicyBit.CIPHERTEXT_HIDING})),
        {"policy": 0x30000},
        "0x30000",
        "CIPHERTEXT_HIDING set",
    ),
    (
        "forbidden_guest_policy_bits",
        policy(forbidden_guest_policy_bits=frozenset({GuestPolicyBit.SMT})),
        {"policy": 0x30000},
        "0x30000",
        "SMT clear",
    ),
    (
        "forbidden_guest_policy_bits",
        policy(forbidden_guest_policy_bits=frozenset({GuestPolicyBit.CXL_ALLOW})),
        {"policy": 0x220000},
        "0x220000",
        "CXL_ALLOW clear",
    ),
    (
        "required_mitigations",
        policy(required_mitigations=0xB),
        {"current_mit_vector": 0x3, "launch_mit_vector": 0xB},
        "current 0x3",
        "0xb",
    ),
    (
        "required_mitigations",
        policy(required_mitigations=0xB),
        {"current_mit_vector": 0xB, "launch_mit_vector": 0x9},
        "launch 0x9",
        "0xb",
    ),
    ("required_mitigations", policy(required_mitigations=1), {"version": 4}, "0x0", "0x1"),
    ("require_crl", policy(require_crl=True), {}, "no CRL", "a CRL"),
]


@pytest.mark.parametrize(("rule", "rules", "fields", "value", "limit"), REFUSED)
def test_a_rule_refuses_and_says_why(
    rule: str, rules: Policy, fields: dict[str, int | bytes], value: str, limit: str
) -> None:
    claims = genoa(**fields)
    with pytest.raises(AttestationError) as caught:
        check(rules, claims)
    found = re.fullmatch(r"the policy's rule (\w+) refuses: found (.+), wanted (.+)", str(caught.value))
    assert found is not None
    assert found[1] == rule
    assert value in found[2]
    assert limit in found[3]


ACCEPTED: list[tuple[Policy, dict[str, int | bytes]]] = [
    (policy(measurements=frozenset({bytes(48), b"\x11" * 48})), {}),
    (policy(products=frozenset({Product.GENOA})), {}),
    (policy(vmpls=frozenset({2})), {"vmpl": 2}),
    (policy(allow_debug=True), {"policy": 0x30000 | DEBUG}),
    (policy(allow_migration_agent=True), {"policy": 0x30000 | MIGRATE_MA, "report_id_ma": b"\x44" * 32}),
    (policy(allow_masked_chip_id=True), {"chip_id": bytes(64)}),
    (policy(allowed_chips=frozenset({CHIP}), denied_chips=frozenset({bytes(64)})), {}),
    (policy(host_data=frozenset({b"\1" * 32})), {"host_data": b"\1" * 32}),
    (policy(author_keys=frozenset({b"\1" * 48})), {"author_key_digest": b"\1" * 48, "key_info": 1}),
    (policy(minimum_guest_svn=70000), {"guest_svn": 70000}),
    (policy(required_platform_bits=frozenset({PlatformBit.ALIAS_CHECK_COMPLETE})), {"platform_info": 0x20}),
    (policy(forbidden_platform_bits=frozenset({PlatformBit.SMT_EN})), {"platform_info": 0x26}),
    (policy(required_mitigations=0xB), {"current_mit_vector": 0xF, "launch_mit_vector": 0xB}),
    (
        policy(
            required_guest_policy_bits=frozenset({GuestPolicyBit.CIPHERTEXT_HIDING}),
            forbidden_guest_policy_bits=frozenset({GuestPolicyBit.SMT, GuestPolicyBit.CXL_ALLOW}),
        ),
        {"policy": 0x1020000},
    ),
]


@pytest.mark.parametrize(("rules", "fields"), ACCEPTED)
def test_a_rule_accepts(rules: Policy, fields: dict[str, int | bytes]) -> None:
    check(rules, genoa(**fields))


def test_a_hidden_chip_id_gets_nobody_past_the_lists() -> None:
    hidden = genoa(chip_id=bytes(64))
    check(policy(allow_masked_chip_id=True, allowed_chips=frozenset({CHIP})), hidden)
    with pytest.raises(AttestationError, match="denied_chips"):
        check(policy(allow_masked_chip_id=True, denied_chips=frozenset({CHIP})), hidden)


def test_a_vlek_needs_a_provider_that_is_named() -> None:
    vlek = genoa_under_a_vlek()
    for rules, why in (
        (policy(allow_masked_chip_id=True), f"vlek_providers refuses: found '{CSP_ID}', wanted none"),
        (policy(vlek_providers=frozenset({CSP_ID})), "allow_masked_chip_id"),
        (policy(vlek_providers=frozenset({"CN=other"}), allow_masked_chip_id=True), "vlek_providers"),
        (
            policy(vlek_providers=None, allow_masked_chip_id=True, denied_chips=frozenset({CHIP})),
            "denied_chips",
        ),
        (
            policy(vlek_providers=None, allow_masked_chip_id=True, allowed_chips=frozenset({CHIP})),
            "allowed_chips",
        ),
    ):
        with pytest.raises(AttestationError, match=why):
            check(rules, vlek)
    check(policy(vlek_providers=frozenset({CSP_ID}), allow_masked_chip_id=True), vlek)
    check(policy(vlek_providers=None, allow_masked_chip_id=True), vlek)


def test_the_minimum_tcb_is_checked_in_every_part_of_three_tcbs() -> None:
    tcb = default_tcb(Product.GENOA)
    check(policy(minimum_tcb=(MinimumTcb(Product.GENOA, None, tcb),)), genoa())
    for part, value in tcb.parts().items():
        above = dataclasses.replace(tcb, **{part: value + 1})
        with pytest.raises(AttestationError, match=f"reported {part} {value}, wanted at least {value + 1}"):
            check(policy(minimum_tcb=(MinimumTcb(Product.GENOA, None, above),)), genoa())
    lower = dataclasses.replace(tcb, snp=tcb.snp - 1)
    for name in ("committed", "launch"):
        claims = genoa(**{f"{name}_tcb": pack_tcb(lower)})
        with pytest.raises(AttestationError, match=f"{name} snp 23, wanted at least 24"):
            check(policy(minimum_tcb=(MinimumTcb(Product.GENOA, None, tcb),)), claims)


def test_the_minimum_tcb_of_a_model_goes_before_its_products() -> None:
    tcb = default_tcb(Product.GENOA)
    low, high = dataclasses.replace(tcb, microcode=27), dataclasses.replace(tcb, microcode=255)
    for_all, for_11, for_a0 = (
        MinimumTcb(Product.GENOA, model, limit) for model, limit in ((None, high), (0x11, low), (0xA0, high))
    )
    for order in ((for_all, for_11, for_a0), (for_a0, for_11, for_all)):
        check(policy(minimum_tcb=order), genoa())
        for fields in ({"cpuid": bytes([0x19, 0xA0, 2])}, {"cpuid": bytes([0x19, 0x12, 0])}, {"version": 2}):
            with pytest.raises(AttestationError, match="microcode 219, wanted at least 255"):
                check(policy(minimum_tcb=order), genoa(**fields))


def test_a_processor_without_a_limit_is_refused() -> None:
    milan = MinimumTcb(Product.MILAN, None, Tcb(None, 0, 0, 0, 0))
    model = MinimumTcb(Product.GENOA, 0xA0, Tcb(None, 0, 0, 0, 0))
    for limits in ((), (milan,), (model,), (milan, model)):
        with pytest.raises(AttestationError, match="minimum_tcb refuses: found Genoa model 0x11"):
            check(policy(minimum_tcb=limits), genoa())
    with pytest.raises(AttestationError, match="Genoa unknown model"):
        check(policy(minimum_tcb=(model,)), genoa(version=2))


def test_the_same_machine_and_one_that_may_be_it() -> None:
    claims, hidden = genoa(), genoa_under_a_vlek()
    ca = authority(Product.GENOA)
    leaf = ca.leaf(hwid=bytes(reversed(CHIP)))
    other = verified(ca, leaf, ca.report(leaf))
    check(OPEN, claims, own=other)
    with pytest.raises(AttestationError, match="another chip than ours"):
        check(OPEN, claims, own=claims)
    with pytest.raises(AttestationError, match=r"allow_same_machine .* known to be another"):
        check(OPEN, claims, own=hidden)
    check(policy(allow_same_machine=True), claims, own=claims)
    check(policy(allow_same_machine=True), claims, own=hidden)


def test_the_number_of_moves() -> None:
    check(policy(maximum_moves=3), genoa(), moves=3)
    check(OPEN, genoa(), moves=1 << 30)
    with pytest.raises(AttestationError, match="maximum_moves refuses: found 4, wanted at most 3"):
        check(policy(maximum_moves=3), genoa(), moves=4)


def test_report_data_is_compared_whole() -> None:
    claims = genoa()
    check_report_data(claims, b"\x22" * 64)
    with pytest.raises(AttestationError, match=r"report_data .* wanted 0{128}"):
        check_report_data(claims, bytes(64))
    for wrong in (b"", b"\x22" * 63, b"\x22" * 65):
        with pytest.raises(UsageError, match="64 bytes"):
            check_report_data(claims, wrong)
