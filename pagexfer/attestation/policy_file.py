"""Policies from a TOML or JSON file (docs/policy.md). A misspelt rule would be no rule at all: it is refused."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, cast

from ..errors import UsageError
from .policy import MinimumTcb, Policy
from .snp.bits import GuestPolicyBit, PlatformBit
from .snp.product import PARTS, Product, Tcb

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

POLICY_VERSION: Final = 1
MAX_POLICY_BYTES: Final = 1 << 20

ANY: Final = "any"
_ROLES: Final = ("destination", "source")
_REQUIRED: Final = ("measurements", "minimum_tcb")


@dataclass(frozen=True, slots=True)
class Policies:
    """What we want of a peer by its part in a move: of the one that gets the guest, and of the one that gives it."""

    destination: Policy
    source: Policy


def load_policies(path: Path) -> Policies:
    """The policies of a file named *.toml or *.json. Raises UsageError where it cannot be used."""
    try:
        return parse_policies(_read(path))
    except UsageError as error:
        raise UsageError(f"policy {path}: {error}") from None


def parse_policies(values: dict[str, object]) -> Policies:
    """The policies of a decoded file. Raises UsageError, which names the key."""
    common = {key: value for key, value in values.items() if key not in ("version", *_ROLES)}
    if "version" not in values:
        raise UsageError(f"version is missing: it is {POLICY_VERSION}")
    if _integer(values["version"], "version", 1 << 16) != POLICY_VERSION:
        raise UsageError(f"version is {values['version']}, this pagexfer knows {POLICY_VERSION}")
    policies = {role: _policy({**common, **_table(values.get(role, {}), role)}, role) for role in _ROLES}
    for policy in policies.values():
        _refuse_ids_of_the_host(policy)
    _refuse_chips_of_no_product(policies.values())
    _refuse_limits_of_no_product(policies.values())
    return Policies(**policies)


def _read(path: Path) -> dict[str, object]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_POLICY_BYTES + 1)
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}") from None
    if len(data) > MAX_POLICY_BYTES:
        raise UsageError(f"more than {MAX_POLICY_BYTES} bytes")
    try:
        if path.suffix == ".toml":
            return cast("dict[str, object]", tomllib.loads(data.decode()))
        if path.suffix == ".json":
            return _table(json.loads(data, object_pairs_hook=_unique), "the file")
    except (
        ValueError,
        RecursionError,
    ) as error:  # of which the decoders' own errors and UnicodeDecodeError are kinds
        raise UsageError(f"cannot be decoded: {error}") from None
    raise UsageError("name it *.toml or *.json, so that its format is known")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """JSON lets a key come twice and decoders take the last: a second one would silently replace a rule."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key is there twice")
    return values


def _policy(values: dict[str, object], role: str) -> Policy:
    unknown = sorted(values.keys() - _RULES.keys())
    if unknown:
        raise UsageError(f"unknown key {unknown[0]!r}; known are {', '.join(_RULES)}")
    for key in _REQUIRED:
        if key not in values:
            raise UsageError(f'{key} is missing for a peer as {role}: give the values, or "{ANY}"')
    rules = {key: _RULES[key](value, key) for key, value in values.items()}
    return Policy(**rules)  # type: ignore[arg-type]  # each converter gives its field's type, held by a test


# What reads like a rule and is none. A table may narrow the products for its role, so a chip or a limit that is of use for
# one role is good for both.


def _refuse_ids_of_the_host(policy: Policy) -> None:
    """The id block has them, which the host gives at launch and may have signed with any key."""
    if policy.id_keys is not None or policy.author_keys is not None:
        return
    for key in ("family_ids", "image_ids", "minimum_guest_svn"):
        if getattr(policy, key):
            raise UsageError(
                f"{key} without id_keys or author_keys is no rule: the host chooses what the report says"
            )


def _refuse_chips_of_no_product(policies: Collection[Policy]) -> None:
    chips = {
        (key, chip): {product for product in Product if product.chip_id_bytes == len(chip)}
        for key in ("allowed_chips", "denied_chips")
        for policy in policies
        for chip in getattr(policy, key) or ()
    }
    for (key, chip), products in chips.items():
        if not any(policy.products & products for policy in policies if chip in (getattr(policy, key) or ())):
            of = " or ".join(sorted(product.value for product in products))
            raise UsageError(
                f"{key} has {chip.hex()}, {len(chip)} bytes as of {of}, which is not in products"
            )


def _refuse_limits_of_no_product(policies: Collection[Policy]) -> None:
    limited = {minimum.product for policy in policies for minimum in policy.minimum_tcb or ()}
    unused = limited.difference(*(policy.products for policy in policies if policy.minimum_tcb))
    for product in unused:
        raise UsageError(f"minimum_tcb has a limit for {product.value}, which is not in products")


def _digests(*sizes: int) -> Callable[[object, str], frozenset[bytes]]:
    """A list of byte strings in hex, each of one of the sizes."""

    def convert(value: object, key: str) -> frozenset[bytes]:
        return frozenset(_bytes(item, key, sizes) for item in _list(value, key))

    return convert


