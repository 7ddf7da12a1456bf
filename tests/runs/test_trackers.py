"""Weights & Biases and MLflow, the real ones, without a network."""

import json
import logging.handlers
from pathlib import Path
from typing import Any

import pytest

from dist_vse import train
from dist_vse.common import log
from dist_vse.common.errors import UserError
from dist_vse.config import load_config
from dist_vse.launch.submit import plan_submission
from dist_vse.runs import trackers
from dist_vse.runs.metrics import Recorder
from tests.support.datasets import write_dataset
from tests.support.distributed import run_distributed
from tests.support.runs import CONFIG, read_logged, read_losses


def learn(folder: Path, names: str, attempts: list[int]) -> None:
    import os

    os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    for total_steps in attempts:
        overrides = [
            f"data.index={folder / 'shards'}",
            f"output_dir={folder / 'run'}",
            f"total_steps={total_steps}",
            f"trackers=[{names}]",
            *("log_every=1", "data.num_workers=0", "project=tried", "optim.schedule=constant"),
        ]
        assert train.run(load_config(CONFIG, overrides)) == 0


@pytest.mark.slow
def test_mlflow_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow: Any = pytest.importorskip("mlflow", reason="needs the extra `mlflow`")
    write_dataset(tmp_path / "shards", {"train": [60, 50, 40], "val": [8]})
    run_distributed(learn, 2, tmp_path, "mlflow", [2, 3])
    run_dir = tmp_path / "run"
    client = mlflow.MlflowClient((run_dir / "mlruns").as_uri())
    (experiment,) = client.search_experiments(filter_string="name = 'tried'")
    (run,) = client.search_runs([experiment.experiment_id])  # one, of both attempts and both ranks
    assert run.info.run_id == json.loads((run_dir / "trackers.json").read_text())["mlflow"]
    assert run.info.status == "FINISHED"
    want = [*zip(read_logged(run_dir, "step"), read_losses(run_dir), strict=True)]
    got = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in got] == want and len(want) == 3
    assert run.data.params["loss.name"] == "convse"


@pytest.mark.slow
def test_wandb_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="needs the extra `wandb`")
    write_dataset(tmp_path / "shards", {"train": [60, 50, 40], "val": [8]})
    run_distributed(learn, 1, tmp_path, "wandb", [2, 3])
    run_dir = tmp_path / "run"
    name = json.loads((run_dir / "trackers.json").read_text())["wandb"]
    files = list((run_dir / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))
    assert len(files) == 2  # one file for each attempt
    assert all(b"train/loss" in file.read_bytes() for file in files)


class Diary:
    """The smallest tracker: a text file in the run's folder."""

    name = "diary"

    def __init__(self, path: Path) -> None:
        self.path = path

    def log(self, values: dict[str, float], *, step: int) -> None:
        if "train/loss" in values:  # evaluations come too
            with self.path.open("a") as file:
                file.write(f"{step} {values['train/loss']}\n")

    def finish(self) -> None:
        with self.path.open("a") as file:
            file.write("finished\n")


def start_diary(run: trackers.TrackedRun) -> tuple[trackers.Tracker, str]:
    path = run.run_dir / "diary.txt"
    if run.run_id is None:
        path.write_text(f"{run.project}: {run.settings['loss.name']}\n")
    return Diary(path), "volume 1"


def learn_with_a_diary(folder: Path, attempts: list[int]) -> None:
    trackers.TRACKERS["diary"] = trackers.TrackerSpec(start_diary, package=None)
    learn(folder, "diary", attempts)


@pytest.mark.slow
def test_a_new_tracker_is_one_function_and_its_name(tmp_path: Path) -> None:
    write_dataset(tmp_path / "shards", {"train": [60, 50, 40], "val": [8]})
    run_distributed(learn_with_a_diary, 2, tmp_path, [2, 3])
    run_dir = tmp_path / "run"
    first, second, third = read_losses(run_dir)
    assert (run_dir / "diary.txt").read_text().splitlines() == [
        "tried: convse",  # written once: the second attempt gets the first one's id
        *(f"1 {first}", f"2 {second}", "finished"),
        *(f"3 {third}", "finished"),
    ]


def test_a_tracker_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"wandb is not installed; pip install 'dist_vse\[wandb\]'"):
        trackers.check_trackers(["wandb"])
    with pytest.raises(UserError, match="trackers='wand' is unknown; did you mean 'wandb'"):
        trackers.check_trackers(["wand"])
    with pytest.raises(UserError, match="trackers='wand' is unknown"):  # before it is queued
        plan_submission(CONFIG, ["trackers=[wand]"])


def lose_the_store(folder: Path) -> tuple[list[int], list[str]]:
    """Log three steps, the store gone after the first; return who was left, and the log."""
    said = logging.handlers.BufferingHandler(100)
    log.logger.addHandler(said)
    recorder = Recorder(folder, 0, trackers=["mlflow"], project="tried", settings={})
    working = []
    for step in (1, 2, 3):
        recorder.write("train", step, {"loss": 3.0 / step})
        working.append(len(recorder.trackers))
        if step == 1:
            (folder / "mlruns").rename(folder / "away")
            (folder / "mlruns").write_text("no folder")
    recorder.close()
    return working, [record.getMessage() for record in said.buffer]


def test_a_tracker_that_fails_is_left_out(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="needs the extra `mlflow`")
    ((working, said),) = run_distributed(lose_the_store, 1, tmp_path)
    assert working == [1, 0, 0]
    (warning,) = said
    assert warning.startswith("tracker mlflow failed (") and "going on without it" in warning
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
