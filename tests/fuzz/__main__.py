"""Coverage-guided fuzzing with atheris (the `fuzz` extra): python -m tests.fuzz [--seconds 5] [TARGET ...]

Each target runs in a process of its own, from its seeds on. Ends with exit code 1 where a target fails; the input that it
failed on is then in the current directory, as libFuzzer leaves it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path


def main() -> int:
    """Run the targets as many at a time as there are processors; returns the exit code."""
    parser = argparse.ArgumentParser(
        "python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=int, default=5, help="for each target")
    parser.add_argument("--seed", type=int, default=0, help="0 for another one in every run")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    options = parser.parse_args()
    if find_spec("atheris") is None:
        parser.error("fuzzing needs the fuzz extra: pip install 'pagexfer[fuzz]'")
    if options.alone:
        _fuzz(options.targets[0], options.seconds, options.seed)
    from .targets import TARGETS

    names = options.targets or [target.name for target in TARGETS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return max(pool.map(partial(_apart, seconds=options.seconds, seed=options.seed), names))


def _apart(name: str, seconds: int, seed: int) -> int:
    command = [sys.executable, "-m", "tests.fuzz", "--alone"]
    command += ["--seconds", str(seconds), "--seed", str(seed), name]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stderr.strip().splitlines() if not line.startswith("INFO")]
    print(f"{name:20}{lines[-1] if lines else 'said nothing'}", flush=True)
    if done.returncode:
        print(done.stdout, *lines, sep="\n")
    return int(done.returncode != 0)


def _fuzz(name: str, seconds: int, seed: int) -> None:
    """Fuzz one target for ever, or for so many seconds; libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["pagexfer"]):
        from .seeds import seeds_of
        from .targets import TARGETS
    target = next(target for target in TARGETS if target.name == name)
    with tempfile.TemporaryDirectory() as folder:
        for number, start in enumerate(seeds_of(target)):
            (Path(folder) / str(number)).write_bytes(start)
        arguments = [
            sys.argv[0],
            folder,
            f"-max_total_time={seconds}",
            "-max_len=70000",
            "-timeout=10",
            f"-seed={seed}",
        ]
        atheris.Setup(arguments, target.run)
        atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
