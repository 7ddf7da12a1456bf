"""`dist-vse bench`: what can be measured, and the options of each benchmark."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one subcommand a benchmark."""
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    benchmarks.add_parser("loss", help="the losses over the global batch, against OpenCLIP's")


def run(args: argparse.Namespace) -> int:
    """Run the benchmark that was chosen; return the exit code."""
    from dist_vse.bench.loss import run as run_loss

    return run_loss(args)
