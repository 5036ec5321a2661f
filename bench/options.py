"""What every bench shares: its options, and how it hands over what it measured.

A bench is a module with `main(argv)`: it makes its parser with `parser`, adds options of its own, parses with `parse`, and
ends with `finish`. Where this machine lacks what it needs, it raises `CannotRun` with the reason, and where something else
than the bench itself fails, `BenchFailed`.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pagexfer.errors import PagexferError, UsageError
from pagexfer.wire.constants import MAX_CHANNELS, PAGE_SIZE

from .files import digest, try_file, try_folder
from .measure import environment, write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from .table import Table

QUICK_REPEATS: Final = 3
# Of RAM that is mostly zero the workload has a twentieth, and needs eight pages.
_LEAST_RAM: Final = 1 << 20
# A guest keeps it in a word of its RAM.
_MAX_SEED: Final = 2**63 - 1


class CannotRun(Exception):
    """This machine cannot run the bench; the message says in one line what is missing."""


class BenchFailed(Exception):
    """A bench has no result, or not all that was asked for; the message says in one line why."""


# What ends a bench without being a defect of it.
_FORESEEN: Final = (CannotRun, BenchFailed, PagexferError, MemoryError, OSError)


def why(error: BaseException) -> tuple[int, str] | None:
    """Exit code and one line for the end of a bench. None for a defect, which is better known by its traceback."""
    causes = _causes(error)
    if any(isinstance(cause, KeyboardInterrupt) for cause in causes):
        return 1, "interrupted"
    if not all(isinstance(cause, _FORESEEN) for cause in causes):
        return None
    said = " ".join(str(causes[0]).split())
    match causes[0]:
        case CannotRun():
            return 3, f"skipped: {said}"
        case UsageError():
            return 2, said
        case MemoryError():
            return 1, f"failed: out of memory: {said}".removesuffix(": ")
    return 1, f"failed: {said}"


def _causes(error: BaseException) -> list[BaseException]:
    if not isinstance(error, BaseExceptionGroup):
        return [error]
    return [cause for inner in error.exceptions for cause in _causes(inner)]


def command(name: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser without options for one command of `python -m bench`; `doc` is the docstring of its module."""
    return argparse.ArgumentParser(
        f"python -m bench {name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_shared(made: argparse.ArgumentParser, *, quick: str, repeats: str) -> None:
    """The options that single benches and `all` share; `quick` and `repeats` are part of their help."""
    made.add_argument("--json", type=new_file, metavar="FILE", help="write all figures to FILE as well")
    made.add_argument("--quick", action="store_true", help=f"small cases, {quick}")
    made.add_argument(
        "--repeats", type=positive, metavar="N", help=f"repeats of each case (default: {repeats})"
    )
    made.add_argument("--seed", type=seed, default=1, help="of all that is random (default: %(default)s)")


def provenance(made: argparse.ArgumentParser, argv: Sequence[str] | None) -> dict[str, str | int]:
    """The command as it was given, and what else its figures depend on: for the head of the result file."""
    given = sys.argv[1:] if argv is None else argv
    return {"command": shlex.join([*made.prog.split(), *given]), **environment()}


def parser(
    bench: str, doc: str | None, *, repeats: int, quick_repeats: int = QUICK_REPEATS, plots: bool = False
) -> argparse.ArgumentParser:
    """A parser with the shared options; `doc` is the docstring of `bench`, `plots` whether it can draw."""
    made = command(bench, doc)
    add_shared(made, quick=f"repeats {quick_repeats}", repeats=str(repeats))
    if plots:
        made.add_argument("--plot", type=new_png, metavar="FILE.png", help="draw the figures as well")
    made.set_defaults(bench=bench, full_repeats=repeats, quick_repeats=quick_repeats, plot=None)
    return made


def parse(made: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse, with the number of repeats filled in. Ends the process with code 2 and one line where an option is bad."""
    options = made.parse_args(argv)
    if options.repeats is None:
        options.repeats = options.quick_repeats if options.quick else options.full_repeats
    if options.plot is not None:
        need_matplotlib(made)
    options.environment = provenance(made, argv)
    return options


def need_matplotlib(made: argparse.ArgumentParser) -> None:
    """End the process with code 2 and one line where plots cannot be drawn."""
    if find_spec("matplotlib") is None:
        made.error("plots need the bench extra: pip install 'pagexfer[bench]'")


def finish(
    options: argparse.Namespace,
    figures: Mapping[str, object],
    tables: Sequence[Table],
    plot: Callable[[Path], None] | None = None,
) -> None:
    """Print the tables, and write plot and figures where asked for. Raises BenchFailed where only these two fail."""
    result = {
        "environment": options.environment,
        "bench": options.bench,
        "quick": options.quick,
        "repeats": options.repeats,
        "seed": options.seed,
        **figures,
        "tables": [asdict(table) for table in tables],
    }
    try:
        for table in tables:
            print(table.text(), end="\n\n", flush=True)
        if options.plot is not None and plot is not None:
            _draw(plot, options.plot)
            result["plot"] = digest(options.plot) if options.plot.is_file() else ""
    finally:  # what was measured is worth keeping, whatever became of plot and terminal
        if options.json is not None:
            try:
                write_json(options.json, result)
            except OSError as error:
                raise BenchFailed(f"cannot write {options.json}: {error.strerror}") from error


def _draw(plot: Callable[[Path], None], path: Path) -> None:
    try:
        plot(path)
    except (ImportError, OSError) as error:  # the library is no good, or the disk; all else is a defect
        raise BenchFailed(f"no plot: {error}") from error


def progress(line: str) -> None:
    """Say what is being measured, apart from the results."""
    print(line, file=sys.stderr, flush=True)


def seed(text: str) -> int:
    """A number from 0 on, as random generators take it."""
    if not text.isdecimal() or int(text) > _MAX_SEED:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to {_MAX_SEED}")
    return int(text)


def positive(text: str) -> int:
    """A number from 1 on."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def up_to(maximum: int) -> Callable[[str], int]:
    """A converter to numbers from 1 to `maximum`."""

    def number(text: str) -> int:
        if not text.isdecimal() or not 1 <= int(text) <= maximum:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to {maximum}")
        return int(text)

    return number


def listed(convert: Callable[[str], int]) -> Callable[[str], list[int]]:
    """A converter to several values that are all different, with commas between; `convert` takes each."""

    def several(text: str) -> list[int]:
        found = [convert(part) for part in text.split(",")]
        if len(set(found)) < len(found):
            raise argparse.ArgumentTypeError(f"{text!r} has the same value twice")
        return found

    return several


def size(text: str) -> int:
    """A size in bytes above zero, as the pagexfer command takes it."""
    import click

    from pagexfer.cli.values import Size

    try:
        size_bytes = Size().convert(text, None, None)
    except click.UsageError as error:
        raise argparse.ArgumentTypeError(error.message) from None
    if not size_bytes:
        raise argparse.ArgumentTypeError(f"{text!r} is nothing: a size is above zero")
    return size_bytes


def seconds(text: str) -> float:
    """A time above zero with its unit, in seconds, as the pagexfer command takes it."""
    import click

    from pagexfer.cli.values import Seconds

    try:
        return Seconds().convert(text, None, None)
    except click.UsageError as error:
        raise argparse.ArgumentTypeError(error.message) from None


def ram(text: str) -> int:
    """The RAM of a guest: whole pages, and so many that its workload has room."""
    ram_bytes = size(text)
    if ram_bytes < _LEAST_RAM or ram_bytes % PAGE_SIZE:
        raise argparse.ArgumentTypeError(f"{text!r} is no RAM of a guest: 1MiB or more, in whole pages")
    return ram_bytes


# A number of channels that a migration can have.
channel_number = up_to(MAX_CHANNELS)

numbers = listed(positive)
sizes = listed(size)
rams = listed(ram)
channel_numbers = listed(channel_number)


def new_file(text: str) -> Path:
    """A file that can be written, which is better known before hours of measuring."""
    path = Path(text)
    try:
        try_file(path)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: {error.strerror}") from None
    return path


def new_png(text: str) -> Path:
    """The same for a plot."""
    if Path(text).suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{text!r} does not end with .png: plots are PNG")
    return new_file(text)


def new_folder(text: str) -> Path:
    """A folder, made where there is none, in which files can be made."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
        try_folder(path)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"no files can be made in {text!r}: {error.strerror}") from None
    return path
