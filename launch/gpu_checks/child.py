"""A rank of a check: doctor runs `python -m dist_vse.launch.gpu_checks.child TASK.json`."""

import contextlib
import importlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from dist_vse.common.errors import UserError
from dist_vse.launch.gpu_checks.catalog import NO_GROUP, find_check
from dist_vse.launch.gpu_checks.finding import Finding, Task

RESULT = "result.json"


def main(path: str) -> None:
    """Run the check; rank 0 writes what it found."""
    task = Task(**json.loads(Path(path).read_text(encoding="utf-8")))
    check = find_check(task.number)

    from dist_vse import distributed

    grouped = check.group != NO_GROUP
    with distributed.process_group() if grouped else contextlib.nullcontext():
        try:
            finding = load(check.warm_up if task.warm_up else check.function)(task)
        except UserError as error:
            finding = Finding(False, str(error))
        if distributed.is_main_process():
            text = json.dumps(asdict(finding))
            Path(task.folder, RESULT).write_text(text, encoding="utf-8")
        if grouped:
            distributed.barrier()


def load(function: str) -> Callable[[Task], Finding]:
    """Return a check's function by "module:name"; what it needs is imported here."""
    module, _, name = function.partition(":")
    found: Callable[[Task], Finding] = getattr(
        importlib.import_module(f"dist_vse.launch.gpu_checks.{module}"), name
    )
    return found


if __name__ == "__main__":
    main(sys.argv[1])
    # At once: while PyTorch's threads still run, its shutdown aborts the process now and then.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
