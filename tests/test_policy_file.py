"""Policy files: they mean what they say or are refused, and what reads like a rule is one."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagexfer.attestation.insecure.certificates import CSP_ID
from pagexfer.attestation.policy import MinimumTcb, Policy
from pagexfer.attestation.policy_file import load_policies, parse_policies
from pagexfer.attestation.snp import Product, Tcb
from pagexfer.attestation.snp.bits import GuestPolicyBit, PlatformBit
from pagexfer.errors import UsageError

OPEN = Policy(measurements=None, minimum_tcb=None)
DOC = Path(__file__).parent.parent / "docs" / "policy.md"
MINIMAL: dict[str, object] = {"version": 1, "measurements": "any", "minimum_tcb": "any"}
TCB_KEYS: dict[str, object] = {"bootloader": 4, "tee": 0, "snp": 24, "microcode": 219}


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
    "required_guest_policy_bits": (["CIPHERTEXT_HIDING"], frozenset({GuestPolicyBit.CIPHERTEXT_HIDING})),
    "forbidden_guest_policy_bits": (
        ["SMT", "CXL_ALLOW"],
        frozenset({GuestPolicyBit.SMT, GuestPolicyBit.CXL_ALLOW}),
    ),
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
    keys = {"id_keys": ["05" * 48]} if key in ("family_ids", "image_ids", "minimum_guest_svn") else {}
    assert getattr(parse_policies(MINIMAL | keys | {key: value}).destination, key) == expected


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
        ({"forbidden_guest_policy_bits": ["SMT_EN"]}, "unknown bit 'SMT_EN'"),
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


def test_a_file_without_a_version_is_refused() -> None:
    with pytest.raises(UsageError, match="version is missing: it is 1"):
        parse_policies({})


GENOA_LIMIT: dict[str, object] = {"product": "Genoa", **TCB_KEYS}
TURIN_CHIP, OTHER_CHIP = "ab" * 8, "cd" * 64


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"minimum_guest_svn": 7}, "minimum_guest_svn without id_keys or author_keys"),
        ({"family_ids": ["03" * 16]}, "family_ids without id_keys or author_keys"),
        ({"image_ids": ["03" * 16], "id_keys": "any"}, "image_ids without id_keys or author_keys"),
        ({"image_ids": ["03" * 16], "source": {"id_keys": ["05" * 48]}}, "image_ids without id_keys"),
        (
            {"products": ["Genoa"], "denied_chips": [TURIN_CHIP]},
            "8 bytes as of Turin, which is not in products",
        ),
        ({"products": ["Genoa"], "source": {"denied_chips": [TURIN_CHIP]}}, "denied_chips has abab"),
        ({"products": ["Turin"], "allowed_chips": [OTHER_CHIP]}, "64 bytes as of Genoa or Milan"),
        (
            {"products": ["Milan"], "minimum_tcb": [GENOA_LIMIT]},
            "a limit for Genoa, which is not in products",
        ),
        (
            {"products": ["Milan"], "source": {"minimum_tcb": [GENOA_LIMIT]}},
            "a limit for Genoa, which is not in products",
        ),
    ],
)
def test_what_reads_like_a_rule_and_is_none_is_refused(change: dict[str, object], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        parse_policies(MINIMAL | change)


@pytest.mark.parametrize(
    "change",
    [
        {"minimum_guest_svn": 7, "id_keys": ["05" * 48]},
        {"family_ids": ["03" * 16], "author_keys": ["05" * 48]},
        {"denied_chips": [TURIN_CHIP, OTHER_CHIP]},
        {"products": ["Milan"], "denied_chips": [OTHER_CHIP]},
        # Of use for one role, and at hand for both.
        {"denied_chips": [TURIN_CHIP], "source": {"products": ["Genoa"]}},
        {"minimum_tcb": [GENOA_LIMIT], "destination": {"products": ["Milan"]}},
    ],
)
def test_rules_that_hold_for_one_role_at_least(change: dict[str, object]) -> None:
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
