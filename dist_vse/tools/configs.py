"""`dist-vse config`: list, print or copy the configs that come with the package."""

import argparse
import shutil
from pathlib import Path

from dist_vse.common.errors import UserError, writing
from dist_vse.common.terminal import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions and their arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="print the names, each with its file's first line")
    show = actions.add_parser("show", help="print one")
    copy = actions.add_parser("copy", help="copy one, to change it")
    for action in (show, copy):
        action.add_argument("name", metavar="NAME", help="such as demo or clusters/local")
    copy.add_argument(
        "dest",
        metavar="DEST",
        nargs="?",
        default=Path(),
        type=Path,
        help="the new file, or a folder for it (default: here)",
    )


def run(args: argparse.Namespace) -> int:
    """Do what was asked; return the exit code. Raises UserError for an unknown name."""
    from dist_vse.config.named import named_config

    if args.action == "list":
        _print_list()
    elif args.action == "show":
        say(named_config(args.name).read_text(encoding="utf-8"), end="")
    else:
        _copy(named_config(args.name), args.dest)
    return 0


def _print_list() -> None:
    from dist_vse.config.named import named_configs

    named = named_configs()
    width = max(len(name) for name in named)
    for name, path in named.items():
        lines = path.read_text(encoding="utf-8").splitlines()
        about = next((line[2:] for line in lines if line.startswith("# ")), "")
        say(f"{name:<{width}}  {about.partition('. ')[0].rstrip('.:')}")


def _copy(source: Path, dest: Path) -> None:
    path = dest / source.name if dest.is_dir() else dest
    if path.exists():
        raise UserError(f"{path}: is there already; name another file")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, path)
    say(f"wrote {path}")
