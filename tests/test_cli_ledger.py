"""`pagexfer ledger verify`, `send --ledger` and `receive --ledger` as a user meets them."""

from __future__ import annotations

import json
import os
import stat
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from pagexfer.attestation.insecure.attestor import strict_policy
from pagexfer.attestation.policy import Policy
from pagexfer.attestation.snp import CertificateTable, Evidence, Product, SigningKey
from pagexfer.attestation.snp.attestor import SnpAttestor
from pagexfer.cli import commands
from pagexfer.cli import ledger as commands_ledger
from pagexfer.cli.ledger import keep_ledger, read_ledger, write_ledger
from pagexfer.testing.snp_ca import AT, SnpTestCa
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


def test_without_the_key_evidence_is_not_verified(verify: Verify, tmp_path: Path) -> None:
    """Whoever has no key can write such a ledger, so it is none that holds."""
    lenient = policy_file(tmp_path / "lenient.json", allow_psk=True)
    for options in ([], ["--no-policy"], ["--policy", lenient]):
        code, out, err = verify(LEDGER, *options)
        assert code == 3
        assert out.count("not verified: pre-shared key") == 6
        assert err == (
            "pagexfer: the ledger's rule evidence refuses move 1: a pre-shared key's is not verified: give --psk-file\n"
        )
        assert "move 3 record" in out
        report = json.loads(verify(LEDGER, *options, "--json")[1])
        assert report["verified"] is False
        assert [move["verified"] for move in report["chain"]] == [False] * 3
        assert report["error"]["rule"] == "evidence"


def test_a_policy_refuses_pre_shared_keys_unless_it_says_otherwise(
    verify: Verify, psk: str, tmp_path: Path
) -> None:
    """They meet none of its other rules."""
    for options in ([], ["--psk-file", psk]):
        code, out, err = verify(LEDGER, *options, "--policy", policy_file(tmp_path / "strict.json"))
        assert (code, out) == (3, "")
        assert "refuses move 1: the source's evidence: the policy's rule allow_psk refuses" in err
    one_side = policy_file(tmp_path / "one.json", source={"allow_psk": True})
    assert "the destination's evidence" in verify(LEDGER, "--psk-file", psk, "--policy", one_side)[2]
    both = policy_file(tmp_path / "both.json", allow_psk=True)
    assert verify(LEDGER, "--psk-file", psk, "--policy", both)[0] == 0


def test_no_guest_is_put_behind_the_chain_of_another(
    verify: Verify, ca: str, psk: str, tmp_path: Path
) -> None:
    """A host without any key puts a record by pre-shared key between one guest's chain and another's next move."""
    first, other = Journey(), Journey()
    first.arrive(first.next_pair(emulated(), emulated()))
    there = emulated()
    other.arrive(other.next_pair(emulated(), there))
    grafted = forged(
        parse_ledger_untrusted(first.ledger),
        RECORDS[0].proofs,
        parse_ledger_untrusted(first.ledger)[0].body.guest_id,
    )
    other.ledger = pack_ledger(grafted)
    other.arrive(other.next_pair(there, emulated()))
    first.close()
    other.close()
    options = ["--test-ca", ca]
    strict = policy_file(tmp_path / "strict.json")
    assert "rule allow_psk" in verify(other.ledger, *options, "--policy", strict)[2]
    code, out, err = verify(other.ledger, *options)
    assert (code, out) == (3, "")
    assert "rule continuity refuses move 2: a pre-shared key names no machine" in err
    lenient = policy_file(tmp_path / "lenient.json", allow_psk=True)
    for accepting in (["--no-policy"], ["--policy", lenient]):
        code, out, err = verify(other.ledger, *options, *accepting, "--json")
        assert code == 3
        assert "a pre-shared key's is not verified" in err
        assert [move["verified"] for move in json.loads(out)["chain"]] == [True, False, True]
        # Nor does the key help, which the host that made the record did not have.
        assert "same pre-shared key" in verify(other.ledger, *options, *accepting, "--psk-file", psk)[2]


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
    code, out, err = verify(attested, "--test-ca", ca, "--json")
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
    code, out, err = verify(pack_ledger(records), "--test-ca", ca, "--no-policy")
    assert (code, out) == (3, "")
    assert "rule evidence refuses move 1: the source's evidence: the report covers report_data" in err


def test_reports_without_a_root(verify: Verify, attested: bytes) -> None:
    code, _, err = verify(attested)
    assert code == 2
    assert "--test-ca" in err


# Moves further apart than any certificate lives: a VLEK's is one year.

YEARS = timedelta(days=3650)
YEAR = timedelta(days=365)
PROVIDER = Policy(
    measurements=None,
    minimum_tcb=None,
    vlek_providers=None,
    allow_masked_chip_id=True,
    allow_same_machine=True,
)


class Machine:
    """A provider's, with a VLEK that is valid for a year from `begin` on."""

    def __init__(self, ca: SnpTestCa, begin: datetime, report_id: bytes) -> None:
        self.ca, self.leaf = ca, ca.leaf(SigningKey.VLEK, valid=(begin, begin + YEAR))
        self.begin, self.report_id = begin, report_id

    def evidence(self, report_data: bytes, *, vmpl: int) -> Evidence:
        raw = self.ca.report(
            self.leaf,
            report_data=report_data,
            vmpl=vmpl,
            report_id=self.report_id,
            chip_id=bytes(64),
        )
        parts = (self.ca.intermediates[SigningKey.VLEK], self.ca.root_certificate)
        chain = (part.public_bytes(Encoding.DER) for part in parts)
        return Evidence(raw, CertificateTable(None, self.leaf.certificate, *chain).pack())

    def attestor(self) -> SnpAttestor:
        now = self.begin + timedelta(days=10)
        return SnpAttestor(self, PROVIDER, roots=(self.ca.root,), now=lambda: now)


