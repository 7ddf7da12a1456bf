"""The options of `dist-vse shard`: their parsers and their meaning."""

import argparse
import inspect
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_vse.common.errors import UserError
from dist_vse.shards.fetching import ROBOTS, Fetching

if TYPE_CHECKING:
    from dist_vse.shards.build.plan import Options

_SOURCE_OPTIONS: dict[str, dict[str, Any]] = {
    "images": {"metavar": "DIR", "help": "where image paths start from [the file's folder]"},
    "split": {"metavar": "NAME", "help": "split of samples that name none [train]"},
    "restval": {"metavar": "NAME", "help": "split that restval goes to [train]"},
    "image_column": {"metavar": "NAME", "help": "column or field of the image's path [image]"},
    "caption_column": {
        "metavar": "NAMES",
        "help": "column or field of captions; in tables and jsonl also several, such as "
        "en_text=en,de_text=de [caption]",
    },
    "split_column": {"metavar": "NAME", "help": "column of the split"},
    "key_column": {"metavar": "NAME", "help": "column of the sample's key [from the path]"},
    "language_column": {"metavar": "NAME", "help": "column of the captions' language"},
    "negatives_column": {
        "metavar": "NAME",
        "help": "column of texts that are false of the image (data.negatives)",
    },
    "url_column": {"metavar": "NAME", "help": "column or field of the image's URL [url]"},
    "separator": {"metavar": "CHAR", "help": "what parts the cells [,]"},
    "quoted": {
        "action": "store_true",
        "default": None,
        "help": "cells in quotation marks are quoted as in CSV [quotation marks are text]",
    },
    "caption_key": {
        "metavar": "NAME",
        "help": "field of the JSON, or extension of the member, that holds the captions "
        "[captions or caption in the JSON, else txt]",
    },
}
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
_SIZE = re.compile(r"(\d+)([KMG]I?)?B", re.IGNORECASE)


def add_source_options(parser: argparse.ArgumentParser, read: Callable[..., object]) -> None:
    """Add the options that the source's function has parameters for."""
    for name in inspect.signature(read).parameters:
        if name in _SOURCE_OPTIONS:
            parser.add_argument("--" + name.replace("_", "-"), **_SOURCE_OPTIONS[name])


def add_caption_key(parser: argparse.ArgumentParser) -> None:
    """Add the option that says where a tar's captions are."""
    parser.add_argument("--caption-key", **_SOURCE_OPTIONS["caption_key"])


def takes(read: Callable[..., object], name: str) -> bool:
    """Return whether the source's function has a parameter of this name."""
    return name in inspect.signature(read).parameters


def source_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of the source that were given, as keyword arguments of its function."""
    from dist_vse.shards.remote import to_path

    given = {name: getattr(args, name, None) for name in _SOURCE_OPTIONS}
    options = {name: value for name, value in given.items() if value is not None}
    if "images" in options:
        options["images"] = to_path(options["images"])
    return options


def add_run_options(parser: argparse.ArgumentParser, *, max_bad: str = "0") -> None:
    """Add the options of everything that makes shards or an index."""
    parser.add_argument(
        "--max-bad",
        metavar="N|P%",
        default=max_bad,
        help="bad samples to skip and list, a number or a share such as 0.1%% [%(default)s]",
    )
    add_workers(parser)


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Add the number of processes."""
    parser.add_argument(
        "--workers",
        metavar="N",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="processes [one per core]",
    )


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what shards look like."""
    parser.add_argument(
        "out", metavar="OUT", type=Path, help="folder for the shards and index.json"
    )
    parser.add_argument(
        "--shard-size",
        metavar="N|SIZE",
        default="500",
        help="samples per shard, or bytes of images such as 200MB [%(default)s]",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the shuffle; splits named val, test, dev or eval are not shuffled [%(default)s]",
    )
    parser.add_argument(
        "--max-side", metavar="PX", type=int, help="shrink images whose longer side exceeds this"
    )
    parser.add_argument(
        "--format", choices=("jpeg", "png", "webp"), help="store images in this format"
    )
    parser.add_argument(
        "--quality", metavar="Q", type=int, help="of JPEG and WebP where images are changed [90]"
    )
    parser.add_argument(
        "--languages", metavar="CODES", help="keep captions in these only, such as en,de [all]"
    )
    parser.add_argument(
        "--decode", action="store_true", help="decode every image to check it, not those in doubt"
    )


def add_fetch_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how images at URLs are fetched."""
    usual = Fetching()
    parser.add_argument(
        "--connections",
        metavar="N",
        type=int,
        default=usual.connections,
        help="images fetched at a time [%(default)s]",
    )
    parser.add_argument(
        "--per-host",
        metavar="R",
        type=float,
        default=usual.per_host,
        help="requests a second to one host; 0 is no limit [%(default)g]",
    )
    parser.add_argument(
        "--timeout",
        metavar="S",
        type=float,
        default=usual.timeout_s,
        help="seconds to wait for an answer [%(default)g]",
    )
    parser.add_argument(
        "--retries",
        metavar="N",
        type=int,
        default=usual.retries,
        help="more tries of what may succeed later, after 1, 4, 16 ... seconds [%(default)s]",
    )
    parser.add_argument(
        "--max-image",
        metavar="SIZE",
        default=f"{usual.max_bytes // 10**6}MB",
        help="skip images with more bytes [%(default)s]",
    )
    parser.add_argument(
        "--user-agent",
        metavar="NAME/VERSION",
        default=usual.user_agent,
        help="who asks; robots.txt calls us NAME [%(default)s]",
    )
    parser.add_argument(
        "--robots",
        choices=ROBOTS,
        default=usual.robots,
        help="respect X-Robots-Tag (noai, noimageai, noindex, noimageindex); `full`: robots.txt "
        "as well [%(default)s]",
    )
    parser.add_argument(
        "--retry-failed",
        action="store_true",
        help="make those shards again in which an image was skipped",
    )


