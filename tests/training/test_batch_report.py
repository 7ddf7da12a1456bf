"""The batch report against cases with a known answer, and on two ranks against one."""

import math
from typing import Any

import pytest
import torch

from dist_vse import distributed
from dist_vse.config import TrainConfig
from dist_vse.engine.plain import PlainEngine
from dist_vse.losses.global_loss import GlobalLoss
from dist_vse.losses.options import LossOptions
from dist_vse.tools.report.batch import batch_section, gain
from dist_vse.tools.report.lines import Lines, Metrics
from dist_vse.tools.report.record import Record
from dist_vse.training import batch_report
from dist_vse.training.batch_report import (
    _Inputs,
    negatives_bias,
    noise_scale,
    reported_step,
    worth,
)
from dist_vse.training.grad_cache import train_step
from tests.support.distributed import run_distributed
from tests.support.tiny import tiny_batch, tiny_model


def test_the_noise_scale_is_that_of_gaussian_gradients() -> None:
    """Gradients of mean g and variance v a number: the scale is trace / |g|^2."""
    generator = torch.Generator().manual_seed(0)
    mean, deviation, size = torch.full((200,), 0.5, dtype=torch.float64), 3.0, 200
    noise, signal = [], []
    for _ in range(50):
        pairs = mean + deviation * torch.randn(256, size, generator=generator, dtype=torch.float64)
        chunks = pairs.view(8, 32, size).mean(1)
        found = noise_scale(
            chunks.square().sum(1).mean().item(), pairs.mean(0).square().sum().item(), 8, 256
        )
        noise.append(found["noise"])
        signal.append(found["signal"])
    expected = deviation**2 * size, 0.25 * size
    assert sum(noise) / 50 == pytest.approx(expected[0], rel=0.02)
    assert sum(signal) / 50 == pytest.approx(expected[1], rel=0.02)
    assert worth(256, 256) == 0.5


def _pairs(total: int, seed: int = 0) -> tuple[_Inputs, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(2, total, 8, generator=generator, dtype=torch.float64)
    made[1] += made[0]
    images, texts = torch.nn.functional.normalize(made, dim=2)
    one = torch.ones(1, dtype=torch.float64)
    return _Inputs(images, texts, one * math.log(5), one), torch.arange(total).repeat(2, 1).T


def test_a_loss_whose_gradient_knows_no_batch_has_no_bias() -> None:
    """Without a temperature's exponential, the mean over negatives is the same for every n."""
    pairs, ids = _pairs(64)
    steep = negatives_bias(GlobalLoss("convse"), pairs, ids, seed=1)
    assert {8, 16, 32} == {int(k.split("_")[2]) for k in steep}
    values = [steep[f"bias_of_{n}"] for n in (8, 16, 32)]
    assert values[0] > values[1] > values[2] > 0  # fewer negatives, further off
    # At an endless temperature the softmax is even: the gradient in expectation is linear in the
    # mean of the others, times 1 - 1/n. So the bias is (1/n - 1/N) / (1 - 1/N) = 1/7 for n = 8.
    flat = pairs._replace(log_scale=torch.full((1,), -12.0, dtype=torch.float64))
    draws = [
        negatives_bias(GlobalLoss("convse"), flat, ids, seed=seed)["bias_of_8"]
        for seed in range(40)
    ]
    squares = sum(math.copysign(x * x, x) for x in draws) / len(draws)
    assert math.sqrt(squares) == pytest.approx((1 / 8 - 1 / 64) / (1 - 1 / 64), rel=0.02)


def test_a_sum_over_the_pairs_counts_as_its_mean() -> None:
    """ConVSE++ is VSE++ over N t, for every N: so a smaller batch is as far off with either."""
    pairs, ids = _pairs(64)
    mean, total = (negatives_bias(GlobalLoss(n), pairs, ids, seed=1) for n in ("convse++", "vse++"))
    assert total == pytest.approx(mean, rel=1e-9) and total["bias_of_8"] > 0


def _report(num_chunks: int) -> dict[str, float]:
    """Take a step of 32 pairs in 8 chunks over all ranks, and return both estimates."""
    model = tiny_model()
    engine = PlainEngine(model, torch.optim.SGD(model.parameters(), lr=0.1))
    images, tokens = tiny_batch(32, 0)
    rows = 32 // distributed.world_size()
    own = slice(distributed.rank() * rows, (distributed.rank() + 1) * rows)
    pieces = zip(images[own].chunk(num_chunks), tokens[own].chunk(num_chunks), strict=True)
    chunks: list[Any] = [model.prepare(images=i, tokens=t) for i, t in pieces]
    ids = torch.arange(32)[own]
    loss = GlobalLoss("convse", LossOptions(), image_ids=ids, text_ids=ids)
    output, report = reported_step(engine, loss, chunks, keep_graphs=1, seed=3)
    again = tiny_model()
    plain = PlainEngine(again, torch.optim.SGD(again.parameters(), lr=0.1))
    loss = GlobalLoss("convse", LossOptions(), image_ids=ids, text_ids=ids)
    assert torch.equal(train_step(plain, loss, chunks).loss, output.loss)
    for a, b in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)  # the step is what it is without the report
    return report


@pytest.mark.slow
def test_two_ranks_report_what_one_does() -> None:
    one = _report(8)
    assert one["chunks"] == 8 and one["noise"] > 0 and "bias_of_16" in one
    for report in run_distributed(_report, 2, 4):
        assert report.keys() == one.keys()
        for name, value in one.items():
            assert report[name] == pytest.approx(value, rel=1e-4), name
    assert batch_report.DRAWS > 2


def test_the_report_says_the_gain_with_its_uncertainty() -> None:
    lines: list[Any] = [
        {"noise": 100.0 + (-1) ** i * 10, "signal": 1.0, "bias_of_8": 0.2, "bias_of_8_error": 0.1}
        for i in range(8)
    ]
    found = gain(lines, 100)
    assert found is not None and found[0] == pytest.approx(0.5)
    # The mean's standard error is 10 / sqrt(7), and the gain's slope in the noise 1 / 400.
    assert found[1] == pytest.approx(10 / math.sqrt(7) / 400, rel=0.02)
    assert gain([{"noise": 1.0, "signal": -1.0}] * 3, 100) is None
    config = TrainConfig(global_batch_size=100)
    record = Record("run", config, Metrics(Lines(), Lines(), lines, ""), [], None, None)
    page = batch_section(record)
    assert "<td>100</td><td>50% ± 2%</td>" in page and "<td>1,600</td><td>94%" in page
    assert "<td>53%</td><td>850%</td>" in page  # steps and pairs for the same
    assert "<td>8</td><td>20.0% ± 0.0%</td>" in page
    few = Metrics(Lines(), Lines(), lines[:2], "")
    assert batch_section(Record("run", config, few, [], None, None)) == ""
