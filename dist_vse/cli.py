"""The command `dist-vse`: its subcommands and their options.

Nothing heavy is imported before a subcommand runs, so that `--help` is fast.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_vse.common.arguments import parse_arguments
from dist_vse.common.consent import add_allow_pipe
from dist_vse.common.errors import UserError
from dist_vse.common.extras import needs_train
from dist_vse.common.local_path import require_local
from dist_vse.common.terminal import accept_any_text, message, say
from dist_vse.common.version import __version__
from dist_vse.launch import cli as launch
from dist_vse.shards import cli as shards
from dist_vse.tools import configs
from dist_vse.tools.bench import cli as bench
from dist_vse.tools.convse import cli as convse
from dist_vse.tools.export import cli as export
from dist_vse.tools.plan import cli as plan
from dist_vse.tools.search import cli as search
from dist_vse.tools.verify import cli as verify


@dataclass(frozen=True)
class Command:
    """A subcommand of `dist-vse`."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    """Returns the exit code. Raises UserError for what the user can fix."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit code; 2 after a UserError, which is one line."""
    accept_any_text()
    args = parse_arguments(_parser(), arguments)
    try:
        _require_local(args)
        with needs_train(f"dist-vse {args.command}"):
            return COMMANDS[args.command].run(args)
    except UserError as error:
        say(f"error: {message(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        say("interrupted", file=sys.stderr)
        return 130


def _require_local(args: argparse.Namespace) -> None:
    """Raise UserError for an address where a path goes; what may be an address is a string."""
    for given in vars(args).values():
        for path in given if isinstance(given, list) else [given]:
            if isinstance(path, Path):
                require_local(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dist-vse",
        description="Train visual-semantic embeddings with exact, very large batches.",
    )
    parser.add_argument("--version", action="version", version=f"dist_vse {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        description = f"{command.help[0].upper()}{command.help[1:]}."
        command.add_arguments(commands.add_parser(name, help=command.help, description=description))
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or a name of `config list`")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="settings that replace the file's, such as loss.name=convse++ optim.lr=1e-3",
    )


def _train(args: argparse.Namespace) -> int:
    from dist_vse.config import load_config

    load_config(args.config, args.overrides)  # an error in it is reported before torch is imported

    from dist_vse.train import main as train

    return train([args.config, *args.overrides])


def _features(args: argparse.Namespace) -> int:
    from dist_vse.tools.features import features_run

    return features_run(args.config, args.overrides, texts=args.texts)


def _add_features(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument(
        "--texts",
        metavar="FOLDER",
        type=Path,
        help="instead, write the frozen text trunk's outputs for all captions of all splits, for "
        "model.text.kind=vectors",
    )


def _add_eval(parser: argparse.ArgumentParser) -> None:
    add_allow_pipe(parser)
    parser.add_argument(
        "run_dir", metavar="RUN", type=Path, help="a trained run, or a folder of its checkpoints"
    )
    parser.add_argument("--split", default="test", help="split to evaluate on (default: test)")
    parser.add_argument("--data", metavar="DIR", help="another sharded data set than the run's")
    parser.add_argument(
        "--protocol",
        default="plain",
        help="plain, coco-5k, coco-1k or flickr-1k (default: plain); see docs/guides/evaluation.md",
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
    parser.add_argument(
        "--width",
        type=int,
        metavar="N",
        help="use the first N numbers of each embedding (models with loss.widths; default: all)",
    )
    parser.add_argument(
        "--suite",
        help="mteb or clip_benchmark: run tasks of other people's instead of a split",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=[],
        metavar="TASK",
        help="of the suite, by name; of clip_benchmark also folders in its WebDataset layout",
    )


def _eval(args: argparse.Namespace) -> int:
    if min(args.recall) < 1 or args.bootstrap < 0:
        raise UserError("--recall takes numbers from 1 on, --bootstrap from 0 on")

    if args.suite is not None:
        from dist_vse.tools.suites.run import run_suite

        return run_suite(args.run_dir, args.suite, args.tasks)

    from dist_vse.evaluation.command import eval_run

    return eval_run(
        args.run_dir,
        split=args.split,
        data=args.data,
        protocol=args.protocol,
        recalls=args.recall,
        bootstrap=args.bootstrap,
        allow_pipe=args.allow_pipe,
        width=args.width,
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
        help="the page to write (default: RUN/report.html, or compare.html next to the first run)",
    )
    parser.add_argument(
        "--watch", action="store_true", help="serve the page to this machine, and follow the run"
    )
    parser.add_argument("--port", type=int, metavar="N", help="where to serve it [8765]")


def _report(args: argparse.Namespace) -> int:
    first = args.run_dirs[0]
    if len(args.run_dirs) > 1 and args.data is not None:
        raise UserError("--data is for the images of one run's report; leave it out for several")

    if args.watch and (len(args.run_dirs) > 1 or args.out is not None):
        raise UserError(
            "--watch follows one run and writes no page; leave out the others and --out"
        )
    if args.port is not None and not args.watch:
        raise UserError("--port is for --watch")

    from dist_vse.tools.report import watch_run, write_comparison, write_report

    if args.watch:
        watch_run(first, args.data, 8765 if args.port is None else args.port)
        return 0
    if len(args.run_dirs) > 1:
        path = write_comparison(args.run_dirs, args.out or first.parent / "compare.html")
    else:
        path = write_report(first, args.data, args.out or first / "report.html")
    say(f"wrote {path}")
    return 0


COMMANDS = {
    "config": Command(
        "list, print or copy the configs that come with dist_vse",
        configs.add_arguments,
        configs.run,
    ),
    "shard": Command(
        "turn images and captions into WebDataset shards", shards.add_arguments, shards.run
    ),
    "train": Command(
        "train, in this process or under a launcher (accelerate, torchrun)", _add_config, _train
    ),
    "features": Command(
        "compute a frozen trunk's outputs once, for training without images",
        _add_features,
        _features,
    ),
    "submit": Command(
        "train as a Slurm job, or as local processes", launch.add_submit, launch.submit
    ),
    "doctor": Command("check a run before it is started", launch.add_doctor, launch.doctor),
    "status": Command("print where a submitted run stands", launch.add_run, launch.status),
    "logs": Command("print a submitted run's log", launch.add_logs, launch.logs),
    "cancel": Command("ask a submitted run to save and exit", launch.add_run, launch.cancel),
    "runs": Command("print a table of several runs", launch.add_runs, launch.runs),
    "eval": Command(
        "measure retrieval on a split, compared with the untrained model and chance",
        _add_eval,
        _eval,
    ),
    "import": Command(
        "take over a checkpoint or vocabulary of ConVSE's or VSE++'s code",
        convse.add_arguments,
        convse.run,
    ),
    "report": Command(
        "write the results of one run, or of several side by side, as an HTML page",
        _add_report,
        _report,
    ),
    "verify": Command(
        "check a config's gradients on several processes against one",
        verify.add_arguments,
        verify.run,
    ),
    "export": Command(
        "write a run's model as a folder for other programs, and for dist_vse.load",
        export.add_arguments,
        export.run,
    ),
    "embed": Command(
        "write the features of a split's images and captions", search.add_embed, search.run_embed
    ),
    "search": Command(
        "find the images of a split that fit a text or an image",
        search.add_search,
        search.run_search,
    ),
    "mine": Command(
        "write the hardest negatives of a split into a copy of its data set",
        search.add_mine,
        search.run_mine,
    ),
    "zeroshot": Command(
        "classify images by the names of their classes", search.add_zeroshot, search.run_zeroshot
    ),
    "plan": Command(
        "predict time and memory on a cluster, and recommend settings",
        plan.add_arguments,
        plan.run,
    ),
    "bench": Command(
        "measure speed, memory and traffic of training steps", bench.add_arguments, bench.run
    ),
}


if __name__ == "__main__":  # for `accelerate launch -m dist_vse.cli bench scale ...`
    sys.exit(main())
