"""The command `dist-vse`: its subcommands and their options.

Nothing heavy is imported before a subcommand runs, so that `--help` answers at once.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import dist_vse.tools.bench.cli
import dist_vse.tools.export.cli
import dist_vse.tools.plan.cli
import dist_vse.tools.search.cli
import dist_vse.tools.verify.cli
import launch.cli
import shards.cli
from dist_vse.common.errors import UserError
from dist_vse.common.version import __version__

_Arguments = Callable[[argparse.ArgumentParser], None]
_Run = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; return 0, or 2 after one line about what the user can mend."""
    args = _parser().parse_args(arguments)
    try:
        run: _Run = args.run
        return run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dist-vse",
        description="Train visual-semantic embeddings with exact, very large batches.",
    )
    parser.add_argument("--version", action="version", version=f"dist_vse {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (text, add_arguments, run) in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        add_arguments(command)
        command.set_defaults(run=run)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, such as configs/demo.yaml")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="settings that replace the file's, such as loss.name=convse++ optim.lr=1e-3",
    )


def _train(args: argparse.Namespace) -> int:
    from dist_vse.config import load_config

    load_config(args.config, args.overrides)  # a slip in it is told before torch is imported

    from dist_vse.train import main as train

    return train([args.config, *args.overrides])


def _features(args: argparse.Namespace) -> int:
    from dist_vse.tools.features import features_run

    return features_run(args.config, args.overrides)


def _add_eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run_dir", metavar="RUN", type=Path, help="a trained run, or a folder of its checkpoints"
    )
    parser.add_argument("--split", default="test", help="split to evaluate on (default: test)")
    parser.add_argument("--data", metavar="DIR", help="another sharded data set than the run's")
    parser.add_argument(
        "--protocol",
        default="plain",
        help="plain, coco-5k, coco-1k or flickr-1k (default: plain); see docs/evaluation.md",
    )
    parser.add_argument(
        "--recall",
        type=int,
        nargs="+",
        default=[1, 5, 10],
        metavar="K",
        help="the Ks of R@K (default: 1 5 10)",
    )
    parser.add_argument(
        "--bootstrap", type=int, default=0, metavar="N", help="resamples for 95 %% intervals"
    )


def _eval(args: argparse.Namespace) -> int:
    if min(args.recall) < 1 or args.bootstrap < 0:
        raise UserError("--recall takes numbers from 1 on, --bootstrap from 0 on")

    from dist_vse.evaluation.command import eval_run

    return eval_run(
        args.run_dir,
        split=args.split,
        data=args.data,
        protocol=args.protocol,
        recalls=args.recall,
        bootstrap=args.bootstrap,
    )


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run_dirs", metavar="RUN", type=Path, nargs="+", help="a run's folder; several are compared"
    )
    parser.add_argument(
        "--data", metavar="DIR", type=Path, help="where its shards are now (of one run)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="the page to write (default: RUN/report.html, or compare.html beside the first run)",
    )


def _report(args: argparse.Namespace) -> int:
    first = args.run_dirs[0]
    if len(args.run_dirs) > 1 and args.data is not None:
        raise UserError("--data is for the images of one run's report; leave it out for several")

    from dist_vse.tools.report import write_comparison, write_report

    if len(args.run_dirs) > 1:
        path = write_comparison(args.run_dirs, args.out or first.parent / "compare.html")
    else:
        path = write_report(first, args.data, args.out or first / "report.html")
    print(f"wrote {path}")
    return 0


_COMMANDS: dict[str, tuple[str, _Arguments, _Run]] = {
    "shard": (
        "turn images and captions into WebDataset shards",
        shards.cli.add_arguments,
        shards.cli.run,
    ),
    "train": (
        "train, in this process or under a launcher (accelerate, torchrun)",
        _add_config,
        _train,
    ),
    "features": (
        "compute a frozen image trunk's outputs once, for training without images",
        _add_config,
        _features,
    ),
    "submit": (
        "train as a Slurm job, or as local processes",
        launch.cli.add_arguments,
        launch.cli.run,
    ),
    "doctor": ("check a run before it is started", launch.cli.add_doctor, launch.cli.doctor),
    "status": ("say where a submitted run stands", launch.cli.add_run, launch.cli.status),
    "logs": ("print a submitted run's log", launch.cli.add_logs, launch.cli.logs),
    "cancel": ("have a submitted run save and end", launch.cli.add_run, launch.cli.cancel),
    "runs": ("print a table of several runs", launch.cli.add_runs, launch.cli.runs),
    "eval": (
        "measure retrieval on a split, beside the untrained model and chance",
        _add_eval,
        _eval,
    ),
    "report": (
        "write the results of a run, or of several side by side, as one HTML page",
        _add_report,
        _report,
    ),
    "verify": (
        "check a config's gradients on several processes against one",
        dist_vse.tools.verify.cli.add_arguments,
        dist_vse.tools.verify.cli.run,
    ),
    "export": (
        "write a run's model as a folder for other programs, and for dist_vse.load",
        dist_vse.tools.export.cli.add_arguments,
        dist_vse.tools.export.cli.run,
    ),
    "embed": (
        "write the features of a split's images and captions",
        dist_vse.tools.search.cli.add_embed,
        dist_vse.tools.search.cli.run_embed,
    ),
    "search": (
        "find the images of a split that fit a text or an image",
        dist_vse.tools.search.cli.add_search,
        dist_vse.tools.search.cli.run_search,
    ),
    "zeroshot": (
        "classify images by the names of their classes",
        dist_vse.tools.search.cli.add_zeroshot,
        dist_vse.tools.search.cli.run_zeroshot,
    ),
    "plan": (
        "predict time and memory on a cluster, and recommend settings",
        dist_vse.tools.plan.cli.add_arguments,
        dist_vse.tools.plan.cli.run,
    ),
    "bench": (
        "measure speed, memory and traffic of training steps",
        dist_vse.tools.bench.cli.add_arguments,
        dist_vse.tools.bench.cli.run,
    ),
}


if __name__ == "__main__":  # for `accelerate launch -m dist_vse.cli bench scale ...`
    sys.exit(main())
