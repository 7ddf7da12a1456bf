"""The command `dist-vse shard`: its subcommands and what they run."""

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from dist_vse.common.consent import add_allow_pipe
from dist_vse.common.errors import UserError
from dist_vse.common.terminal import say
from dist_vse.shards.error_budget import ErrorBudget, parse_error_budget
from dist_vse.shards.options import (
    add_caption_key,
    add_fetch_options,
    add_output_options,
    add_run_options,
    add_source_options,
    add_workers,
    at_least_1,
    output_options,
    source_options,
    takes,
)
from dist_vse.shards.sources import SOURCES

if TYPE_CHECKING:
    from dist_vse.shards.build.plan import Options
    from dist_vse.shards.manifest import ShardEntry
    from dist_vse.shards.record import Record


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one subcommand for each source, and those that work on finished shards."""
    commands = parser.add_subparsers(dest="shard_command", required=True, metavar="COMMAND")
    for name, (text, read) in SOURCES.items():
        source = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        source.add_argument("input", metavar="INPUT", help="the folder, file or URL to read")
        add_source_options(source, read)
        add_output_options(source)
        far = name == "urls"
        if far:
            add_fetch_options(source)
        add_run_options(source, max_bad="100%" if far else "0")
        source.set_defaults(shard_run=_build)
    index = commands.add_parser("index", help="index existing tars where they are")
    index.add_argument(
        "tars", metavar="TAR", nargs="+", help="tars, folders of tars, URLs or pipe:COMMAND"
    )
    index.add_argument(
        "--out", metavar="DIR", type=Path, help="folder for index.json [that of the first tar]"
    )
    index.add_argument("--split", metavar="NAME", default="train", help="[%(default)s]")
    add_caption_key(index)
    add_run_options(index)
    index.set_defaults(shard_run=_index)
    for name, text, function in (
        ("verify", "read all shards back: checksums, images, captions", _verify),
        ("stats", "count captions, lengths, sizes and repetitions", _stats),
        ("repair", "write damaged or missing shards again from their source", _repair),
    ):
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        command.add_argument("dir", metavar="DIR", type=Path, help="folder of the shards")
        add_workers(command)
        add_allow_pipe(command)
        if name == "stats":
            command.add_argument(
                "--contact-sheet", metavar="FILE.png", type=Path, help="draw some of the samples"
            )
        command.set_defaults(shard_run=function)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; return the exit code.

    Raises UserError for what the user can fix.
    """
    run_command = args.shard_run
    code: int = run_command(args)
    return code


def _build(args: argparse.Namespace) -> int:
    """Shard a data set and print a table of it."""
    from dist_vse.shards.build.output_checks import check_local
    from dist_vse.shards.remote import local_copies
    from dist_vse.shards.tables import print_summary

    at_least_1(args, "workers")
    options, max_bad = output_options(args), parse_error_budget(args.max_bad)
    check_local(args.out)
    start = time.monotonic()
    remote = "" if os.path.exists(args.input) or args.shard_command != "reshard" else args.input
    with (
        local_copies(remote, allow_pipe=_consent(args)) as copies,
        TemporaryDirectory(prefix="dist-vse-") as scratch,
    ):
        entries = _write(args, _read(args, copies, Path(scratch)), options, max_bad)
    print_summary(entries, args.out, seconds=time.monotonic() - start)
    return 0


def _consent(args: argparse.Namespace) -> bool:
    """Return whether commands among the inputs may run: the user has just typed them.

    A repair takes them from a file instead, and has an option for it.
    """
    return bool(getattr(args, "allow_pipe", True))


