"""`pagexfer ledger verify`, `send --ledger` and `receive --ledger` as a user meets them."""

from __future__ import annotations

import json
import os
import stat
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest

from pagexfer.attestation.insecure.attestor import strict_policy
from pagexfer.attestation.snp import Product
from pagexfer.cli import commands
from pagexfer.cli.ledger import keep_ledger, write_ledger
from pagexfer.testing.snp_ca import AT
from pagexfer.wire.ledger import MAX_LEDGER_BYTES, pack_ledger, parse_ledger_untrusted

from .handshakes import authority
from .journeys import Journey, emulated, forged
from .test_cli import GUEST, Destination, key_file, run
from .wire_vectors import data_of, load

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

VECTOR = load("ledger")["ledgers"][2]
LEDGER = data_of(VECTOR)
RECORDS = parse_ledger_untrusted(LEDGER)
KEY = "0123456789abcdef" * 4
AT_TEXT = AT.isoformat()

Verify: TypeAlias = "Callable[..., tuple[int, str, str]]"


@pytest.fixture
def verify(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Verify:
    """Runs `ledger verify` on these bytes with some options; returns exit code, output and errors."""

    def verify(data: bytes, *options: str) -> tuple[int, str, str]:
        file = tmp_path / "ledger"
        file.write_bytes(data)
        monkeypatch.setattr(sys, "argv", ["pagexfer", "ledger", "verify", str(file), *options])
        capfd.readouterr()
        code = commands.main()
        return code, *capfd.readouterr()

    return verify


@pytest.fixture
def psk(tmp_path: Path) -> str:
    path = tmp_path / "psk"
    path.touch(mode=0o600)
    path.write_bytes(bytes.fromhex(VECTOR["psk"]))
    return str(path)


@pytest.fixture
def ca(tmp_path: Path) -> str:
    authority().save(tmp_path / "ca")
    return str(tmp_path / "ca")


@pytest.fixture(scope="module")
def attested() -> bytes:
    """The ledger of two moves over three emulated machines."""
    first, second, third = emulated(), emulated(), emulated()
    journey = Journey()
    journey.arrive(journey.next_pair(first, second))
    journey.arrive(journey.next_pair(second, third))
    journey.close()
    return journey.ledger


def policy_file(path: Path, **rules: object) -> str:
    path.write_text(json.dumps({"version": 1, "measurements": "any", "minimum_tcb": "any", **rules}))
    return str(path)


def test_a_chain_is_printed_move_by_move(verify: Verify, psk: str) -> None:
    code, out, err = verify(LEDGER, "--psk-file", psk, "--json")
    assert (code, err) == (0, "")
    report: dict[str, Any] = json.loads(out)
    assert report["verified"] is True
    assert (report["moves"], report["guest-id"]) == (3, VECTOR["records"][0]["guest_id"])
    assert report["last-record"] == VECTOR["records"][-1]["hash"]
    for move, (shown, values) in enumerate(zip(report["chain"], VECTOR["records"], strict=True), start=1):
        assert shown["move"] == move
        assert shown["record"] == values["hash"]
        assert shown["attestation"] == "psk"
        assert shown["freshness"] == "svsm-tracked"
        assert shown["source-policy-digest"] == values["source_policy_digest"]
        assert shown["destination-policy-digest"] == values["destination_policy_digest"]
        assert shown["manifest-digest"] == RECORDS[move - 1].body.manifest_digest.hex()
        assert (
            shown["source"] == shown["destination"] == {"evidence": "verified: holder of the pre-shared key"}
        )
        assert shown.get("continuous") == (None if move == 1 else "not known")


def test_without_the_key_evidence_is_told_to_be_unverified(verify: Verify) -> None:
    code, out, err = verify(LEDGER)
    assert code == 0
    assert out.count("pre-shared key: not verifiable offline") == 6
    assert "give --psk-file" in err
    assert "move 3 record" in out


def test_another_key_is_refused(verify: Verify, tmp_path: Path) -> None:
    code, out, err = verify(LEDGER, "--psk-file", key_file(tmp_path / "other", KEY))
    assert (code, out) == (3, "")
    assert "rule evidence refuses move 1" in err


def test_a_broken_chain_names_rule_and_move(verify: Verify) -> None:
    code, out, err = verify(pack_ledger([RECORDS[0], RECORDS[2]]), "--json")
    assert code == 3
    error = json.loads(out)["error"]
    assert (error["rule"], error["move"], error["reason"]) == ("move_number", 2, "ledger")
    assert json.loads(out)["verified"] is False
    assert err.splitlines() == [f"pagexfer: {error['message']}"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "never moved"),
        (b"something else, and long enough", "not a ledger: wrong magic"),
        (LEDGER[:-1], "not a ledger"),
        (bytes(MAX_LEDGER_BYTES + 1), "more than"),
    ],
    ids=["empty", "other bytes", "cut", "too large"],
)
def test_a_file_that_is_no_ledger(verify: Verify, data: bytes, message: str) -> None:
    code, out, err = verify(data, "--json")
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_reports_are_verified_up_to_the_given_root(verify: Verify, attested: bytes, ca: str) -> None:
    code, out, err = verify(attested, "--test-ca", ca, "--at", AT_TEXT, "--json")
    assert code == 0, err
    one, two = json.loads(out)["chain"]
    assert one["attestation"] == "emulated"
    assert one["destination"]["certified_chip"] == two["source"]["certified_chip"]
    assert one["destination"]["report_id"] == two["source"]["report_id"]
    assert one["source"]["certified_chip"] != one["destination"]["certified_chip"]
    assert two["continuous"] == "yes"
    assert "compared with nothing" in err