def _fetching(args: argparse.Namespace) -> Fetching:
    """Return a process's share of what the options of `add_fetch_options` allow."""
    at_least_1(args, "connections")
    for name, least in (("per_host", 0.0), ("timeout", 1e-3), ("retries", 0.0)):
        if not least <= getattr(args, name) < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} ({getattr(args, name):g}) is too low")
    if not args.user_agent.split("/")[0].strip() or not args.user_agent.isprintable():
        raise UserError(f"--user-agent {args.user_agent!r}: give a name, such as lab-name/1.0")
    return Fetching(
        connections=-(-args.connections // args.workers),
        per_host=args.per_host / args.workers,
        timeout_s=args.timeout,
        retries=args.retries,
        max_bytes=parse_size("--max-image", args.max_image),
        user_agent=args.user_agent,
        robots=args.robots,
        retry_failed=getattr(args, "retry_failed", False),  # not of a logged command
    )


def output_options(args: argparse.Namespace) -> "Options":
    """Return what the options of `add_output_options` stand for.

    Raises UserError for one that makes no sense.
    """
    from dist_vse.shards.build.plan import Options

    at_least_1(args, "max_side", "quality")
    if args.quality is not None and args.quality > 100:
        raise UserError(f"--quality ({args.quality}) must be at most 100")
    recode = None
    if args.max_side or args.format:
        from dist_vse.shards.build.recode import Recode

        recode = Recode(args.max_side or 0, args.format or "", args.quality or 90)
    if args.quality is not None and (recode is None or args.format == "png"):
        raise UserError(
            "--quality changes nothing with --format png, or without --max-side and --format; "
            "leave it out, or add --max-side or --format jpeg or webp"
        )
    samples, num_bytes = parse_shard_size(args.shard_size)
    fetching = _fetching(args) if args.shard_command == "urls" else None
    if fetching is not None and num_bytes:
        raise UserError(
            f"--shard-size {args.shard_size}: the sizes of images at URLs are not known ahead; "
            "give a number of samples"
        )
    return Options(samples, num_bytes, args.seed, recode, args.decode, fetching)


def at_least_1(args: argparse.Namespace, *names: str) -> None:
    """Raise UserError for one of the options that is given and below 1."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} ({value}) must be at least 1")


def parse_shard_size(text: str) -> tuple[int, int]:
    """Return (samples, 0) for a number, or (0, bytes) for a size such as 200MB or 1GiB.

    Raises UserError for anything else.
    """
    if text.isascii() and text.isdigit() and int(text) > 0:
        return int(text), 0
    return 0, parse_size("--shard-size", text, " samples such as 500, or")


def parse_size(option: str, text: str, other: str = "") -> int:
    """Return the bytes of a size such as 200MB or 1GiB; `other` is what might be given as well.

    Raises UserError for anything else.
    """
    size = _SIZE.fullmatch(text)
    value = int(size[1]) * _UNITS[(size[2] or "").upper()] if size else 0
    if value < 1:
        raise UserError(f"{option} ({text}) must be at least 1:{other} bytes such as 200MB")
    return value
