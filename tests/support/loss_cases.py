"""Small batches for the tests of the losses over the global batch."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dist_vse.losses import dense_loss as dense
from dist_vse.losses import global_loss as losses
from dist_vse.losses.global_loss import GlobalLoss, LossOutput
from dist_vse.losses.options import LossOptions
from dist_vse.losses.registry import LOSSES

NAMES = tuple(LOSSES)


def global_loss(name: str, *tensors: Tensor, **options: Any) -> LossOutput:
    """Call `global_loss` with options given by name."""
    return losses.global_loss(name, *tensors, **_split(options))


def dense_loss(name: str, *tensors: Tensor, **options: Any) -> Tensor:
    """Call `dense_loss` with options given by name."""
    return dense.dense_loss(name, *tensors, **_split(options))


def step_loss(name: str, **options: Any) -> GlobalLoss:
    """Return the loss of one step, with options given by name."""
    return GlobalLoss(name, **_split(options))


def _split(options: dict[str, Any]) -> dict[str, Any]:
    """Return arguments in which all but the ids, negatives and teacher is a LossOptions."""
    given = ("negatives", "teacher")
    ids = {k: v for k, v in options.items() if k.endswith("_ids") or k in given}
    others = {name: value for name, value in options.items() if name not in ids}
    return {**ids, "options": LossOptions(**others)}


class Plain:
    """The loss of a train step as a plain function."""

    def __init__(self, fn: Callable[..., Tensor]) -> None:
        self.fn = fn

    def prefetch(self, text_features: Tensor) -> None:
        """Nothing travels ahead."""

    def __call__(self, *outputs: Tensor) -> LossOutput:
        return LossOutput(self.fn(*outputs), {})


class Case:
    """A whole batch of pairs in float64, of which a rank may take a part.

    Image and caption ids repeat after `groups` rows, where the batch is longer.
    """

    def __init__(
        self,
        name: str,
        count: int,
        *,
        width: int = 6,
        temperature: float = 0.1,
        groups: int = 10**6,
        duplicates: str = "mask",
        weight: float = 1.0,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        made = torch.randn(2, count, width, generator=generator, dtype=torch.float64)
        made[1] += made[0]
        self.images, self.texts = functional.normalize(made, dim=2).unbind()
        self.ids = torch.arange(count) % groups
        self.text_ids = torch.arange(count) % (groups + 3)
        self.part = slice(0, count)
        self.name = name
        self.log_scale = torch.tensor([-math.log(temperature)], dtype=torch.float64)
        self.bias = torch.tensor([-2.0], dtype=torch.float64)
        self.options: dict[str, Any] = {"duplicates": duplicates, "hard_negative_weight": weight}

    def to(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.images.to(dtype), self.texts.to(dtype)

    def leaves(self, dtype: torch.dtype) -> list[Tensor]:
        """Return the part's features, the scale and the bias, each to be differentiated."""
        scalar_dtype = torch.promote_types(dtype, torch.float32)
        features = [x[self.part].to(dtype) for x in (self.images, self.texts)]
        scalars = [x.to(scalar_dtype) for x in (self.log_scale, self.bias)]
        return [x.detach().clone().requires_grad_() for x in (*features, *scalars)]

    def ids_of_part(self) -> dict[str, Tensor]:
        return {"image_ids": self.ids[self.part], "text_ids": self.text_ids[self.part]}

    def output(self, **options: Any) -> LossOutput:
        """Run `global_loss` with image ids alone."""
        images, texts, *scalars = self.leaves(torch.float64)
        scale, bias = scalars
        ids = self.ids[self.part]
        return global_loss(
            self.name, images, texts, scale, bias, image_ids=ids, **self.options, **options
        )

    def run(self, fn: Callable[..., Any], **options: Any) -> Tensor:
        """Return the loss."""
        return self.differentiable(fn, self.leaves(torch.float64), **options)

    def differentiable(
        self, fn: Callable[..., Any], leaves: Sequence[Tensor], **options: Any
    ) -> Tensor:
        """Return the loss of `fn`, which is global_loss or dense_loss."""
        result = fn(self.name, *leaves, **self.ids_of_part(), **self.options, **options)
        loss: Tensor = result.loss if isinstance(result, LossOutput) else result
        return loss.view(())


def gradients(
    fn: Callable[..., Any], case: Case, *, dtype: torch.dtype = torch.float64, **options: Any
) -> list[Tensor]:
    """Return the loss, and its gradients in image and text features, scale and bias."""
    leaves = case.leaves(dtype)
    loss = case.differentiable(fn, leaves, **options)
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return [loss.detach(), *grads]


def error(ours: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Return the largest difference, relative to each tensor's largest number (or to 1e-3)."""
    worst = 0.0
    for a, b in zip(ours, exact, strict=True):
        if b.numel():
            difference = (a.double() - b.double()).abs().max()
            relative = (difference / b.abs().max().clamp(min=1e-3)).item()
            worst = max(worst, math.inf if math.isnan(relative) else relative)
    return worst
