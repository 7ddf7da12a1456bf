"""One entry of the table is all that an optimizer needs: a toy one shows it."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_vse import distributed
from dist_vse.common.errors import UserError
from dist_vse.config import EngineConfig, OptimConfig, load_config
from dist_vse.config.optimizers import OPTIMIZERS, OptimizerSpec, state_tensors
from dist_vse.engine.optimizer import build_optimizer
from dist_vse.engine.zero import ZeroEngine, zero_config
from dist_vse.losses.global_loss import GlobalLoss
from dist_vse.tools.plan.check import settings_of
from dist_vse.tools.plan.count import count_work
from dist_vse.tools.plan.memory import state_bytes
from dist_vse.tools.plan.step_memory import step_memory
from dist_vse.training.build_engine import launcher_conflicts
from dist_vse.training.grad_cache import train_step
from tests.support.distributed import run_distributed
from tests.support.paths import ROOT
from tests.support.pretend_gpu import GpuTensor, pretend_gpu
from tests.support.tiny import tiny_batch, tiny_model

B = 8  # pairs in the global batch


class Toy(torch.optim.Optimizer):
    """Steps by the sign of a running sum of gradients; keeps three tensors for each."""

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, decay: float) -> None:
        super().__init__(groups, {"lr": lr, "decay": decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                kept = self.state[parameter]
                for name in ("first", "second", "third"):
                    kept.setdefault(name, torch.zeros_like(parameter))
                    kept[name].mul_(group["decay"]).add_(parameter.grad)
                parameter.sub_(kept["third"].sign(), alpha=group["lr"])


TOY = OptimizerSpec(
    factory=f"{__name__}:Toy",
    deepspeed_type="toy",
    settings=lambda optim: {"decay": optim.momentum},
    state_tensors=lambda optim: 3,
)


def _train() -> tuple[Tensor, Tensor, set[str]]:
    """Train two steps under ZeRO 1; return the parameters before and after, and the state."""
    OPTIMIZERS["toy"] = TOY
    model, rank, rows = tiny_model(), distributed.rank(), B // distributed.world_size()
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    optimizer = build_optimizer(model, OptimConfig("toy", lr=0.01, momentum=0.5))
    engine = ZeroEngine(model, optimizer, EngineConfig(1), rank_batch_size=rows)
    for step in range(2):
        images, tokens = (x[rank * rows : (rank + 1) * rows] for x in tiny_batch(B, step))
        chunk = model.prepare(images=images, tokens=tokens)
        train_step(engine, GlobalLoss("convse"), [chunk])
    after = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    kept = {name.split("/")[1] for name in engine.dump_optimizer()}
    return before, after, kept


def test_a_registered_optimizer_trains_alike_on_any_number_of_ranks() -> None:
    (before, alone, kept), *_ = run_distributed(_train, 1)
    for _, together, _ in run_distributed(_train, 2):
        # Signs of gradients that are nearly 0 may differ, nothing else.
        assert (together - alone).abs().gt(1e-6).float().mean() < 0.01
    moved = (alone - before).abs()
    assert kept == {"first", "second", "third"} and moved.max() == pytest.approx(0.02, rel=1e-3)


@pytest.mark.slow
def test_doctor_and_plan_count_what_a_registered_optimizer_keeps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(OPTIMIZERS, "toy", TOY)
    config = load_config(ROOT / "configs" / "debug_cpu.yaml", [])
    optims = [OptimConfig("toy"), OptimConfig(), OptimConfig("sgd", momentum=0.9)]
    optims.append(OptimConfig("sgd"))
    assert [state_tensors(optim) for optim in optims] == [3, 2, 1, 0]
    work, whole, trained = count_work(config, vocabulary=100), 1000 << 20, 800 << 20
    for stage in (0, 2):
        planned, doctors = [], []
        for optim in optims:
            run = replace(config, optim=optim, engine=EngineConfig(stage))
            chosen = settings_of(run, global_batch=32, world_size=2)
            planned.append(state_bytes(work, chosen))
            memory = step_memory(run, 2, parameters=(whole, trained), vocabulary=100, on_cpu=True)
            doctors.append(memory.states)
        share = 2 if stage else 1
        for values, tensor in ((planned, work.gradient_bytes), (doctors, 4 * trained)):
            steps = [a - b for a, b in pairwise(values)]
            assert steps == [pytest.approx(tensor / share)] * 3, stage


def test_the_launchers_optimizer_is_compared_with_a_registered_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OPTIMIZERS, "toy", TOY)
    path = tmp_path / "deepspeed.json"
    path.write_text('{"optimizer": {"type": "Toy", "params": {"decay": 0.25}}}')
    environment = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path),
    }
    config = load_config(ROOT / "configs" / "debug_cpu.yaml", [])
    same, other = (replace(config, optim=OptimConfig("toy", momentum=m)) for m in (0.25, 0.5))
    assert launcher_conflicts(same, environment) == []
    (told,) = launcher_conflicts(other, environment)
    assert "optimizer.params.decay=0.25, the run has 0.5" in told


def test_an_unknown_optimizer_is_refused_with_the_known_names() -> None:
    with pytest.raises(UserError, match=r"optim.name.*adamw, adam, sgd"):
        OptimConfig(name="lamb")


@pytest.mark.parametrize(("name", "fused"), [("adamw", True), ("adam", True), ("sgd", False)])
def test_adam_is_fused_on_a_gpu_alone(name: str, fused: bool) -> None:
    config = OptimConfig(name=name)
    assert not build_optimizer(nn.Linear(2, 2), config).defaults.get("fused")
    layer = nn.Module()
    with pretend_gpu():
        layer.weight = nn.Parameter(GpuTensor(torch.ones(2, 2)))
        optimizer = build_optimizer(layer, config)
    assert bool(optimizer.defaults.get("fused")) == fused


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gradient_norm_is_taken_only_to_clip(stage: int) -> None:
    config = EngineConfig(zero_stage=stage)
    for clip_norm in (0.0, 1.0):
        zero = zero_config(config, rank_batch_size=1, clip_norm=clip_norm, bucket=1024)
        taken = zero["zero_optimization"].get("compute_grad_norm", True)
        assert taken == (clip_norm > 0 or stage in (0, 3))  # which can't do without
