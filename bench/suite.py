"""Every bench in turn, each in a process of its own, into one result file: python -m bench all

    python -m bench all [--quick] [--repeats N] [--json FILE] [--plots FOLDER]

What this machine cannot run is skipped with its reason, which the result file keeps. A bench that fails does not keep the
others from running; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from time import monotonic

from .measure import write_json
from .names import BENCHES, PLOTTED
from .options import need_matplotlib, new_file, positive, progress


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m bench all", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--json", type=new_file, metavar="FILE", help="write the figures of all benches to FILE"
    )
    parser.add_argument(
        "--plots", type=Path, metavar="FOLDER", help="draw NAME.png for each bench that draws"
    )
    parser.add_argument("--quick", action="store_true", help="small cases, few repeats: under five minutes")
    parser.add_argument("--repeats", type=positive, metavar="N", help="of each case (default: each bench's)")
    parser.add_argument("--seed", type=int, default=1, help="of all that is random (default: %(default)s)")
    options = parser.parse_args(argv)
    if options.plots is not None:
        need_matplotlib(parser)
        try:
            options.plots.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"cannot make {options.plots}: {error.strerror}")
    shared = ["--seed", str(options.seed), *(["--quick"] if options.quick else [])]
    shared += ["--repeats", str(options.repeats)] if options.repeats is not None else []
    results = run_all(list(BENCHES), shared, options.plots)
    if options.json is not None:
        write_json(options.json, {"bench": "all", "quick": options.quick, "benches": results})
    failed = [name for name, result in results.items() if "failed" in result]
    if failed:
        sys.exit(f"all: failed: {', '.join(failed)}")


def run_all(names: list[str], shared: list[str], plots: Path | None) -> dict[str, dict[str, object]]:
    """Each bench's result, or why there is none."""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            began = monotonic()
            arguments = [
                *shared,
                *(["--plot", str(plots / f"{name}.png")] if plots and name in PLOTTED else []),
            ]
            results[name] = run_one(name, arguments, Path(folder) / "result.json")
            progress(f"{name}: {monotonic() - began:.0f} s")
    return results


def run_one(name: str, arguments: list[str], result: Path) -> dict[str, object]:
    """One bench in a fresh process, which leaves neither memory nor threads to the next."""
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "bench", name, "--json", str(result), *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        last = ""
        for line in process.stderr:
            sys.stderr.write(line)
            last = line.strip() or last
    if process.returncode == 3:
        return {"skipped": last.removeprefix(f"{name}: skipped: ")}
    if process.returncode or not result.exists():
        return {"failed": f"exit code {process.returncode}: {last}"}
    measured: dict[str, object] = json.loads(result.read_text())
    del measured["environment"]  # the same for all, and in the result file once
    return measured
