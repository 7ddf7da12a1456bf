"""What we assume about DeepSpeed's gradients holds in the installed version."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_vse import distributed
from dist_vse.engine import deepspeed_internals as internals
from dist_vse.engine.zero import ZeroEngine
from tests.support.collectives import Collectives
from tests.support.distributed import run_distributed
from tests.support.tiny import tiny_model
from tests.support.zero_engines import RATE, build_engine, rank_batch


class _NoReduction:
    """Stands in for ours, and leaves each rank its own gradients."""

    def start(self) -> None:
        pass

    def finish(self) -> None:
        pass


def _step_without_reduction(stage: int) -> tuple[dict[str, int], float, float]:
    """Return the reductions of a step that nobody reduces, and the error of its update."""
    engine = build_engine(stage)
    assert engine.reduction is not None
    engine.reduction = _NoReduction()  # type: ignore[assignment]
    alone = tiny_model()
    outputs = alone(**rank_batch(alone, 0))
    sum(output.sum() for output in outputs).backward()
    expected = {
        name: p.detach() - RATE * p.grad
        for name, p in alone.named_parameters()
        if p.grad is not None
    }
    with Collectives() as counted, engine.accumulation():
        outputs = engine(**rank_batch(engine.module, 0))
        engine.backward(sum(output.sum() for output in outputs), last=True)
    engine.step()
    error = moved = 0.0
    start = dict(tiny_model().named_parameters())
    for fragment in engine._fragments():
        part = slice(fragment.start, fragment.start + fragment.length)
        found = fragment.within(fragment.flat).detach()
        error += float((found - expected[fragment.name].flatten()[part]).norm())
        moved += float((found - start[fragment.name].flatten()[part]).norm())
    return dict(counted.calls), error, moved


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_take_over_reduction(stage: int) -> None:
    for calls, error, moved in run_distributed(_step_without_reduction, 2, stage):
        assert calls == {}, "DeepSpeed reduces gradients in another place as well"
        assert error < 1e-5 * moved, "DeepSpeed changes gradients that are averages already"


def _slices_and_fragments(stage: int) -> dict[str, Any]:
    engine = build_engine(stage)
    names = {id(p): name for name, p in engine.module.named_parameters()}
    slices = internals.gradient_slices(engine.engine, engine.module, stage)
    own = [s for s in slices if s.owner in (None, distributed.rank())]
    return {
        "order": list(dict.fromkeys(names[id(s.parameter)] for s in slices)),
        "covered": sum(s.length for s in slices),
        "own": sorted((names[id(s.parameter)], s.start, s.length) for s in own),
        "updated": sorted((f.name, f.start, f.length) for f in engine._fragments() if f.length),
    }


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_gradient_slices(stage: int) -> None:
    trainable = [(name, p) for name, p in tiny_model().named_parameters() if p.requires_grad]
    for found in run_distributed(_slices_and_fragments, 3, stage):
        assert found["covered"] == sum(p.numel() for _, p in trainable)
        assert found["order"] == [name for name, _ in trainable]
        assert found["own"] == found["updated"], "ranks own other gradients than they update"


def _averages(stage: int) -> tuple[float, float, bool]:
    """Return the length of what the optimizer will read, that of its movement, and what is left."""
    engine = build_engine(stage)
    start = _fragments_of(engine)
    with engine.accumulation():
        outputs = engine(**rank_batch(engine.module, 0))
        engine.backward(sum(output.sum() for output in outputs), last=True)
    averages = internals.averaged_gradients(engine.engine, engine.module, stage)
    length = float(torch.cat([x.flatten() for x in averages]).norm())
    engine.step()
    moved = float((_fragments_of(engine) - start).norm()) / RATE
    left = internals.averaged_gradients(engine.engine, engine.module, stage)
    return length, moved, bool(left)


def _fragments_of(engine: ZeroEngine) -> Tensor:
    return torch.cat([f.within(f.flat).detach().clone() for f in engine._fragments()])


@pytest.mark.parametrize(
    "stage", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 2, 3))]
)
def test_averaged_gradients(stage: int) -> None:
    for length, moved, left in run_distributed(_averages, 2, stage):
        assert length == pytest.approx(moved, rel=1e-3), "the optimizer reads others"
        assert not left, "they stay after a step"


def _loss_scales(stage: int) -> tuple[float, float]:
    """Return by what a float16 run's gradients are multiplied, and what its update divides by."""
    lengths = []
    for factor in (1.0, 256.0):
        engine = build_engine(stage, "fp16")
        assert engine.loss_scale is not None
        engine.loss_scale.value = factor
        start = _fragments_of(engine)
        with engine.accumulation():
            outputs = engine(**rank_batch(engine.module, 0))
            engine.backward(sum(output.sum() for output in outputs), last=True)
        averages = internals.averaged_gradients(engine.engine, engine.module, stage)
        lengths.append(float(torch.cat([x.flatten() for x in averages]).norm()))
        engine.step()
        lengths.append(float((_fragments_of(engine) - start).norm()))
    return lengths[2] / lengths[0], lengths[3] / lengths[1]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_take_over_loss_scale(stage: int) -> None:
    for multiplied, moved in run_distributed(_loss_scales, 1, stage):
        assert multiplied == pytest.approx(256, rel=0.05)
        assert moved == pytest.approx(1, rel=0.05)


def _wire_dtypes(precision: str) -> dict[str, torch.dtype]:
    module = build_engine(1, precision).module
    return {name: internals.wire_dtype(p) for name, p in module.named_parameters()}


@pytest.mark.slow
def test_wire_dtype() -> None:
    kinds = ("bf16", "fp32", "fp16")
    (found,), (plain,), (half,) = (run_distributed(_wire_dtypes, 1, kind) for kind in kinds)
    assert half == plain, "float16's sums of the ranks would overflow"
    lowered = {
        f"{name}.{own}"
        for name, module in tiny_model().named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        for own, _ in module.named_parameters(recurse=False)
    }
    assert {name for name, dtype in found.items() if dtype == torch.bfloat16} == lowered
    assert {found[name] for name in found.keys() - lowered} == {torch.float32}
    assert set(plain.values()) == {torch.float32}