def _write(
    args: argparse.Namespace, records: "Sequence[Record]", options: "Options", max_bad: ErrorBudget
) -> "list[ShardEntry]":
    """Write the records as shards into OUT."""
    from dist_vse.shards.build.dataset import build_dataset
    from dist_vse.shards.build.output_checks import check_output
    from dist_vse.shards.command_log import log_command
    from dist_vse.shards.tables import progress_bar

    splits = _wanted_splits(args, records)
    check_output(args.out, records, splits)
    with _write_errors(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
        log_command(args.out, args, splits)
        total = sum(record.split in splits for record in records)
        with progress_bar("sharding", total, "images") as advance:
            return build_dataset(
                records,
                args.out,
                options,
                only=splits,
                max_bad=max_bad,
                workers=args.workers,
                advance=advance,
            )


def _read(args: argparse.Namespace, copies: dict[str, Path], scratch: Path) -> "Sequence[Record]":
    """Read all records of the source that the command names.

    `copies` stand for a URL; into `scratch` go images that have to be unpacked.
    """
    from dist_vse.shards.record import all_in_languages
    from dist_vse.shards.remote import to_path

    _, read = SOURCES[args.shard_command]
    options = source_options(args)
    if takes(read, "scratch"):
        options["scratch"] = scratch
    if copies:
        records = [r for url, path in copies.items() for r in read(path, name=url, **options)]
    else:
        records = list(read(to_path(args.input), **options))
    if args.languages is not None:
        records = all_in_languages(records, args.languages)
    if not records:
        raise UserError(
            f"{args.input}: no images found for the source {args.shard_command}; check the path"
        )
    return records


def _wanted_splits(args: argparse.Namespace, records: "Sequence[Record]") -> set[str]:
    """Return the splits to make: all, or in a repair those that the command still owns."""
    there = {record.split for record in records}
    wanted = set(getattr(args, "only", there))
    for split in sorted(wanted - there):
        raise UserError(
            f"{args.input}: has no samples of split {split!r} any more; bring them back, or shard "
            "the split again"
        )
    return wanted


def _index(args: argparse.Namespace) -> int:
    """Index tars and print a table of them."""
    from dist_vse.data.index import check_consent
    from dist_vse.shards.command_log import log_command
    from dist_vse.shards.index.existing import find_tars, index_existing
    from dist_vse.shards.tables import print_summary, progress_bar

    at_least_1(args, "workers")
    max_bad = parse_error_budget(args.max_bad)
    tars, folder = find_tars(args.tars, args.out)
    for tar in tars:
        check_consent(tar, allow_pipe=_consent(args))
    start = time.monotonic()
    with _write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        log_command(folder, args, {args.split})
        with progress_bar("indexing", len(tars), "tars") as advance:
            entries = index_existing(
                tars,
                folder,
                split=args.split,
                caption_key=args.caption_key,
                max_bad=max_bad,
                workers=args.workers,
                advance=advance,
            )
    print_summary(entries, folder, seconds=time.monotonic() - start)
    return 0


def _verify(args: argparse.Namespace) -> int:
    """Read a data set back; print what is wrong with it, or a table."""
    from dist_vse.data.index import read_index
    from dist_vse.shards.tables import print_findings, progress_bar
    from dist_vse.shards.verify.dataset import verify_dataset

    at_least_1(args, "workers")
    index = read_index(args.dir, allow_pipe=args.allow_pipe)
    total = sum(len(split.shards) for split in index.splits.values())
    with progress_bar("verifying", total, "shards") as advance:
        findings = verify_dataset(index, workers=args.workers, advance=advance)
    print_findings(findings, args.dir)
    damaged = {finding.shard for finding in findings if finding.damage}
    if damaged:
        indexed = "; copy an indexed tar again first: only its side files can be written"
        raise UserError(
            f"{args.dir}: {len(damaged)} of its shards are damaged; write them again with "
            f"`dist-vse shard repair {args.dir}`{indexed * any(s.side for s in damaged)}"
        )
    unusable = sum(len(finding.unusable) for finding in findings)
    if unusable:
        raise UserError(
            f"{args.dir}: {unusable} samples cannot be used, though their bytes are as they were "
            "written; shard again with --decode and --max-bad to leave them out"
        )
    return 0


def _repair(args: argparse.Namespace) -> int:
    """Run the data set's commands again; whole shards are kept."""
    from dist_vse.shards.command_log import check_inputs, read_commands
    from dist_vse.shards.index.existing import check_tars

    at_least_1(args, "workers")
    commands = read_commands(args.dir)
    for command in commands:
        command.workers, command.allow_pipe = args.workers, args.allow_pipe
        check_inputs(command)
    for command in commands:
        if command.shard_command == "index":
            how = {"workers": args.workers, "allow_pipe": args.allow_pipe}
            check_tars(args.dir, command.split, **how)
            _index(command)
        else:
            _build(command)
    return 0


def _stats(args: argparse.Namespace) -> int:
    """Print what is in a data set; draw a contact sheet if one is asked for."""
    from dist_vse.data.index import read_index
    from dist_vse.shards.tables import print_stats, progress_bar
    from dist_vse.shards.verify.stats import dataset_stats, write_contact_sheet

    at_least_1(args, "workers")
    index = read_index(args.dir, allow_pipe=args.allow_pipe)
    total = sum(len(split.shards) for split in index.splits.values())
    with progress_bar("counting", total, "shards") as advance:
        stats = dataset_stats(index, workers=args.workers, advance=advance)
    print_stats(stats)
    if args.contact_sheet is not None:
        with _write_errors(args.contact_sheet):
            count = write_contact_sheet(index, args.contact_sheet)
        say(f"{count} samples: {args.contact_sheet}")
    return 0


@contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    """Report a full or read-only disk in one line."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: cannot write the shards ({error.strerror or error}); "
            "fix that and run the command again"
        ) from error
