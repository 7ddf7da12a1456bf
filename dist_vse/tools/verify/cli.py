"""The command `dist-vse verify`."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dist_vse.common.arguments import parse_arguments
from dist_vse.common.errors import UserError
from dist_vse.common.terminal import say

if TYPE_CHECKING:
    from dist_vse.config import TrainConfig
    from dist_vse.tools.verify.checks import Result

PROCESSES = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "config", nargs="?", metavar="CONFIG", help="the run's YAML (default: every setting's own)"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="settings that replace the file's, such as loss.name=convse++ engine.zero_stage=3",
    )
    parser.add_argument(
        "--processes",
        type=int,
        metavar="W",
        help=f"processes to start on this machine's CPU (default: {PROCESSES}); a launcher's own "
        "(torchrun, accelerate launch) are used where it has started this command",
    )
    parser.add_argument(
        "--peer",
        choices=("open_clip", "sentence_transformers", "grad_cache", "all"),
        help="instead of a config: the losses of another library, or of all of these, compared "
        "with ours (extra `examples`)",
    )


def run(args: argparse.Namespace) -> int:
    """Compare and print; return 0 if all is exact, 1 if something is off."""
    if args.peer is not None:
        return _compare_peers(args)
    if "RANK" in os.environ:
        return _join_group(args)
    check = _choose_check(args)
    processes = _processes(args)

    from dist_vse.distributed.spawn import run_on_ranks
    from dist_vse.tools.verify.checks import Result, describe

    result: Result = run_on_ranks(check, processes)
    say(describe(result))
    return result.code


def _join_group(args: argparse.Namespace) -> int:
    """Run as one rank of a launcher's group; every rank returns the same code."""
    from dist_vse import distributed
    from dist_vse.tools.verify.checks import describe

    with distributed.process_group():
        try:
            with distributed.raise_on_all_ranks():
                check = _choose_check(args)
                world_size = distributed.world_size()
                if args.processes not in (None, world_size):
                    raise UserError(
                        f"--processes {args.processes}: the launcher has started {world_size}; "
                        "leave --processes out"
                    )
            result = check()
            code, message = result.code, describe(result)
        except UserError as error:  # alike on every rank
            code, message = 2, f"error: {error}"
        if distributed.is_main_process():
            say(message, file=sys.stderr if code == 2 else sys.stdout, flush=True)
        # A launcher ends all ranks when the first one fails: let rank 0 speak before.
        distributed.barrier()
        return code


def _choose_check(args: argparse.Namespace) -> "Callable[[], Result]":
    """Return what every rank runs. Raises UserError for what the user can mend."""
    config = _read_config(args)  # an error in it is reported before torch is imported

    from dist_vse.tools.verify.checks import check

    return partial(check, config)


def _compare_peers(args: argparse.Namespace) -> int:
    if args.config is not None:
        raise UserError(f"--peer {args.peer} takes no config; leave {args.config} out")
    if "RANK" in os.environ:
        raise UserError(f"--peer {args.peer} starts its own processes; run it without a launcher")
    processes = _processes(args)

    from dist_vse.tools.verify.conformance.command import run

    return run(args.peer, processes)


def _processes(args: argparse.Namespace) -> int:
    processes = PROCESSES if args.processes is None else args.processes
    if processes < 1:
        raise UserError(f"--processes {processes} must be at least 1")
    return int(processes)


def _read_config(args: argparse.Namespace) -> "TrainConfig":
    from dist_vse.config import load_config

    given = args.config
    if given is not None and "=" in given and not Path(given).exists():
        return load_config(None, [given, *args.overrides])
    return load_config(given, args.overrides)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line of `python -m dist_vse.tools.verify`; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m dist_vse.tools.verify")
    add_arguments(parser)
    try:
        return run(parse_arguments(parser, arguments))
    except UserError as error:
        say(f"error: {error}", file=sys.stderr)
        return 2
