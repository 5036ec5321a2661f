"""`pagexfer attest` as a user meets it: output, exit codes, and the likeliest mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner
from cryptography import x509

from pagexfer.attestation.insecure.reports import pack_report
from pagexfer.attestation.snp import Product, SigningKey
from pagexfer.cli import commands

from . import snp_data
from .snp_data import authority, needs_data

if TYPE_CHECKING:
    from pathlib import Path

TIMEOUT_S = 60


class Result:
    """What one run of the command gave."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def report(self) -> dict[str, Any]:
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value


def attest(*arguments: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Result:
    """The command's own `main`, in this process: a process each would take longer than all of the rest."""
    monkeypatch.setattr(sys, "argv", ["pagexfer", "attest", *arguments])
    capfd.readouterr()
    code = commands.main()
    return Result(code, *capfd.readouterr())


class Command:
    """`pagexfer attest` with some arguments."""

    def __init__(self, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capfd, self._monkeypatch = capfd, monkeypatch

    def __call__(self, *arguments: str) -> Result:
        return attest(*arguments, capfd=self._capfd, monkeypatch=self._monkeypatch)

    def verify(self, name: str, kind: str, product: str, *arguments: str) -> Result:
        """Of a real report, at a time at which its certificates were valid."""
        leaf = snp_data.DATA / f"{name}.{kind}.der"
        chain = snp_data.DATA / f"chain-{kind[:4]}-{product}.pem"
        first = x509.load_pem_x509_certificates(chain.read_bytes())[0]
        assert first.not_valid_before_utc.year < 2024
        files = [str(snp_data.DATA / f"{name}.report.bin"), "--leaf", str(leaf), "--chain", str(chain)]
        return self("verify", *files, "--at", AT[name, kind], *arguments)


# Within the life of each leaf certificate.
AT = {(name, kind): "2026-06-01T12:00:00Z" for name, kind, _ in snp_data.REAL} | {
    ("milan-v2-vlek", "vlek"): "2024-06-01",
    ("milan-v3-vlek", "vlek"): "2025-06-01T00:00:00+02:00",
}


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    return Command(capfd, monkeypatch)


@needs_data
@pytest.mark.parametrize(("name", "kind", "product"), snp_data.REAL)
def test_a_real_report_verifies_and_its_claims_are_as_listed(
    command: Command, name: str, kind: str, product: str
) -> None:
    listed = snp_data.listed(name)
    result = command.verify(name, kind, product, "--no-policy", "--json")
    assert result.code == 0, result.err
    claims = result.report
    assert claims["verified"] is True
    assert claims["product"].lower() == product
    assert claims["signing_key"] == kind[:4].upper()
    assert claims["version"] == int(listed["version"])
    assert claims["vmpl"] == int(listed["vmpl"])
    assert claims["policy"] == listed["policy"].split()[0]
    assert claims["measurement"] == listed["measurement"]
    for field in ("current_tcb", "reported_tcb", "committed_tcb", "launch_tcb"):
        parts = dict(part.split("=") for part in listed[field].split("(")[1].rstrip(")").split())
        assert claims[field] == {part: int(value) for part, value in parts.items()}
    chip = "00" * 64 if listed["chip_id"] == "zero x64" else listed["chip_id"]
    assert (claims["chip_id"], claims["chip_id_masked"]) == (chip, listed["chip_id"] == "zero x64")
    assert "compared with nothing" in result.err


@needs_data
@pytest.mark.parametrize(("name", "kind", "product"), snp_data.REAL)
def test_the_built_in_rules_refuse_what_they_should(
    command: Command, name: str, kind: str, product: str
) -> None:
    result = command.verify(name, kind, product)
    if name == "milan-v2-debug":
        assert (result.code, result.out) == (3, "")
        assert "allow_debug" in result.err
    elif kind == "vlek":
        assert (result.code, result.out) == (3, "")
        assert "vlek_providers" in result.err
    else:
        assert result.code == 0, result.err
    assert len(result.err.splitlines()) == 1


@needs_data
def test_a_policy_file_decides(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    measured = snp_data.listed("turin-v5-a")["measurement"]
    limit = "[[minimum_tcb]]\nproduct = 'Turin'\nfmc = 0\nbootloader = 1\ntee = 0\nsnp = 2\nmicrocode = 71\n"
    good = f"version = 1\nmeasurements = ['{measured}']\n{limit}"
    for text, code, why in (
        (good, 0, ""),
        (good.replace(measured, "00" * 48), 3, "measurements"),
        (good.replace("microcode = 71", "microcode = 72"), 3, "reported microcode 71, wanted at least 72"),
        (good.replace("Turin", "Genoa").replace("fmc = 0\n", ""), 3, "minimum_tcb"),
        (good.replace("measurements", "measurement"), 2, "unknown key 'measurement'"),
    ):
        path.write_text(text)
        result = command.verify("turin-v5-a", "vcek", "turin", "--policy", str(path), "--json")
        assert result.code == code
        assert why in result.err
        assert len(result.err.splitlines()) == (code != 0)
        if code == 3:
            assert result.report["verified"] is False
            assert result.report["error"]["reason"] == "attestation"


@needs_data
def test_the_part_of_the_peer_chooses_the_rules(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    open_rules = {"version": 1, "measurements": "any", "minimum_tcb": "any"}
    path.write_text(json.dumps(open_rules | {"source": {"allow_debug": True}}))
    arguments = ("milan-v2-debug", "vcek", "milan", "--policy", str(path))
    assert command.verify(*arguments).code == 3
    assert command.verify(*arguments, "--as", "destination").code == 3
    assert command.verify(*arguments, "--as", "source").code == 0


@needs_data
def test_report_data_is_compared(command: Command) -> None:
    data = snp_data.listed("milan-v3-a")["report_data"]
    arguments = ("milan-v3-a", "vcek", "milan", "--no-policy", "--report-data")
    assert command.verify(*arguments, data).code == 0
    refused = command.verify(*arguments, "00" * 64)
    assert refused.code == 3
    assert "report_data" in refused.err
    for wrong in ("", data[:-2], data + "00", "zz" * 64):
        assert command.verify(*arguments, wrong).code == 2


@needs_data
def test_a_revocation_list_is_used(command: Command, tmp_path: Path) -> None:
    crl = str(snp_data.DATA / "crl-milan-2023.der")
    good = command.verify("milan-v2-a", "vcek", "milan", "--crl", crl, "--at", "2023-06-01", "--json")
    assert good.code == 0
    assert good.report["crl_checked"] is True
    other = tmp_path / "other.crl"
    other.write_bytes(authority(Product.TURIN).crl())
    both = ("--crl", str(other), "--crl", crl, "--at", "2023-06-01", "--json")
    assert command.verify("milan-v2-a", "vcek", "milan", *both).report["crl_checked"] is True
    late = command.verify("milan-v2-a", "vcek", "milan", "--crl", crl)
    assert late.code == 3
    assert "fetch a new one" in late.err


@needs_data
def test_what_must_not_verify(command: Command) -> None:
    for name in ("neg-vcek-hwid-der", "neg-vcek-hwid-raw"):
        leaf = str(snp_data.DATA / f"{name}.der")
        result = command.verify("milan-v2-a", "vcek", "milan", "--leaf", leaf, "--at", "2024-01-01")
        assert (result.code, result.out) == (3, "")
    for at, code in (("2023-04-03T19:23:42Z", 3), ("2023-04-03T19:23:43Z", 0), ("2031-01-01", 3)):
        assert command.verify("milan-v2-a", "vcek", "milan", "--at", at).code == code
    wrong_chain = str(snp_data.DATA / "chain-vcek-genoa.pem")
    assert command.verify("milan-v2-a", "vcek", "milan", "--chain", wrong_chain).code == 3


@needs_data
def test_files_that_are_not_what_they_should_be(command: Command, tmp_path: Path) -> None:
    noise = tmp_path / "noise"
    noise.write_bytes(b"noise")
    for option in ("--leaf", "--chain", "--crl"):
        result = command.verify("milan-v2-a", "vcek", "milan", option, str(noise), "--json")
        assert (result.code, result.out) == (2, "")
        what = "CRL" if option == "--crl" else "certificate"
        assert result.err == f"pagexfer: {noise} is not a {what}, DER or PEM\n"
    noise.write_bytes(bytes((1 << 16) + 1))
    assert command.verify("milan-v2-a", "vcek", "milan", "--leaf", str(noise)).code == 2


@pytest.mark.parametrize("wrong", ["report", "leaf", "chain", "crl"])
def test_a_file_of_the_wrong_kind_is_named(command: Command, tmp_path: Path, wrong: str) -> None:
    ca = authority(Product.GENOA)
    leaf = ca.leaf()
    files = {
        "report": ca.report(leaf),
        "leaf": leaf.certificate,
        "chain": ca.chain(SigningKey.VCEK),
        wrong: b"no",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    report, *others = files
    options = [word for name in others for word in (f"--{name}", str(tmp_path / name))]
    result = command("verify", str(tmp_path / report), *options, "--json")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"pagexfer: {tmp_path / wrong} is not a ")
    assert "ParseError" not in result.err
    assert len(result.err.splitlines()) == 1


def test_reports_under_another_root_are_refused(command: Command, tmp_path: Path) -> None:
    ca = authority(Product.GENOA)
    leaf = ca.leaf()
    files = {"report": ca.report(leaf), "leaf": leaf.certificate, "chain": ca.chain(SigningKey.VCEK)}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    paths = [str(tmp_path / "report"), "--leaf", str(tmp_path / "leaf"), "--chain", str(tmp_path / "chain")]
    result = command("verify", *paths, "--no-policy", "--at", "2026-06-01")
    assert (result.code, result.out) == (3, "")
    assert "not one of the pinned roots" in result.err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["verify"],
        ["verify", "report", "--leaf", "leaf"],
        ["verify", "none", "--leaf", "none", "--chain", "none"],
        ["verify", "none", "--leaf", "none", "--chain", "none", "--at", "yesterday"],
        ["verify", "none", "--leaf", "none", "--chain", "none", "--policy", "p.toml", "--no-policy"],
        ["verify", "none", "--leaf", "none", "--chain", "none", "--policy", "none.toml"],
        ["verify", "none", "--leaf", "none", "--chain", "none", "--as", "host"],
        ["show"],
        ["show", "none"],
    ],
)
def test_bad_usage(command: Command, arguments: list[str]) -> None:
    result = command(*arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err


@needs_data
@pytest.mark.parametrize("name", snp_data.NAMES)
def test_show_prints_every_field(command: Command, name: str) -> None:
    listed = snp_data.listed(name)
    path = str(snp_data.DATA / f"{name}.report.bin")
    shown = command("show", path, "--json").report
    assert shown["measurement"] == listed["measurement"]
    assert shown["product"] == (None if shown["version"] == 2 else name.split("-")[0].capitalize())
    raw = listed["reported_tcb"].split()[0]
    assert (shown["reported_tcb"] == raw) == (shown["version"] == 2)
    text = command("show", path).out
    names = set(listed) - {"cpuid_fms", "key_info", "sig_r", "sig_s"}
    assert names - {line.split()[0] for line in text.splitlines()} == set()


def test_show_of_a_report_with_its_prefix_and_of_none(command: Command, tmp_path: Path) -> None:
    turin: dict[str, int | bytes] = {"version": 5, "policy": 0x30000, "cpuid": bytes([0x1A, 2, 1])}
    raw = pack_report(turin)
    path = tmp_path / "report"
    path.write_bytes(bytes(4) + len(raw).to_bytes(4, "little") + bytes(24) + raw)
    assert command("show", str(path), "--json").report["product"] == "Turin"
    path.write_bytes(pack_report({**turin, "reported_tcb": b"\xff" * 8}))
    result = command("show", str(path))
    assert (result.code, result.out) == (2, "")
    assert "reserved bytes" in result.err
    path.write_bytes(raw[:-1])
    result = command("show", str(path))
    assert (result.code, result.out) == (2, "")
    assert f"{path} is not a report: report of 1183 bytes" in result.err


def test_a_test_ca_is_made_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "ca"
    # No file may have content: what is written fails after the file was made.
    limited = ["sh", "-c", 'ulimit -f 0; exec "$@"', "sh", sys.executable, "-m", "pagexfer"]
    done = subprocess.run(
        [*limited, "attest", "make-test-ca", str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == f"pagexfer: cannot make the test CA in {path}: File too large\n"
    assert not list(tmp_path.iterdir())


def test_the_command_is_there() -> None:
    """Once as a process of its own, for what a call in this process would not see."""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-m", "pagexfer", "attest", "show", "/none"],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert (run.returncode, run.stdout) == (2, "")
    assert "cannot read /none" in run.stderr
    assert "verify" in CliRunner().invoke(commands.cli, ["attest", "--help"]).output
