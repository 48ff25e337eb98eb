"""A `Section`: a question, a table, plots. A page is a list of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

Cell = str | int | float | None


@dataclass(frozen=True)
class Figure:
    """One plot.

    Attributes:
        title: Its heading.
        svg: The inline `<svg>` element.
        caption: What one sees in it.
        wide: Whether it takes the page's whole width.
    """

    title: str
    svg: str
    caption: str
    wide: bool = True


@dataclass(frozen=True)
class Section:
    """What one experiment asked and found.

    Attributes:
        name: Short name.
        title: Heading.
        question: One sentence: what is claimed, or asked.
        rows: The table: `{column: value}` each.
        reading: How to read the table.
        figures: The plots.
        records: Names of the run records behind the table.
    """

    name: str
    title: str
    question: str
    rows: Sequence[Mapping[str, Cell]]
    reading: str = ""
    figures: Sequence[Figure] = ()
    records: Sequence[str] = field(default=())

    @property
    def columns(self) -> list[str]:
        """Headings of the table."""
        return list(dict.fromkeys(column for row in self.rows for column in row))

    def is_text(self, column: str) -> bool:
        """Whether a column holds text, which is set flush left."""
        return any(isinstance(row.get(column), str) for row in self.rows)

    def table(self) -> Table:
        """The table for a terminal."""
        table = Table(
            title=self.title,
            title_justify="left",
            box=SIMPLE_HEAD,
            pad_edge=False,
            padding=(0, 1, 0, 0),
        )
        for column in self.columns:
            text = self.is_text(column)
            table.add_column(column, justify="left" if text else "right", overflow="fold")
        for row in self.rows:
            table.add_row(*(shown(row.get(column)) for column in self.columns))
        return table

    def as_json(self) -> dict[str, Any]:
        """Everything but the plots, as JSON values."""
        return {
            "name": self.name,
            "title": self.title,
            "question": self.question,
            "rows": [dict(row) for row in self.rows],
            "records": list(self.records),
        }


def shown(value: Cell) -> str:
    """A cell as text: three digits, thousands separated, a dash for nothing."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, str):
        return value
    if math.isnan(value):
        return "n/a"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}"
