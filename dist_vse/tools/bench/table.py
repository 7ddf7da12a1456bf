"""A table of figures: printed now, stored in a result as JSON, and rendered as Markdown later."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import rich.table


@dataclass
class Table:
    """A title, columns of text of which the first names the row, and a note below."""

    title: str
    columns: Sequence[str]
    rows: list[list[str]] = field(default_factory=list)
    note: str = ""

    def add_row(self, *cells: str) -> None:
        """Append a row, a cell a column."""
        assert len(cells) == len(self.columns), (self.title, cells)
        self.rows.append(list(cells))

    def as_rich(self) -> rich.table.Table:
        """Return it for a terminal."""
        table = rich.table.Table(title=self.title, caption=self.note or None)
        for number, column in enumerate(self.columns):
            table.add_column(column, justify="right" if number else "left")
        for row in self.rows:
            table.add_row(*row)
        return table
