"""A run ends where its evaluations no longer become better, and stays ended."""

import json
from pathlib import Path

import pytest

from dist_vse.common.errors import UserError
from dist_vse.config import TrainConfig
from dist_vse.training.early_stop import EarlyStop, read_early_stop
from tests.support.datasets import write_dataset
from tests.support.distributed import run_distributed
from tests.support.runs import read_lines, run, settings


def _ends(patience: int, scores: list[float]) -> list[bool]:
    stop, found = EarlyStop(patience), []
    for score in scores:
        stop.add(score)
        found.append(stop.ends)
    return found


def test_patience_counts_evaluations_without_a_better_score() -> None:
    scores = [1.0, 3.0, 2.0, 4.0, 4.0, 3.0]
    assert _ends(0, scores) == [False] * 6
    assert _ends(1, scores) == [False, False, True, False, True, True]
    assert _ends(2, scores) == [False, False, False, False, False, True]
    assert _ends(9, scores) == [False] * 6


def test_a_run_that_goes_on_counts_on(tmp_path: Path) -> None:
    lines = [("eval", 1.0), ("train", 0.0), ("eval", 2.0), ("eval", 2.0)]
    text = "".join(json.dumps({"kind": k, "step": 1, "i2t_r1": v}) + "\n" for k, v in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    assert read_early_stop(tmp_path, "i2t_r1", 1).ends
    assert not read_early_stop(tmp_path, "i2t_r1", 2).ends
    assert not read_early_stop(tmp_path / "none", "rsum", 1).ends


def test_wrong_settings_are_named() -> None:
    with pytest.raises(UserError, match=r"patience \(2\).*eval_every"):
        TrainConfig(patience=2)
    with pytest.raises(UserError, match=r"best_metric='rsums'.*rsum"):
        TrainConfig(best_metric="rsums")


def _twice(overrides: list[str]) -> list[int | str]:
    return [run(overrides), run(overrides)]


@pytest.mark.slow
def test_a_run_ends_early_with_a_checkpoint_and_stays_ended(tmp_path: Path) -> None:
    write_dataset(tmp_path / "shards", {"train": 64, "val": 16})
    more = ["eval_every=1", "patience=2", "best_metric=t2i_r1", "optim.lr=1e-12", "total_steps=9"]
    overrides = settings(tmp_path / "shards", tmp_path / "run", *more)
    assert run_distributed(_twice, 1, overrides) == [[0, 0]]
    evaluated = [line["step"] for line in read_lines(tmp_path / "run") if line["kind"] == "eval"]
    assert evaluated == [0, 1, 2]
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]
