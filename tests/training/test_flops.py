"""Operations are counted as they are, without a trace; a GPU is known by its name."""

import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dist_vse.config import ImageConfig, LossConfig, ModelConfig, TextConfig
from dist_vse.models.build import build_model
from dist_vse.models.tokenizer import AnyWords
from dist_vse.runs.metrics import Meter
from dist_vse.training.flops import Flops, count_flops, peak_of
from tests.support.tiny import tiny_model


def test_counting_leaves_no_trace() -> None:
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    flops = count_flops(model, 32, 8)
    assert 1.8 < flops.backward / flops.forward < 2.1  # but for the pixels' gradient
    assert flops == count_flops(model, 32, 8)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(state, torch.get_rng_state())


def test_a_linear_head_alone_is_counted_to_the_operation() -> None:
    config = ModelConfig(
        image=ImageConfig(name="test_vit", size=32),
        text=TextConfig(kind="gru", width=64, word_dim=32, max_tokens=8),
        embed_dim=16,
    )
    models = [
        build_model(
            ModelConfig(image=config.image, text=config.text, embed_dim=dim),
            LossConfig(),
            AnyWords(50),
        )
        for dim in (16, 48)
    ]
    small, large = (count_flops(model, 32, 8) for model in models)
    inputs = models[0].image.trunk.dim + models[0].text.trunk.dim
    assert large.forward - small.forward == 2 * inputs * 32
    assert large.backward - small.backward == 4 * inputs * 32


def test_a_steps_operations_are_its_pairs_and_its_losss_products() -> None:
    assert Flops(10.0, 20.0).of_step(4, 8) == 4 * 30 + 3 * 2 * 4 * 4 * 8
    assert Flops(10.0, 20.0, 5.0).of_step(4, 8, 3) == 4 * 30 + 3 * 5 + 3 * 2 * 4 * 7 * 8


def test_a_text_without_an_image_costs_what_its_encoder_does() -> None:
    model = tiny_model()
    flops = count_flops(model, 32, 8, negatives=True)
    assert replace(flops, negative=0.0) == count_flops(model, 32, 8)
    tokens = torch.ones(3, 8, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model.encode_texts(tokens)
    forward = counter.get_total_flops() / 3
    assert 2.8 * forward < flops.negative < 3.1 * forward


def test_mfu_counts_the_texts_that_came(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = Meter(partial(Flops(10.0, 20.0, 5.0).of_step, 4, 8), peak_flops=1e3)
    monkeypatch.setattr(time, "perf_counter", lambda: meter.started + 2)
    meter.add(4, 3)
    meter.add(4, 5)
    assert meter.rates()["mfu"] == Flops(10.0, 20.0, 5.0).of_step(4, 8, 4) * 2 / 2 / 1e3


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA A100-SXM4-40GB", "fp32", 19.5e12),
        ("NVIDIA L40S", "bf16", 362e12),
        ("NVIDIA L4", "bf16", 121e12),
        ("NVIDIA A100-SXM4-80GB", "tf32", 156e12),
        ("Tesla V100-SXM2-16GB", "tf32", 15.7e12),
        ("Some GPU", "tf32", None),
        ("Tesla V100-SXM2-16GB", "bf16", None),
        ("Some GPU", "fp32", None),
    ],
)
def test_peaks_by_name(name: str, precision: str, peak: float | None) -> None:
    assert peak_of(name, precision) == peak
