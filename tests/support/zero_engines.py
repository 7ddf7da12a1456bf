"""ZeRO engines of tiny models, which the tests of DeepSpeed's internals train."""

from typing import Any

import torch
from torch import Tensor, nn

from dist_vse import distributed
from dist_vse.config import EngineConfig, OptimConfig
from dist_vse.engine.optimizer import build_optimizer
from dist_vse.engine.zero import ZeroEngine
from dist_vse.losses.global_loss import GlobalLoss
from dist_vse.models.dual_encoder import DualEncoder
from dist_vse.training.grad_cache import train_step
from tests.support.tiny import tiny_batch, tiny_model

B = 8  # pairs in the global batch
RATE = 0.05


def sgd(model: DualEncoder, momentum: float = 0.0) -> torch.optim.Optimizer:
    optim = OptimConfig("sgd", lr=RATE, weight_decay=0.0, momentum=momentum)
    return build_optimizer(model, optim)


def build_engine(stage: int, precision: str = "fp32", momentum: float = 0.0) -> ZeroEngine:
    model, rows = tiny_model(), B // distributed.world_size()
    config = EngineConfig(stage, precision)
    return ZeroEngine(model, sgd(model, momentum), config, rank_batch_size=rows)


def rank_batch(model: DualEncoder, step: int) -> dict[str, Tensor]:
    rank, rows = distributed.rank(), B // distributed.world_size()
    images, tokens = (x[rank * rows : (rank + 1) * rows] for x in tiny_batch(B, step))
    return model.prepare(images=images, tokens=tokens)


def train(engine: Any, steps: int) -> Tensor:
    """Train with two chunks; return all parameters in one vector."""
    for step in range(steps):
        batch = rank_batch(engine.module, step)
        halves = zip(*(value.chunk(2) for value in batch.values()), strict=True)
        chunks = [dict(zip(batch, half, strict=True)) for half in halves]
        train_step(engine, GlobalLoss("convse"), chunks)
    return nn.utils.parameters_to_vector(engine.module.parameters()).detach().clone()
