"""The vector files are what their script makes, and the script knows nothing of the library."""

from __future__ import annotations

import ast
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from .wire_vectors import VECTORS

if TYPE_CHECKING:
    from pathlib import Path

SCRIPTS = sorted(path for path in VECTORS.glob("*.py") if path.name != "__init__.py")
ALLOWED = {"__future__", "hashlib", "hmac", "json", "pathlib", "struct", "sys", "tests"}
PRIMITIVES = {
    f"cryptography.hazmat.primitives.{name}"
    for name in ("ciphers.aead", "asymmetric.x25519", "asymmetric.mlkem", "asymmetric.ed25519")
}


def test_the_files_are_what_the_script_makes() -> None:
    script = VECTORS / "make_vectors.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "all vectors hold\n", "")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_the_script_imports_nothing_of_the_library(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert {alias.name for alias in node.names} <= ALLOWED
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            assert node.level == 1 or module in PRIMITIVES or module.split(".")[0] in ALLOWED
