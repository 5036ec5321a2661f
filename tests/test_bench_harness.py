"""What is around the benches: results are kept whatever fails, every end is one line, and nothing is left behind."""

from __future__ import annotations

import argparse
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from bench import limits, report, suite
from bench.__main__ import main
from bench.files import write_whole
from bench.names import BENCHES, PLOTTED
from bench.options import (
    BenchFailed,
    channel_numbers,
    finish,
    listed,
    new_file,
    new_folder,
    numbers,
    parse,
    parser,
    ram,
    rams,
    seed,
    size,
    sizes,
    up_to,
)
from bench.qemu_machine import QemuFailed
from bench.table import Table
from pagexfer.errors import GuestError, Outcome, TransferAborted, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CHECKOUT: Final = Path(__file__).parents[1]
TABLE: Final = Table.of("title", ("", "x"), [("row", "1")])
OLD: Final = b"old"


@contextmanager
def file_size_limit(limit_bytes: int) -> Iterator[None]:
    """Files cannot grow beyond this, as on a full disk: a write is cut there, and the next one fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def wait_until(true: Callable[[], bool], timeout_s: float = 20.0) -> None:
    end = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end, "it does not come true"
        time.sleep(0.05)


# Files


def test_an_older_result_survives_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "result"
    path.write_bytes(OLD)
    with file_size_limit(10), pytest.raises(OSError, match="too large"):
        write_whole(path, bytes(100))
    assert path.read_bytes() == OLD
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_written_anew_keeps_its_mode_and_a_link_to_it_stays(tmp_path: Path) -> None:
    path, link = tmp_path / "result", tmp_path / "link"
    path.write_bytes(OLD)
    path.chmod(0o604)
    link.symlink_to("result")
    write_whole(link, b"new")
    assert link.is_symlink()
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"new", 0o604)


def test_a_link_to_a_file_that_is_not_there_yet_is_written_through(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("target")
    path = new_file(str(link))
    assert link.is_symlink()
    assert not (tmp_path / "target").exists()
    write_whole(path, b"new")
    assert link.is_symlink()
    assert (tmp_path / "target").read_bytes() == b"new"


@pytest.mark.parametrize("converter", [lambda folder: new_file(f"{folder}/new"), new_folder])
def test_a_folder_in_which_no_file_can_be_made_is_told_before(converter: Callable[[str], Path]) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="/proc"):
        converter("/proc")


def test_a_page_that_cannot_be_written_stays_as_it_is_and_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results, page = tmp_path / "results.json", tmp_path / "page.md"
    results.write_text(json.dumps({"bench": "all", "environment": {"command": ""}, "benches": {}}))
    page.write_text(report.PAGE.read_text())
    before = page.read_text()
    with file_size_limit(1000):
        assert main(["report", str(results), "--page", str(page)]) == 1
    assert page.read_text() == before
    assert capsys.readouterr().err == "report: failed: [Errno 27] File too large\n"


# Results that are kept


def test_figures_are_kept_where_the_plot_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def plot(path: Path) -> None:
        raise ImportError("libfreetype.so.6: cannot open shared object file")

    result = tmp_path / "result.json"
    made = parser("limits", "", repeats=1, plots=True)
    options = parse(made, ["--json", str(result), "--plot", str(tmp_path / "plot.png")])
    with pytest.raises(BenchFailed, match="no plot: libfreetype"):
        finish(options, {"figure": 1}, [TABLE], plot)
    assert "title" in capsys.readouterr().out
    assert json.loads(result.read_text())["figure"] == 1
    assert "plot" not in json.loads(result.read_text())


def test_figures_are_kept_where_nobody_reads_the_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = tmp_path / "result.json"
    options = parse(parser("limits", "", repeats=1), ["--json", str(result)])
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(OSError, match="No space"):
            finish(options, {"figure": 1}, [TABLE])
        monkeypatch.undo()
        with pytest.raises(OSError, match="No space"):
            full.close()
    assert json.loads(result.read_text())["figure"] == 1


def fake_bench(folder: Path, monkeypatch: pytest.MonkeyPatch, **code: str) -> None:
    """Have `all` run these lines of Python in place of the benches of their names."""
    run = suite.run_alone

    def run_code(command: list[str]) -> tuple[int, str]:
        script = folder / "bench.py"
        script.write_text(f"import os, sys, time\nresult = sys.argv[5]\n{code[command[3]]}\n")
        return run([sys.executable, str(script), *command[1:]])

    monkeypatch.setattr(suite, "BENCHES", dict.fromkeys(code, ""))
    monkeypatch.setattr(suite, "run_alone", run_code)


GOOD: Final = """open(result, "w").write('{"environment": {}, "figure": 1, "tables": []}')"""


def test_all_keeps_what_was_measured_before_an_interrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def second(name: str, arguments: list[str], result: Path) -> dict[str, object]:
        if name == "second":
            raise KeyboardInterrupt
        return {"figure": 1}

    monkeypatch.setattr(suite, "BENCHES", {"first": "", "second": ""})
    monkeypatch.setattr(suite, "run_one", second)
    result = tmp_path / "all.json"
    with pytest.raises(SystemExit) as end:
        suite.main(["--json", str(result)])
    assert end.value.code == f"all: interrupted after 1 of 2 benches; {result} has first"
    assert json.loads(result.read_text())["benches"] == {"first": {"figure": 1}}


def test_all_goes_on_where_the_disk_is_full_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full = iter([True, False, False])

    def write_json(path: Path, found: dict[str, object]) -> None:
        if next(full):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_whole(path, json.dumps(found).encode())

    fake_bench(tmp_path, monkeypatch, first=GOOD, second=GOOD)
    monkeypatch.setattr(suite, "write_json", write_json)
    result = tmp_path / "all.json"
    suite.main(["--json", str(result)])
    assert f"cannot write {result} yet: No space left on device" in capsys.readouterr().err
    assert json.loads(result.read_text())["benches"].keys() == {"first", "second"}


def test_all_keeps_figures_whose_plot_failed_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_bench(tmp_path, monkeypatch, scale=f"{GOOD}\nsys.exit('scale: failed: no plot: libfreetype')")
    result = tmp_path / "all.json"
    with pytest.raises(SystemExit) as end:
        suite.main(["--json", str(result)])
    assert end.value.code == "all: failed: scale"
    kept = json.loads(result.read_text())["benches"]["scale"]
    assert (kept["figure"], kept["incomplete"]) == (1, "exit code 1: scale: failed: no plot: libfreetype")


def test_all_goes_on_when_a_bench_is_killed_and_ends_what_it_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The child has the bench's standard error, which a reader to its end would wait for.
    left = "if (child := os.fork()) == 0: time.sleep(60)\nopen(os.environ['LEFT'], 'w').write(str(child))\n"
    pid_file = tmp_path / "left"
    monkeypatch.setenv("LEFT", str(pid_file))
    fake_bench(tmp_path, monkeypatch, first=f"{left}os.kill(os.getpid(), 9)", second=GOOD)
    result = tmp_path / "all.json"
    began = time.monotonic()
    with pytest.raises(SystemExit):
        suite.main(["--json", str(result)])
    assert time.monotonic() - began < 30
    benches = json.loads(result.read_text())["benches"]
    assert benches["first"]["failed"].startswith("ended by signal 9")
    assert benches["second"]["figure"] == 1
    assert _gone(int(pid_file.read_text()))


def _gone(process_id: int) -> bool:
    try:
        stat = Path(f"/proc/{process_id}/stat").read_text()
    except OSError:
        return True
    return stat.rpartition(")")[2].split()[0] == "Z"  # whose parent does not look after it


def test_all_runs_only_what_it_is_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_bench(tmp_path, monkeypatch, first=GOOD, second=GOOD, third=GOOD)
    result = tmp_path / "all.json"
    suite.main(["--only", "third,first", "--json", str(result)])
    assert list(json.loads(result.read_text())["benches"]) == ["first", "third"]


def test_all_names_the_benches_where_one_is_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        suite.main(["--only", "limits,nope"])
    assert end.value.code == 2
    assert "'nope': there are limits" in capsys.readouterr().err.splitlines()[-1]


# Ends


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("ignored", [signal.SIGHUP, signal.SIGINT])
def test_sigterm_and_sighup_end_a_bench_like_an_interrupt(
    number: signal.Signals, ignored: signal.Signals
) -> None:
    # A shell starts a job in the background with SIGINT ignored, nohup with SIGHUP.
    command = [sys.executable, "-m", "bench", "channels", "--quick", "--ram", "256MiB"]
    with subprocess.Popen(
        command,
        cwd=CHECKOUT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: (signal.signal(ignored, signal.SIG_IGN), None)[1],
    ) as bench:
        assert bench.stderr is not None
        wait_until(lambda: len(_group(bench.pid)) > 4)  # two servers of multiprocessing, two sides
        sides = _group(bench.pid)
        bench.send_signal(number)
        if number == ignored:
            assert _ignores(bench.pid, number)  # so the kernel has dropped it
            bench.terminate()
        assert bench.wait(30) == 1
        assert bench.stderr.read().splitlines()[-1] == "channels: interrupted"
    wait_until(lambda: all(map(_gone, sides)))


def _ignores(process_id: int, number: int) -> bool:
    status = Path(f"/proc/{process_id}/status").read_text().splitlines()
    mask = next(int(line.split()[1], 16) for line in status if line.startswith("SigIgn:"))
    return bool(mask >> (number - 1) & 1)


def _group(leader: int) -> list[int]:
    """All processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[3] == str(leader):
            found.append(int(stat.parent.name))
    return found


