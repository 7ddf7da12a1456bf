"""The reference: one process with the whole batch, the dense loss and plain autograd."""

from collections.abc import Callable

import torch
from torch import Tensor

from dist_vse import distributed
from dist_vse.config import TrainConfig
from dist_vse.data.samples import Batch
from dist_vse.losses.dense_loss import dense_loss
from dist_vse.losses.nested import first_features
from dist_vse.losses.reference import divergence
from dist_vse.models.dual_encoder import DualEncoder
from dist_vse.models.precision import autocast
from dist_vse.training.step_loss import has_bf16_products, loss_options

MIN_TOLERANCE = {"float64": 1e-9, "fp32": 1e-5, "tf32": 2**-8, "fp16": 2**-8, "bf16": 2**-6}
"""Errors that are always allowed: thousands of roundings of float64, some hundred of
float32, two of TF32, float16 and bfloat16."""
ROUNDING = 4
"""A run's error may be that many times the error of one process in the same precision."""

DenseLoss = Callable[..., Tensor]
"""Of features (N, d) of images and captions, log_scale, bias, and features (M, d) if any."""


def samples_seen(config: TrainConfig) -> int:
    """Return the moment that is checked: the middle of the loss's warm-up, if it has one."""
    return config.loss.warmup_samples // 2


def build_dense_loss(config: TrainConfig, batch: Batch, *, rounded: bool = False) -> DenseLoss:
    """Return the loss of the whole batch, as its paper writes it, with the config's settings.

    `rounded` gives it features in the precision of the config's products.
    """
    loss, here = config.loss, distributed.device()
    bf16 = rounded and has_bf16_products(config)

    def fn(
        images: Tensor, texts: Tensor, log_scale: Tensor, bias: Tensor, *negatives: Tensor
    ) -> Tensor:
        if bf16:  # their gradients go past the rounding
            images, texts, *negatives = (  # type: ignore[assignment]
                x + (x.bfloat16() - x).detach() for x in (images, texts, *negatives)
            )
        of_widths = []
        for width in (None, *loss.widths):
            first = [first_features(x, width) for x in (images, texts, *negatives)]
            value = dense_loss(
                loss.name,
                first[0],
                first[1],
                log_scale,
                bias,
                loss_options(config, samples_seen(config)),
                image_ids=batch.image_ids.to(here),
                text_ids=batch.text_ids.to(here),
                negatives=first[2] if negatives else None,
                negative_ids=None if batch.negative_ids is None else batch.negative_ids.to(here),
                teacher=_teacher(batch, images),
            )
            of_widths.append(value.view(()))
        return torch.stack(of_widths).mean() + _distillation(
            config, batch, images, texts, log_scale
        )

    return fn


def _teacher(batch: Batch, like: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the teacher's features of the batch, as features are here."""
    if batch.teacher is None:
        return None
    images, texts = (x.to(like) for x in batch.teacher)
    return images, texts


def _distillation(
    config: TrainConfig, batch: Batch, images: Tensor, texts: Tensor, log_scale: Tensor
) -> Tensor:
    """Return the weighted divergence from the teacher; 0 without one."""
    loss, teacher = config.loss, _teacher(batch, images)
    if teacher is None or loss.distill_weight == 0:
        return images.new_zeros(())
    fixed = loss_options(config, samples_seen(config)).temperature
    scale = log_scale.exp() if fixed is None else 1 / fixed
    logits = images @ texts.T * scale
    return loss.distill_weight * divergence(
        logits, teacher[0] @ teacher[1].T / loss.distill_temperature
    )


def gradients(loss_fn: DenseLoss, leaves: list[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
    """Return the loss and its gradients; None for what the loss does not depend on."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    loss = loss_fn(*leaves)
    return loss.detach(), list(torch.autograd.grad(loss, leaves, allow_unused=True))


def model_gradients(
    config: TrainConfig, model: DualEncoder, batch: Batch, *, rounded: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss and each trainable parameter's gradient, in the model's own precision.

    `rounded` uses bfloat16 or float16 where the config does; a scaled loss keeps small gradients.
    """
    here = distributed.device()
    precision = config.engine.precision if rounded else "fp32"
    scale = 2.0**8 if precision == "fp16" else 1.0
    with autocast(here, precision):
        inputs = {"images": batch.images.to(here), "tokens": batch.tokens.to(here)}
        if batch.negatives is not None:
            inputs["negatives"] = batch.negatives.to(here)
        outputs = model(**model.prepare(**inputs))
    loss = build_dense_loss(config, batch, rounded=rounded)(*outputs)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(scale * loss, list(named.values()), allow_unused=True)
    return loss.detach(), {
        name: torch.zeros_like(p) if grad is None else grad / scale
        for (name, p), grad in zip(named.items(), grads, strict=True)
    }
