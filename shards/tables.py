"""What the tool prints: a progress bar, summaries, findings and statistics."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from dist_vse.common.terminal import plain, say, without_secrets
from dist_vse.shards.manifest import SKIPPED_NAME, ShardEntry

if TYPE_CHECKING:
    from dist_vse.shards.verify.dataset import Finding
    from dist_vse.shards.verify.stats import Stats

FAULTS_SHOWN = 10  # of a shard
BINS, BAR = 12, 50  # of a histogram: rows, characters


@contextmanager
def progress_bar(verb: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Show a bar with the rate and the time left; yield the function that advances it.

    It is drawn on standard error, if that is a terminal.
    """
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

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


def print_summary(entries: Sequence[ShardEntry], folder: Path, *, seconds: float) -> None:
    """Print one row for each split, and the time it took."""
    table = Table("split", title=plain(folder))
    for heading in ("images", "captions", "shards", "size", "skipped"):
        table.add_column(heading, justify="right")
    for split in sorted({entry.split for entry in entries}):
        of_split = [entry for entry in entries if entry.split == split]
        table.add_row(
            plain(split),
            f"{sum(r.num_samples for r in of_split):,}",
            f"{sum(r.num_captions for r in of_split):,}",
            f"{len(of_split):,}",
            decimal(sum(r.num_bytes for r in of_split)),
            f"{sum(len(r.skipped) for r in of_split):,}",
        )
    console = Console()
    console.print(table)
    images = sum(entry.num_samples for entry in entries)
    console.print(f"{seconds:,.1f} s, {images / max(seconds, 1e-3):,.0f} images/s")
    if any(entry.skipped for entry in entries):
        console.print(plain(f"skipped samples: {folder / SKIPPED_NAME}"), soft_wrap=True)


def print_findings(findings: "Sequence[Finding]", folder: Path) -> None:
    """Print one line for each of a shard's first faults, and one row for each split."""
    console = Console()
    for finding in findings:
        faults = [*finding.damage, *finding.unusable]
        called = without_secrets(finding.shard.path)
        for fault in faults[:FAULTS_SHOWN]:
            console.print(plain(f"{called}: {fault}"), soft_wrap=True)
        if len(faults) > FAULTS_SHOWN:
            more = f"{called}: ... {len(faults) - FAULTS_SHOWN} more"
            console.print(plain(more), soft_wrap=True)
    table = Table("split", title=plain(folder))
    for heading in ("shards", "images", "damaged shards", "unusable images"):
        table.add_column(heading, justify="right")
    for split in sorted({finding.split for finding in findings}):
        of_split = [finding for finding in findings if finding.split == split]
        shards = {finding.shard.path: finding.shard for finding in of_split}
        table.add_row(
            plain(split),
            f"{len(shards):,}",
            f"{sum(shard.num_samples for shard in shards.values()):,}",
            f"{sum(bool(finding.damage) for finding in of_split):,}",
            f"{sum(len(finding.unusable) for finding in of_split):,}",
        )
    console.print(table)


def print_stats(stats: "dict[str, Stats]") -> None:
    """Print a table of the splits, then a histogram of each measure over all of them."""
    from dist_vse.shards.verify.stats import Stats, shared_images

    console = Console()
    table = Table("split")
    for heading in ("images", "captions", "repeated images", "formats", "languages"):
        table.add_column(heading, justify="right")
    whole = Stats()
    for name, of_split in sorted(stats.items()):
        whole.add(of_split)
        table.add_row(
            plain(name),
            f"{sum(of_split.captions.values()):,}",
            f"{sum(of_split.words.values()):,}",
            f"{of_split.repeated:,}",
            plain(_counts(of_split.formats)),
            plain(_counts(of_split.languages)),
        )
    console.print(table)
    for title, counts in (
        ("words a caption", whole.words),
        ("captions an image", whole.captions),
        ("longer side, pixels", whole.sides),
        ("image file, kB", whole.kilobytes),
    ):
        if counts:  # a data set may be empty
            _print_histogram(console, title, counts)
    for one, other, count in shared_images(stats):
        repeated = f"{count:,} images are in both {one} and {other}: the same bytes"
        console.print(plain(repeated), style="red")


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{key} {count:,}" for key, count in counter.most_common())


def _print_histogram(console: Console, title: str, counts: Counter[int]) -> None:
    """Print up to `BINS` bins of equal width, and the median."""
    low, high = min(counts), max(counts)
    width = (high - low) // BINS + 1
    bins = Counter({(value - low) // width: 0 for value in range(low, high + 1, width)})
    for value, count in counts.items():
        bins[(value - low) // width] += count
    half, seen = sum(counts.values()) / 2, 0
    for median in sorted(counts):
        seen += counts[median]
        if seen >= half:
            break
    console.print(plain(f"\n{title} (median {median:,})"), style="bold")
    for number, count in sorted(bins.items()):
        start = low + number * width
        label = f"{start:,}" if width == 1 else f"{start:,}-{start + width - 1:,}"
        bar = "█" * round(BAR * count / max(bins.values()))
        say(f"{label:>15} {count:>9,} {bar}")
