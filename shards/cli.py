"""The command `dist-vse shard`: its options, and what it tells."""

import argparse
import difflib
import inspect
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_vse.errors import UserError
from shards.sources import SOURCES

if TYPE_CHECKING:
    from shards.receipts import Receipt
    from shards.record import Record


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `dist-vse shard` to its parser."""
    parser.add_argument("source", metavar="SOURCE", help=", ".join(SOURCES))
    parser.add_argument("input", metavar="INPUT", type=Path, help="the folder or file to read")
    parser.add_argument(
        "out", metavar="OUT", type=Path, help="folder for the shards and index.json"
    )
    parser.add_argument("--images", metavar="DIR", type=Path, help="where image paths start from")
    parser.add_argument("--split", metavar="NAME", help="split of samples that name none [train]")
    parser.add_argument(
        "--restval", metavar="NAME", help="split that Karpathy's restval goes to [train]"
    )
    parser.add_argument(
        "--shard-size", metavar="N", type=int, default=500, help="samples a shard [%(default)s]"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the shuffle [%(default)s]")
    parser.add_argument(
        "--max-bad",
        metavar="N|P%",
        default="0",
        help="bad samples to skip and list, a number or a share such as 0.1%% [%(default)s]",
    )
    parser.add_argument(
        "--workers",
        metavar="N",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="processes that check and write [one a core: %(default)s]",
    )


def run(args: argparse.Namespace) -> int:
    """Shard a data set and print a table of it; return the exit code.

    Raises UserError for what the user can mend.
    """
    from shards.build import build_dataset

    for name in ("shard_size", "workers"):
        if getattr(args, name) < 1:
            option = "--" + name.replace("_", "-")
            raise UserError(f"{option} ({getattr(args, name)}) must be at least 1")
    records = _read(args)
    max_bad = parse_max_bad(args.max_bad, len(records))
    try:
        with _progress(len(records)) as advance:
            receipts = build_dataset(
                records,
                args.out,
                shard_size=args.shard_size,
                seed=args.seed,
                max_bad=max_bad,
                workers=args.workers,
                advance=advance,
            )
    except OSError as error:
        raise UserError(
            f"{error.filename or args.out}: cannot write the shards ({error.strerror}); "
            "mend that and run the command again"
        ) from error
    _print_summary(receipts, args.out)
    return 0


def parse_max_bad(text: str, num_records: int) -> int:
    """Return the number of bad samples that `text`, a count or a share such as 0.1%, allows.

    Raises UserError for anything else.
    """
    try:
        if text.endswith("%"):
            allowed = math.floor(Fraction(text[:-1]) * num_records / 100)  # exact, as 0.29 is not
        else:
            allowed = int(text)
    except (ValueError, ZeroDivisionError):
        allowed = -1
    if allowed < 0:
        raise UserError(f"--max-bad {text!r}: give a number of samples, or a share such as 0.1%")
    return allowed


def _read(args: argparse.Namespace) -> "Sequence[Record]":
    """Read all records of the source that the command names."""
    if args.source not in SOURCES:
        near = difflib.get_close_matches(args.source, SOURCES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(SOURCES)}"
        raise UserError(f"no source {args.source!r}; {hint}")
    read = SOURCES[args.source]
    options: dict[str, Any] = {}
    for name in ("images", "split", "restval"):
        value = getattr(args, name)
        if value is not None and name not in inspect.signature(read).parameters:
            raise UserError(f"--{name} means nothing to the source {args.source}; leave it out")
        if value is not None:
            options[name] = value
    records = list(read(args.input, **options))
    if not records:
        raise UserError(
            f"{args.input}: no images found for the source {args.source}; check the path"
        )
    return records


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr while the body runs; yield the function that advances it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = ("sharding", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=total)
        yield lambda count: progress.advance(bar, count)


def _print_summary(receipts: "Sequence[Receipt]", folder: Path) -> None:
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table

    from shards.receipts import SKIPPED_NAME

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
    if any(receipt.skipped for receipt in receipts):
        console.print(f"skipped samples: {folder / SKIPPED_NAME}", soft_wrap=True)
