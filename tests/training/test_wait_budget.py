"""A step waits for the device at most twice, whatever it is asked for: on the pretend GPU."""

from dataclasses import dataclass, field, replace

import pytest
import torch

from dist_vse import distributed
from dist_vse.config import (
    EngineConfig,
    ImageConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from dist_vse.data.samples import Batch
from dist_vse.engine import Engine
from dist_vse.engine.optimizer import build_optimizer
from dist_vse.engine.plain import PlainEngine
from dist_vse.engine.zero import ZeroEngine
from dist_vse.models.dual_encoder import DualEncoder
from dist_vse.models.lora import add_adapters
from dist_vse.training.chunks import make_chunks
from dist_vse.training.grad_cache import train_step
from dist_vse.training.step_loss import build_loss
from tests.support.distributed import run_distributed
from tests.support.pretend_gpu import move, pretend_gpu
from tests.support.tiny import tiny_batch, tiny_model

ROWS, CHUNK = 12, 4  # a rank's
WAITS = 2  # what the ranks must know of each other's features; whether the loss is finite


@dataclass(frozen=True)
class Case:
    """An engine (None: the plain one), and what the step is asked for besides."""

    stage: int | None = None
    precision: str = "fp32"
    clip_norm: float = 0.0
    loss: LossConfig = field(default_factory=LossConfig)
    average: bool = False
    lora: bool = False
    negatives: bool = False


TEACHER = LossConfig(teacher="teacher.safetensors", ignore_above=0.1)
ENGINES = [
    *(Case(stage, "fp16", average=stage is not None) for stage in (None, 0, 1, 2)),
    Case(None, "bf16"),  # without a norm: PyTorch's clipping asks C++ for the device
    *(Case(stage, "bf16", clip_norm=0.1) for stage in (0, 1, 2)),
    Case(3, average=True),  # C++ sees a CPU, whose autocast ZeRO 3's own products do not ask
]
LOSSES = {
    "ignore_above": Case(loss=LossConfig(ignore_above=0.1)),
    "ignore_above by a teacher": Case(loss=TEACHER),
    "two widths": Case(loss=LossConfig(widths=[4, 8])),
    "distilled": Case(loss=replace(TEACHER, ignore_above=None, distill_weight=1.0)),
    "distilled, two widths": Case(loss=replace(TEACHER, widths=[4, 8], distill_weight=1.0)),
    "negatives": Case(negatives=True),
    "adapters": Case(1, lora=True),
}


def _engine(model: DualEncoder, case: Case) -> Engine:
    sgd = build_optimizer(model, OptimConfig(name="sgd", lr=0.05, weight_decay=0.0))
    if case.stage is None:
        return PlainEngine(model, sgd, case.clip_norm, case.precision)
    return ZeroEngine(
        model,
        sgd,
        EngineConfig(case.stage, case.precision),
        rank_batch_size=ROWS,
        clip_norm=case.clip_norm,
        average_samples=100 if case.average else 0,
    )


def _batch(case: Case) -> Batch:
    rank = distributed.rank()
    images, tokens = tiny_batch(ROWS, rank)
    ids = torch.arange(ROWS * rank, ROWS * (rank + 1)) // 2  # with duplicates
    features = torch.nn.functional.normalize(torch.randn(2, ROWS, 24), dim=2)
    return Batch(
        images=images,
        tokens=tokens,
        image_ids=ids,
        text_ids=ids,
        origin=torch.zeros(ROWS, 2, dtype=torch.int64),
        state=torch.zeros(0, 2, dtype=torch.int64).numpy(),
        skipped=(),
        negatives=tokens.flip(1) if case.negatives else None,
        negative_ids=ids + 1 if case.negatives else None,
        teacher=(features[0], features[1]) if case.loss.teacher is not None else None,
    )


def _waits(case: Case) -> list[dict[str, int]]:
    """Take a step, in float16 two; return for each where the host waits in code of ours."""
    model = tiny_model(dropout=0.3)
    if case.lora:
        pretrained = ModelConfig(
            image=ImageConfig(weights="image.pt"),
            lora=LoraConfig(rank=2),
        )
        add_adapters(model, pretrained, seed=0)
    config = TrainConfig(
        model=ModelConfig(embed_dim=16),
        loss=case.loss,
        engine=EngineConfig(case.stage or 0, case.precision),
        global_batch_size=ROWS * distributed.world_size(),
        chunk_size=CHUNK,
    )
    batch = _batch(case)
    with pretend_gpu() as gpu:
        move(model)
        engine = _engine(model, case)
        waits = []
        # In float16 the first scale is too large, so that the step is skipped.
        scales = [None] if engine.loss_scale is None else [engine.loss_scale.value, 1.0]
        for scale in scales:
            if engine.loss_scale is not None:
                assert scale is not None
                engine.loss_scale.value = scale
            gpu.waits.clear()
            loss = build_loss(config, batch, samples_seen=0)
            train_step(engine, loss, make_chunks(model, batch, config))
            if isinstance(engine, ZeroEngine):
                engine.update_average(2 * ROWS, 2 * ROWS)
            waits.append(dict(gpu.waits))
        assert engine.loss_scale is None or engine.loss_scale.skipped == 1
        return waits


def _all_waits(cases: list[Case]) -> list[list[dict[str, int]]]:
    return [_waits(case) for case in cases]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_no_step_waits_more_than_twice() -> None:
    cases = [*ENGINES, *LOSSES.values()]
    for of_rank in run_distributed(_all_waits, 2, cases, timeout=280):
        for case, waits in zip(cases, of_rank, strict=True):
            for of_step in waits:
                assert 1 <= sum(of_step.values()) <= WAITS, (case, of_step)
