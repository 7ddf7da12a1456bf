"""Whether a step's gradients are finite, as all ranks know it and no host has to wait for it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dist_vse.distributed import all_reduce_min, device


def all_finite(gradients: Sequence[Tensor]) -> Tensor:
    """Return 1.0 if all gradients of all ranks are finite, else 0.0, as a number on the device.

    Every rank calls this with what it has, which may be nothing.
    """
    if not gradients:
        return all_reduce_min(torch.ones((), device=device()))
    # One pass, a few kernels. So what is too long for float32 is not finite either.
    return all_reduce_min(nn.utils.get_total_norm(gradients).isfinite().float())
