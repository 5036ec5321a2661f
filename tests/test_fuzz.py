"""The fuzz targets without a fuzzer: seeds and random changes of them; and that no parser is without a target."""

from __future__ import annotations

import ast
import random
from pathlib import Path

import pytest

import pagexfer

from .fuzz.seeds import seeds_of
from .fuzz.targets import TARGETS, Target

_CHANGES = 150
_MAX_SEEDS = 12

# These act on a session and are the hostile host's (`test_hostile`), or are the inside of a parser that is here.
_ELSEWHERE = {
    "open_untrusted",
    "accept_untrusted",
    "open_channel_untrusted",
    "check_replacement_untrusted",
    "open_answer_untrusted",
    "import_untrusted",
    "carry_untrusted",
}


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_target_takes_its_seeds_and_whatever_becomes_of_them(target: Target) -> None:
    seeds = seeds_of(target)
    for seed in seeds:
        target.run(seed)
    rng = random.Random(1)
    for number in range(_CHANGES):
        data = bytearray(seeds[number % min(len(seeds), _MAX_SEEDS)])
        for _ in range(rng.randint(1, 4)):
            _change(rng, data, rng.choice(seeds))
        target.run(bytes(data))


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_seeds_are_worth_beginning_with(target: Target) -> None:
    """At least one is taken, so that what lies behind the first check is reached."""
    seeds = seeds_of(target)
    if seeds == [b""]:
        pytest.skip("no real attestation data on this machine")
    assert any(target.run(seed) for seed in seeds)


def test_every_parser_of_hostile_bytes_has_a_target() -> None:
    covered = {parser.__name__ for target in TARGETS for parser in target.parsers}
    public = {
        node.name
        for path in Path(pagexfer.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_untrusted") and node.name[0] != "_"
    }
    assert public - covered - _ELSEWHERE == set()


def test_a_target_sees_another_error() -> None:
    def check(_data: bytes) -> None:
        raise IndexError

    with pytest.raises(IndexError):
        Target("broken", (), check).run(b"")


def _change(rng: random.Random, data: bytearray, other: bytes) -> None:
    place = rng.randrange(len(data) + 1)
    match rng.randrange(6):
        case 0 if data:
            data[place % len(data)] ^= 1 << rng.randrange(8)
        case 1 if data:
            data[place % len(data)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        case 2:
            del data[place:]
        case 3:
            data[place:place] = rng.randbytes(rng.randint(1, 9))
        case 4:
            del data[place : place + rng.randint(1, 9)]
        case _:
            data[place:] = other[place:]
