"""A loss over the global batch as a module, for a training loop of your own.

b rows on this rank, d embedding, t temperature.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dist_vse import distributed
from dist_vse.common.errors import UserError
from dist_vse.common.uncompiled import uncompiled
from dist_vse.losses.global_loss import GlobalLoss, LossOutput
from dist_vse.losses.options import LossOptions
from dist_vse.losses.registry import find_loss
from dist_vse.losses.temperature import bounded, has_temperature


class GlobalContrastiveLoss(nn.Module):
    """The loss of all ranks' pairs, of which each rank passes its own rows.

        criterion = GlobalContrastiveLoss("info_nce")
        loss = criterion(image_features, text_features)  # unit length, (b, d) each
        loss.backward()

    The value is the global batch's, alike on all ranks. Whatever averages the gradients of
    parameters over the ranks (DDP, FSDP2, DeepSpeed) then has those of one process with the whole
    batch. The ranks' batches may differ in size.

    A learned temperature is `log_scale` = log(1/t), at most log(100); SigLIP also learns a `bias`.
    Give both to your optimizer: `criterion.parameters()`. Their gradients are averages over the
    ranks at once, so the module may stand inside a wrapped model or beside it. Losses:
    info_nce, convse, convse++, dcl, siglip, vse0, vse++, or "module:NAME" of a LossSpec.
    """

    def __init__(
        self,
        name: str = "info_nce",
        *,
        temperature: float = 0.07,
        bias: float = -10.0,
        learned: bool = True,
        options: LossOptions | None = None,
    ) -> None:
        """Start at a temperature and, where the loss has one, a bias.

        `learned=False` keeps both. Raises UserError for an unknown loss or option.
        """
        super().__init__()
        spec = find_loss(name)
        self.name = name
        self.options = options or LossOptions()
        fault = self.options.fault()
        if fault is None and not temperature > 0:
            fault = f"temperature ({temperature}) must be above 0"
        if fault is not None:
            raise UserError(fault)
        self.log_scale: Tensor
        self.bias: Tensor
        self.stats: dict[str, Tensor] = {}
        """Statistics of the last batch: detached numbers, alike on all ranks."""
        scheduled = self.options.temperature is not None
        self._hold(
            "log_scale", -math.log(temperature), learned and has_temperature(spec) and not scheduled
        )
        self._hold("bias", bias, learned and spec.learns_bias)

    def _hold(self, name: str, value: float, learned: bool) -> None:
        # Of shape (1,): DeepSpeed and FSDP2 cannot send parameters without a dimension.
        tensor = torch.tensor([value])
        if learned:
            self.register_parameter(name, nn.Parameter(tensor))
        else:
            self.register_buffer(name, tensor, persistent=False)

    def extra_repr(self) -> str:
        """Return what `print(model)` shows."""
        return f"{self.name!r}, learned={[name for name, _ in self.named_parameters()]}"

    def scalars(self) -> tuple[Tensor, Tensor]:
        """Return copies of log_scale (1,) and bias (1,), as the loss uses them."""
        return bounded(self.log_scale), self.bias.clone()

    # `uncompiled`: it exchanges numbers between the ranks, and reads some of them on the host.
    @uncompiled
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | None = None,
        logit_bias: Tensor | None = None,
        *,
        image_ids: Tensor | None = None,
        text_ids: Tensor | None = None,
        negatives: Tensor | None = None,
        negative_ids: Tensor | None = None,
    ) -> Tensor:
        """Return the global loss of features (b, d) of unit length, in any floating type.

        `logit_scale` (1/t, as CLIP models return it) and `logit_bias` take the place of the
        module's own, and are alike on all ranks. Pairs that share an int64 id (b,) are no
        negatives of each other. `negatives` (m, d) are texts that no image has, and their ids (m,)
        say which are a row's caption after all.

        Raises UserError, the same on all ranks, for features that do not fit together or differ in
        width between the ranks, and for others than of unit length.
        """
        log_scale, bias = self.scalars()
        if logit_scale is not None:
            log_scale = logit_scale.to(log_scale.dtype).log().view(1)
        if logit_bias is not None:
            bias = logit_bias.to(bias.dtype).view(1)
        step_loss = StepLoss(
            self, image_ids=image_ids, text_ids=text_ids, negative_ids=negative_ids
        )
        return step_loss(image_features, text_features, log_scale, bias, negatives).loss


class StepLoss:
    """The loss of one step, as the train step calls it; it leaves its statistics in the module."""

    def __init__(
        self,
        module: GlobalContrastiveLoss,
        *,
        image_ids: Tensor | None = None,
        text_ids: Tensor | None = None,
        negative_ids: Tensor | None = None,
    ) -> None:
        self._module = module
        self._loss = GlobalLoss(
            module.name,
            module.options,
            image_ids=image_ids,
            text_ids=text_ids,
            negative_ids=negative_ids,
            unit_length=True,
        )

    def prefetch(self, text_features: Tensor) -> None:
        """Send nothing ahead: that wants equally many rows of all ranks."""

    def __call__(
        self,
        image_features: Tensor,
        text_features: Tensor,
        log_scale: Tensor,
        bias: Tensor,
        negatives: Tensor | None = None,
    ) -> LossOutput:
        """Return the rank's loss: features (b, d), log_scale and bias (1,), negatives (m, d)."""
        log_scale, bias = _AveragedGradient.apply(log_scale, bias)
        output = self._loss(image_features, text_features, log_scale, bias, negatives)
        self._module.stats = output.stats
        return output


class _AveragedGradient(torch.autograd.Function):
    """Passes on log_scale and bias; averages their gradients over the ranks, in one message."""

    @staticmethod
    def forward(ctx: Any, log_scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return log_scale.view_as(log_scale), bias.view_as(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        joined = torch.cat([grad.double() for grad in grads])
        mean = distributed.all_reduce_mean(joined)
        return tuple(part.to(grad.dtype) for part, grad in zip(mean.split(1), grads, strict=True))
