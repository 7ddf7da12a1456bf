"""Train every loss at every batch with its best rate: the runs behind `python -m benchmarks batch`.

    python -m benchmarks.batch_search runs/sweep_batch [KEY=VALUE ...]

Each run is one of `dist-vse submit sweep_batch --sweep`. Three rates around a guess are tried, then
further ones while the best lies at an edge, all with seed 0 on val. Then the best rate is trained
with further seeds, evaluated on test. What is there already is not trained again. Afterwards,
`--report` trains the best rates once more with the batch report.
"""

import argparse
import sys
from pathlib import Path

from benchmarks.support.batch_runs import repeat_best, report_best, search
from dist_vse.common.errors import UserError

LOSSES = ("convse", "info_nce", "siglip", "dcl", "convse++", "vse++")
BATCHES = (64, 256, 1024, 4096, 512, 2048)


def main() -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description="Train every loss at every batch.")
    parser.add_argument("folder", type=Path, help="where the runs go")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="changes to the config")
    parser.add_argument("--losses", nargs="+", default=LOSSES)
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time [2]")
    parser.add_argument("--report", action="store_true", help="only the runs with batch_report")
    parser.add_argument("--no-seeds", action="store_true", help="only search the rates")
    args = parser.parse_args()
    where = args.folder.absolute(), args.losses, args.batches, args.settings
    try:
        if args.report:
            report_best(*where, parallel=args.parallel)
            return 0
        search(*where, parallel=args.parallel)
        if not args.no_seeds:
            repeat_best(*where, parallel=args.parallel)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
