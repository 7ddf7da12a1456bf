"""A float16 run: the gradient of one process, overflows skipped alike, the scale continued."""

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_vse import distributed
from dist_vse.common.errors import UserError
from dist_vse.config import EngineConfig, OptimConfig
from dist_vse.engine import Engine, loss_scale
from dist_vse.engine.loss_scale import LossScale
from dist_vse.engine.optimizer import build_optimizer
from dist_vse.engine.plain import PlainEngine
from dist_vse.engine.zero import ZeroEngine
from dist_vse.losses.dense_loss import dense_loss
from dist_vse.losses.global_loss import GlobalLoss
from dist_vse.runs import checkpoint
from dist_vse.runs.checkpoint import Progress
from dist_vse.training.grad_cache import train_step
from tests.support.distributed import run_distributed
from tests.support.savers import open_saver
from tests.support.tiny import tiny_batch, tiny_model

B, CHUNKS = 16, 2  # pairs in the global batch, chunks of a rank
FIT = 2.0**8  # a scale at which this model's gradients fit
STAGES = (None, 0, 1, 2, 3)  # None is the plain engine
SLOW = pytest.mark.slow


def _engine(stage: int | None, clip_norm: float = 0.0, **options: Any) -> Engine:
    model = tiny_model()
    sgd = build_optimizer(model, OptimConfig("sgd", lr=0.05, weight_decay=0.0, momentum=0.9))
    if stage is None:
        return PlainEngine(model, sgd, clip_norm, "fp16")
    rows, config = B // distributed.world_size(), EngineConfig(stage, "fp16", **options)
    return ZeroEngine(model, sgd, config, rank_batch_size=rows, clip_norm=clip_norm)


def _step(engine: Engine, number: int) -> None:
    rank, rows = distributed.rank(), B // distributed.world_size()
    images, tokens = (x[rank * rows : (rank + 1) * rows] for x in tiny_batch(B, number))
    pieces = zip(images.chunk(CHUNKS), tokens.chunk(CHUNKS), strict=True)
    chunks = [engine.module.prepare(images=i, tokens=t) for i, t in pieces]
    train_step(engine, GlobalLoss("convse"), chunks)


def _weights(engine: Engine) -> Tensor:
    with engine.gathered_parameters() if isinstance(engine, ZeroEngine) else torch.no_grad():
        return torch.cat([p.detach().flatten().clone() for p in engine.module.parameters()])


@functools.cache
def _reference(clip_norm: float) -> Tensor:
    """Return the parameters after two steps of one process with autocast and the dense loss."""
    model = tiny_model()
    sgd = build_optimizer(model, OptimConfig("sgd", lr=0.05, weight_decay=0.0, momentum=0.9))
    for number in range(2):
        images, tokens = tiny_batch(B, number)
        with torch.autocast("cpu", torch.float16):
            outputs = model(**model.prepare(images=images, tokens=tokens))
        (FIT * dense_loss("convse", *outputs)).backward()
        for parameter in model.parameters():
            if parameter.grad is not None:  # the bias is another loss's
                parameter.grad /= FIT
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        sgd.step()
        sgd.zero_grad()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def _train(case: tuple[int | None, float, bool]) -> dict[str, Any]:
    """Take an overflowing step, then two right ones; return what came of it."""
    stage, clip_norm, coalesce = case
    engine = _engine(stage, clip_norm, **({} if stage is None else {"coalesce": coalesce}))
    assert engine.loss_scale is not None
    start = _weights(engine)
    engine.loss_scale.value = 2.0**40  # even the small gradients overflow
    _step(engine, 0)
    unmoved = torch.equal(start, _weights(engine))
    after_overflow = engine.loss_scale.value, engine.loss_scale.skipped
    engine.loss_scale.value = FIT
    for number in range(2):
        _step(engine, number)
    expected = _reference(clip_norm)
    error = (_weights(engine) - expected).norm() / (expected - start).norm()
    scale = engine.loss_scale
    return {
        "unmoved": unmoved,
        "after_overflow": after_overflow,
        "error": float(error),
        "after": (scale.value, scale.steps, scale.skipped),
    }


