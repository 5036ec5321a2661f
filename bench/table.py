"""A table of results: the same rows for the terminal, for the result file and for docs/performance.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


@dataclass(frozen=True, slots=True)
class Table:
    """What a bench says: `title` is a line, `rows` have a cell for each of `columns`, `note` says how to read it.

    The first column is the name of a row; all others are figures and stand to the right.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    @classmethod
    def of(
        cls, title: str, columns: Iterable[str], rows: Iterable[Iterable[object]], note: str = ""
    ) -> Table:
        """A table of cells that are text already, or print as they should. Raises ValueError where a row is uneven."""
        table = cls(title, tuple(columns), tuple(tuple(str(cell) for cell in row) for row in rows), note)
        if any(len(row) != len(table.columns) for row in table.rows):
            raise ValueError(f"a row of {title!r} has not {len(table.columns)} cells")
        return table

    @classmethod
    def load(cls, stored: Mapping[str, object]) -> Table:
        """A table from a result file. Raises ValueError where it is none."""
        title, columns, rows, note = (stored.get(key) for key in ("title", "columns", "rows", "note"))
        if not (isinstance(title, str) and isinstance(note, str)):
            raise ValueError("a table without title or note")
        if not (
            isinstance(columns, list) and isinstance(rows, list) and all(isinstance(r, list) for r in rows)
        ):
            raise ValueError(f"table {title!r} has no columns or rows")
        return cls.of(title, map(str, columns), rows, note)

    def text(self) -> str:
        """For a terminal."""
        lines = [self.columns, *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.columns))]
        body = [
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines
        ]
        return "\n".join([self.title, *(line.rstrip() for line in body), *([self.note] if self.note else [])])

    def markdown(self) -> str:
        """For a page."""
        rule = ["---", *["---:"] * (len(self.columns) - 1)]
        body = [f"| {' | '.join(line)} |" for line in (self.columns, rule, *self.rows)]
        return "\n".join([f"**{self.title}**", "", *body, *(["", self.note] if self.note else [])])
