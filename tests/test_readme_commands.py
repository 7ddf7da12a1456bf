"""The README's commands on a small run, and an error from a launcher."""

import json
from pathlib import Path

import pytest
import torch

from tests.support.datasets import write_dataset
from tests.support.runs import command, read_losses, settings

pytestmark = pytest.mark.slow

TWO = ("--config_file", "configs/accelerate/cpu_2proc.yaml")
LAUNCH = ("accelerate", "launch", *TWO, "-m", "dist_vse.train", "configs/debug_cpu.yaml")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "shards", {"train": [60, 50, 40], "val": [32]})
    return tmp_path / "shards"


def test_the_readmes_commands_train_evaluate_and_report(shards: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    launched = command(
        *LAUNCH,
        *settings(shards, run_dir, "log_every=1", "optim.lr=2e-3", "total_steps=30"),
    )
    assert launched.returncode == 0, launched.stderr
    losses = read_losses(run_dir)
    assert len(losses) == 30 and losses[-1] < losses[0] - 0.3
    evaluated = command("dist-vse", "eval", run_dir, "--split", "val")
    assert evaluated.returncode == 0, evaluated.stderr
    result = json.loads((run_dir / "eval-val.json").read_text())
    assert result["chance"]["i2t_r1"] == pytest.approx(100 / 32)
    assert result["trained"]["num_images"] == 32
    assert result["intervals"] == {}
    checkpoint = max((run_dir / "checkpoints").glob("step-*"))
    again = ("--split", "val", "--recall", "2", "--bootstrap", "20")
    evaluated = command("dist-vse", "eval", checkpoint, *again)
    assert evaluated.returncode == 0, evaluated.stderr
    assert "R@2, %" in evaluated.stdout and "95 % bootstrap" in evaluated.stdout
    other = json.loads((run_dir / f"eval-val-{checkpoint.name}.json").read_text())
    assert other["trained"]["i2t_r1"] == result["trained"]["i2t_r1"]
    low, high = other["intervals"]["i2t_r2"]
    assert low <= other["trained"]["i2t_r2"] <= high
    wrong = command("dist-vse", "eval", run_dir, "--split", "val", "--protocol", "flickr-1k")
    assert wrong.returncode == 2
    assert "defined on 1,000 images, this split has 32" in wrong.stderr.splitlines()[-1]
    (made,) = (run_dir / "environment.jsonl").read_text().splitlines()
    assert json.loads(made)["machine"]["processes"] == 2
    assert json.loads(made)["versions"]["torch"] == torch.__version__.split("+")[0]
    reported = command("dist-vse", "report", run_dir)
    assert reported.returncode == 0, reported.stderr
    assert "<html" in (run_dir / "report.html").read_text()


def test_a_launched_error_is_one_line(shards: Path, tmp_path: Path) -> None:
    launched = command(
        *LAUNCH,
        *settings(shards, tmp_path / "run", "loss.name=convs"),
    )
    assert launched.returncode != 0
    errors = [line for line in launched.stderr.splitlines() if line.startswith("error:")]
    assert errors == [
        "error: configs/debug_cpu.yaml: loss.name='convs' is unknown; did you mean 'convse'?"
    ]
