"""Policies: every rule accepts and refuses, the defaults are strict, and a file means what it says or is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagexfer.attestation.insecure.certificates import CSP_ID
from pagexfer.attestation.insecure.reports import default_tcb, pack_tcb
from pagexfer.attestation.policy import MinimumTcb, Policy, check_policy, check_report_data
from pagexfer.attestation.policy_file import load_policies, parse_policies
from pagexfer.attestation.snp import Product, SigningKey, Tcb
from pagexfer.attestation.snp.bits import PlatformBit
from pagexfer.errors import AttestationError, UsageError

from .snp_data import authority, verified

if TYPE_CHECKING:
    from pagexfer.attestation.snp import SnpClaims

OPEN = Policy(measurements=None, minimum_tcb=None)
DEBUG, MIGRATE_MA = 1 << 19, 1 << 18
CHIP = bytes(range(1, 65))
DOC = Path(__file__).parent.parent / "docs" / "policy.md"
MINIMAL: dict[str, object] = {"version": 1, "measurements": "any", "minimum_tcb": "any"}
TCB_KEYS: dict[str, object] = {"bootloader": 4, "tee": 0, "snp": 24, "microcode": 219}


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
    ("required_mitigations", policy(required_mitigations=0xB), {"current_mit_vector": 0x3}, "0x3", "0xb"),
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
    (policy(required_mitigations=0xB), {"current_mit_vector": 0xF}),
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


# Each key of a file, a value, and the field of `Policy` that it becomes.
KEYS: dict[str, tuple[object, object]] = {
    "measurements": (["11" * 48], frozenset({b"\x11" * 48})),
    "minimum_tcb": (
        [{"product": "Genoa", "model": 0xA0, **TCB_KEYS}, {"product": "Turin", "fmc": 1, **TCB_KEYS}],
        (
            MinimumTcb(Product.GENOA, 0xA0, Tcb(None, 4, 0, 24, 219)),
            MinimumTcb(Product.TURIN, None, Tcb(1, 4, 0, 24, 219)),
        ),
    ),
    "products": (["Genoa", "Turin"], frozenset({Product.GENOA, Product.TURIN})),
    "allowed_chips": (["ab" * 8, "01" * 8 + "00" * 56], frozenset({b"\xab" * 8, b"\1" * 8})),
    "denied_chips": (["cd" * 64], frozenset({b"\xcd" * 64})),
    "vlek_providers": ([CSP_ID], frozenset({CSP_ID})),
    "vmpls": ([0, 1], frozenset({0, 1})),
    "allow_debug": (True, True),
    "allow_migration_agent": (True, True),
    "allow_masked_chip_id": (True, True),
    "allow_same_machine": (True, True),
    "host_data": (["02" * 32], frozenset({b"\2" * 32})),
    "family_ids": (["03" * 16], frozenset({b"\3" * 16})),
    "image_ids": (["04" * 16], frozenset({b"\4" * 16})),
    "id_keys": (["05" * 48], frozenset({b"\5" * 48})),
    "author_keys": (["06" * 48], frozenset({b"\6" * 48})),
    "minimum_guest_svn": (70000, 70000),
    "required_platform_bits": (["ECC_EN"], frozenset({PlatformBit.ECC_EN})),
    "forbidden_platform_bits": (["SMT_EN"], frozenset({PlatformBit.SMT_EN})),
    "required_mitigations": (11, 11),
    "require_crl": (True, True),
    "maximum_moves": (5, 5),
    "allow_psk": (True, True),
}


def test_every_field_of_a_policy_has_a_key() -> None:
    assert list(KEYS) == [field.name for field in dataclasses.fields(Policy)]


@pytest.mark.parametrize("key", KEYS)
def test_a_key_becomes_its_field(key: str) -> None:
    value, expected = KEYS[key]
    assert getattr(parse_policies(MINIMAL | {key: value}).destination, key) == expected


def test_the_least_file_has_the_defaults() -> None:
    policies = parse_policies(MINIMAL)
    assert policies.destination == policies.source == OPEN


ANY_ALLOWED = [
    *("measurements", "minimum_tcb", "allowed_chips", "vlek_providers", "host_data", "family_ids"),
    *("image_ids", "id_keys", "author_keys", "maximum_moves"),
]


@pytest.mark.parametrize("key", KEYS)
def test_any_is_for_sets_and_limits_that_may_be_open(key: str) -> None:
    if key in ANY_ALLOWED:
        assert getattr(parse_policies(MINIMAL | {key: "any"}).source, key) is None
    else:
        with pytest.raises(UsageError, match=key):
            parse_policies(MINIMAL | {key: "any"})


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"measurement": ["11" * 48]}, "unknown key 'measurement'"),
        ({"destination": {"vmpl": 0}}, "unknown key 'vmpl'"),
        ({"destination": {"version": 1}}, "unknown key 'version'"),
        ({"source": []}, "source is"),
        ({"version": 2}, "version is 2"),
        ({"version": True}, "version is True"),
        ({"version": "1"}, "version is '1'"),
        ({"measurements": "11" * 48}, "expected a list"),
        ({"measurements": ["11" * 47]}, "expected 48 bytes in hex"),
        ({"measurements": ["zz"]}, "expected 48 bytes in hex"),
        ({"measurements": [11]}, "expected a string"),
        ({"measurements": ["any"]}, "expected 48 bytes in hex"),
        ({"denied_chips": ["11" * 9]}, "expected 8 or 64 bytes in hex"),
        ({"products": ["Venice"]}, "expected one of Milan, Genoa, Turin"),
        ({"products": [["Milan"]]}, "expected one of"),
        ({"vmpls": [4]}, "number from 0 to 3"),
        ({"vmpls": [True]}, "number from 0 to 3"),
        ({"vmpls": 0}, "expected a list"),
        ({"allow_debug": 1}, "expected true or false"),
        ({"allow_debug": "false"}, "expected true or false"),
        ({"minimum_guest_svn": -1}, "expected a number"),
        ({"minimum_guest_svn": 1.5}, "expected a number"),
        ({"required_platform_bits": ["ECC"]}, "unknown bit 'ECC'"),
        ({"minimum_tcb": {"product": "Genoa"}}, "expected a list"),
        ({"minimum_tcb": ["Genoa"]}, "expected a table"),
        ({"minimum_tcb": [{"product": "Genoa"}]}, "other keys than"),
        ({"minimum_tcb": [{"product": "Genoa", "fmc": 1, **TCB_KEYS}]}, "other keys than"),
        ({"minimum_tcb": [{"product": "Turin", **TCB_KEYS}]}, "other keys than"),
        ({"minimum_tcb": [{"product": "Genoa", **TCB_KEYS, "snp": 256}]}, "snp of minimum_tcb is 256"),
        ({"minimum_tcb": [{"product": "Genoa", **TCB_KEYS}] * 2}, "two limits"),
        ({"minimum_tcb": [TCB_KEYS]}, "product of minimum_tcb is None"),
    ],
)
def test_a_file_that_is_not_understood_is_refused(change: dict[str, object], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        parse_policies(MINIMAL | change)


@pytest.mark.parametrize("key", MINIMAL)
def test_a_key_without_default_must_be_there(key: str) -> None:
    with pytest.raises(UsageError, match=key):
        parse_policies({name: value for name, value in MINIMAL.items() if name != key})


def test_the_part_of_the_peer_decides() -> None:
    values: dict[str, object] = {"version": 1, "measurements": "any", "vmpls": [1]}
    roles: dict[str, object] = {
        "destination": {"minimum_tcb": []},
        "source": {"minimum_tcb": "any", "vmpls": [2]},
    }
    policies = parse_policies(values | roles)
    assert (policies.destination.minimum_tcb, policies.destination.vmpls) == ((), frozenset({1}))
    assert (policies.source.minimum_tcb, policies.source.vmpls) == (None, frozenset({2}))
    with pytest.raises(UsageError, match="minimum_tcb is missing for a peer as source"):
        parse_policies(values | {"destination": {"minimum_tcb": "any"}})


def test_toml_and_json_say_the_same(tmp_path: Path) -> None:
    toml, plain = tmp_path / "policy.toml", tmp_path / "policy.json"
    toml.write_text(
        'version = 1\nmeasurements = "any"\nvmpls = [1]\n[[minimum_tcb]]\nproduct = "Turin"\n'
        "fmc = 1\nbootloader = 4\ntee = 0\nsnp = 24\nmicrocode = 0xDB\n"
    )
    limit = {"product": "Turin", "fmc": 1, **TCB_KEYS}
    plain.write_text(json.dumps({"version": 1, "measurements": "any", "vmpls": [1], "minimum_tcb": [limit]}))
    assert load_policies(toml) == load_policies(plain)


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.yaml", b"", "name it"),
        ("a.toml", b"version = ", "cannot be decoded"),
        ("a.toml", b"\xff", "cannot be decoded"),
        ("a.toml", b"version = 1\nversion = 1\n", "cannot be decoded"),
        ("a.toml", b"#" * (1 << 20) + b"\n", "more than"),
        ("a.json", b"[]", "expected a table"),
        ("a.json", b"{", "cannot be decoded"),
        ("a.json", b"[" * 100_000, "cannot be decoded"),
        ("a.json", b'{"version": 1, "allow_debug": false, "allow_debug": true}', "a key is there twice"),
        ("a.json", b'{"version": 1, "source": {"vmpls": [0], "vmpls": [3]}}', "a key is there twice"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, name: str, content: bytes, why: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UsageError, match=why) as caught:
        load_policies(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        load_policies(tmp_path / "none.toml")


_PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.just("any") | st.just("ab" * 48),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["product", "model", "tee"]), inner)
    ),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from([*KEYS, "source", "destination"]), _PLAIN))
def test_whatever_is_in_a_file_gives_policies_or_a_usage_error(values: dict[str, object]) -> None:
    with contextlib.suppress(UsageError):
        assert isinstance(parse_policies(MINIMAL | values).source, Policy)


def test_the_document_names_every_key_and_its_examples_load(tmp_path: Path) -> None:
    text = DOC.read_text()
    table = text.split("## Keys")[1].split("\n##")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == [*KEYS]
    examples = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    assert examples
    for number, example in enumerate(examples):
        path = tmp_path / f"{number}.toml"
        path.write_text(example)
        load_policies(path)
