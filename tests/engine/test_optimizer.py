"""One entry of the table is all that an optimizer needs: a toy one shows it."""

import itertools
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from timm.optim import list_optimizers
from torch import Tensor, nn

from dist_vse import distributed
from dist_vse.common.errors import UserError
from dist_vse.config import EngineConfig, OptimConfig, TrainConfig, load_config
from dist_vse.config.optimizers import OPTIMIZERS, OptimizerSpec, state_tensors
from dist_vse.engine import Engine, RunEngine
from dist_vse.engine.optimizer import build_optimizer
from dist_vse.engine.plain import PlainEngine
from dist_vse.engine.zero import ZeroEngine, zero_config
from dist_vse.losses.global_loss import GlobalLoss
from dist_vse.runs import checkpoint
from dist_vse.runs.checkpoint import Progress
from dist_vse.tools.plan.check import settings_of
from dist_vse.tools.plan.count import count_work
from dist_vse.tools.plan.memory import state_bytes
from dist_vse.tools.plan.step_memory import step_memory
from dist_vse.training.build_engine import launcher_conflicts
from dist_vse.training.grad_cache import train_step
from tests.support.distributed import run_distributed
from tests.support.engines import FSDP2, build
from tests.support.paths import ROOT
from tests.support.pretend_gpu import GpuTensor, pretend_gpu
from tests.support.savers import open_saver
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


@pytest.mark.slow
def test_a_registered_optimizer_trains_alike_on_any_number_of_ranks() -> None:
    (before, alone, kept), *_ = run_distributed(_train, 1)
    for _, together, _ in run_distributed(_train, 2):
        # Signs of gradients that are nearly 0 may differ, nothing else.
        assert (together - alone).abs().gt(1e-6).float().mean() < 0.01
    moved = (alone - before).abs()
    assert kept == {"first", "second", "third"} and moved.max() == pytest.approx(0.02, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("adamw", {"betas": (0.7, 0.6)}), ("adam", {"betas": (0.7, 0.6)}), ("sgd", {"momentum": 0.8})],
)
def test_every_setting_reaches_the_optimizer(name: str, settings: dict[str, object]) -> None:
    config = OptimConfig(name, lr=0.3, weight_decay=0.2, beta1=0.7, beta2=0.6, momentum=0.8)
    groups = build_optimizer(tiny_model(), config).param_groups
    assert {group["weight_decay"] for group in groups} == {0.0, 0.2}
    for group in groups:
        assert group["lr"] == 0.3
        assert {key: group[key] for key in settings} == settings


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
            chosen = settings_of(run, global_batch=32, world_size=2, on_cpu=True)
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


def test_an_unknown_optimizer_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match=r"optim.name='lambb' is unknown; did you mean 'lamb'"):
        OptimConfig(name="lambb")


@pytest.mark.parametrize(("name", "fused"), [("adamw", True), ("adam", True), ("sgd", False)])
def test_adam_is_fused_on_a_gpu_alone(name: str, fused: bool) -> None:
    config = OptimConfig(name=name)
    assert not build_optimizer(nn.Linear(2, 2), config).defaults.get("fused")
    layer = nn.Module()
    with pretend_gpu():
        layer.weight = nn.Parameter(GpuTensor(torch.ones(2, 2)))
        optimizer = build_optimizer(layer, config)
    assert bool(optimizer.defaults.get("fused")) == fused


def _steps(name: str, cut: bool) -> Tensor:
    """Take three steps on a matrix and a vector, or on them laid end to end and cut elsewhere."""
    generator = torch.Generator().manual_seed(0)
    start, *gradients = (torch.randn(40 * 48 + 7, generator=generator) for _ in range(4))
    where = [700, 1227] if cut else [40 * 48, 7]

    def pieces(flat: Tensor) -> list[Tensor]:
        parts = [part.clone() for part in flat.split(where)]
        return parts if cut else [parts[0].view(40, 48), parts[1]]

    model = nn.Module()
    for key, piece in zip("ab", pieces(start), strict=True):
        model.register_parameter(key, nn.Parameter(piece))
    optimizer = build_optimizer(model, OptimConfig(name, lr=0.01, weight_decay=0.0))
    for gradient in gradients:
        for parameter, piece in zip(model.parameters(), pieces(gradient), strict=True):
            parameter.grad = piece
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", sorted(n for n, s in OPTIMIZERS.items() if not s.whole_tensors))
def test_an_optimizer_for_flat_pieces_steps_each_element_alike(name: str) -> None:
    if OPTIMIZERS[name].from_timm and name not in list_optimizers():
        pytest.skip("needs a newer timm")
    torch.testing.assert_close(_steps(name, cut=True), _steps(name, cut=False), rtol=0, atol=1e-6)


def test_every_optimizer_of_timm_that_runs_here_is_known() -> None:
    unknown = set(list_optimizers()) - set(OPTIMIZERS)
    needs_more = {"adahessian", "kron", "kronw", "kronc"}  # second gradients; lists as state
    doubles = {name for name in unknown if name.endswith("legacy")}
    on_gpus = {name for name in unknown if name.startswith(("bnb", "fused"))}
    assert unknown == needs_more | doubles | on_gpus


def test_an_optimizer_that_this_timm_lacks_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIMIZERS, "coming", OPTIMIZERS["lion"])
    with pytest.raises(UserError, match=r"optim.name=coming: .* timm .* install a newer timm"):
        build_optimizer(nn.Linear(2, 2), OptimConfig("coming"))


