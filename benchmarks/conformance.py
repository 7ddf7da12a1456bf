"""The losses of other libraries under DDP, against one process: `dist-vse verify --peer all`."""

import argparse

from benchmarks.result import Result
from dist_vse.tools.verify.conformance.command import PEERS, collect, table


def run(args: argparse.Namespace) -> Result:
    """Measure all peers that are installed, and ours."""
    found, absent = collect(PEERS[:-1], args.processes, skip=True)
    for line in absent:
        print(f"SKIPPED {line}")
    return Result(
        {"settings": [measured.figures() for measured in found], "skipped": absent},
        [table(found, args.processes)],
    )
