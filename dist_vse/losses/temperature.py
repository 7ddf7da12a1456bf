"""The learned temperature, as log(1/t)."""

import math

import torch
from torch import Tensor

from dist_vse.losses.registry import LossSpec

MAX_LOG_SCALE = math.log(100)


def bounded(log_scale: Tensor) -> Tensor:
    """Return a copy of a learned log_scale (1,), at most log(100) as CLIP has it.

    The gradient passes the bound whole: with a plain clamp it would be zero beyond the bound, and
    a parameter that has stepped over it could never come back.
    """
    if not log_scale.requires_grad:
        return log_scale.clone()
    excess = (log_scale - MAX_LOG_SCALE).clamp(min=0)
    return log_scale - excess.detach()


def has_temperature(spec: LossSpec) -> bool:
    """Return whether a loss depends on its temperature; the hinge losses of VSE++ do not."""
    one, two = torch.ones(1), torch.full((1,), 2.0)
    return spec.similarity_unit is not None or float(spec.loss_unit(one, 1)) != float(
        spec.loss_unit(two, 1)
    )
