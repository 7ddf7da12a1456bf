"""What the tool shows: a progress bar, and a table of what was made."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from shards.receipts import SKIPPED_NAME, Receipt


@contextmanager
def progress_bar(verb: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr with the rate and the time left; yield the function that advances it."""
    columns = (
        TextColumn(verb),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=total, rate="")
        done, start = 0, time.monotonic()

        def advance(count: int) -> None:
            nonlocal done
            done += count
            rate = done / max(time.monotonic() - start, 1e-3)
            progress.update(bar, advance=count, rate=f"{rate:,.0f} {unit}/s")

        yield advance


def print_summary(receipts: Sequence[Receipt], folder: Path, *, seconds: float) -> None:
    """Print a row a split, and how long it took."""
    table = Table("split", title=str(folder))
    for heading in ("images", "captions", "shards", "size", "skipped"):
        table.add_column(heading, justify="right")
    for split in sorted({receipt.split for receipt in receipts}):
        of_split = [receipt for receipt in receipts if receipt.split == split]
        table.add_row(
            split,
            f"{sum(r.num_samples for r in of_split):,}",
            f"{sum(r.num_captions for r in of_split):,}",
            f"{len(of_split):,}",
            decimal(sum(r.num_bytes for r in of_split)),
            f"{sum(len(r.skipped) for r in of_split):,}",
        )
    console = Console()
    console.print(table)
    images = sum(receipt.num_samples for receipt in receipts)
    console.print(f"{seconds:,.1f} s, {images / max(seconds, 1e-3):,.0f} images/s")
    if any(receipt.skipped for receipt in receipts):
        console.print(f"skipped samples: {folder / SKIPPED_NAME}", soft_wrap=True)
