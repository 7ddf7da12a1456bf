"""Engines of a run, by one number: ZeRO's stages 0 to 3, and FSDP2's above them."""

from typing import Any

import torch
from torch import nn

from dist_vse import distributed
from dist_vse.config import EngineConfig
from dist_vse.engine import RunEngine
from dist_vse.engine.fsdp2 import Fsdp2Engine
from dist_vse.engine.zero import ZeroEngine
from dist_vse.models.dual_encoder import DualEncoder

FSDP2 = 10  # plus FSDP2's stage


def build(
    model: DualEncoder,
    optimizer: torch.optim.Optimizer,
    stage: int,
    *,
    batch_size: int,
    clip_norm: float = 0.0,
    average_samples: int = 0,
    float32_layers: set[nn.Module] | None = None,
    **options: Any,
) -> RunEngine:
    """Build the engine of a stage; `options` are of `engine`, `batch_size` the global one."""
    if stage > FSDP2:
        config = EngineConfig(stage - FSDP2, name="fsdp2", **options)
        return Fsdp2Engine(
            model,
            optimizer,
            config,
            clip_norm=clip_norm,
            average_samples=average_samples,
            float32_layers=float32_layers or set(),
        )
    rows = batch_size // distributed.world_size()
    config = EngineConfig(stage, **options)
    return ZeroEngine(
        model,
        optimizer,
        config,
        rank_batch_size=rows,
        clip_norm=clip_norm,
        average_samples=average_samples,
    )
