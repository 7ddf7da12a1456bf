"""Copies in host memory, for what goes on while the original changes."""

from torch import Tensor


def host_copy(x: Tensor) -> Tensor:
    """Return a contiguous copy of a tensor in host memory: one copy, also of a GPU's."""
    return x.detach().to("cpu", copy=True).contiguous()
