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
from shards.verify import Finding

FAULTS_SHOWN = 10  # of a shard


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


def print_findings(findings: Sequence[Finding], folder: Path) -> None:
    """Print a line for each fault, the first few of a shard, and a row a split."""
    console = Console()
    for finding in findings:
        faults = [*finding.damage, *finding.unusable]
        for fault in faults[:FAULTS_SHOWN]:
            console.print(f"{finding.shard.path}: {fault}", soft_wrap=True, markup=False)
        if len(faults) > FAULTS_SHOWN:
            console.print(f"{finding.shard.path}: ... {len(faults) - FAULTS_SHOWN} more")
    table = Table("split", title=str(folder))
    for heading in ("shards", "images", "damaged shards", "unusable images"):
        table.add_column(heading, justify="right")
    for split in sorted({finding.split for finding in findings}):
        of_split = [finding for finding in findings if finding.split == split]
        shards = {finding.shard.path: finding.shard for finding in of_split}
        table.add_row(
            split,
            f"{len(shards):,}",
            f"{sum(shard.num_samples for shard in shards.values()):,}",
            f"{sum(bool(finding.damage) for finding in of_split):,}",
            f"{sum(len(finding.unusable) for finding in of_split):,}",
        )
    console.print(table)