def _or_any(convert: Callable[[object, str], object]) -> Callable[[object, str], object]:
    """What `convert` takes, or "any" for no limit."""
    return lambda value, key: None if value == ANY else convert(value, key)


def _number(limit: int) -> Callable[[object, str], int]:
    return lambda value, key: _integer(value, key, limit)


def _chips(value: object, key: str) -> frozenset[bytes]:
    """Chip ids as reports have them, 64 bytes, or as certificates do, 8 on Turin: the short form is the name."""
    chips = _digests(8, 64)(value, key)
    return frozenset(chip if any(chip[8:]) else chip[:8] for chip in chips)


def _strings(value: object, key: str) -> frozenset[str]:
    return frozenset(_string(item, key) for item in _list(value, key))


def _products(value: object, key: str) -> frozenset[Product]:
    return frozenset(_product(item, key) for item in _list(value, key))


def _bits(kind: type[PlatformBit | GuestPolicyBit]) -> Callable[[object, str], object]:
    """A list of the names of bits."""

    def convert(value: object, key: str) -> object:
        names = kind.__members__
        for item in _strings(value, key):
            if item not in names:
                raise UsageError(f"{key} has the unknown bit {item!r}; known are {', '.join(names)}")
        return frozenset(names[item] for item in _strings(value, key))

    return convert


def _vmpls(value: object, key: str) -> frozenset[int]:
    return frozenset(_integer(item, key, 4) for item in _list(value, key))


def _minimums(value: object, key: str) -> tuple[MinimumTcb, ...]:
    minimums = tuple(_minimum(_table(item, key), key) for item in _list(value, key))
    if len({(minimum.product, minimum.model) for minimum in minimums}) != len(minimums):
        raise UsageError(f"{key} has two limits for one product and model")
    return minimums


def _minimum(values: dict[str, object], key: str) -> MinimumTcb:
    """One limit: product, model if it is for one only, and every part that the product has."""
    product = _product(values.get("product"), f"product of {key}")
    parts = [part for part in PARTS if part != "fmc" or product.tcb_layout == 1]
    wanted = {"product", *parts}
    if values.keys() - {"model"} != wanted:
        raise UsageError(
            f"{key} of {product.value} has other keys than {', '.join(sorted(wanted))} and model"
        )
    numbers = {part: _integer(values[part], f"{part} of {key}", 1 << 8) for part in parts}
    tcb = Tcb(numbers.get("fmc"), *(numbers[part] for part in PARTS[1:]))
    model = values.get("model")
    return MinimumTcb(product, None if model is None else _integer(model, f"model of {key}", 1 << 8), tcb)


def _product(value: object, key: str) -> Product:
    try:
        return Product(value)
    except ValueError:
        known = ", ".join(product.value for product in Product)
        raise UsageError(f"{key} is {value!r}, expected one of {known}") from None


def _boolean(value: object, key: str) -> bool:
    if not isinstance(value, bool):
        raise UsageError(f"{key} is {value!r}, expected true or false")
    return value


def _integer(value: object, key: str, limit: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < limit:
        raise UsageError(f"{key} is {value!r}, expected a number from 0 to {limit - 1}")
    return value


def _string(value: object, key: str) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{key} has {value!r}, expected a string")
    return value


def _bytes(value: object, key: str, sizes: tuple[int, ...]) -> bytes:
    try:
        data = bytes.fromhex(_string(value, key))
    except ValueError:
        data = b""
    if len(data) not in sizes:
        raise UsageError(f"{key} has {value!r}, expected {' or '.join(map(str, sizes))} bytes in hex")
    return data


def _list(value: object, key: str) -> list[object]:
    if not isinstance(value, list):
        raise UsageError(f"{key} is {value!r}, expected a list")
    return value


def _table(value: object, key: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise UsageError(f"{key} is {value!r}, expected a table")
    return value


# How the value of each key becomes the field of `Policy` with the same name.
_RULES: Final[dict[str, Callable[[object, str], object]]] = {
    "measurements": _or_any(_digests(48)),
    "minimum_tcb": _or_any(_minimums),
    "products": _products,
    "allowed_chips": _or_any(_chips),
    "denied_chips": _chips,
    "vlek_providers": _or_any(_strings),
    "vmpls": _vmpls,
    "allow_debug": _boolean,
    "allow_migration_agent": _boolean,
    "allow_masked_chip_id": _boolean,
    "allow_same_machine": _boolean,
    "host_data": _or_any(_digests(32)),
    "family_ids": _or_any(_digests(16)),
    "image_ids": _or_any(_digests(16)),
    "id_keys": _or_any(_digests(48)),
    "author_keys": _or_any(_digests(48)),
    "minimum_guest_svn": _number(1 << 32),
    "required_platform_bits": _bits(PlatformBit),
    "forbidden_platform_bits": _bits(PlatformBit),
    "required_guest_policy_bits": _bits(GuestPolicyBit),
    "forbidden_guest_policy_bits": _bits(GuestPolicyBit),
    "required_mitigations": _number(1 << 64),
    "require_crl": _boolean,
    "maximum_moves": _or_any(_number(1 << 32)),
    "allow_psk": _boolean,
}
