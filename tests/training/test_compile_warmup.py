"""Compiling takes place before the first step, leaves no trace, and is judged honestly."""

import logging
import shutil
from pathlib import Path

import pytest
import torch

from dist_vse.config import ImageConfig, ModelConfig, OptimConfig, TextConfig, TrainConfig
from dist_vse.engine.optimizer import build_optimizer
from dist_vse.engine.plain import PlainEngine
from dist_vse.losses.global_loss import GlobalLoss
from dist_vse.training import compile_warmup
from dist_vse.training.compile_warmup import warm_up
from dist_vse.training.grad_cache import train_step
from tests.support.tiny import tiny_batch, tiny_model


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(shutil.which("g++") is None, reason="nothing can be compiled without g++")
def test_the_steps_after_it_compile_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = tiny_model(dropout=0.3, compiled=True)
    text = TextConfig(max_tokens=8)
    config = TrainConfig(
        model=ModelConfig(image=ImageConfig(size=32), text=text, embed_dim=16, compile=True)
    )
    state, graphs = torch.get_rng_state(), torch._dynamo.utils.counters["stats"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    warm_up(model, config, 4)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    compiled = graphs["unique_graphs"]
    assert compiled >= 2
    sgd = build_optimizer(model, OptimConfig("sgd", lr=0.05, weight_decay=0.0))
    images, tokens = tiny_batch(8, 0)
    pieces = zip(images.split(4), tokens.split(4), strict=True)
    chunks = [model.prepare(images=i, tokens=t) for i, t in pieces]
    train_step(PlainEngine(model, sgd), GlobalLoss("convse"), chunks)
    assert graphs["unique_graphs"] == compiled


def test_nothing_happens_where_nothing_is_compiled(caplog: pytest.LogCaptureFixture) -> None:
    warm_up(tiny_model(), TrainConfig(), 4)
    assert not caplog.records


@pytest.mark.parametrize(
    ("compiled", "said"),
    [(0.5, "compiled in 70 s: a chunk takes 0.5 s, and 1 s"), (0.99, "does not help here")],
)
def test_the_log_says_whether_it_helps(
    compiled: float,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(logging.getLogger("dist_vse"), "propagate", True)
    caplog.set_level(logging.INFO)
    compile_warmup._tell(70.0, compiled, 1.0)
    assert said in caplog.text
