"""Tables of a page from a result file of `all`: python -m bench report RESULTS.json [--page FILE.md]

The page has a place for each bench, between two comments:

    <!-- bench NAME -->
    <!-- end NAME -->

and one of the name `environment`. What stands between them is replaced; all else stays as it is. Of a bench that did not
run, it is the reason. Where the folder beside the page, of the page's name, has NAME.png, it comes with the tables.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from .names import BENCHES
from .table import Table

if TYPE_CHECKING:
    from collections.abc import Mapping

PAGE: Final = Path(__file__).parents[1] / "docs" / "performance.md"


class BadInput(Exception):
    """The result file or the page cannot be used; the message is one line."""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m bench report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, metavar="RESULTS.json", help="what `all --json` wrote")
    parser.add_argument(
        "--page", type=Path, default=PAGE, metavar="FILE.md", help="default: docs/performance.md"
    )
    options = parser.parse_args(argv)
    try:
        results = load(options.results)
        page = _read(options.page)
        written = fill(page, sections(results, options.page))
    except BadInput as bad:
        parser.error(str(bad))
    options.page.write_text(written)
    print(f"report: {options.page}", file=sys.stderr)


def load(path: Path) -> dict[str, object]:
    """A result file of `all`. Raises BadInput for anything else."""
    try:
        results = json.loads(_read(path))
    except ValueError:
        raise BadInput(f"{path} is no JSON") from None
    if not isinstance(results, dict) or results.get("bench") != "all":
        raise BadInput(f"{path} is not the result of python -m bench all")
    return results


def sections(results: Mapping[str, object], page: Path) -> dict[str, str]:
    """The text for each place of a page. Raises BadInput where the results have not the form that `all` writes."""
    benches, environment = results.get("benches"), results.get("environment")
    if not isinstance(benches, dict) or not isinstance(environment, dict):
        raise BadInput("the results have no benches or no environment")
    texts = {"environment": _environment(environment, quick=bool(results.get("quick")))}
    for name in BENCHES:
        plot = page.with_suffix("") / f"{name}.png"
        image = f"![{name}]({plot.parent.name}/{plot.name})"
        text = _bench(name, benches.get(name, {"skipped": "not among the results"}))
        texts[name] = f"{text}\n\n{image}" if plot.exists() else text
    return texts


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


def _environment(found: Mapping[str, object], *, quick: bool) -> str:
    how = "python -m bench all --quick" if quick else "python -m bench all"
    about = Table.of("Measured with", ("", ""), [("command", f"`{how}`"), *found.items()])
    return about.markdown()


def _bench(name: str, result: object) -> str:
    if not isinstance(result, dict):
        raise BadInput(f"the result of {name} is no object")
    for kept, said in (("skipped", "Not measured"), ("failed", "Failed")):
        if kept in result:
            return f"{said}: {result[kept]}."
    try:
        tables = [Table.load(stored).markdown() for stored in result["tables"]]
    except (KeyError, TypeError, AttributeError, ValueError):
        raise BadInput(f"the result of {name} has no tables that can be read") from None
    return "\n\n".join(tables)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read: {error}") from None


if __name__ == "__main__":
    main()
