"""From the config to the engine and to the loss of a step."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dist_vse import distributed
from dist_vse.config import TrainConfig
from dist_vse.config.optimizers import OPTIMIZERS
from dist_vse.data.samples import Batch
from dist_vse.engine.launcher_conflicts import conflicts
from dist_vse.engine.optimizer import build_optimizer
from dist_vse.engine.zero import ZeroEngine, zero_config
from dist_vse.losses.async_gather import Ahead
from dist_vse.losses.global_loss import global_loss
from dist_vse.losses.registry import travels_rounded
from dist_vse.models.dual_encoder import DualEncoder
from dist_vse.training.grad_cache import LossFn
from dist_vse.training.schedule import temperature, warmup_share


def wrap_model(config: TrainConfig, model: DualEncoder) -> ZeroEngine:
    """Build the optimizer and the DeepSpeed engine around a model that is on its device."""
    return ZeroEngine(
        model,
        build_optimizer(model, config.optim),
        config.engine,
        rank_batch_size=config.global_batch_size // distributed.world_size(),
        clip_norm=config.optim.clip_norm,
    )


def build_ahead(config: TrainConfig) -> Ahead:
    """Return what takes one step's text features to all ranks, before its loss is called."""
    loss = config.loss
    rounded = travels_rounded(loss.name, bf16_products=loss.bf16_products)
    return Ahead(loss.transport, rounded=rounded)


def build_loss(
    config: TrainConfig,
    batch: Batch,
    samples_seen: int,
    statistics: dict[str, Tensor],
    ahead: Ahead | None = None,
) -> LossFn:
    """Return the loss of one step; calling it fills `statistics` with detached numbers.

    `ahead` has been told the text features before.
    """
    loss = config.loss
    here = distributed.device()
    image_ids, text_ids = batch.image_ids.to(here), batch.text_ids.to(here)

    def loss_fn(
        image_features: Tensor, text_features: Tensor, log_scale: Tensor, bias: Tensor
    ) -> Tensor:
        if loss.temperature_end is not None:
            t = temperature(
                samples_seen,
                start=loss.temperature,
                end=loss.temperature_end,
                total_samples=config.total_steps * config.global_batch_size,
            )
            log_scale = torch.full_like(log_scale, -math.log(t))
        output = global_loss(
            loss.name,
            image_features,
            text_features,
            log_scale,
            bias,
            image_ids=image_ids,
            text_ids=text_ids,
            margin=loss.margin,
            hardness=warmup_share(samples_seen, loss.warmup_samples),
            duplicates=loss.duplicates,
            transport=loss.transport,
            memory_gib=loss.memory_gib,
            bf16_products=loss.bf16_products,
            ahead=ahead,
        )
        statistics.update(output.stats)
        return output.loss

    return loss_fn


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
    chunk_size, chunks = config.chunk_size, config.chunk_size
    if not isinstance(chunk_size, str):
        chunk_size = min(chunk_size, rank_batch_size)
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
    return conflicts(environment, ours | elsewhere)
