"""Both passes of a step draw the same random numbers, whatever a module draws them from."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dist_vse.common.errors import UserError
from dist_vse.config import OptimConfig
from dist_vse.engine.optimizer import build_optimizer
from dist_vse.engine.plain import PlainEngine
from dist_vse.losses.global_loss import GlobalLoss
from dist_vse.models.dual_encoder import DualEncoder
from dist_vse.training.grad_cache import train_step
from dist_vse.training.replay_check import check_replay, compare_passes
from tests.support.tiny import tiny_batch, tiny_model

SHAPE: dict[str, Any] = {"image_size": 32, "num_tokens": 8}


class Noise(nn.Module):
    """Multiplies what passes by random numbers of a generator of its own."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.source = source

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.source, torch.Generator):
            return x * torch.rand(x.shape, generator=self.source)
        if isinstance(self.source, random.Random):
            return x * self.source.random()
        return x * torch.from_numpy(self.source.random(x.shape)).to(x.dtype)


class CudnnDropout(nn.Module):
    """What cuDNN does between the layers of an RNN, played on a CPU.

    Its generator starts from PyTorch's at the first call, and at the first one after somebody set
    the state of PyTorch's; else it goes on by itself.
    """

    times_set = 0

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.seen = [torch.Generator()], -1  # a list, as nobody can find cuDNN's

    def forward(self, x: Tensor) -> Tensor:
        if self.seen != CudnnDropout.times_set:
            self.seen = CudnnDropout.times_set
            self.inner[0].manual_seed(int(torch.randint(2**60, ())))
        return x * torch.rand(x.shape, generator=self.inner[0]).gt(0.3)


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.set_rng_state

    def set_rng_state(state: Tensor) -> None:
        CudnnDropout.times_set += 1
        real(state)

    monkeypatch.setattr(torch, "set_rng_state", set_rng_state)


SOURCES = [
    lambda: torch.Generator().manual_seed(1),
    lambda: random.Random(1),
    lambda: np.random.default_rng(1),
    lambda: np.random.RandomState(1),
]


def _noisy(module: nn.Module) -> DualEncoder:
    model = tiny_model(dropout=0.3)
    model.text.head.append(module)
    return model


def _step(model: DualEncoder, keep_graphs: int) -> Tensor:
    torch.manual_seed(1)
    optimizer = build_optimizer(model, OptimConfig(name="sgd", lr=0.05, weight_decay=0.0))
    images, tokens = tiny_batch(12, 0)
    chunks = [
        model.prepare(images=i, tokens=t)
        for i, t in zip(images.split(4), tokens.split(4), strict=True)
    ]
    train_step(PlainEngine(model, optimizer), GlobalLoss("convse"), chunks, keep_graphs=keep_graphs)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("source", SOURCES)
def test_a_modules_own_generator_is_replayed(source: Any) -> None:
    assert torch.equal(_step(_noisy(Noise(source())), 1), _step(_noisy(Noise(source())), 3))
    assert compare_passes(_noisy(Noise(source())), precision="fp32", **SHAPE).error == 0.0


@pytest.mark.usefixtures("cudnn")
def test_cudnns_dropout_between_the_layers_of_an_rnn_is_replayed() -> None:
    assert torch.equal(_step(_noisy(CudnnDropout()), 1), _step(_noisy(CudnnDropout()), 3))
    assert compare_passes(_noisy(CudnnDropout()), precision="fp32", **SHAPE).error == 0.0


def test_what_cannot_be_replayed_is_refused_by_name() -> None:
    hidden = Noise(None)
    hidden.source = type("Hidden", (), {"random": np.random.default_rng(1).random})()
    with pytest.raises(UserError, match=r"model.text.head.\d \(Noise\) does not draw the same"):
        check_replay(_noisy(hidden), precision="fp32", **SHAPE)


class _Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.half()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_float16_is_refused_by_name(precision: str) -> None:
    with pytest.raises(UserError, match=r"model.text.head.\d \(_Half\) runs in float16"):
        check_replay(_noisy(_Half()), precision=precision, **SHAPE)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_check_leaves_no_trace(precision: str) -> None:
    generator = torch.Generator().manual_seed(1)
    model = _noisy(Noise(generator))
    norm = nn.BatchNorm1d(16)
    model.image.head.append(norm)
    states = torch.get_rng_state(), generator.get_state()
    check_replay(model, precision=precision, **SHAPE)
    assert torch.equal(states[0], torch.get_rng_state())
    assert torch.equal(states[1], generator.get_state())
    assert norm.num_batches_tracked == 0
    assert not any(module._forward_hooks for module in model.modules())