def test_sigterm_to_all_lets_the_bench_end_what_it_began() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "bench", "all", "--only", "channels", "--quick"],
        cwd=CHECKOUT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as everything:
        assert everything.stderr is not None
        for line in everything.stderr:
            if line.startswith("channels: round"):
                break
        bench = int(Path(f"/proc/{everything.pid}/task/{everything.pid}/children").read_text())
        wait_until(lambda: len(_group(bench)) > 4)
        sides = _group(bench)
        everything.terminate()
        said = everything.stderr.read().splitlines()
        assert everything.wait(30) == 1
    assert said[-2:] == ["channels: interrupted", "all: interrupted after 0 of 1 benches"]
    wait_until(lambda: all(map(_gone, sides)))


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (UsageError("no such guest"), 2, "no such guest"),
        (GuestError("a guest has no room"), 1, "failed: a guest has no room"),
        (QemuFailed("it ended"), 1, "failed: it ended"),
        (TransferAborted(Outcome.ENDED, "x", "two\nlines"), 1, "failed: two lines"),
        (MemoryError(), 1, "failed: out of memory"),
        (PermissionError(errno.EACCES, "Denied", "page"), 1, "failed: [Errno 13] Denied: 'page'"),
        (ExceptionGroup("", [ExceptionGroup("", [GuestError("inside")])]), 1, "failed: inside"),
        (BaseExceptionGroup("", [GuestError("inside"), KeyboardInterrupt()]), 1, "interrupted"),
    ],
)
def test_what_was_foreseen_is_one_line(
    raised: BaseException,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(argv: list[str]) -> None:
        raise raised

    monkeypatch.setattr(limits, "main", fail)
    assert main(["limits"]) == code
    assert capsys.readouterr().err == f"limits: {said}\n"


@pytest.mark.parametrize(
    "defect", [KeyError("x"), ExceptionGroup("", [GuestError("foreseen"), KeyError("x")])]
)
def test_a_defect_keeps_its_traceback(defect: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(argv: list[str]) -> None:
        raise defect

    monkeypatch.setattr(limits, "main", fail)
    with pytest.raises(type(defect)):
        main(["limits"])


_PAIR: Final = """
import sys
from bench.pair import SideFailed, run_pair
from tests.test_bench_harness import _no_room
try:
    run_pair(_no_room, _no_room, None)
except SideFailed:
    print("ends: SideFailed", file=sys.stderr)
"""


def _no_room(job: None, host: str, port_or_callback: object) -> None:
    raise MemoryError("Unable to allocate 8 TiB")


def test_a_side_without_memory_is_one_line() -> None:
    # A process of its own: the fork server keeps the standard error that it was started with.
    done = subprocess.run(
        [sys.executable, "-c", _PAIR], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == "failed: out of memory: Unable to allocate 8 TiB\nends: SideFailed\n"


# Options


@pytest.mark.parametrize(
    ("converter", "text"),
    [
        (seed, "-1"),
        (seed, str(2**63)),
        (numbers, "1,1"),
        (numbers, "1,0"),
        (channel_numbers, "4,4"),
        (sizes, "1MiB,0"),
        (sizes, "1MiB,1024KiB"),
        (rams, "1MiB,1MiB"),
        (ram, "0"),
        (size, "0"),
        (up_to(9), "10"),
        (up_to(9), "0"),
        (listed(up_to(9)), "1,10"),
    ],
)
def test_values_that_cannot_be_are_refused(converter: Callable[[str], object], text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=text.rpartition(",")[2]):
        converter(text)


def test_values_that_can_be_are_taken() -> None:
    assert (seed("0"), seed(str(2**63 - 1))) == (0, 2**63 - 1)
    assert listed(up_to(9))("9,1") == [9, 1]
    assert sizes("2MiB,1MiB") == [2 << 20, 1 << 20]


def test_a_bad_seed_is_told_by_every_bench(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("handshake", "all"):
        with pytest.raises(SystemExit) as end:
            main([name, "--seed", "-1"])
        assert end.value.code == 2
        assert "'-1'" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", BENCHES)
def test_those_that_are_said_to_draw_do(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    assert ("--plot FILE.png" in capsys.readouterr().out) == (name in PLOTTED)
