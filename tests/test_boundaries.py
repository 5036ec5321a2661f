"""The import rules between rooms (docs/design.md), read from the syntax trees of all modules."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pagexfer

ROOT = Path(pagexfer.__file__).parent

# For each room the rooms of ours that it may import, and the packages from outside that it must not.
ALLOWED = {
    "errors": set[str](),
    "arguments": {"errors"},
    "wire": {"errors"},
    "dirty": {"errors"},
    "attestation": {"errors", "wire"},
    "svsm": {"wire", "dirty", "attestation", "errors"},
    "engine": {"wire", "dirty", "errors"},
    "guests": {"svsm", "engine", "wire", "dirty", "errors"},
    "isolation": {"engine", "wire", "dirty", "errors"},
}
FORBIDDEN = {
    "isolation": {"cryptography"},
    "wire": {"trio", "cryptography", "socket", "time", "random", "os"},
    "dirty": {"trio", "cryptography", "socket", "time", "random"},
    "attestation": {"trio", "socket"},
    "svsm": {"trio", "socket", "time", "random"},
    "engine": {"cryptography", "hashlib", "hmac", "secrets"},
}
# The engine and the trusted side meet here only.
MEETING_POINTS = {"__init__", "__main__", "cli", "migration", "testing"}
# Of an isolated engine, the files that its own process never imports.
SVSM_PROCESS = {Path("isolation/mailbox.py"), Path("isolation/sides.py")}


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imports(path: Path, source: str) -> list[str]:
    """Absolute dotted names of everything that a module imports, for types or not."""
    package = ["pagexfer", *path.relative_to(ROOT).parts[:-1]]
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names += [f"{stem}.{alias.name}" for alias in node.names]
    return names


def breaches(path: Path, source: str) -> set[str]:
    """Rooms and packages that a module imports although its room may not."""
    room = room_of(path)
    names = imports(path, source)
    ours = {name.split(".")[1] for name in names if name.startswith("pagexfer.")} - {room}
    outside = {name.split(".")[0] for name in names} & FORBIDDEN.get(room, set())
    meets = room in MEETING_POINTS or path.relative_to(ROOT) in SVSM_PROCESS
    return outside if meets else outside | (ours - ALLOWED[room])


def test_every_room_has_a_rule() -> None:
    assert {room_of(path) for path in modules()} <= ALLOWED.keys() | MEETING_POINTS


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_its_room_may(path: Path) -> None:
    assert not breaches(path, path.read_text())


@pytest.mark.parametrize(
    ("module", "line", "breach"),
    [
        ("engine/channel.py", "from ..svsm.source import SourceSvsm", "svsm"),
        ("engine/channel.py", "from cryptography import x509", "cryptography"),
        ("svsm/source.py", "import trio", "trio"),
        ("svsm/source.py", "from .. import engine", "engine"),
        ("wire/slot.py", "from ..dirty import DirtyBitmap", "dirty"),
        ("dirty/bitmap.py", "import pagexfer.svsm.memory", "svsm"),
    ],
)
def test_the_rules_see_a_breach(module: str, line: str, breach: str) -> None:
    path = ROOT / module
    assert breaches(path, f"{path.read_text()}\n{line}\n") == {breach}


def test_only_one_file_uses_msgpack() -> None:
    assert users_of("msgpack", ROOT) == [Path("wire/control.py")]


def test_only_one_file_of_the_engine_opens_sockets() -> None:
    assert users_of("socket", ROOT / "engine") == [Path("engine/streams.py")]


def users_of(package: str, folder: Path) -> list[Path]:
    return [
        path.relative_to(ROOT)
        for path in sorted(folder.rglob("*.py"))
        if package in {name.split(".")[0] for name in imports(path, path.read_text())}
    ]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_two_files(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 500


@pytest.mark.parametrize(
    ("process", "without"),
    [
        ("isolation.engine_process", {"cryptography", "pagexfer.svsm", "pagexfer.attestation"}),
        ("guests.simulated_vcpu.__main__", {"cryptography", "trio", "pagexfer.svsm", "pagexfer.engine"}),
    ],
)
def test_a_process_has_no_code_of_what_it_must_not_do(process: str, without: set[str]) -> None:
    """Whatever its modules import in turn, and what the package's front door would."""
    print_modules = f"import sys, pagexfer.{process}; print(*sys.modules)"
    ended = subprocess.run([sys.executable, "-c", print_modules], capture_output=True, text=True, check=True)
    assert not without & set(ended.stdout.split())