def _train_all(cases: list[tuple[int | None, float, bool]]) -> list[dict[str, Any]]:
    loss_scale._GROWTH_STEPS = 2
    return [_train(case) for case in cases]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("world_size", "cases"),
    [
        (2, [(None, 0.0, True), (1, 0.0, True)]),
        pytest.param(1, [*itertools.product(STAGES, (0.0, 0.1), (True,))], marks=SLOW),
        pytest.param(
            2, [*itertools.product(STAGES, (0.0, 0.1), (True,)), (2, 0, False), (3, 0, False)],
            marks=SLOW,
        ),
    ],
    ids=["some", "one process", "two processes"],
)  # fmt: skip
def test_overflows_update_nothing_and_the_rest_equals_one_process(
    world_size: int, cases: list[tuple[int | None, float, bool]]
) -> None:
    for found in run_distributed(_train_all, world_size, cases, timeout=280):
        for case, seen in zip(cases, found, strict=True):
            assert seen["unmoved"], case
            assert seen["after_overflow"] == (2.0**39, 1), case
            assert seen["error"] < 5e-3, (case, seen)  # chunks round otherwise
            assert seen["after"] == (2 * FIT, 0, 1), case


def _overflow_of_one_rank(stages: list[int | None]) -> list[tuple[bool, float, int]]:
    found = []
    for stage in stages:
        engine = _engine(stage)
        assert engine.loss_scale is not None
        engine.loss_scale.value = FIT
        start = _weights(engine)
        weight = next(engine.module.image.head.parameters())
        if distributed.rank() == 1:
            weight.register_hook(lambda gradient: gradient * float("inf"))
        _step(engine, 0)
        unmoved = torch.equal(start, _weights(engine))
        found.append((unmoved, engine.loss_scale.value, engine.loss_scale.skipped))
    return found


@pytest.mark.timeout(300)
@pytest.mark.parametrize("stages", [[None, 2], pytest.param([0, 1, 3], marks=SLOW)], ids=str)
def test_all_ranks_skip_where_one_overflows(stages: list[int | None]) -> None:
    for found in run_distributed(_overflow_of_one_rank, 2, stages):
        assert found == [(True, FIT / 2, 1)] * len(stages)


def _continue(folder: Path, stage: int, from_stage: int) -> dict[str, Any]:
    """Save in the middle of a run, go on; load into another stage, go on alike."""
    loss_scale._GROWTH_STEPS = 2
    engine = _engine(from_stage)
    assert isinstance(engine, ZeroEngine) and engine.loss_scale is not None
    engine.loss_scale.value = 2.0**40
    _step(engine, 0)
    engine.loss_scale.value = FIT
    _step(engine, 1)
    saver = open_saver(folder)
    saver.start(engine, Progress(2, 2 * B, [[0, 2]]), score=None)
    saver.finish()
    _step(engine, 2)
    again = _engine(stage)
    assert isinstance(again, ZeroEngine) and again.loss_scale is not None
    progress = checkpoint.load_latest(folder, again)
    loaded = LossScale(**vars(again.loss_scale))
    _step(again, 2)
    gap = (_weights(engine) - _weights(again)).abs().max()
    return {
        "progress": progress,
        "loaded": loaded,
        "same scale": again.loss_scale == engine.loss_scale,
        "gap": float(gap),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("from_stage", "stage", "gap"), [(1, 1, 0.0), pytest.param(3, 0, 1e-6, marks=SLOW)]
)
def test_a_run_continues_with_its_scale_and_its_place(
    tmp_path: Path, from_stage: int, stage: int, gap: float
) -> None:
    for found in run_distributed(_continue, 2, tmp_path, stage, from_stage):
        assert found["progress"] == Progress(2, 2 * B, [[0, 2]])
        assert found["loaded"] == LossScale(FIT, steps=1, skipped=1)
        assert found["same scale"]
        assert found["gap"] <= gap


def test_a_gradient_that_never_fits_ends_the_run() -> None:
    scale = LossScale(4.0)
    scale.back_off()
    scale.back_off()
    with pytest.raises(UserError, match="after 3 skipped steps a gradient is infinite or NaN"):
        scale.back_off()
