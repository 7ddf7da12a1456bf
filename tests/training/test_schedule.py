"""What changes along a run: the learning rate, the warm-up, and a temperature that is scheduled."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from dist_vse.config import LossConfig, OptimConfig, TrainConfig
from dist_vse.data.samples import Batch
from dist_vse.losses.dense_loss import dense_loss
from dist_vse.training.schedule import learning_rate, temperature, warmup_fraction
from dist_vse.training.step_loss import build_loss


def test_the_rate_rises_to_its_peak_and_ends_at_zero() -> None:
    def rate(seen: int, schedule: str = "cosine") -> float:
        optim = OptimConfig(lr=2.0, schedule=schedule, warmup_samples=9)
        return learning_rate(seen, optim, total_samples=109)

    assert [rate(seen) for seen in (0, 4, 9, 59, 109)] == pytest.approx([0.2, 1.0, 2.0, 1.0, 0.0])
    assert [rate(seen, "step") for seen in (58, 60)] == pytest.approx([2.0, 0.2])
    assert [warmup_fraction(seen, 8) for seen in (0, 2, 8, 20)] == [0.0, 0.25, 1.0, 1.0]


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
