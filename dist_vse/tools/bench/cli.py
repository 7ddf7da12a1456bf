"""`dist-vse bench`: the options of its measurements."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands: the measurements that the package brings along."""
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    help_text = "speed, memory and traffic over processes"
    _add_scale(benchmarks.add_parser("scale", help=help_text))
    help_text = "one exact step of a loss over a million pairs"
    _add_million(benchmarks.add_parser("million", help=help_text))


def run(args: argparse.Namespace) -> int:
    """Run the measurement; return the exit code."""
    from dist_vse.tools.bench import million, scale

    return million.run(args) if args.benchmark == "million" else scale.run(args)


def _add_million(million: argparse.ArgumentParser) -> None:
    million.description = (
        "Take one exact step (forward and backward) of ConVSE++ and of ConVSE over made-up "
        "features, on processes of this machine with one thread each. Reports time, operations, "
        "bytes and memory, and compares some rows and columns with dense float64. A million pairs "
        "took 28 minutes with ConVSE++ and 64 with ConVSE on two cores (docs/benchmarks/losses.md)"
        "; --pairs 131072 takes two minutes."
    )
    million.add_argument("--pairs", type=int, default=2**20, metavar="N", help="[1048576]")
    million.add_argument("--dim", type=int, default=64, metavar="D", help="embedding [64]")
    million.add_argument("--processes", type=int, default=2, metavar="W", help="[2]")
    million.add_argument(
        "--losses",
        nargs="+",
        default=["convse++", "convse"],
        choices=["convse++", "convse"],
        help="[convse++ convse]",
    )
    million.add_argument("--out", type=Path, metavar="FILE", help="write the numbers as JSON")


def _add_scale(scale: argparse.ArgumentParser) -> None:
    scale.description = (
        "Train some steps of a config on several numbers of processes, and with settings varied "
        "one at a time; report pairs a second, efficiency, memory and seconds by part, and bytes "
        "sent. Starts processes of this machine (gloo, one thread each), or joins a launcher's."
    )
    scale.add_argument(
        "settings",
        nargs="*",
        metavar="[CONFIG] KEY=VALUE",
        help="the run; without CONFIG a small ViT and a small text transformer",
    )
    scale.add_argument(
        "--processes", type=int, nargs="+", default=[1, 2], metavar="W", help="[1 2]"
    )
    scale.add_argument(
        "--vary",
        nargs="+",
        default=[],
        metavar="KEY=VALUE,VALUE",
        help="settings to vary on the last W, such as chunk_size=32,128 loss.transport=ring",
    )
    scale.add_argument("--rounds", type=int, default=3, help="measurements of every case [3]")
    scale.add_argument("--steps", type=int, default=2, help="timed steps of each [2]")
    scale.add_argument(
        "--stream", action="store_true", help="read the config's data; else pairs are made up"
    )
    scale.add_argument(
        "--no-independent",
        dest="independent",
        action="store_false",
        help="skip the W single runs at once, with which weak scaling is compared",
    )
    scale.add_argument(
        "--read", nargs="+", default=[], metavar="FILE", help="measure nothing; join such files"
    )
    scale.add_argument("--baseline", metavar="FILE", help="an earlier --out, to compare with")
    scale.add_argument("--page", type=Path, metavar="FILE", help="write plots as one HTML page")
    scale.add_argument("--task", metavar="I/N", help="measure one share of N, for a job array")
    scale.add_argument("--out", type=Path, metavar="FILE", help="write the numbers as JSON")
