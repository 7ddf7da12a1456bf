"""From the config to the parts: the only place beside `train` that sees a TrainConfig."""

import math
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_vse import distributed
from dist_vse.common.files import sha256_of_file
from dist_vse.config import TrainConfig
from dist_vse.config.optimizers import OPTIMIZERS
from dist_vse.data.eval_stream import EvalBatch, eval_batches
from dist_vse.data.index import Index
from dist_vse.data.precomputed import Features, Key, open_features
from dist_vse.data.samples import Batch
from dist_vse.data.streams import TrainSet
from dist_vse.data.train_stream import train_batches
from dist_vse.engine.launcher_conflicts import conflicts
from dist_vse.engine.optimizer import build_optimizer
from dist_vse.engine.zero import ZeroEngine, max_live_graphs, zero_config
from dist_vse.losses.async_gather import Ahead
from dist_vse.losses.global_loss import global_loss
from dist_vse.losses.registry import travels_rounded
from dist_vse.models.dual_encoder import DualEncoder
from dist_vse.models.tokenizer import Tokenizer
from dist_vse.runs.checkpoint import Progress
from dist_vse.runs.metrics import Meter
from dist_vse.training.chunking import Chunking, Pairs, choose_chunking
from dist_vse.training.flops import count_flops, peak_flops
from dist_vse.training.grad_cache import LossFn
from dist_vse.training.prefetch_to_device import Chunk
from dist_vse.training.schedule import learning_rate, temperature, warmup_share

EVAL_SAMPLES_A_WORKER = 1000  # starting a process takes as long as decoding about so many


def choose_chunks(config: TrainConfig, model: DualEncoder) -> Chunking:
    """Return this rank's chunk size and number of kept graphs, found by trying where auto."""
    chunk_size, keep_graphs = (
        None if isinstance(value, str) else value
        for value in (config.chunk_size, config.cache.keep_graphs)
    )
    return choose_chunking(
        model,
        Pairs(config.model.image.size, config.model.text.max_tokens),
        rank_batch_size=config.global_batch_size // distributed.world_size(),
        chunk_size=chunk_size,
        keep_graphs=keep_graphs,
        max_live_graphs=max_live_graphs(config.engine.zero_stage, coalesce=config.engine.coalesce),
        memory_gib=config.cache.memory_gib,
        bf16=config.engine.precision == "bf16",
    )


def wrap_model(config: TrainConfig, model: DualEncoder) -> ZeroEngine:
    """Build the optimizer and the DeepSpeed engine around a model that is on its device."""
    return ZeroEngine(
        model,
        build_optimizer(model, config.optim),
        config.engine,
        rank_batch_size=config.global_batch_size // distributed.world_size(),
        clip_norm=config.optim.clip_norm,
    )


def build_train_batches(
    config: TrainConfig, sets: Sequence[TrainSet], tokenizer: Tokenizer, progress: Progress
) -> Iterator[Batch]:
    """Stream this rank's share of the global batches, from where `progress` stands."""
    data = config.data
    return train_batches(
        sets,
        seed=config.seed,
        global_batch_size=config.global_batch_size,
        streams=data.num_streams,
        shuffle_window=data.shuffle_window,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        num_workers=data.num_workers,
        **_square(config),
        crop=data.crop,
        min_crop_area=data.min_crop_area,
        flip=data.flip,
        color_jitter=data.color_jitter,
        tokenizer=tokenizer,
        state=np.array(progress.streams, dtype=np.int64) if progress.streams else None,
        state_format=progress.order,
        read_images=data.features is None,
    )


def build_eval_batches(
    config: TrainConfig, index: Index, tokenizer: Tokenizer, split: str
) -> Iterator[EvalBatch]:
    """Stream this rank's share of a split, each image once with all of its captions."""
    share = index.split(split).num_samples // distributed.world_size()
    return eval_batches(
        index,
        split=split,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        batch_size=config.fixed_chunk_size,
        **_square(config),
        tokenizer=tokenizer,
        num_workers=min(config.data.num_workers, share // EVAL_SAMPLES_A_WORKER),
    )


def _square(config: TrainConfig) -> dict[str, Any]:
    """Return how the stream makes an image a square."""
    image = config.model.image
    return {"size": image.size, "squash": image.squash, "resampling": image.resampling}


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


def build_meter(config: TrainConfig, model: DualEncoder) -> Meter:
    """Return what measures the steps; it counts operations where the device's peak is known."""
    peak = peak_flops(distributed.device(), config.engine.precision)
    if peak is None:
        return Meter()
    flops = count_flops(model, config.model.image.size, config.model.text.max_tokens)
    return Meter(flops.of_step(config.global_batch_size, config.model.embed_dim), peak)


def feature_key(config: TrainConfig, index: Index) -> Key:
    """Return all that the outputs of the frozen image trunk depend on."""
    image, here = config.model.image, distributed.device().type
    return {
        "model": image.name,
        "weights": sha256_of_file(Path(str(image.weights)))[:16],
        "size": f"{image.size}{' squashed' * image.squash} {image.resampling}",
        "data": f"{index.fingerprint()} {config.data.train_split}",
        "precision": f"{config.engine.precision} {here}",
        "timm": metadata.version("timm"),
    }


def open_run_features(config: TrainConfig, index: Index) -> Features | None:
    """Open the cached outputs of the image trunk; None where images are read.

    Raises UserError if they are missing, cut, or stale.
    """
    if config.data.features is None:
        return None
    num_samples = index.split(config.data.train_split).num_samples
    return open_features(Path(config.data.features), feature_key(config, index), num_samples)


def make_chunks(
    model: DualEncoder, batch: Batch, config: TrainConfig, features: Features | None = None
) -> list[Chunk]:
    """Cut the rank's batch into chunks of what the model's forward takes.

    A frozen trunk runs here, once: its outputs take the place of its inputs. Those of `features`
    are only read. Images of a trunk that learns stay on the host, uint8, until their chunk's turn.
    """
    here = distributed.device()
    name, images = "images", batch.images
    if features is not None:
        name, images = "image_hidden", features.rows(batch.origin[:, 1])
    tokens = batch.tokens
    if here.type == "cuda":  # a GPU reads such memory by itself, while others work
        images, tokens = images.pin_memory(), tokens.pin_memory()
    pieces = zip(*(x.split(config.fixed_chunk_size) for x in (images, tokens)), strict=True)
    bf16 = config.engine.precision == "bf16"
    with torch.autocast(here.type, torch.bfloat16, enabled=bf16):
        return [model.prepare(tokens=t, **{name: i}) for i, t in pieces]


def step_learning_rate(config: TrainConfig, samples_seen: int) -> float:
    """Return the rate of the step that starts after `samples_seen` pairs."""
    return learning_rate(
        samples_seen,
        peak=config.optim.lr,
        schedule=config.optim.schedule,
        warmup_samples=config.optim.warmup_samples,
        total_samples=config.total_steps * config.global_batch_size,
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
