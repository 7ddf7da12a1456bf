"""`python -m benchmarks NAME [options]`: measure dist_vse, and compare it with its peers.

Run it in a checkout with the extra `dev`; the wheel has no benchmarks. With `--out FILE` the
result is written as JSON; `python -m benchmarks render` makes docs/benchmarks/ from such files.
"""

import argparse
import importlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.options import BENCHMARKS
from dist_vse.common.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark, or render the results; return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    known = [*BENCHMARKS, "render"]
    if words and not words[0].startswith("-") and words[0] not in known:
        print(f"error: no benchmark {words[0]!r}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    args = _parser().parse_args(words)
    try:
        if args.benchmark == "render":
            from benchmarks.render import render

            render()
        else:
            _run(args, shlex.join(["python", "-m", "benchmarks", *words]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(args: argparse.Namespace, command: str) -> None:
    from benchmarks.result import write_result
    from dist_vse.common.files import check_output
    from dist_vse.tools.bench.report import print_tables

    if args.out is not None:
        check_output(args.out)
    result = importlib.import_module(f"benchmarks.{args.benchmark}").run(args)
    print_tables(result.tables)
    if args.out is not None:
        write_result(args.out, args.benchmark, command, result)
        print(f"wrote {args.out}")


def _parser() -> argparse.ArgumentParser:
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser("python -m benchmarks", description=about)
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="NAME")
    for name, (help_text, add_options) in BENCHMARKS.items():
        benchmark = benchmarks.add_parser(name, help=help_text)
        add_options(benchmark)
        benchmark.add_argument("--out", type=Path, metavar="FILE", help="write the result as JSON")
    benchmarks.add_parser("render", help="make docs/benchmarks/ from benchmarks/results/")
    return parser


if __name__ == "__main__":
    sys.exit(main())
