"""docs/security.md names the tests that break each guarantee on purpose; they exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

_HERE: Final = Path(__file__).parent
_TEXT: Final = (_HERE.parent / "docs" / "security.md").read_text()


def test_every_guarantee_names_its_tests() -> None:
    rows = re.findall(r"^\| (G\d) \|.*\|.*\|(.*)\|$", _TEXT, re.MULTILINE)
    assert [name for name, _ in rows] == [f"G{number}" for number in range(1, 10)]
    assert all(re.findall(r"`test_\w+`", tests) for _, tests in rows)


def test_the_named_tests_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", _TEXT))
    assert named
    assert {name for name in named if not (_HERE / f"{name}.py").is_file()} == set()
