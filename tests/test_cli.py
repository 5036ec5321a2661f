"""The command as a user meets it: real processes, their output, exit codes, and the likeliest mistakes."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import click
import pytest

from pagexfer.attestation.snp.providers import SEV_GUEST, TSM_REPORTS
from pagexfer.cli.output import print_table
from pagexfer.cli.values import Address, Seconds, Size
from pagexfer.guests import kvm

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pagexfer.guests.kvm import KvmGuest
    from pagexfer.guests.simulated import SimulatedGuest

COMMAND = [sys.executable, "-m", "pagexfer"]
GUEST = ["--guest", "simulated", "--ram", "16MiB", "--vcpus", "1"]
TIMEOUT_S = 60


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


@pytest.fixture
def psk(tmp_path: Path) -> str:
    return key_file(tmp_path / "psk", "0123456789abcdef" * 4)


def key_file(path: Path, key: str) -> str:
    path.touch(mode=0o600)
    path.write_text(key + "\n")
    return str(path)


class Destination:
    """A `pagexfer receive` process that listens."""

    def __init__(
        self,
        *arguments: str,
        warned: bool = False,
        output: int = subprocess.PIPE,
        ignoring: tuple[signal.Signals, ...] = (),
    ) -> None:
        traps = [f"trap '' {number.name.removeprefix('SIG')}; " for number in ignoring]
        self.process = subprocess.Popen(
            [
                *("sh", "-c", "".join(traps) + 'exec "$@"', "sh"),
                *COMMAND,
                "receive",
                "--listen",
                "127.0.0.1:0",
                "--json",
                *arguments,
            ],
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        line = self.process.stderr.readline()
        if warned:
            line = self.process.stderr.readline()
        assert "listening at" in line, line
        self.address = line.split()[-1]

    def end(self) -> tuple[int, dict[str, Any], str]:
        output, errors = self.process.communicate(timeout=TIMEOUT_S)
        return self.process.returncode, json.loads(output) if output else {}, errors


@pytest.fixture
def destination(psk: str) -> Iterator[Destination]:
    side = Destination("--psk-file", psk, "--run-for", "100ms", *GUEST)
    yield side
    side.process.kill()
    side.process.wait()
    for stream in (side.process.stdout, side.process.stderr):
        if stream is not None:
            stream.close()


def one_line(errors: str) -> str:
    """The only line about a failure; progress lines aside."""
    lines = [
        line
        for line in errors.splitlines()
        if not line.startswith(("pagexfer: active", "pagexfer: failed ", "pagexfer: device"))
    ]
    assert len(lines) == 1, errors
    assert "Traceback" not in errors
    return lines[0]


# The main job


@pytest.mark.parametrize("channels", [1, 4, 16])
def test_demo(guest_type: type[KvmGuest] | type[SimulatedGuest], channels: int) -> None:
    kind = "simulated" if guest_type.__name__ == "SimulatedGuest" else "kvm"
    done = run("demo", "--json", "--guest", kind, "--ram", "48MiB", "--channels", str(channels))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["status"] == "completed"
    assert report["channels"] == channels
    assert report["freshness"] == ("host-reported" if kind == "kvm" else "svsm-tracked")
    assert report["guest"] == {"kind": kind, "consistent": True, "progressed": True, "faults": []}
    assert report["total-time"] > report["setup-time"] > 0
    assert report["downtime"] > 0
    ram = report["ram"]
    assert ram["total"] == 48 << 20
    assert ram["page-size"] == 4096
    assert ram["normal"] + ram["duplicate"] >= ram["total"] // 4096
    assert ram["transferred"] > ram["normal"] * 4096
    assert ram["dirty-sync-count"] >= 2
    assert ram["mbps"] > 0
    assert "error" not in report


def test_demo_with_an_audit(guest_type: type[KvmGuest] | type[SimulatedGuest]) -> None:
    kind = "simulated" if guest_type.__name__ == "SimulatedGuest" else "kvm"
    arguments = ("--guest", kind, "--ram", "48MiB", "--freshness", "digest-audit", "--downtime-limit", "1s")
    done = run("demo", "--json", *arguments)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["freshness"] == "digest-audit"
    assert report["audit"]["pages"] == 0
    assert 0 < report["audit"]["milliseconds"] < report["downtime"]
    assert report["guest"]["consistent"]


def test_demo_of_a_guest_that_cannot_converge_says_so_and_leaves_it_unharmed() -> None:
    done = run("demo", "--json", *GUEST, "--write-rate", "1TiB", "--downtime-limit", "1ms", "--channels", "2")
    report = json.loads(done.stdout)
    assert done.returncode == 1
    assert report["status"] == "failed"
    assert report["error"]["reason"] == "not-converging"
    assert report["guest"] == {"kind": "simulated", "consistent": True, "progressed": True, "faults": []}


def test_demo_with_emulated_attestation_prints_the_claims_of_both_sides() -> None:
    done = run("demo", "--attest", "emulated", "--json", *GUEST)
    assert done.returncode == 0, done.stderr
    assert "emulated attestation proves nothing" in done.stderr
    report = json.loads(done.stdout)
    attestation = report["attestation"]
    assert set(attestation) == {"kind", "source", "destination"}
    assert attestation["kind"] == "emulated"
    for side in ("source", "destination"):
        claims = attestation[side]
        assert claims["subject"] == "emulated SEV-SNP guest on Genoa"
        assert (claims["product"], claims["vmpl"], claims["signing_key"]) == ("Genoa", 0, "VCEK")
        assert len(claims["measurement"]) == 96
        assert len(claims["chip_id"]) == 128
        assert claims["reported_tcb"]["microcode"] > 0
    assert attestation["source"]["chip_id"] != attestation["destination"]["chip_id"]
    assert report["guest"]["consistent"]
    assert report["guest"]["progressed"]


def test_a_name_in_a_table_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    tcb = {"tcb": {"snp": 24, "spl": None}}
    print_table({"attestation": {"source": tcb, "destination": tcb}})
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["attestation", "source", "tcb", "snp", "24"],
        ["attestation", "source", "tcb", "spl", "none"],
        ["attestation", "destination", "tcb", "snp", "24"],
        ["attestation", "destination", "tcb", "spl", "none"],
    ]


def test_demo_prints_a_table_for_people() -> None:
    done = run("demo", *GUEST)
    assert done.returncode == 0
    assert "guest consistent" in done.stdout
    assert "epoch" in done.stderr


def test_send_and_receive(psk: str, destination: Destination) -> None:
    sent = run("send", "--to", destination.address, "--psk-file", psk, *GUEST, "--channels", "2", "--json")
    assert sent.returncode == 0, sent.stderr
    assert json.loads(sent.stdout)["guest"] == {"kind": "simulated"}
    psk_peer = {"kind": "psk", "peer": {"subject": "holder of the pre-shared key"}}
    assert json.loads(sent.stdout)["attestation"] == psk_peer
    code, report, _ = destination.end()
    assert code == 0
    assert report["status"] == "completed"
    assert report["guest"]["consistent"]
    assert report["guest"]["progressed"]


# Refused and ended: one line, the documented code, the guest goes on


def went_on(output: str) -> bool:
    guest = json.loads(output)["guest"]
    return bool(guest["consistent"] and guest["progressed"])


def test_wrong_psk(tmp_path: Path, destination: Destination) -> None:
    wrong = key_file(tmp_path / "wrong", "0f" * 32)
    sent = run("send", "--to", destination.address, "--psk-file", wrong, *GUEST, "--json")
    assert sent.returncode == 3
    assert "pre-shared key" in one_line(sent.stderr)
    assert json.loads(sent.stdout)["error"]["reason"] == "authentication"
    assert went_on(sent.stdout)
    assert destination.process.poll() is None  # it still waits for the right source


@pytest.fixture(scope="module")
def ca_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("ca") / "test-ca"
    made = run("attest", "make-test-ca", str(path))
    assert (made.returncode, made.stdout) == (0, ""), made.stderr
    assert path.stat().st_mode & 0o777 == 0o600
    return str(path)


def emulated(ca_file: str, policy: Path | None = None) -> list[str]:
    rules = [] if policy is None else ["--policy", str(policy)]
    return ["--attest", "emulated", "--test-ca", ca_file, *rules, *GUEST]


@pytest.mark.parametrize("refusing", ["source", "destination"])
def test_a_policy_that_refuses_the_peer(tmp_path: Path, ca_file: str, refusing: str) -> None:
    policy = tmp_path / "policy.json"
    peer = "destination" if refusing == "source" else "source"
    rules = {"version": 1, "measurements": "any", "minimum_tcb": "any", peer: {"measurements": ["00" * 48]}}
    policy.write_text(json.dumps(rules))
    near, far = (policy, None) if refusing == "source" else (None, policy)
    side = Destination(*emulated(ca_file, far), warned=True)
    try:
        sent = run("send", "--to", side.address, *emulated(ca_file, near), "--json")
        assert side.process.poll() is None  # it still waits for a source that it likes
    finally:
        side.process.kill()
        _, _, errors = side.end()
    assert sent.returncode == 3
    report = json.loads(sent.stdout)
    assert report["error"]["reason"] == "policy"
    assert "policy does not accept" in sent.stderr
    assert "Traceback" not in sent.stderr
    # The rule that refused, to the operator of the side that has it and to nobody else.
    assert ("rule measurements refuses" in sent.stderr) is (refusing == "source")
    assert ("rule measurements refuses" in errors) is (refusing == "destination")
    assert went_on(sent.stdout)


def test_emulated_reports_are_refused_by_who_did_not_ask_for_them(
    psk: str, ca_file: str, destination: Destination
) -> None:
    sent = run("send", "--to", destination.address, *emulated(ca_file), "--json")
    assert sent.returncode == 3
    assert json.loads(sent.stdout)["error"]["reason"] == "authentication"
    assert "same kind of attestation" in sent.stderr
    assert went_on(sent.stdout)


@pytest.mark.parametrize(("option", "value", "word"), [("--ram", "32MiB", "RAM"), ("--vcpus", "2", "vCPUs")])
def test_a_guest_of_another_size(
    psk: str, destination: Destination, option: str, value: str, word: str
) -> None:
    sent = run("send", "--to", destination.address, "--psk-file", psk, *GUEST, option, value, "--json")
    assert sent.returncode == 1
    assert word in one_line(sent.stderr)
    assert went_on(sent.stdout)
    code, report, errors = destination.end()
    assert code == 1
    assert report["error"]["reason"] == "geometry"
    assert word in one_line(errors)


def test_nobody_listens(psk: str) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        sent = run("send", "--to", f"127.0.0.1:{port}", "--psk-file", psk, *GUEST, "--json")
    assert sent.returncode == 1
    said = f"pagexfer: cannot connect to 127.0.0.1:{port}: Connection refused"
    assert one_line(sent.stderr) == said  # the address once, and no words of a library around it
    assert went_on(sent.stdout)


def test_strangers_at_the_port(psk: str, destination: Destination) -> None:
    host, port = destination.address.split(":")
    for garbage in (b"GET / HTTP/1.1\r\n\r\n", bytes(64), b"\xff" * 4096, b""):
        with socket.create_connection((host, int(port))) as stranger:
            stranger.sendall(garbage)
    sent = run("send", "--to", destination.address, "--psk-file", psk, *GUEST, "--json")
    assert sent.returncode == 0, sent.stderr
    code, report, errors = destination.end()
    assert code == 0
    assert report["guest"]["consistent"]
    assert errors.count("dropped connection from") == 4
    assert "Traceback" not in errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_cancels(destination: Destination, number: int) -> None:
    destination.process.send_signal(number)
    code, report, errors = destination.end()
    assert code == 1
    assert report["status"] == "cancelled"
    assert "cancelled" in one_line(errors)


def test_a_hangup_that_is_ignored_cancels_nothing(psk: str) -> None:
    side = Destination("--psk-file", psk, "--run-for", "100ms", *GUEST, ignoring=(signal.SIGHUP,))
    side.process.send_signal(signal.SIGHUP)
    sent = run("send", "--to", side.address, "--psk-file", psk, *GUEST)
    assert (sent.returncode, side.end()[0]) == (0, 0)


# Bad usage: code 2, one line, nothing on standard output


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["demo", "--ram", "12 parrots"], "512MiB"),
        (["demo", "--ram", "100"], "write it like 512MiB"),
        (["demo", "--ram", "4096"], "write it like 512MiB"),
        (["demo", "--ram", "0", "--guest", "simulated"], "RAM"),
        (["demo", "--channels", "0"], "--channels"),
        (["demo", "--write-rate", "50"], "128KiB or more for 2 vCPUs"),
        (
            ["send", "--to", "127.0.0.1:1", "--write-rate", "200KiB", "--vcpus", "4"],
            "256KiB or more for 4 vCPUs",
        ),
        (["demo", "--freshness", "host-reported"], "--freshness"),
        (["demo", "--channels", "100000"], "--channels"),
        (["demo", "--vcpus", "99"], "--vcpus"),
        (["demo", "--guest", "simulated", "--ram", "1000TiB"], "cannot provide RAM of 1048576000 MiB"),
        (["demo", "--downtime-limit", "soon"], "300ms"),
        (["demo", "--downtime-limit", "0"], "above zero"),
        (["demo", "--downtime-limit", "500"], "300ms"),
        (["demo", "--downtime-limit", "3600s"], "below 2000 s"),
        (["demo", "--timeout", "9999999999s"], "at most 1000000000s"),
        (["demo", "--guest", "xen"], "--guest"),
        (["send", "--to", "nowhere", "--psk-file", "x"], "HOST:PORT"),
        (["send", "--to", "127.0.0.1:4455"], "--psk-file"),
        (["receive", "--listen", "127.0.0.1:0", "--attest", "emulated"], "--test-ca"),
        (["receive", "--listen", "127.0.0.1:0", "--attest", "snp"], "--policy"),
        (["receive", "--listen", "127.0.0.1:0", "--attest", "tdx"], "--attest"),
        (["receive", "--listen", "127.0.0.1:0", "--psk-file", "x", "--test-ca", "y"], "--test-ca"),
        (["send", "--to", "127.0.0.1:1", "--attest", "emulated", "--test-ca", "/none"], "/none"),
        (["send", "--to", "127.0.0.1:1", "--attest", "snp", "--policy", "/none.toml"], "/none.toml"),
        (["demo", "--attest", "snp"], "--attest"),
        (["attest", "make-test-ca", "/nonexistent/ca"], "/nonexistent/ca"),
        (["attest", "make-test-ca", "ca", "--product", "Rome"], "--product"),
        (["send", "--to", "127.0.0.1:4455", "--psk-file", "/nonexistent/psk"], "/nonexistent/psk"),
        (["receive", "--listen", "127.0.0.1:99999", "--psk-file", "x"], "HOST:PORT"),
        (["frobnicate"], "frobnicate"),
    ],
)
def test_bad_usage(arguments: list[str], word: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2, done.stderr
    assert word in one_line(done.stderr)
    assert not done.stdout


def test_a_qemu_is_not_slowed_down(psk: str) -> None:
    qemu = ["--guest", "qemu", "--qmp", "/nonexistent/qmp", "--auto-converge"]
    done = run("send", "--to", "127.0.0.1:1", "--psk-file", psk, *qemu)
    assert done.returncode == 2
    assert "auto-converge" in one_line(done.stderr)


@pytest.mark.parametrize("group", [[], ["attest"], ["ledger"]])
def test_a_command_without_words_shows_its_help(group: list[str]) -> None:
    done = run(*group)
    assert done.returncode == 2
    assert done.stderr.startswith("Usage: ")
    assert not done.stdout


def test_without_its_extra_the_command_says_what_it_needs() -> None:
    without = "import sys; sys.modules['click'] = None; from pagexfer.__main__ import run; run()"
    done = subprocess.run([sys.executable, "-c", without], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'pagexfer[cli]'" in one_line(done.stderr)


def test_a_key_that_is_too_short(tmp_path: Path) -> None:
    short = key_file(tmp_path / "short", "secret")
    done = run("receive", "--listen", "127.0.0.1:0", "--psk-file", short, *GUEST)
    assert done.returncode == 2
    assert "openssl rand" in one_line(done.stderr)


@pytest.mark.skipif(TSM_REPORTS.is_dir() or SEV_GUEST.exists(), reason="this machine gives SNP reports")
def test_snp_on_a_machine_without_it(tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text('version = 1\nmeasurements = "any"\nminimum_tcb = "any"\n')
    done = run("receive", "--listen", "127.0.0.1:0", "--attest", "snp", "--policy", str(policy), *GUEST)
    assert done.returncode == 2
    assert "no SNP reports on this machine" in one_line(done.stderr)


def test_an_address_in_use(psk: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = run("receive", "--listen", address, "--psk-file", psk, *GUEST)
    assert done.returncode == 2
    assert address in one_line(done.stderr)


def test_a_key_that_others_can_read_is_worth_a_warning(tmp_path: Path, psk: str) -> None:
    key = tmp_path / "psk"
    key.chmod(0o644)
    done = run("send", "--to", "127.0.0.1:1", "--psk-file", psk, *GUEST)
    assert f"chmod 600 {key}" in done.stderr


@pytest.mark.skipif(kvm.unavailable_reason() is not None, reason=str(kvm.unavailable_reason()))
def test_a_kvm_guest_that_is_too_large(psk: str) -> None:
    done = run("send", "--to", "127.0.0.1:1", "--psk-file", psk, "--guest", "kvm", "--ram", "64GiB")
    assert done.returncode == 2
    assert "3GiB" in one_line(done.stderr)


# Values


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("1k", 1024), ("512MiB", 512 << 20), ("1.5 GiB", 3 << 29), ("2gb", 2 << 30), ("0", 0)],
)
def test_sizes(text: str, size: int) -> None:
    assert Size().convert(text, None, None) == size


@pytest.mark.parametrize(
    ("text", "seconds"), [("300ms", 0.3), ("2s", 2.0), ("1.5 S", 1.5), ("3600s", 3600.0)]
)
def test_times(text: str, seconds: float) -> None:
    assert Seconds().convert(text, None, None) == seconds


@pytest.mark.parametrize(
    ("text", "address"),
    [("example.org:1", ("example.org", 1)), ("[2001:db8::7]:4455", ("2001:db8::7", 4455))],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert Address().convert(text, None, None) == address


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (Size(), "-1"),
        (Size(), "1.0001k"),
        (Size(), "9999999TiB"),
        (Seconds(), "-1s"),
        (Seconds(), "0"),
        (Seconds(), "500"),
        (Seconds(), "9999999999s"),
        (Address(), ":80"),
        (Address(), "host:"),
        (Address(), "host:-1"),
        (Address(), "2001:db8::7"),
        (Address(), "2001:db8::7:4455"),
        (Address(), "[2001:db8::7:4455"),
    ],
)
def test_bad_values(kind: click.ParamType[Any], text: str) -> None:
    with pytest.raises(click.BadParameter):
        kind.convert(text, None, None)
