"""A total over all ranks, with the gradient that the pass which found it will find."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dist_vse import distributed
from dist_vse.common.errors import UserError


class TotalOverRanks(torch.autograd.Function):
    """`apply(gradients, total, *inputs)` returns the total.

    `gradients` is called in backward, and returns the total's gradient in each of this rank's
    inputs, None for one that has none. A rank gets W times that: see `GlobalLoss`.
    """

    @staticmethod
    def forward(
        ctx: Any, gradients: Callable[[], Sequence[Tensor | None]], total: Tensor, *inputs: Tensor
    ) -> Tensor:
        ctx.gradients = gradients
        return total.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # alike on all ranks, and before anything is sent
            raise UserError(
                "the loss over the global batch has no second derivative; take its gradient "
                "without create_graph=True"
            )
        with torch.autocast(grad.device.type, enabled=False):
            found: Sequence[Tensor | None] = ctx.gradients()
        factor = grad * distributed.world_size()
        return None, None, *(None if x is None else x.mul_(factor) for x in found)
