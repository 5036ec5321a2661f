"""The benches run, with tiny sizes, and the command in front of them says what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack
from functools import partial
from time import thread_time
from typing import TYPE_CHECKING

import pytest

from bench import (
    audit,
    channels,
    compression,
    convergence,
    dirty,
    limits,
    links,
    mailbox,
    profile,
    qemu,
    report,
    scale,
    suite,
)
from bench.__main__ import main
from bench.names import BENCHES
from bench.namespace import shaped_link
from bench.options import CannotRun, new_file
from bench.pair import Route, SideFailed, Watch, children
from bench.qemu_machine import QemuFailed
from bench.qemu_moves import Taken
from bench.relay import paced_relay
from bench.stopwatch import Stopwatch
from bench.table import Table
from bench.tcp import Plain, run_plain

from .qemu_guests import needs_qemu

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
    "option",
    [
        ["--repeats", "0"],
        ["--ram", "much"],
        ["--ram", "1"],
        ["--ram", "1025KiB"],
        ["--channels", "1,2000"],
        ["--json", "/no/such/folder/file"],
        ["--json", "/dev/full"],
        ["--plot", "plot.xyz"],
    ],
)
def test_a_bad_option_ends_with_code_2(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["channels", *option])
    assert end.value.code == 2
    assert option[1].rpartition(",")[2] in capsys.readouterr().err.splitlines()[-1]


def test_a_file_that_is_looked_at_before_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    assert new_file(str(tmp_path / "old")).read_text() == "old"
    assert not new_file(str(tmp_path / "new")).exists()


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (SideFailed("a process ended without a result"), "failed: a process ended without a result"),
        (KeyboardInterrupt(), "interrupted"),
    ],
)
def test_a_side_that_fails_and_an_interrupt_are_one_line(
    raised: BaseException, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(argv: list[str]) -> None:
        raise raised

    monkeypatch.setattr(limits, "main", fail)
    assert main(["limits"]) == 1
    assert capsys.readouterr().err == f"limits: {said}\n"


def test_limits(tmp_path: Path) -> None:
    result = tmp_path / "limits.json"
    limits.main(["--ram", "4MiB", "--streams", "1,2", "--repeats", "1", "--json", str(result)])
    measured = json.loads(result.read_text())
    assert measured["tcp"].keys() == {"1", "2"}
    assert all(spread["median"] > 0 for spread in measured["seconds"].values())
    assert 0 < measured["doorbell"]["p50_us"] <= measured["doorbell"]["p99_us"]


def test_dirty(tmp_path: Path) -> None:
    result = tmp_path / "dirty.json"
    dirty.main(["--guests", "1GiB", "--ram", "4MiB", "--repeats", "1", "--json", str(result)])
    measured = json.loads(result.read_text())
    assert {row["operation"] for row in measured["figures"]} >= {"union", "gfns", "first", "epoch"}
    assert all(row["times_copy"] > 0 for row in measured["figures"])
    found = {(row["tracker"], row["density"]): row["pages"] for row in measured["trackers"]}
    assert found["byte map", 0.1] == found["content", 0.1] == 102
    assert not any(pages for (_, density), pages in found.items() if density == 0)


def test_channels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "CONTENTS", {"half zero": 0.5})
    monkeypatch.setattr(channels, "CARRIED", (2,))
    result, plot = tmp_path / "channels.json", tmp_path / "channels.png"
    small = ["--ram", "8MiB", "--channels", "2", "--bundles", "16", "--repeats", "1"]
    channels.main([*small, "--json", str(result), "--plot", str(plot)])
    measured = json.loads(result.read_text())
    assert measured["channels"].keys() == {"2"}
    assert {name.removesuffix(" (default)") for name in measured["carriers"]["2"]["engines"]} >= {
        f"{engine}, {carrier}" for engine in ("local", "isolated") for carrier in ("loop", "threads")
    }
    assert measured["channels"]["2"]["engines"].keys() == {"local", "isolated"}
    local, isolated = (measured["channels"]["2"]["engines"][engine] for engine in ("local", "isolated"))
    # The engine's process, an interpreter of its own, is counted.
    assert isolated["extra_mib"][0]["median"] > 1.3 * local["extra_mib"][0]["median"]
    assert measured["environment"]["revision"]
    tables = [Table.load(table) for table in measured["tables"]]
    assert [table.title.split(",")[0] for table in tables] == [
        "By channels",
        "By content",
        "By pages in a bundle",
        "By what carries the channels",
    ]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_what_a_child_spends_counts_unless_it_is_spared() -> None:
    busy = "import time\nwhile time.process_time() < 0.2: pass\nprint(flush=True)\ninput()"
    with subprocess.Popen(
        [sys.executable, "-c", busy], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        counting, sparing = Watch(), Watch(children())
        child.stdout.readline()
        counting.look()
        child.stdin.close()
        child.wait()
        assert counting.side(0).cpu_seconds > 0.15
        assert sparing.side(0).cpu_seconds < 0.15


def test_profile_finds_every_kind_of_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "CONTENTS", {"half zero": 0.5})
    result = tmp_path / "profile.json"
    profile.main(["--ram", "32MiB", "--channels", "2", "--repeats", "1", "--json", str(result)])
    figure = json.loads(result.read_text())["figures"]["half zero"]
    kinds = {kind: tuple(side["median"] for side in sides) for kind, sides in figure["s_per_gib"].items()}
    assert all(kinds[kind][0] > 0 for kind in (profile.SEND, profile.SEAL, profile.LOOK, profile.PYTHON))
    assert all(kinds[kind][1] > 0 for kind in (profile.RECEIVE, profile.OPEN, profile.WRITE, profile.PYTHON))
    # A destination seals two short answers, and that is all.
    assert kinds[profile.SEAL][1] < 0.1 * kinds[profile.SEAL][0]
    assert kinds[profile.WRITE][0] == 0
    totals = [side["median"] for side in figure["total_s_per_gib"]]
    assert [sum(sides) for sides in zip(*kinds.values(), strict=True)] == pytest.approx(totals)


def test_a_stopwatch_gives_each_call_its_own_time() -> None:
    def spin(seconds: float) -> None:
        end = thread_time() + seconds
        while thread_time() < end:
            pass

    def outer() -> None:
        spin(0.02)
        inner(0.03)

    stopwatch = Stopwatch()
    inner = stopwatch.timed("inner", spin)
    stopwatch.timed("outer", outer)()
    taken = stopwatch.lap()
    assert taken["outer"].cpu_seconds == pytest.approx(0.02, rel=0.1)
    assert taken["inner"].cpu_seconds == pytest.approx(0.03, rel=0.1)
    assert stopwatch.lap() == {}


def test_mailbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailbox, "MAX_RINGS", 100)
    monkeypatch.setattr(mailbox, "RINGS", 500)
    monkeypatch.setattr(mailbox, "CHANNELS", (4,))
    result, plot = tmp_path / "mailbox.json", tmp_path / "mailbox.png"
    small = ["--quick", "--ram", "8MiB", "--slots", "1,2", "--repeats", "1"]
    mailbox.main([*small, "--json", str(result), "--plot", str(plot)])
    measured = json.loads(result.read_text())
    assert measured["sealing"]["2 KiB"]["1"]["handshakes_per_gib"] == 1 << 19
    assert measured["round_trips"].keys() == {"two eventfds", "doorbells", "command", "direct call"}
    assert measured["migrations"].keys() == {"4"}
    assert [Table.load(table).rows for table in measured["tables"]]
    assert plot.read_bytes().startswith(b"\x89PNG")


@needs_qemu
def test_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu, "PREALLOCATED", (True,))
    result, plot = tmp_path / "qemu.json", tmp_path / "qemu.png"
    small = ["--ram", "64MiB", "--channels", "1", "--content", "incompressible", "--repeats", "1"]
    qemu.main([*small, "--json", str(result), "--plot", str(plot)])
    measured = json.loads(result.read_text())
    figures = {figure["way"]: figure for figure in measured["figures"]}
    assert figures.keys() == {"multifd", "multifd TLS", "pagexfer", "pagexfer threads"}
    assert all(
        figure["seconds"]["median"] > 0 < figure["downtime_ms"]["median"] for figure in figures.values()
    )
    # Encryption costs several times what moving does: were it left out, this would show.
    plain = figures["multifd"]["both_cpu_s_per_gib"]["median"]
    sealed = [figure for way, figure in figures.items() if way != "multifd"]
    assert all(figure["both_cpu_s_per_gib"]["median"] > 1.5 * plain for figure in sealed)
    assert figures["multifd TLS"]["rate_of_tls"]["median"] == 1
    assert "skipped" not in measured  # which in a result file is a bench that did not run
    assert "the targets are 2 and 0.6" in measured["tables"][0]["note"]
    assert plot.read_bytes().startswith(b"\x89PNG")


@needs_qemu
def test_compression(tmp_path: Path) -> None:
    pytest.importorskip("zstandard", reason="compression needs the zstd extra")
    result = tmp_path / "compression.json"
    small = ["--ram", "16MiB", "--content", "text", "--links", "200", "--repeats", "1"]
    compression.main([*small, "--json", str(result)])
    measured = json.loads(result.read_text())
    sent = {figure["way"]: figure["sent_of_ram"]["median"] for figure in measured["figures"]}
    assert sent.keys() == {"multifd", "multifd zstd", "multifd zstd TLS", "pagexfer", "pagexfer zstd"}
    assert all((part < 0.5) is ("zstd" in way) for way, part in sent.items())
    assert "text" in measured["tables"][0]["note"]


def test_compression_has_levels_up_to_9(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["compression", "--level", "10"])
    assert end.value.code == 2
    assert "1 to 9" in capsys.readouterr().err.splitlines()[-1]


@needs_qemu
def test_a_way_that_leaves_ram_behind_is_no_migration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu, "WAYS", {"multifd TLS": lambda *_: Taken(1.0, 0.1, 1.0, 1.0)})
    with pytest.raises(QemuFailed, match="RAM of both sides differs"):
        qemu.measure("incompressible", 4 << 20, [1], 1, 1)


def test_without_qemu_its_bench_is_skipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    assert main(["qemu"]) == 3
    assert capsys.readouterr().err == "qemu: skipped: qemu-system-x86_64 is not installed\n"


@pytest.mark.parametrize(("option", "value"), [("--content", "full"), ("--ram", "4097KiB")])
def test_qemu_takes_whole_mib_and_contents_that_it_knows(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["qemu", option, value])
    assert end.value.code == 2
    assert value in capsys.readouterr().err.splitlines()[-1]


def test_an_uneven_row_is_no_table() -> None:
    with pytest.raises(ValueError, match="2 cells"):
        Table.of("title", ("a", "b"), [("1",)])


def test_convergence_meets_each_policy_and_says_how_well_it_foresaw(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = tmp_path / "result.json"
    small = ["--guest", "simulated", "--ram", "16MiB", "--rates", "1", "--repeats", "1"]
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


def test_a_relay_holds_each_flow_to_its_rate() -> None:
    sender, _ = run_plain(Plain(10_000_000, 2), Route(lead=partial(paced_relay, flow_bytes_per_s=20_000_000)))
    assert sender.seconds > 0.8 * 5_000_000 / 20_000_000


def test_a_shared_link_holds_each_flow_and_all_together() -> None:
    link = links.Link(20, 40)
    seconds = {}
    for flows in (1, 4):
        with ExitStack() as stack:
            try:
                route = stack.enter_context(link.route())
            except CannotRun as reason:
                pytest.skip(str(reason))
            seconds[flows] = run_plain(Plain(flows * 8_000_000, flows), route)[0].seconds
    assert seconds[1] > 0.8 * 8 / 20
    assert seconds[4] > 0.8 * 32 / 40


def test_links_more_channels_converge_where_one_does_not(tmp_path: Path) -> None:
    result, plot = tmp_path / "links.json", tmp_path / "links.png"
    # A guest that writes all of its RAM within the downtime limit: four flows carry that in as much time, one does not.
    small = [
        "--ram",
        "8MiB",
        "--channels",
        "1,4",
        "--flows",
        "40",
        "--rates",
        "1000",
        "--downtime-limit",
        "150ms",
        "--repeats",
        "1",
    ]
    links.main([*small, "--json", str(result), "--plot", str(plot)])
    measured = json.loads(result.read_text())
    one, four = measured["links"][0]["figures"]
    assert (one["channels"], one["converged"], one["downtime_ms"]) == (1, 0, None)
    assert (four["channels"], four["converged"]) == (4, 1)
    assert "not at 1000 MB/s" in measured["tables"][0]["note"]
    assert len(measured["links"]) == 2 or measured["shared_link_skipped"]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_shared_link_that_cannot_be_made_is_skipped_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(CannotRun, match=r"root|there is no ip"), shaped_link(1_000_000, 1_000_000):
        pytest.fail("there is no link")


def test_scale(tmp_path: Path) -> None:
    result, plot = tmp_path / "scale.json", tmp_path / "scale.png"
    small = ["--ram", "4MiB,8MiB,1GiB", "--memory", "64MiB", "--repeats", "1"]
    scale.main([*small, "--json", str(result), "--plot", str(plot)])
    measured = json.loads(result.read_text())
    assert [size["ram_bytes"] for size in measured["sizes"]] == [4 << 20, 8 << 20]
    assert measured["left_out_bytes"] == [1 << 30]
    assert "1 GiB" in measured["tables"][0]["note"]
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("ram", ["1MiB", "32MiB"])
def test_audit(tmp_path: Path, ram: str) -> None:
    result = tmp_path / "audit.json"
    # Neither RAM nor the tables are whole bundles, and one RAM is less than a bundle.
    audit.main(["--quick", "--ram", ram, "--table", "2", "--repeats", "1", "--json", str(result)])
    measured = json.loads(result.read_text())
    assert {rate["operation"] for rate in measured["rates"]} == {"copy", "audit", "audit, 5% pending"}
    assert measured["move"].keys() == {"host-reported", "digest-audit"}
    assert measured["manifest"].keys() == {"1", "2"}


def test_a_line_has_its_fixed_cost_and_its_cost_per_gib() -> None:
    line = scale.Line.through([1.0, 2.0, 8.0], [2.5, 3.0, 6.0])
    assert (line.fixed, line.per_gib, line.off) == pytest.approx((2.0, 0.5, 0.0))
    assert line.off_by(8.0, 9.0) == pytest.approx(0.5)


def test_without_memory_scale_is_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scale", "--memory", "1MiB"]) == 3
    assert capsys.readouterr().err.startswith("scale: skipped: there is no memory")


def test_a_bench_that_is_not_there_is_skipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(BENCHES, "absent", "no module has this name")
    assert main(["absent"]) == 3
    assert capsys.readouterr().err == "absent: skipped: it is not part of this checkout\n"


def test_without_the_command_no_bench_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "click", None)
    monkeypatch.setattr("bench.__main__.find_spec", lambda name: None if name == "click" else name)
    assert main(["limits"]) == 3
    assert "pip install 'pagexfer[cli]'" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--plots", "/dev/null/plots"], ["--json", "/no/such/folder/file"]])
def test_all_looks_at_its_files_before_it_measures(
    option: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(suite, "BENCHES", {})
    with pytest.raises(SystemExit) as end:
        suite.main(option)
    assert end.value.code == 2
    assert option[1] in capsys.readouterr().err.splitlines()[-1]


def test_all_keeps_results_reasons_and_failures(tmp_path: Path) -> None:
    result = tmp_path / "one.json"
    measured = suite.run_one("handshake", ["--quick", "--repeats", "1"], result)
    assert measured["tables"]
    assert "environment" not in measured
    skipped = suite.run_one("scale", ["--memory", "1MiB"], result)
    assert str(skipped["skipped"]).startswith("there is no memory")
    failed = suite.run_one("scale", ["--repeats", "0"], result)
    assert str(failed["failed"]).startswith("exit code 2")


def test_all_then_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "BENCHES", {"handshake": ""})
    result, page = tmp_path / "all.json", tmp_path / "page.md"
    suite.main(["--quick", "--repeats", "1", "--json", str(result), "--plots", str(tmp_path / "page")])
    assert json.loads(result.read_text())["benches"]["handshake"]["repeats"] == 1
    page.write_text(report.PAGE.read_text())
    (tmp_path / "page" / "links.png").touch()
    report.main([str(result), "--page", str(page)])
    written = page.read_text()
    assert "| psk |" in written
    assert "Not measured: not among the results." in written
    assert "![" not in written
    report.main([str(result), "--page", str(page)])
    assert page.read_text() == written


@pytest.mark.parametrize(
    ("results", "page", "said"),
    [
        ("no JSON", "", "is no JSON"),
        ("[]", "", "not the result of python -m bench all"),
        ('{"bench": "all"}', "", "no benches"),
        ('{"bench": "all", "environment": {}, "benches": {}}', "", "does not say which command wrote it"),
        ('{"bench": "links", "environment": {"command": ""}}', "", "links has no tables"),
        (
            '{"bench": "all", "environment": {"command": ""}, "benches": {}}',
            "",
            "no place of its own for env",
        ),
    ],
)
def test_what_is_no_result_or_no_page_is_one_line(
    results: str, page: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.json").write_text(results)
    (tmp_path / "page.md").write_text(page)
    with pytest.raises(SystemExit) as end:
        report.main([str(tmp_path / "results.json"), "--page", str(tmp_path / "page.md")])
    assert end.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "page.md").read_text() == page
