"""What leaves a trunk or a head is float32, or float64 where the model is (`dist-vse verify`)."""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Widen half precision, such as autocast leaves it; keep float32 and float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