def test_an_optimizer_that_needs_whole_tensors_is_refused_where_it_gets_pieces() -> None:
    engines = [EngineConfig(stage) for stage in (1, 2, 3)]
    engines += [EngineConfig(stage, name="fsdp2") for stage in (2, 3)]
    whole = [name for name, spec in OPTIMIZERS.items() if spec.whole_tensors]
    assert {"lamb", "lars", "muon", "adafactor"} <= {*whole} and "lion" not in whole
    for name, engine in itertools.product(whole, engines):
        told = rf"optim.name={name} needs whole tensors.*zero_stage=0, with engine.name=deepspeed"
        with pytest.raises(UserError, match=told):
            TrainConfig(optim=OptimConfig(name), engine=engine)


def test_wrong_options_of_an_optimizer_are_named() -> None:
    with pytest.raises(UserError, match=r"optim.beta2 is not for lion.*optim.options"):
        OptimConfig("lion", beta2=0.98)
    with pytest.raises(UserError, match=r"optim.options: lr is a key of optim itself"):
        OptimConfig("lion", options={"lr": 1})
    with pytest.raises(UserError, match=r"optim.options of adamw.*beta3"):
        build_optimizer(nn.Linear(2, 2), OptimConfig(options={"beta3": 1}))
    options = load_config(None, ["optim.name=adamw", "optim.options={eps: 1.0e-6}"]).optim.options
    assert build_optimizer(nn.Linear(2, 2), OptimConfig(options=options)).defaults["eps"] == 1e-6


def _take_step(engine: Engine, number: int) -> Tensor:
    """Take a step; return the weights after it."""
    rank, rows = distributed.rank(), B // distributed.world_size()
    images, tokens = (x[rank * rows : (rank + 1) * rows] for x in tiny_batch(B, number))
    chunk = engine.module.prepare(images=images, tokens=tokens)
    train_step(engine, GlobalLoss("convse"), [chunk])
    if isinstance(engine, PlainEngine):
        return _flat(engine.module)
    with cast(RunEngine, engine).gathered_parameters() as model:
        return _flat(model)


def _flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def _train_whole(folder: Path, name: str) -> dict[str, Any]:
    """Train three steps by an engine and a plain one, and from a checkpoint of the second step."""
    optim = OptimConfig(name, lr=0.01, weight_decay=0.1)

    def engine(kind: type) -> Any:
        model = tiny_model()
        optimizer = build_optimizer(model, optim)
        if kind is PlainEngine:
            return PlainEngine(model, optimizer)
        rows = B // distributed.world_size()
        return ZeroEngine(
            model, optimizer, EngineConfig(0), rank_batch_size=rows, whole_tensors=True
        )

    plain, zero = engine(PlainEngine), engine(ZeroEngine)
    first = _take_step(plain, 0), _take_step(zero, 0)
    _take_step(zero, 1)
    folder = distributed.broadcast_object(folder / name)
    folder.mkdir(parents=True, exist_ok=True)
    distributed.barrier()
    saver = open_saver(folder)
    saver.start(zero, Progress(2, 2 * B, [[0, 0]]), score=None)
    saver.finish()
    again = engine(ZeroEngine)
    checkpoint.load_latest(folder, again)
    return {"first": first, "third": (_take_step(zero, 2), _take_step(again, 2))}


def _differing_share(name: str, stage: int) -> float:
    """Return the share of weights that two steps of an engine move otherwise than plain ones."""
    weights = []
    for of_stage in (None, stage):
        model = tiny_model()
        optimizer = build_optimizer(model, OptimConfig(name, lr=0.01, weight_decay=0.1))
        engine: Engine = PlainEngine(model, optimizer)
        if of_stage is not None:
            engine = build(model, optimizer, of_stage, batch_size=B)
        _take_step(engine, 0)
        weights.append(_take_step(engine, 1))
    return (weights[1] - weights[0]).abs().gt(1e-5).float().mean().item()


def _all_optimizers(folder: Path) -> tuple[dict[str, Any], dict[tuple[str, int], float]]:
    whole = {name: _train_whole(folder, name) for name in ("lamb", "muon", "adafactor")}
    cases = itertools.product(("lion", "nadamw", "adopt"), (1, 3, FSDP2 + 2, FSDP2 + 3))
    return whole, {case: _differing_share(*case) for case in cases}


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_optimizers_of_timm_step_as_plain_ones_under_every_engine_that_they_are_allowed(
    tmp_path: Path,
) -> None:
    for whole, shares in run_distributed(_all_optimizers, 2, tmp_path, timeout=180):
        for found in whole.values():
            plain, zero = found["first"]
            torch.testing.assert_close(zero, plain, rtol=1e-5, atol=1e-6)
            assert torch.equal(*found["third"])  # also from a checkpoint
        # Where a gradient is nearly 0, its sign may differ.
        assert max(shares.values()) < 0.01, shares


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gradient_norm_is_taken_only_to_clip(stage: int) -> None:
    config = EngineConfig(zero_stage=stage)
    for clip_norm in (0.0, 1.0):
        zero = zero_config(config, rank_batch_size=1, clip_norm=clip_norm, bucket=1024)
        taken = zero["zero_optimization"].get("compute_grad_norm", True)
        assert taken == (clip_norm > 0 or stage in (0, 3))  # which can't do without