@pytest.fixture(scope="module")
def genoa() -> SnpTestCa:
    return SnpTestCa(Product.GENOA, valid=(AT - YEARS, AT + YEARS))


def journey_at(ca: SnpTestCa, *times: datetime) -> bytes:
    """The ledger of a move at each of these times, from one machine to the next."""
    journey = Journey()
    for number, begin in enumerate(times):
        here, there = (Machine(ca, begin, bytes([number + side]) * 32).attestor() for side in (1, 2))
        journey.arrive(journey.next_pair(here, there))
    journey.close()
    return journey.ledger


@pytest.fixture(scope="module")
def years_apart(genoa: SnpTestCa) -> bytes:
    return journey_at(genoa, AT - 4 * YEAR, AT - 2 * YEAR)


def test_certificates_may_have_been_valid_at_any_time(
    verify: Verify, years_apart: bytes, genoa: SnpTestCa, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All moves verify long after their certificates ended, and the answer says when those were valid."""
    monkeypatch.setattr(commands_ledger, "AMD_ROOTS", (genoa.root,))
    code, out, err = verify(years_apart, "--no-policy", "--json")
    assert code == 0, err
    for move, begin in zip(json.loads(out)["chain"], (AT - 4 * YEAR, AT - 2 * YEAR), strict=True):
        interval = (begin.isoformat(), (begin + YEAR).isoformat())
        assert (move["certificates-valid-from"], move["certificates-valid-until"]) == interval
        for side in (move["source"], move["destination"]):
            assert (side["certificates_valid_from"], side["certificates_valid_until"]) == interval


def test_certificates_follow_the_order_of_the_moves(
    verify: Verify, genoa: SnpTestCa, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands_ledger, "AMD_ROOTS", (genoa.root,))
    code, out, err = verify(journey_at(genoa, AT, AT - 2 * YEAR), "--no-policy")
    assert (code, out) == (3, "")
    assert "rule dates refuses move 2: a certificate ended at" in err


def test_a_crl_of_today_holds_for_moves_of_the_past(
    verify: Verify, years_apart: bytes, genoa: SnpTestCa, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands_ledger, "AMD_ROOTS", (genoa.root,))
    now = datetime.now(UTC)
    today = (now - timedelta(days=1), now + timedelta(days=1))
    serial = genoa.intermediates[SigningKey.VLEK].serial_number
    for name, crl, why in (
        ("good", genoa.crl(valid=today), None),
        ("revoking", genoa.crl(serial, valid=today), "is revoked"),
        ("old", genoa.crl(valid=(now - 2 * YEAR, now - YEAR)), "fetch a new one"),
    ):
        path = tmp_path / name
        path.write_bytes(crl)
        code, _, err = verify(years_apart, "--no-policy", "--crl", str(path))
        assert code == (0 if why is None else 3), err
        assert why is None or why in err


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
    options = ["--test-ca", ca]
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
    options = ["--test-ca", ca]
    code, _, err = verify(journey.ledger, *options)
    assert code == 3
    assert "allow_same_machine" in err
    assert verify(journey.ledger, *options, "--no-policy")[0] == 0
    one_side = policy_file(tmp_path / "one.json", destination={"allow_same_machine": True})
    assert verify(journey.ledger, *options, "--policy", one_side)[0] == 3
    both = policy_file(tmp_path / "both.json", allow_same_machine=True)
    assert verify(journey.ledger, *options, "--policy", both)[0] == 0


def test_moves_by_pre_shared_key_are_counted_too(verify: Verify, psk: str, tmp_path: Path) -> None:
    few = policy_file(tmp_path / "few.json", allow_psk=True, maximum_moves=2)
    code, _, err = verify(LEDGER, "--psk-file", psk, "--policy", few)
    assert code == 3
    assert "refuses move 3" in err
    assert "maximum_moves" in err
    enough = policy_file(tmp_path / "enough.json", allow_psk=True, maximum_moves=3)
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


@pytest.mark.parametrize(("share", "warned"), [(0.5, False), (0.89, False), (0.91, True)])
def test_who_sends_a_guest_with_a_nearly_full_ledger_is_warned(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], share: float, warned: bool
) -> None:
    path = tmp_path / "ledger"
    path.write_bytes(bytes(int(MAX_LEDGER_BYTES * share)))
    read_ledger(path)
    assert ("cannot move any more" in capfd.readouterr().err) is warned


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
    answers = {"psk": "exists and is not a ledger", ".": "is a directory", "fifo": "not a file"}
    for kept, said in answers.items():
        path = tmp_path / kept
        if kept == "fifo":
            os.mkfifo(path)
        done = run("receive", "--listen", "127.0.0.1:0", "--psk-file", key, "--ledger", str(path), *GUEST)
        assert done.returncode == 2
        assert said in done.stderr
    assert (tmp_path / "psk").read_text().strip() == KEY
