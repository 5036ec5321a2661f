"""The public API: what a program may import, and nothing by accident."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest

import pagexfer

PUBLIC = [
    "Attestor",
    "AuditInfo",
    "ChannelInfo",
    "Claims",
    "Guest",
    "MigrationInfo",
    "MigrationParameters",
    "MigrationReport",
    "Outcome",
    "PagexferError",
    "PskAttestor",
    "RamInfo",
    "Status",
    "Steering",
    "ThrottleInfo",
    "TransferAborted",
    "UsageError",
    "receive_guest",
    "send_guest",
]


def test_the_public_names_are_exactly_these() -> None:
    assert pagexfer.__all__ == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_exists_and_is_documented(name: str) -> None:
    assert inspect.getdoc(getattr(pagexfer, name))


@pytest.mark.parametrize(
    "module", [path.stem for path in sorted((Path(__file__).parent.parent / "examples").glob("[a-z]*.py"))]
)
def test_examples_use_public_names_only(module: str) -> None:
    source = inspect.getsource(importlib.import_module(f"examples.{module}"))
    # A guest of one's own is made of the ports and their parts, which are no names of the front door.
    parts = {"dirty", "errors", "svsm"} if module == "vmm_pagemap" else {"guests", "testing"}
    assert set(re.findall(r"\bpagexfer\.([A-Za-z_]+)\b", source)) - parts <= set(PUBLIC)


def test_the_package_is_typed() -> None:
    assert (Path(pagexfer.__file__).parent / "py.typed").exists()
