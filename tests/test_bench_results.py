"""What a bench writes: figures with their spread, what they depend on, and the page that is made from them."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from bench import report
from bench.__main__ import main
from bench.files import digest
from bench.measure import Spread, revision
from bench.pair import Watch, children

if TYPE_CHECKING:
    from pathlib import Path


def test_a_spread_has_all_values_and_of_one_value_none_is_shown() -> None:
    three = Spread.of([3.0, 1.0, 2.0])
    assert (three.n, three.values, three.cells(1)) == (3, (3.0, 1.0, 2.0), ("2.0", "1.0", "3.0"))
    assert three.scaled(2).values == (6.0, 2.0, 4.0)
    rates = Spread.of([1.0, 4.0]).rate(8)
    assert (rates.median, rates.minimum, rates.maximum) == (5.0, 2.0, 8.0)
    assert Spread.of([1.5]).cells(2) == ("1.50", "-", "-")


def test_a_result_says_what_it_depends_on(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    assert main(["handshake", "--quick", "--repeats", "2", "--json", str(result)]) == 0
    measured = json.loads(result.read_text())
    environment = measured["environment"]
    assert environment["command"] == f"python -m bench handshake --quick --repeats 2 --json {result}"
    assert environment.keys() >= {"date", "revision", "openssl", "ram", "usable cpus", "load before"}
    assert environment["date"].endswith("+00:00")
    spread = measured["milliseconds"]["psk"]
    assert (spread["n"], len(spread["values"])) == (2, 2)


def test_a_revision_is_marked_where_the_code_is_not_that_of_the_commit(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=x", "-c", "user.email=x"]
        done = subprocess.run(
            ["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    assert revision(tmp_path) == "unknown"
    for name in ("pagexfer", "bench", "docs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "x")
    commit = git("rev-parse", "HEAD")
    assert revision(tmp_path) == commit
    (tmp_path / "results.json").touch()  # no code, and the same for a page that gets its tables
    (tmp_path / "docs" / "file").write_text("x")
    assert revision(tmp_path) == commit
    (tmp_path / "bench" / "new").touch()
    assert revision(tmp_path) == f"{commit}+dirty"


def test_memory_that_a_child_shares_is_not_counted_twice() -> None:
    shared_bytes, own_bytes = 64 << 20, 32 << 20
    memory_fd = os.memfd_create("mailbox")
    os.ftruncate(memory_fd, shared_bytes)
    touch = (
        "import mmap, sys\n"
        f"shared = mmap.mmap({memory_fd}, {shared_bytes})\n"
        "for page in range(0, len(shared), 4096): shared[page] = 1\n"
        f"own = bytearray(b'x' * {own_bytes})\n"
        "print(flush=True)\nsys.stdin.read()"
    )
    watch = Watch(children())
    with subprocess.Popen(
        [sys.executable, "-c", touch],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=[memory_fd],
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdout.readline()
        before = watch.side(0).peak_extra_mib - resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        child.stdin.close()
        child.wait()
    os.close(memory_fd)
    assert 32 <= before < 32 + 2 * 32 + 24  # own memory, twice while it is made, and an interpreter


# The page


def _page(folder: Path, **results: dict[str, object]) -> tuple[Path, list[str]]:
    page = folder / "page.md"
    page.write_text(report.PAGE.read_text())
    (folder / "page").mkdir(exist_ok=True)
    paths = []
    for name, result in results.items():
        paths.append(folder / f"{name}.json")
        paths[-1].write_text(json.dumps(result))
    return page, [*map(str, paths), "--page", str(page)]


def _tables(title: str) -> dict[str, object]:
    table = {"title": title, "columns": ["", "x"], "rows": [["row", "1"]], "note": ""}
    return {"tables": [table]}


def test_a_page_has_the_plots_of_its_results_and_no_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plots = tmp_path / "page"
    plots.mkdir()
    for name in ("links", "scale", "qemu"):
        (plots / f"{name}.png").write_bytes(name.encode())
    links = _tables("links") | {"plot": digest(plots / "links.png")}
    benches = {"links": links, "scale": _tables("scale") | {"plot": "another"}}
    page, arguments = _page(
        tmp_path, all={"bench": "all", "environment": {"command": "python"}, "benches": benches}
    )
    assert main(["report", *arguments]) == 0
    written = page.read_text()
    assert "![links](page/links.png)" in written
    assert "**scale**" in written
    assert "![scale]" not in written
    assert "![qemu]" not in written
    assert f"{plots / 'scale.png'} is left out" in capsys.readouterr().err


def test_a_page_has_the_command_that_was_given(tmp_path: Path) -> None:
    environment = {"command": "python -m bench all --repeats 7", "revision": "abc"}
    page, arguments = _page(tmp_path, all={"bench": "all", "environment": environment, "benches": {}})
    assert main(["report", *arguments]) == 0
    assert "| command | `python -m bench all --repeats 7` |" in page.read_text()


def test_a_later_result_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    first = {"links": _tables("old links"), "scale": _tables("old scale")}
    page, arguments = _page(
        tmp_path,
        all={"bench": "all", "environment": {"command": "one", "date": "monday"}, "benches": first},
        links={"bench": "links", "environment": {"command": "two", "date": "friday"}, **_tables("new links")},
    )
    assert main(["report", *arguments]) == 0
    written = page.read_text()
    assert "**new links**" in written
    assert "**old links**" not in written
    assert "**old scale**" in written
    assert "|  | scale | links |" in written
    assert "| date | monday | friday |" in written


def test_what_a_result_lacks_is_on_the_page(tmp_path: Path) -> None:
    benches = {"scale": _tables("scale") | {"incomplete": "exit code 1: no plot"}}
    page, arguments = _page(
        tmp_path, all={"bench": "all", "environment": {"command": "x"}, "benches": benches}
    )
    assert main(["report", *arguments]) == 0
    assert "Incomplete: exit code 1: no plot." in page.read_text()


def test_a_result_file_that_is_not_there_is_named_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        report.main([str(tmp_path / "none.json")])
    assert f"{tmp_path}/none.json cannot be read: No such file or directory\n" in capfd.readouterr().err
