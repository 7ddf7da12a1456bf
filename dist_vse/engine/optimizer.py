"""The optimizer and its parameter groups."""

import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dist_vse.config import OptimConfig
from dist_vse.config.optimizers import OPTIMIZERS


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Build the optimizer of the trainable parameters.

    Weight decay spares vectors (biases, norms) and scalars (temperature, bias of SigLIP).
    """
    groups: list[dict[str, Any]] = [
        {"params": list(_trainable(model, matrices=True)), "weight_decay": config.weight_decay},
        {"params": list(_trainable(model, matrices=False)), "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    spec = OPTIMIZERS[config.name]
    settings = spec.settings(config)
    if spec.fuses and all(p.is_cuda for group in groups for p in group["params"]):
        settings["fused"] = True  # one kernel for all parameters, not one an operation
    module, name = spec.factory.split(":")
    factory = getattr(importlib.import_module(module), name)
    optimizer: torch.optim.Optimizer = factory(groups, lr=config.lr, **settings)
    return optimizer


def _trainable(model: nn.Module, *, matrices: bool) -> Iterator[nn.Parameter]:
    return (p for p in model.parameters() if p.requires_grad and (p.ndim >= 2) == matrices)