def test_reports_of_other_handshakes_prove_nothing(verify: Verify, attested: bytes, ca: str) -> None:
    """A ledger that somebody signed anew, with reports that he found in a real one."""
    records = forged((), parse_ledger_untrusted(attested)[0].proofs)
    code, out, err = verify(pack_ledger(records), "--test-ca", ca, "--at", AT_TEXT, "--no-policy")
    assert (code, out) == (3, "")
    assert "rule evidence refuses move 1: the source's evidence: the report covers report_data" in err


def test_reports_without_a_root_or_out_of_time(verify: Verify, attested: bytes, ca: str) -> None:
    code, _, err = verify(attested)
    assert code == 2
    assert "--test-ca" in err
    code, _, err = verify(attested, "--test-ca", ca, "--at", "2001-01-01")
    assert code == 3
    assert "rule evidence refuses move 1: the source's evidence" in err


@pytest.mark.parametrize(
    ("rules", "refusal"),
    [
        ({"maximum_moves": 1}, "refuses move 2: the source's evidence: the policy's rule maximum_moves"),
        (
            {"destination": {"measurements": []}},
            "move 1: the destination's evidence: the policy's rule measure",
        ),
        ({"source": {"vmpls": [1]}}, "move 1: the source's evidence: the policy's rule vmpls"),
    ],
)
def test_a_policy_holds_for_every_move(
    verify: Verify,
    attested: bytes,
    ca: str,
    tmp_path: Path,
    rules: dict[str, object],
    refusal: str,
) -> None:
    options = ["--test-ca", ca, "--at", AT_TEXT]
    code, _, err = verify(attested, *options, "--policy", policy_file(tmp_path / "good.json"))
    assert (code, err) == (0, "")
    code, out, err = verify(attested, *options, "--policy", policy_file(tmp_path / "bad.json", **rules))
    assert (code, out) == (3, "")
    assert refusal in err
    assert verify(attested, *options, "--no-policy")[0] == 0


def test_the_two_machines_of_a_move_are_different_ones(verify: Verify, ca: str, tmp_path: Path) -> None:
    """A move within one machine, made under policies that allow it."""
    same = emulated(replace(strict_policy(Product.GENOA), allow_same_machine=True))
    journey = Journey()
    journey.arrive(journey.next_pair(same))
    journey.close()
    options = ["--test-ca", ca, "--at", AT_TEXT]
    code, _, err = verify(journey.ledger, *options)
    assert code == 3
    assert "allow_same_machine" in err
    assert verify(journey.ledger, *options, "--no-policy")[0] == 0
    one_side = policy_file(tmp_path / "one.json", destination={"allow_same_machine": True})
    assert verify(journey.ledger, *options, "--policy", one_side)[0] == 3
    both = policy_file(tmp_path / "both.json", allow_same_machine=True)
    assert verify(journey.ledger, *options, "--policy", both)[0] == 0


def test_moves_by_pre_shared_key_are_counted_too(verify: Verify, psk: str, tmp_path: Path) -> None:
    few = policy_file(tmp_path / "few.json", maximum_moves=2)
    code, _, err = verify(LEDGER, "--psk-file", psk, "--policy", few)
    assert code == 3
    assert "refuses move 3" in err
    assert "maximum_moves" in err
    enough = policy_file(tmp_path / "enough.json", maximum_moves=3)
    assert verify(LEDGER, "--psk-file", psk, "--policy", enough)[0] == 0


def test_options_that_exclude_each_other(verify: Verify, tmp_path: Path) -> None:
    code, _, err = verify(LEDGER, "--no-policy", "--policy", policy_file(tmp_path / "policy.json"))
    assert code == 2
    assert "exclude" in err


