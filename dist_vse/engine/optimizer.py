"""The optimizer and its parameter groups."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

ADAM_EPS = 1e-8


def build_optimizer(
    model: nn.Module,
    *,
    name: str,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    momentum: float,
) -> torch.optim.Optimizer:
    """Build the optimizer of the trainable parameters.

    Weight decay spares vectors (biases, norms) and scalars (temperature, bias of SigLIP).
    """
    groups: list[dict[str, Any]] = [
        {"params": list(_trainable(model, matrices=True)), "weight_decay": weight_decay},
        {"params": list(_trainable(model, matrices=False)), "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum)
    adam = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
    return adam(groups, lr=lr, betas=betas, eps=ADAM_EPS)


def _trainable(model: nn.Module, *, matrices: bool) -> Iterator[nn.Parameter]:
    return (p for p in model.parameters() if p.requires_grad and (p.ndim >= 2) == matrices)
