"""What changes along a run: the learning rate, the warm-up, and a temperature that is scheduled."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from dist_vse.common.errors import UserError
from dist_vse.config import DataConfig, ImageConfig, LossConfig, OptimConfig, TrainConfig
from dist_vse.data.samples import Batch
from dist_vse.data.streams import open_train_sets
from dist_vse.data.train_stream import train_batches
from dist_vse.losses.dense_loss import dense_loss
from dist_vse.models.tokenizer import WordTokenizer
from dist_vse.training.schedule import learning_rate, temperature, warmup_fraction
from dist_vse.training.step_loss import build_loss
from tests.support.datasets import write_dataset
from tests.support.distributed import run_distributed
from tests.support.runs import read_lines, run, settings


def test_the_rate_rises_to_its_peak_and_ends_at_zero() -> None:
    def rate(seen: int, schedule: str = "cosine") -> float:
        optim = OptimConfig(lr=2.0, schedule=schedule, warmup_samples=9)
        return learning_rate(seen, optim, total_samples=109)

    assert [rate(seen) for seen in (0, 4, 9, 59, 109)] == pytest.approx([0.2, 1.0, 2.0, 1.0, 0.0])
    assert [rate(seen, "step") for seen in (58, 60)] == pytest.approx([2.0, 0.2])
    floor = OptimConfig(lr=2.0, schedule="linear", warmup_samples=9, min_lr=0.5)
    rates = [learning_rate(seen, floor, total_samples=109) for seen in (0, 8, 9, 59, 109)]
    assert rates == pytest.approx([0.2, 1.8, 2.0, 1.25, 0.5])  # the end value lifts no warm-up
    assert [warmup_fraction(seen, 8) for seen in (0, 2, 8, 20)] == [0.0, 0.25, 1.0, 1.0]


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "wsd", "step"])
def test_the_rate_at_a_sample_is_the_same_for_every_batch(schedule: str) -> None:
    end = 1e-5 if schedule in ("cosine", "linear", "wsd") else 0.0
    cooldown = 3000 if schedule == "wsd" else 0
    optim = OptimConfig(
        lr=1e-3, schedule=schedule, warmup_samples=1024, min_lr=end, cooldown_samples=cooldown
    )
    curves, lengths = [], []
    for batch in (32, 64, 128, 256, 512):
        config = TrainConfig(global_batch_size=batch, total_samples=10_000, optim=optim)
        config = config.with_budget(epoch_size=999)
        lengths.append(config.total_steps)
        curves.append(
            [learning_rate(n, optim, total_samples=config.horizon) for n in range(0, 10_000, 512)]
        )
    assert lengths == [313, 157, 79, 40, 20]
    assert all(curve == curves[0] for curve in curves)
    last = learning_rate(10_000, optim, total_samples=10_000)
    assert last == pytest.approx({"constant": 1e-3, "step": 1e-4}.get(schedule, 1e-5))


def test_wsd_is_flat_before_its_cooldown_and_linear_in_it() -> None:
    optim = OptimConfig(lr=1.0, schedule="wsd", min_lr=0.2, cooldown_samples=100)
    found = [learning_rate(n, optim, total_samples=1000) for n in (0, 899, 900, 950, 1000, 1001)]
    assert found == pytest.approx([1.0, 1.0, 1.0, 0.6, 0.2, 0.2])
    with pytest.raises(UserError, match=r"optim.cooldown_samples \(0\) must be above 0"):
        OptimConfig(schedule="wsd")
    with pytest.raises(UserError, match=r"is for no other \(it is cosine\)"):
        OptimConfig(cooldown_samples=1)
    with pytest.raises(UserError, match=r"optim.min_lr \(1e-06\).*is for cosine, linear, wsd"):
        OptimConfig(schedule="step", min_lr=1e-6)


def test_epochs_become_samples_and_steps() -> None:
    config = TrainConfig(global_batch_size=64, epochs=2).with_budget(epoch_size=160)
    assert (config.total_samples, config.total_steps, config.horizon) == (320, 5, 320)
    assert config.with_budget(epoch_size=160) == config
    unchanged = TrainConfig(global_batch_size=64)
    assert unchanged.with_budget(epoch_size=160) == unchanged


def test_two_epochs_read_every_sample_twice(tmp_path: Path) -> None:
    write_dataset(tmp_path, {"train": [40, 24]}, captions=1)
    data = DataConfig(index=str(tmp_path), num_workers=0, shuffle_window=16)
    sets = open_train_sets(data)
    config = TrainConfig(global_batch_size=16, epochs=2, data=data).with_budget(sets[0].per_epoch)
    tokenizer = WordTokenizer(["a"], 8)
    batches = train_batches(
        sets, tokenizer, data, ImageConfig(size=32), seed=0, global_batch_size=16
    )
    read = Counter(i for _ in range(config.total_steps) for i in next(batches).image_ids.tolist())
    assert len(read) == 64 and set(read.values()) == {2}


def _run_both(settings_of: list[list[str]]) -> list[int | str]:
    return [run(overrides) for overrides in settings_of]


@pytest.mark.slow
def test_runs_of_other_batches_see_the_same_pairs_at_the_same_rates(tmp_path: Path) -> None:
    write_dataset(tmp_path / "shards", {"train": 64, "val": 8})
    more = ["epochs=2", "log_every=1", "optim.schedule=cosine", "optim.warmup_samples=48"]
    overrides = [
        settings(tmp_path / "shards", tmp_path / str(batch), *more, f"global_batch_size={batch}")
        for batch in (32, 64)
    ]
    assert run_distributed(_run_both, 1, overrides) == [[0, 0]]
    rates = []
    for batch in (32, 64):
        lines = [line for line in read_lines(tmp_path / str(batch)) if line["kind"] == "train"]
        assert len(lines) == 128 / batch and lines[-1]["samples_seen"] == 128
        rates.append({line["samples_seen"] - batch: line["lr"] for line in lines})
    common = rates[0].keys() & rates[1].keys()
    assert common == {0, 64} and all(rates[0][n] == rates[1][n] for n in common)


def test_a_scheduled_temperature_goes_from_start_to_end() -> None:
    found = [temperature(n, start=0.2, end=0.05, total_samples=80) for n in (0, 40, 80, 99)]
    assert found == pytest.approx([0.2, 0.125, 0.05, 0.05])


@pytest.mark.parametrize("name", ["convse", "convse++"])
def test_the_loss_of_a_step_has_the_temperature_of_that_step(name: str) -> None:
    config = TrainConfig(
        global_batch_size=8,
        total_steps=10,
        loss=LossConfig(name=name, temperature=0.2, temperature_end=0.05),
    )
    images, texts = normalize(torch.randn(2, 8, 6, dtype=torch.float64), dim=2).unbind()
    kept_by_the_model, zero = torch.tensor([0.2]).double().log().neg(), torch.zeros(1).double()
    for samples_seen, t in ((0, 0.2), (40, 0.125), (80, 0.05)):
        loss = build_loss(config, _batch(8), samples_seen)
        log_scale = torch.tensor([t], dtype=torch.float64).log().neg()
        expected = dense_loss(name, images, texts, log_scale, zero)
        found = loss(images, texts, kept_by_the_model, zero)
        assert found.loss.item() == pytest.approx(expected.item(), rel=1e-10)
        assert found.stats["temperature"].item() == pytest.approx(t)


def _batch(rows: int) -> Batch:
    ids = torch.arange(rows)
    nothing = torch.zeros(rows, 2, dtype=torch.int64)
    return Batch(ids, ids, ids, ids, nothing, np.zeros((1, 2), dtype=np.int64), ())
