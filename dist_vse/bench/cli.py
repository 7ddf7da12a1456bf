"""`dist-vse bench`: what can be measured, and the options of each benchmark."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one subcommand a benchmark."""
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    loss = benchmarks.add_parser("loss", help="the losses over the global batch, and OpenCLIP's")
    loss.add_argument("--processes", type=int, default=2, help="ranks on this machine (default: 2)")
    loss.add_argument(
        "--rows", type=int, nargs="*", default=[4096], help="pairs a rank (default: 4096)"
    )
    loss.add_argument("--dim", type=int, default=512, help="embedding size (default: 512)")
    loss.add_argument("--repeats", type=int, default=5, help="timed rounds (default: 5)")
    loss.add_argument(
        "--memory", type=int, nargs="*", default=[], metavar="N", help="global batches to weigh"
    )
    loss.add_argument(
        "--memory-dim", type=int, default=64, help="embedding size there (default: 64)"
    )
    loss.add_argument("--out", metavar="FILE", help="write the numbers as JSON")
    evaluation = benchmarks.add_parser("eval", help="retrieval by tiles, and VSE++'s way")
    evaluation.add_argument("--images", type=int, default=5000, help="of 5 captions (5000)")
    evaluation.add_argument("--dim", type=int, default=1024, help="embedding size (default: 1024)")
    evaluation.add_argument("--repeats", type=int, default=3, help="timed rounds (default: 3)")
    evaluation.add_argument("--out", metavar="FILE", help="write the numbers as JSON")


def run(args: argparse.Namespace) -> int:
    """Run the benchmark that was chosen; return the exit code."""
    if args.benchmark == "eval":
        from dist_vse.bench.eval import run as run_eval

        return run_eval(args)
    from dist_vse.bench.loss import run as run_loss

    return run_loss(args)
