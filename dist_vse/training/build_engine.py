"""From the config to the engine, and what a launcher says against it."""

from collections.abc import Mapping

from torch import nn

from dist_vse import distributed
from dist_vse.config import TrainConfig
from dist_vse.config.checks import AUTO
from dist_vse.config.optimizers import OPTIMIZERS, needs_whole_tensors
from dist_vse.engine import RunEngine
from dist_vse.engine.float32_layers import float32_layers
from dist_vse.engine.fsdp2 import Fsdp2Engine
from dist_vse.engine.launcher_conflicts import conflicts
from dist_vse.engine.optimizer import build_optimizer
from dist_vse.engine.zero import ZeroEngine, zero_config
from dist_vse.models.dual_encoder import DualEncoder
from dist_vse.models.precision import HALVES


def build_engine(config: TrainConfig, model: DualEncoder) -> RunEngine:
    """Build the optimizer and the engine around a model that is on its device."""
    optimizer = build_optimizer(model, config.optim)
    if config.engine.name == "fsdp2":
        return Fsdp2Engine(
            model,
            optimizer,
            config.engine,
            clip_norm=config.optim.clip_norm,
            average_samples=config.ema.samples,
            float32_layers=_float32_layers(config, model),
        )
    return ZeroEngine(
        model,
        optimizer,
        config.engine,
        rank_batch_size=config.global_batch_size // distributed.world_size(),
        clip_norm=config.optim.clip_norm,
        whole_tensors=needs_whole_tensors(config.optim),
        average_samples=config.ema.samples,
    )


def _float32_layers(config: TrainConfig, model: DualEncoder) -> set[nn.Module]:
    """Return the layers that stay in float32 in a run of half precision."""
    if config.engine.precision not in HALVES:
        return set()
    return float32_layers(
        model,
        config.engine.precision,
        image_size=config.model.image.size,
        num_tokens=config.model.text.max_tokens,
    )


def launcher_conflicts(config: TrainConfig, environment: Mapping[str, str]) -> list[str]:
    """Say where the launcher's own settings contradict the run's, a line each."""
    rank_batch_size = config.global_batch_size // distributed.world_size()
    ours = zero_config(
        config.engine,
        rank_batch_size=rank_batch_size,
        clip_norm=config.optim.clip_norm,
        bucket=1,
    )
    # To DeepSpeed our chunks would be micro batches that are accumulated.
    chunk_size: int | str = AUTO
    chunks: int | str = AUTO
    asked = config.asked_chunk_size(on_gpu=distributed.device().type == "cuda")
    if asked is not None:
        chunk_size = min(asked, rank_batch_size)
        chunks = rank_batch_size // chunk_size
    optim = config.optim
    spec = OPTIMIZERS[optim.name]
    settings = {"lr": optim.lr, "weight_decay": optim.weight_decay, **spec.settings(optim)}
    elsewhere = {
        "train_batch_size": config.global_batch_size,
        "train_micro_batch_size_per_gpu": chunk_size,
        "gradient_accumulation_steps": chunks,
        "optimizer": {"type": spec.deepspeed_type, "params": settings},
        "scheduler": {"type": optim.schedule},
    }
    return conflicts(environment, ours | elsewhere, fsdp2=config.engine.name == "fsdp2")
