"""Compiling takes place before the first step, leaves no trace, and is judged honestly."""

import contextlib
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_vse.common.errors import UserError
from dist_vse.config import ImageConfig, ModelConfig, OptimConfig, TextConfig, TrainConfig
from dist_vse.engine.optimizer import build_optimizer
from dist_vse.engine.plain import PlainEngine
from dist_vse.losses.global_loss import GlobalLoss
from dist_vse.models.dual_encoder import Tower
from dist_vse.training import compile_warmup
from dist_vse.training.compile_warmup import warm_up
from dist_vse.training.grad_cache import train_step
from tests.support.tiny import tiny_batch, tiny_model

SMALL = ModelConfig(image=ImageConfig(size=32), text=TextConfig(max_tokens=8), embed_dim=16)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(shutil.which("g++") is None, reason="nothing can be compiled without g++")
@pytest.mark.parametrize("how", [True, "graphs"])
def test_the_steps_after_it_compile_nothing(
    how: bool | str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = tiny_model(dropout=0.3, compiled=how)
    text = TextConfig(max_tokens=8)
    config = TrainConfig(
        model=ModelConfig(image=ImageConfig(size=32), text=text, embed_dim=16, compile=how)
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


def test_a_second_pass_that_draws_other_numbers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(dropout=0.3)
    config = replace(TrainConfig(), model=replace(SMALL, compile=True))
    warm_up(model, config, 4)  # nothing is compiled in it, so nothing differs
    monkeypatch.setattr(compile_warmup, "replay", lambda state: contextlib.nullcontext())
    with pytest.raises(UserError, match="second pass of gradient caching does not repeat"):
        warm_up(model, config, 4)


def test_cuda_graphs_of_moving_statistics_are_refused() -> None:
    model = tiny_model(image="resnet10t")
    config = replace(TrainConfig(), model=replace(SMALL, compile="graphs"))
    with pytest.raises(UserError, match=r"BatchNorm.*set model.compile=true"):
        warm_up(model, config, 4)


def test_nothing_that_a_replay_writes_over_is_left_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trunks that write outputs and gradients into the same memory every time, as graphs do."""
    begun: list[int] = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(1))
    images, tokens = tiny_batch(8, 0)
    found = []
    for graphs in (False, True):
        model = tiny_model()
        model.image = Tower(model.image.trunk, model.image.head, frozen=True)
        if graphs:
            model.use_cuda_graphs()
            for tower in (model.image, model.text):
                tower.trunk.register_forward_hook(_overwriting())
            for parameter in model.text.trunk.parameters():
                _write_gradients_over(parameter)
        sgd = build_optimizer(model, OptimConfig("sgd", lr=0.05, weight_decay=0.0))
        pieces = zip(images.split(4), tokens.split(4), strict=True)
        chunks = [model.prepare(images=i, tokens=t) for i, t in pieces]
        train_step(PlainEngine(model, sgd), GlobalLoss("convse"), chunks)
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*found)
    assert len(begun) == 2 + 3  # prepared chunks, and forwards


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
    compile_warmup._tell("model.compile=true", 70.0, compiled, 1.0)
    assert said in caplog.text


def _overwriting() -> Callable[[torch.nn.Module, Any, Tensor], Tensor]:
    """Return a hook after which all of a module's outputs without a graph share their memory."""
    memory: list[Tensor] = []

    def hook(module: torch.nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return output
        if not memory:
            memory.append(torch.empty_like(output))
        return memory[0].copy_(output)

    return hook


def _write_gradients_over(parameter: Tensor) -> None:
    """Let each gradient of a parameter come in the same memory, before the hooks that it has."""
    memory = torch.empty_like(parameter)
    earlier = dict(parameter._backward_hooks or {})
    assert parameter._backward_hooks is not None
    parameter._backward_hooks.clear()
    parameter.register_hook(lambda gradient: memory.copy_(gradient).detach())
    parameter._backward_hooks.update(earlier)
