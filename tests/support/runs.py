"""Small real runs: the debug config trained on drawn shapes, as a function and as commands."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_vse import train
from dist_vse.common.errors import UserError
from dist_vse.config import load_config
from tests.support.datasets import write_dataset
from tests.support.distributed import run_distributed
from tests.support.paths import ROOT

CONFIG = ROOT / "configs" / "debug_cpu.yaml"


def settings(shards: Path, run_dir: Path, *more: str) -> list[str]:
    """Return the overrides of a run."""
    return [f"data.index={shards}", f"output_dir={run_dir}", *more]


def run(overrides: Sequence[str]) -> int | str:
    """Train on this rank; return the exit code, or what the user is told."""
    try:
        return train.run(load_config(CONFIG, overrides))
    except UserError as error:
        return str(error)


def trained_run(
    folder: Path, splits: Mapping[str, int | Sequence[int]], *more: str, captions: int = 2
) -> Path:
    """Write `shards` into the folder and train on them in one process; return the run's folder."""
    write_dataset(folder / "shards", splits, captions=captions)
    overrides = settings(folder / "shards", folder / "run", *more)
    assert run_distributed(run, 1, overrides) == [0]
    return folder / "run"


def read_lines(run_dir: Path) -> list[dict[str, Any]]:
    """Return the run's metrics, a line a step and an evaluation."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def read_logged(run_dir: Path, name: str) -> list[float]:
    """Return a number of every training step."""
    return [line[name] for line in read_lines(run_dir) if line["kind"] == "train"]


def read_losses(run_dir: Path) -> list[float]:
    return read_logged(run_dir, "loss")


def command(*arguments: Any) -> subprocess.CompletedProcess[str]:
    """Run a command in the repository, as a user whose environment is active does."""
    bin_dir = Path(sys.executable).parent
    env = {**os.environ, "PATH": f"{bin_dir}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(
        [str(a) for a in arguments],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=110,
    )
