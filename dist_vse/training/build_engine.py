"""From the config to the engine, and what a launcher says against it."""

from collections.abc import Mapping

from dist_vse import distributed
from dist_vse.config import TrainConfig
from dist_vse.config.checks import AUTO
from dist_vse.config.optimizers import OPTIMIZERS, needs_whole_tensors
from dist_vse.engine.launcher_conflicts import conflicts
from dist_vse.engine.optimizer import build_optimizer
from dist_vse.engine.zero import ZeroEngine, zero_config
from dist_vse.models.dual_encoder import DualEncoder


def build_engine(config: TrainConfig, model: DualEncoder) -> ZeroEngine:
    """Build the optimizer and the DeepSpeed engine around a model that is on its device."""
    return ZeroEngine(
        model,
        build_optimizer(model, config.optim),
        config.engine,
        rank_batch_size=config.global_batch_size // distributed.world_size(),
        clip_norm=config.optim.clip_norm,
        whole_tensors=needs_whole_tensors(config.optim),
        average_samples=config.ema.samples,
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
    return conflicts(environment, ours | elsewhere)
