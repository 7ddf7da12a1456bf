"""A rank that dies: the others say so in one line, with the step to continue at."""

import os
import signal
from pathlib import Path

import pytest
import torch

from dist_vse import distributed, train
from dist_vse.config import load_config
from tests.support.datasets import write_dataset
from tests.support.distributed import run_distributed
from tests.support.runs import CONFIG, settings


def _lose(folder: Path) -> None:
    """Die on rank 1; note on rank 0 what an all-reduce makes of it."""
    if distributed.rank() == 1:
        os._exit(9)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # of who notices rank 1's end before us
    try:
        distributed.all_reduce_sum(torch.ones(3))
    except RuntimeError as error:
        (folder / "told").write_text(f"{distributed.is_lost_rank(error)}: {error}")


def test_a_lost_rank_is_known_by_its_error(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        run_distributed(_lose, 2, tmp_path)
    assert (tmp_path / "told").read_text().startswith("True: ")
    assert not distributed.is_lost_rank(RuntimeError("a tensor of another shape"))
    assert not distributed.is_lost_rank(ValueError("gloo: Connection closed by peer"))


def test_training_says_where_it_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lose(_: object) -> int:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:1")

    monkeypatch.setattr(train, "_run", lose)
    for step, name in ((0, "other"), (20, "step-000020")):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        with pytest.raises(distributed.LostRankError, match=f"continues at step {step}$"):
            train.run(load_config(CONFIG, [f"output_dir={tmp_path}"]))
    assert train.main([str(CONFIG), f"output_dir={tmp_path}"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == said.count("continues at step 20") == 1 and "Traceback" not in said


def _train(overrides: list[str], folder: Path) -> None:
    """Lose rank 1 at step 4."""
    config = load_config(CONFIG, overrides)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    advance = train._advance

    def die(*args: object) -> object:
        progress = advance(*args)  # type: ignore[arg-type]
        if progress.step == 4 and distributed.rank() == 1:
            os._exit(9)
        return progress

    train._advance = die  # type: ignore[assignment]
    try:
        train.run(config)
    except distributed.LostRankError as error:
        (folder / "told").write_text(str(error))


@pytest.mark.slow
def test_a_rank_that_dies_in_training(tmp_path: Path) -> None:
    write_dataset(tmp_path / "shards", {"train": 64, "val": 8})
    more = ["total_steps=8", "checkpoint_every=2", "data.num_workers=0"]
    overrides = settings(tmp_path / "shards", tmp_path / "run", *more)
    with pytest.raises(AssertionError):
        run_distributed(_train, 2, overrides, tmp_path, timeout=120)
    assert "continues at step 2" in (tmp_path / "told").read_text()
