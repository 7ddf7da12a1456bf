"""Run a suite on a run's model, print its metrics, and keep its files in the run's folder."""

import errno
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dist_vse.common.errors import UserError, writing
from dist_vse.common.files import check_output, write_text
from dist_vse.common.log import setup_logging
from dist_vse.common.terminal import plain
from dist_vse.tools.search.embed import open_model

SUITES = {"mteb": "mteb", "clip_benchmark": "clip-benchmark"}  # modules of ours and packages
_EXAMPLES = {"mteb": "Flickr30kT2IRetrieval", "clip_benchmark": "wds/cifar10"}


def run_suite(location: Path, suite: str, tasks: Sequence[str]) -> int:
    """Run the tasks of a suite on a run, one of its checkpoints, or an exported folder.

    The suite's own files go to `suites/SUITE` in that folder. Raises UserError for an unknown
    suite, and for one that is not installed.
    """
    setup_logging()
    if suite not in SUITES:
        raise UserError(f"--suite {suite} is unknown; choose from {', '.join(SUITES)}")
    if not tasks:
        raise UserError(
            f"--suite {suite} needs --tasks, such as {_EXAMPLES[suite]}; the suite lists them"
        )
    model = open_model(location)
    out = location / "suites" / suite
    check_output(out / f"{suite}.json")  # before it runs for hours
    try:
        with tempfile.TemporaryDirectory() as scratch:
            found = import_module(f"dist_vse.tools.suites.{suite}").run(model, tasks, Path(scratch))
            with writing(out):
                take_over(Path(scratch), out)
    except ModuleNotFoundError as error:
        raise UserError(
            f"--suite {suite} needs the package {SUITES[suite]} ({error.name} is missing); "
            "pip install 'dist_vse[suites]'"
        ) from error
    table = Table("task", "metric", "value", title=plain(f"{location}, {suite}"))
    for task, metrics in found.items():
        for key, value in metrics.items():
            table.add_row(plain(task), plain(key), f"{value:.4f}")
    Console().print(table)
    return 0


def take_over(scratch: Path, out: Path) -> None:
    """Write the suite's files into the folder, each by one rename.

    Somebody else may have made the folder: a link in it is replaced, and not followed.
    """
    if out.is_symlink() or out.parent.is_symlink():
        raise OSError(errno.ELOOP, "it is a link")
    for path in sorted(scratch.glob("*.json")):
        write_text(out / path.name, path.read_text(encoding="utf-8"))
