"""The benches run, with tiny sizes, and the command in front of them says what is wrong."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from bench import channels, convergence, limits, mailbox
from bench.__main__ import main
from bench.names import BENCHES
from bench.table import Table

if TYPE_CHECKING:
    from pathlib import Path


def test_an_unknown_bench_is_one_line_with_the_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nope"]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert all(name in said for name in BENCHES)


def test_without_a_name_all_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    said = capsys.readouterr().out
    assert all(name in said for name in BENCHES)


@pytest.mark.parametrize(
    "option", [["--repeats", "0"], ["--ram", "much"], ["--json", "/no/such/folder/file"]]
)
def test_a_bad_option_ends_with_code_2(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["channels", *option])
    assert end.value.code == 2
    assert option[1] in capsys.readouterr().err.splitlines()[-1]


def test_limits(tmp_path: Path) -> None:
    result = tmp_path / "limits.json"
    limits.main(["--ram", "4MiB", "--streams", "1,2", "--repeats", "1", "--json", str(result)])
    measured = json.loads(result.read_text())
    assert measured["tcp"].keys() == {"1", "2"}
    assert all(spread["median"] > 0 for spread in measured["seconds"].values())


def test_channels(tmp_path: Path) -> None:
    result, plot = tmp_path / "channels.json", tmp_path / "channels.png"
    small = ["--ram", "8MiB", "--channels", "1,2", "--bundles", "16", "--repeats", "1"]
    channels.main([*small, "--json", str(result), "--plot", str(plot)])
    measured = json.loads(result.read_text())
    assert measured["channels"].keys() == {"1", "2"}
    assert measured["environment"]["revision"]
    assert [Table.load(table).rows for table in measured["tables"]]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_mailbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailbox, "MAX_RINGS", 100)
    monkeypatch.setattr(mailbox, "RINGS", 500)
    result, plot = tmp_path / "mailbox.json", tmp_path / "mailbox.png"
    small = ["--quick", "--ram", "8MiB", "--slots", "1,2", "--repeats", "1"]
    mailbox.main([*small, "--json", str(result), "--plot", str(plot)])
    measured = json.loads(result.read_text())
    assert measured["sealing"]["2 KiB"]["1"]["handshakes_per_gib"] == 1 << 19
    assert measured["round_trips"].keys() == {"two eventfds", "direct call", "slot"}
    assert measured["migrations"].keys() == {"1", "4"}
    assert [Table.load(table).rows for table in measured["tables"]]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_an_uneven_row_is_no_table() -> None:
    with pytest.raises(ValueError, match="2 cells"):
        Table.of("title", ("a", "b"), [("1",)])


def test_convergence_meets_each_policy_and_says_how_well_it_foresaw(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = tmp_path / "result.json"
    small = ["--guest", "simulated", "--ram", "16MiB", "--rates", "1MiB", "--repeats", "1"]
    assert main(["convergence", *small, "--json", str(result)]) == 0
    assert "1 of 1" in capsys.readouterr().out
    written = json.loads(result.read_text())
    assert [run["policy"] for run in written["runs"]] == ["plain", "throttle", "ramp"]
    assert written["prediction"]["completed"] == 3


def test_a_forecast_is_judged_against_what_came() -> None:
    def run(expected_ms: float, reason: str = "") -> convergence.Run:
        return convergence.Run("plain", 0, reason, 1, 1.0, 100.0, expected_ms, 0.0)

    judged = convergence.prediction([run(125.0), run(74.0), run(100.0), run(1.0, "timeout")])
    assert (judged["completed"], judged["within"]) == (3, 2)
    assert judged["largest_error"] == pytest.approx(0.26)
    assert convergence.prediction([]) == {
        "completed": 0,
        "within": 0,
        "median_error": 0.0,
        "largest_error": 0.0,
    }
