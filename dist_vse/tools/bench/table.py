"""A table of figures: printed now, stored in a result as JSON, and rendered as Markdown later."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import rich.table

from dist_vse.common.terminal import plain


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
        table = rich.table.Table(
            title=plain(self.title), caption=plain(self.note) if self.note else None
        )
        for number, column in enumerate(self.columns):
            table.add_column(plain(column), justify="right" if number else "left")
        for row in self.rows:
            table.add_row(*map(plain, row))
        return table
