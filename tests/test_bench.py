"""The benches run, with tiny sizes, and the command in front of them says what is wrong."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from bench import channels, dirty, limits, mailbox
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


def test_dirty(tmp_path: Path) -> None:
    result = tmp_path / "dirty.json"
    dirty.main(["--guests", "1GiB", "--ram", "4MiB", "--repeats", "1", "--json", str(result)])
    measured = json.loads(result.read_text())
    assert {row["operation"] for row in measured["figures"]} >= {"union", "gfns", "first", "epoch"}
    assert all(row["times_copy"] > 0 for row in measured["figures"])
    found = {(row["tracker"], row["density"]): row["pages"] for row in measured["trackers"]}
    assert found["byte map", 0.1] == found["content", 0.1] == 102
    assert not any(pages for (_, density), pages in found.items() if density == 0)


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
