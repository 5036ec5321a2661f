"""Tables of a page from result files: python -m bench report RESULTS.json [RESULTS.json ...] [--page FILE.md]

A result file is one of `all` or of a single bench. Of a bench that is in several of them the last one counts.

The page has a place for each bench, between two comments:

    <!-- bench NAME -->
    <!-- end NAME -->

and one of the name `environment`. What stands between them is replaced; all else stays as it is. Of a bench that did not
run, it is the reason. A plot comes with the tables where the folder beside the page, of the page's name, has the NAME.png
that was drawn with these results; one of another run is left out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from .files import digest, write_whole
from .names import BENCHES
from .options import command, progress
from .table import Table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PAGE: Final = Path(__file__).parents[1] / "docs" / "performance.md"


class BadInput(Exception):
    """The result file or the page cannot be used; the message is one line."""


@dataclass(frozen=True, slots=True)
class Run:
    """A result file: what its figures depend on, and the result of each bench, or why there is none."""

    environment: dict[str, object]
    benches: dict[str, object]


def main(argv: list[str] | None = None) -> None:
    made = command("report", __doc__)
    made.add_argument("results", type=Path, nargs="+", metavar="RESULTS.json", help="what --json wrote")
    made.add_argument(
        "--page", type=Path, default=PAGE, metavar="FILE.md", help="default: docs/performance.md"
    )
    options = made.parse_args(argv)
    try:
        runs = [load(path) for path in options.results]
        page = _read(options.page)
        written = fill(page, sections(runs, options.page))
    except BadInput as bad:
        made.error(str(bad))
    write_whole(options.page, written.encode())
    progress(f"report: {options.page}")


def load(path: Path) -> Run:
    """A result file of `all` or of one bench. Raises BadInput where it is neither."""
    try:
        result = json.loads(_read(path))
    except ValueError:
        raise BadInput(f"{path} is no JSON") from None
    bench = result.get("bench") if isinstance(result, dict) else None
    if bench != "all" and bench not in BENCHES:
        raise BadInput(f"{path} is not the result of python -m bench all, nor of a bench")
    benches = result.get("benches") if bench == "all" else {bench: result}
    environment = result.get("environment")
    if not isinstance(environment, dict) or not isinstance(benches, dict):
        raise BadInput(f"{path} has no benches or no environment")
    if "command" not in environment:
        raise BadInput(f"{path} does not say which command wrote it: another revision of the benches did")
    return Run(environment, benches)


def sections(runs: Sequence[Run], page: Path) -> dict[str, str]:
    """The text for each place of a page. Raises BadInput where a result has not the form that benches write."""
    found = {name: run for run in runs for name in run.benches}
    texts = dict.fromkeys(BENCHES, "Not measured: not among the results.")
    for name in BENCHES:
        if name in found:
            texts[name] = _bench(name, found[name].benches[name], page.with_suffix("") / f"{name}.png")
    return {"environment": _environments(runs, found), **texts}


def fill(page: str, texts: Mapping[str, str]) -> str:
    """The page with each text in its place. Raises BadInput where a place is missing or is there twice."""
    for name, text in texts.items():
        begin, end = f"<!-- bench {name} -->", f"<!-- end {name} -->"
        if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
            raise BadInput(f"the page has no place of its own for {name}: {begin} and {end}")
        before, rest = page.split(begin)
        after = rest.split(end)[1]
        page = f"{before}{begin}\n\n{text}\n\n{end}{after}"
    return page


def _environments(runs: Sequence[Run], found: Mapping[str, Run]) -> str:
    """A column for each run; where there are several, its head says which benches on the page are of it."""
    heads = [", ".join(name for name in run.benches if found[name] is run) for run in runs]
    columns = [{**run.environment, "command": f"`{run.environment['command']}`"} for run in runs]
    keys = dict.fromkeys(key for column in columns for key in column)
    rows = [(key, *(column.get(key, "-") for column in columns)) for key in keys]
    return Table.of("Measured with", ("", *(heads if len(runs) > 1 else [""])), rows).markdown()


def _bench(name: str, result: object, plot: Path) -> str:
    if not isinstance(result, dict):
        raise BadInput(f"the result of {name} is no object")
    for kept, said in (("skipped", "Not measured"), ("failed", "Failed")):
        if kept in result:
            return f"{said}: {result[kept]}."
    try:
        parts = [Table.load(stored).markdown() for stored in result["tables"]]
    except (KeyError, TypeError, AttributeError, ValueError):
        raise BadInput(f"the result of {name} has no tables that can be read") from None
    if "incomplete" in result:
        parts.append(f"Incomplete: {result['incomplete']}.")
    if plot.is_file():
        if digest(plot) == result.get("plot"):
            parts.append(f"![{name}]({plot.parent.name}/{plot.name})")
        else:
            progress(f"report: {plot} is left out: it was not drawn with these results")
    return "\n\n".join(parts)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


if __name__ == "__main__":
    main()
