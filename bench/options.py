"""What every bench shares: its options, and how it hands over what it measured.

A bench is a module with `main(argv)`: it makes its parser with `parser`, adds options of its own, parses with `parse`, and
ends with `finish`. Where this machine lacks what it needs, it raises `CannotRun` with the reason.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pagexfer.wire.constants import MAX_CHANNELS, PAGE_SIZE

from .measure import write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from .table import Table

QUICK_REPEATS: Final = 3
# Of RAM that is mostly zero the workload has a twentieth, and needs eight pages.
_LEAST_RAM: Final = 1 << 20


class CannotRun(Exception):
    """This machine cannot run the bench; the message says in one line what is missing."""


def parser(
    bench: str, doc: str | None, *, repeats: int, quick_repeats: int = QUICK_REPEATS, plots: bool = False
) -> argparse.ArgumentParser:
    """A parser with the shared options; `doc` is the docstring of `bench`, `plots` whether it can draw."""
    made = argparse.ArgumentParser(
        f"python -m bench {bench}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--json", type=new_file, metavar="FILE", help="write all figures to FILE as well")
    if plots:
        made.add_argument("--plot", type=new_png, metavar="FILE.png", help="draw the figures as well")
    made.add_argument("--quick", action="store_true", help=f"small cases, repeats {quick_repeats}")
    made.add_argument(
        "--repeats", type=positive, metavar="N", help=f"repeats of each case (default: {repeats})"
    )
    made.add_argument("--seed", type=int, default=1, help="of all that is random (default: %(default)s)")
    made.set_defaults(bench=bench, full_repeats=repeats, quick_repeats=quick_repeats, plot=None)
    return made


def parse(made: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse, with the number of repeats filled in. Ends the process with code 2 and one line where an option is bad."""
    options = made.parse_args(argv)
    if options.repeats is None:
        options.repeats = options.quick_repeats if options.quick else options.full_repeats
    if options.plot is not None:
        need_matplotlib(made)
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
    """Print the tables, and write figures and plot where asked for."""
    for table in tables:
        print(table.text(), end="\n\n", flush=True)
    if options.json is not None:
        shared = {
            "bench": options.bench,
            "quick": options.quick,
            "repeats": options.repeats,
            "seed": options.seed,
        }
        write_json(options.json, {**shared, **figures, "tables": [asdict(table) for table in tables]})
    if options.plot is not None and plot is not None:
        plot(options.plot)


def progress(line: str) -> None:
    """Say what is being measured, apart from the results."""
    print(line, file=sys.stderr, flush=True)


def positive(text: str) -> int:
    """A number from 1 on."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def numbers(text: str) -> list[int]:
    """Numbers from 1 on, with commas between."""
    return [positive(part) for part in text.split(",")]


def size(text: str) -> int:
    """A size in bytes, as the pagexfer command takes it."""
    import click

    from pagexfer.cli.values import Size

    try:
        return Size().convert(text, None, None)
    except click.UsageError as error:
        raise argparse.ArgumentTypeError(error.message) from None


def sizes(text: str) -> list[int]:
    """Sizes, with commas between."""
    return [size(part) for part in text.split(",")]


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


def rams(text: str) -> list[int]:
    """The same, with commas between."""
    return [ram(part) for part in text.split(",")]


def channel_number(text: str) -> int:
    """A number of channels that a migration can have."""
    number = positive(text)
    if number > MAX_CHANNELS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of channels from 1 to {MAX_CHANNELS}")
    return number


def channel_numbers(text: str) -> list[int]:
    """The same, with commas between."""
    return [channel_number(part) for part in text.split(",")]


def new_file(text: str) -> Path:
    """A file that can be written, which is better known before hours of measuring."""
    path = Path(text)
    if path.is_fifo():
        return path  # whoever reads it may come later
    existed = path.exists()
    try:
        with path.open("ab", buffering=0) as file:
            if not path.is_file():
                file.write(b"\n")  # only so a device says whether it takes anything; JSON may begin with it
        if not existed:
            path.unlink()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: {error.strerror}") from None
    return path


def new_png(text: str) -> Path:
    """The same for a plot."""
    if Path(text).suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{text!r} does not end with .png: plots are PNG")
    return new_file(text)