def test_a_ledger_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    write_ledger(path, b"first")
    assert path.read_bytes() == b"first"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    write_ledger(path, b"second")
    assert path.read_bytes() == b"second"
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_ledger(tmp_path / "folder", b"third")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["folder", "ledger"]


def test_a_ledger_is_on_the_disk_and_then_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        real(descriptor)
        synced.append(tmp_path / os.readlink(f"/proc/self/fd/{descriptor}"))
        assert (tmp_path / "ledger").exists() is (synced[-1] == tmp_path)

    monkeypatch.setattr(os, "fsync", fsync)
    write_ledger(tmp_path / "ledger", b"first")
    assert [path.parent for path in synced] == [tmp_path, tmp_path.parent]


def test_no_ledger_of_other_moves_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    guest = RECORDS[0].body.guest_id.hex()
    beside, second = tmp_path / f"ledger.{guest}", tmp_path / f"ledger.{guest}.2"
    first, longer = pack_ledger(RECORDS[:1]), LEDGER
    another = pack_ledger(forged((), RECORDS[0].proofs, bytes(16)))
    fork = pack_ledger([RECORDS[0], *forged(RECORDS[:1], RECORDS[0].proofs)])
    assert keep_ledger(path, first) == path
    assert keep_ledger(path, longer) == path
    assert path.read_bytes() == longer
    write_ledger(path, another)
    assert keep_ledger(path, first) == beside
    assert keep_ledger(path, longer) == beside
    assert keep_ledger(path, fork) == second
    path.write_text("something else by now")
    assert keep_ledger(path, longer) == beside
    assert path.read_text() == "something else by now"
    assert (beside.read_bytes(), second.read_bytes()) == (longer, fork)


def test_the_ledger_of_another_guest_is_kept(tmp_path: Path) -> None:
    key = key_file(tmp_path / "psk", KEY)
    ledger, typo = tmp_path / "ledger", tmp_path / "typo"
    write_ledger(ledger, LEDGER)
    side = Destination("--psk-file", key, "--ledger", str(ledger), "--run-for", "100ms", *GUEST)
    sent = run("send", "--to", side.address, "--psk-file", key, "--ledger", str(typo), *GUEST)
    code, _, errors = side.end()
    assert (sent.returncode, code) == (0, 0), (sent.stderr, errors)
    assert f"pagexfer: no ledger at {typo}: counted as the first move\n" in sent.stderr
    (beside,) = tmp_path.glob("ledger.*")
    assert (
        errors
        == f"pagexfer: {ledger} has other moves and stays as it is: the ledger of this guest is {beside}\n"
    )
    assert ledger.read_bytes() == LEDGER
    assert len(parse_ledger_untrusted(beside.read_bytes())) == 1


def test_two_moves_between_processes(tmp_path: Path) -> None:
    key = key_file(tmp_path / "psk", KEY)
    ledger = tmp_path / "ledger"
    for move in (1, 2):
        side = Destination("--psk-file", key, "--ledger", str(ledger), "--run-for", "100ms", *GUEST)
        sent = run("send", "--to", side.address, "--psk-file", key, "--ledger", str(ledger), *GUEST)
        code, report, errors = side.end()
        assert (sent.returncode, code) == (0, 0), (sent.stderr, errors)
        assert report["guest"]["consistent"] is True
        assert len(parse_ledger_untrusted(ledger.read_bytes())) == move
    done = run("ledger", "verify", str(ledger), "--psk-file", key, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["moves"] == 2


def test_mistakes_are_told_before_a_guest_is_made(tmp_path: Path) -> None:
    key = key_file(tmp_path / "psk", KEY)
    missing = run(
        "receive", "--listen", "127.0.0.1:0", "--psk-file", key, "--ledger", str(tmp_path / "no" / "l")
    )
    assert missing.returncode == 2
    assert "cannot write" in missing.stderr
    (tmp_path / "bad").write_bytes(b"no ledger, but some bytes")
    bad = run("send", "--to", "127.0.0.1:9", "--psk-file", key, "--ledger", str(tmp_path / "bad"), *GUEST)
    assert bad.returncode == 2
    assert "not the ledger of a guest" in bad.stderr
    for kept, said in (
        ("psk", "exists and is not a ledger"),
        (".", "is a directory"),
        ("fifo", "not a file"),
    ):
        path = tmp_path / kept
        if kept == "fifo":
            os.mkfifo(path)
        done = run("receive", "--listen", "127.0.0.1:0", "--psk-file", key, "--ledger", str(path), *GUEST)
        assert done.returncode == 2
        assert said in done.stderr
    assert (tmp_path / "psk").read_text().strip() == KEY
