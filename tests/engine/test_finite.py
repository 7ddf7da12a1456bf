"""A gradient that is not finite ends the step on every rank before anything is updated."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_vse import distributed
from dist_vse.common.errors import UserError
from dist_vse.config import EngineConfig, OptimConfig
from dist_vse.engine import Engine
from dist_vse.engine.optimizer import build_optimizer
from dist_vse.engine.plain import PlainEngine
from dist_vse.engine.zero import ZeroEngine
from dist_vse.losses.global_loss import GlobalLoss
from dist_vse.training.grad_cache import train_step
from tests.support.distributed import run_distributed
from tests.support.tiny import tiny_batch, tiny_model

B = 8  # pairs in the global batch


def _engine(stage: int | None, clip_norm: float) -> Engine:
    model = tiny_model()
    sgd = build_optimizer(model, OptimConfig("sgd", lr=0.05, weight_decay=0.0))
    if stage is None:
        return PlainEngine(model, sgd, clip_norm)
    rows = B // distributed.world_size()
    return ZeroEngine(model, sgd, EngineConfig(stage), rank_batch_size=rows, clip_norm=clip_norm)


def _weights(engine: Any) -> Tensor:
    if isinstance(engine, ZeroEngine):
        with engine.gathered_parameters():
            return nn.utils.parameters_to_vector(engine.module.parameters()).detach().clone()
    return nn.utils.parameters_to_vector(engine.module.parameters()).detach().clone()


def _step_with(engine: Engine, wrong: float) -> str | None:
    """Take a step in which one element of rank 1's gradients is wrong; return what was raised."""
    rank, rows = distributed.rank(), B // distributed.world_size()
    images, tokens = (x[rank * rows : (rank + 1) * rows] for x in tiny_batch(B, 0))
    chunk = engine.module.prepare(images=images, tokens=tokens)

    def spoil(gradient: Tensor) -> Tensor:
        spoilt = gradient.clone()
        spoilt.view(-1)[0] += wrong
        return spoilt

    head = engine.module.image.head[0]
    assert isinstance(head, nn.Linear)
    hook = head.weight.register_hook(spoil) if rank == 1 else None
    try:
        train_step(engine, GlobalLoss("convse"), [chunk])
    except UserError as error:
        return str(error)
    finally:
        if hook is not None:
            hook.remove()
    return None


def _raised(cases: list[tuple[int | None, float, float]]) -> list[tuple[str | None, bool]]:
    found = []
    for stage, clip_norm, wrong in cases:
        engine = _engine(stage, clip_norm)
        before = _weights(engine)
        message = _step_with(engine, wrong)
        found.append((message, torch.equal(before, _weights(engine))))
    return found


WRONG = (float("nan"), float("-inf"))


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    "stages", [(None, 1), pytest.param((0, 2, 3), marks=pytest.mark.slow)], ids=str
)
def test_no_rank_updates_by_a_gradient_that_is_not_finite(stages: tuple[int | None, ...]) -> None:
    cases = [(stage, clip, x) for stage in stages for clip in (0.0, 1.0) for x in WRONG]
    right = [(stage, 0.0, 0.0) for stage in stages]
    ranks = run_distributed(_raised, 2, [*cases, *right], timeout=180)
    assert ranks[0] == ranks[1], "the ranks do not agree"
    for case, (message, unchanged) in zip(cases, ranks[0], strict=False):
        assert message is not None and "but a gradient is infinite or NaN" in message, case
        assert unchanged, case
    assert ranks[0][len(cases) :] == [(None, False)] * len(stages)
