"""Random vectors of length one."""

import torch
from torch import Tensor


def unit(rows: int, width: int, seed: int) -> Tensor:
    """Draw vectors (rows, width)."""
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(x, dim=1)
