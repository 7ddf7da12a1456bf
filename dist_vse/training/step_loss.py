"""The loss of a step, as the run's config and its schedules have it."""

from dataclasses import replace
from typing import Protocol

from torch import Tensor

from dist_vse import distributed
from dist_vse.config import TrainConfig
from dist_vse.losses.distillation import DistilledLoss, Teacher
from dist_vse.losses.global_loss import GlobalLoss
from dist_vse.losses.layout import sent
from dist_vse.losses.nested import NestedLoss
from dist_vse.losses.options import LossOptions
from dist_vse.losses.tiles import default_tile
from dist_vse.training.schedule import temperature, warmup_fraction


class PairIds(Protocol):
    """What says which pairs of a batch share an image or a caption."""

    @property
    def image_ids(self) -> Tensor:
        """int64 (b,)."""

    @property
    def text_ids(self) -> Tensor:
        """int64 (b,)."""

    @property
    def negative_ids(self) -> Tensor | None:
        """int64 (m,) of texts without an image."""

    @property
    def teacher(self) -> tuple[Tensor, Tensor] | None:
        """A teacher's features of the pairs."""


def build_loss(
    config: TrainConfig, batch: PairIds, samples_seen: int, *, max_tile: int | None = None
) -> GlobalLoss | NestedLoss | DistilledLoss:
    """Return the loss of this rank's batch, in the step that starts after `samples_seen` pairs.

    `max_tile` bounds the size of its tiles.
    """
    widths, options = config.loss.widths, loss_options(config, samples_seen)
    if max_tile is not None:
        options = replace(options, tile=min(max_tile, default_tile(distributed.device())))
    teacher: tuple[Tensor, Tensor] | None = None
    if batch.teacher is not None:
        images, captions = (sent(x, distributed.device()) for x in batch.teacher)
        teacher = images, captions
    losses = [
        GlobalLoss(
            config.loss.name,
            options,
            image_ids=batch.image_ids,
            text_ids=batch.text_ids,
            negative_ids=batch.negative_ids,
            teacher=teacher,
        )
        for _ in range(1 + len(widths))
    ]
    loss = NestedLoss(losses, widths) if widths else losses[0]
    if config.loss.distill_weight == 0:
        return loss
    assert teacher is not None
    teaching = Teacher(*teacher, config.loss.distill_temperature, weight=config.loss.distill_weight)
    return DistilledLoss(loss, teaching, options)


def has_bf16_products(config: TrainConfig) -> bool:
    """Return whether this process computes the similarities in bfloat16."""
    return config.has_bf16_products(on_gpu=distributed.device().type == "cuda")


def loss_options(config: TrainConfig, samples_seen: int) -> LossOptions:
    """Return how the loss is computed after `samples_seen` pairs."""
    loss, scheduled = config.loss, None
    if loss.temperature_end is not None:
        scheduled = temperature(
            samples_seen,
            start=loss.temperature,
            end=loss.temperature_end,
            total_samples=config.horizon,
        )
    return LossOptions(
        margin=loss.margin,
        hard_negative_weight=warmup_fraction(samples_seen, loss.warmup_samples),
        ignore_above=loss.ignore_above,
        duplicates=loss.duplicates,
        transport=loss.transport,
        bf16_products=has_bf16_products(config),
        kernels=loss.kernels,
        temperature=scheduled,
        memory_gib=loss.memory_gib,
    )
