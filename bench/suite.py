"""Every bench in turn, each in a process of its own, into one result file: python -m bench all

    python -m bench all [--quick] [--repeats N] [--only NAME,NAME] [--json FILE] [--plots FOLDER]

What this machine cannot run is skipped with its reason, which the result file keeps. A bench that fails does not keep the
others from running; the exit code is then 1. The result file is written after each bench: whatever ends a run, what was
measured until then is in it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import IO, TYPE_CHECKING, Final

from .files import replaceable
from .measure import write_json
from .names import BENCHES, PLOTTED
from .options import add_shared, command, need_matplotlib, new_folder, progress, provenance

if TYPE_CHECKING:
    from collections.abc import Mapping

# To end what it began, for a bench that was interrupted; and for the last of what was said to arrive.
PATIENCE_S: Final = 20.0


def main(argv: list[str] | None = None) -> None:
    made = command("all", __doc__)
    add_shared(made, quick="few repeats: under five minutes", repeats="each bench's")
    made.add_argument(
        "--only", type=_names, default=list(BENCHES), metavar="NAME,NAME", help="these benches (default: all)"
    )
    made.add_argument(
        "--plots", type=new_folder, metavar="FOLDER", help="draw NAME.png for each bench that draws"
    )
    options = made.parse_args(argv)
    if options.plots is not None:
        need_matplotlib(made)
    about = {"environment": provenance(made, argv), "bench": "all", "quick": options.quick}
    shared = ["--seed", str(options.seed), *(["--quick"] if options.quick else [])]
    shared += ["--repeats", str(options.repeats)] if options.repeats is not None else []
    results: dict[str, dict[str, object]] = {}
    written = ""
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name in options.only:
                began = monotonic()
                drawn = options.plots is not None and name in PLOTTED
                plot = ["--plot", str(options.plots / f"{name}.png")] if drawn else []
                results[name] = run_one(name, [*shared, *plot], Path(folder) / "result.json")
                progress(f"{name}: {monotonic() - began:.0f} s")
                if options.json is not None and _keep(options.json, {**about, "benches": results}):
                    written = f"; {options.json} has {', '.join(results)}"
    except KeyboardInterrupt:
        sys.exit(f"all: interrupted after {len(results)} of {len(options.only)} benches{written}")
    if options.json is not None:
        write_json(options.json, {**about, "benches": results})
    failed = [name for name, result in results.items() if "failed" in result or "incomplete" in result]
    if failed:
        sys.exit(f"all: failed: {', '.join(failed)}")


def _names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in BENCHES:
            raise argparse.ArgumentTypeError(f"no bench {name!r}: there are {', '.join(BENCHES)}")
    return [name for name in BENCHES if name in names]


def _keep(path: Path, result: Mapping[str, object]) -> bool:
    """Write what there is so far; a disk that is full may have room again before the end."""
    if not replaceable(path):  # a pipe or a device: it takes one result, the last
        return False
    try:
        write_json(path, result)
    except OSError as error:
        progress(f"all: cannot write {path} yet: {error.strerror}")
        return False
    return True


def run_one(name: str, arguments: list[str], result: Path) -> dict[str, object]:
    """One bench in a fresh process, which leaves neither memory, threads nor processes to the next."""
    result.unlink(missing_ok=True)
    code, last = run_alone([sys.executable, "-m", "bench", name, "--json", str(result), *arguments])
    if code == 3:
        return {"skipped": last.removeprefix(f"{name}: skipped: ")}
    how = f"{f'exit code {code}' if code > 0 else f'ended by signal {-code}'}: {last}"
    if not result.exists():
        return {"failed": how}
    measured: dict[str, object] = json.loads(result.read_text())
    del measured["environment"]  # the same for all, and in the result file once
    return measured | ({"incomplete": how} if code else {})


def run_alone(command: list[str]) -> tuple[int, str]:
    """The exit code of a command and the last line that it said on standard error, all of which is passed on.

    When its own process has ended, those that it has left are killed: where it was killed itself, nobody else does, and
    they would go on beside the next bench.
    """
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True
    )
    assert process.stderr is not None
    last: list[str] = []
    # Not read to its end here: whatever has the pipe may live longer than the process.
    reading = threading.Thread(target=_pass_on, args=(process.stderr, last), daemon=True)
    reading.start()
    try:
        process.wait()
    except KeyboardInterrupt:
        process.terminate()  # an interrupt to a bench, which then ends what it began
        with suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE_S)
        raise
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reading.join(PATIENCE_S)
    return process.returncode, "".join(last)


def _pass_on(lines: IO[str], last: list[str]) -> None:
    with lines:
        for line in lines:
            with suppress(OSError):  # nobody reads it any more, which is no reason to stop
                sys.stderr.write(line)
            last[:] = [line.strip()] if line.strip() else last
