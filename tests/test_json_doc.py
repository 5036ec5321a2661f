"""docs/json.md against what the command prints: no key and no reason that it does not name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from pagexfer.cli.steering import _described
from pagexfer.engine.failure import _REFUSALS
from pagexfer.engine.progress import AuditInfo, ChannelInfo, MigrationInfo, RamInfo, Status, ThrottleInfo
from pagexfer.engine.steering import MigrationParameters
from pagexfer.wire.handshake import Role
from pagexfer.wire.slot import SessionStatus as State

from .test_cli import GUEST, key_file, run
from .test_cli_recover import journal
from .wire_vectors import data_of, load

if TYPE_CHECKING:
    from collections.abc import Iterator

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "json.md").read_text()


def section(title: str) -> set[str]:
    """All that the section of this title has in code type."""
    text = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return set(re.findall(r"`([^`\n]+)`", text))


def keys(value: object) -> Iterator[str]:
    """Keys at every depth; those of reports' fields aside."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            if key not in ("attestation", "peer", "source", "destination"):
                yield from keys(inner)
    if isinstance(value, list):
        for inner in value:
            yield from keys(inner)


def test_a_migration() -> None:
    done = run("demo", "--json", *GUEST)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert set(keys(report)) <= section("send, receive, demo")
    assert set(report["attestation"]) <= section("send, receive, demo")
    failed = run(
        "demo", "--json", *GUEST, "--write-rate", "1TiB", "--downtime-limit", "1ms", "--timeout", "500ms"
    )
    assert set(keys(json.loads(failed.stdout))) <= section("send, receive, demo")


def test_all_that_a_status_can_have() -> None:
    info = MigrationInfo(
        *(Status.ACTIVE, 1, 1, 1, 1, 1, RamInfo(1), (ChannelInfo(0, 1, 1, 1),)),
        audit=AuditInfo(1, 1),
        throttle=ThrottleInfo(1, 1),
        downtime_limit=1,
    )
    assert set(keys(info.as_dict())) <= section("send, receive, demo")
    assert {status.value for status in Status} <= section("send, receive, demo")
    assert set(_described(MigrationParameters())) <= section("control")


def test_reasons() -> None:
    table = (DOCS / "protocol.md").read_text().split("| reason | meaning |\n|---|---|\n")[1].split("\n\n")[0]
    reasons = {line.split("|")[1].strip() for line in table.splitlines()}
    assert {reason for reason, _ in _REFUSALS.values()} <= reasons
    assert reasons | {"engine", "process"} <= section("send, receive, demo")


def test_journals(tmp_path: Path) -> None:
    source = journal(tmp_path / "source", Role.SOURCE, State.STARTED)
    destination = journal(tmp_path / "destination", Role.DESTINATION, State.RUNNING)
    for asked in ([source], [source, destination]):
        report = json.loads(run("recover", "--json", *asked).stdout)
        assert set(keys(report)) <= section("recover")
        assert report["may-run"] in section("recover")


def test_ledgers(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    ledger.write_bytes(data_of(load("ledger")["ledgers"][2]))
    for options in ([], ["--psk-file", key_file(tmp_path / "other", "0123456789abcdef" * 4)]):
        done = run("ledger", "verify", str(ledger), *options, "--json")
        assert done.returncode == 3
        assert set(keys(json.loads(done.stdout))) <= section("ledger verify")
