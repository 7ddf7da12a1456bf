"""The optimizer and its parameter groups."""

import importlib
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from dist_vse.common.errors import UserError
from dist_vse.config import OptimConfig
from dist_vse.config.optimizers import OPTIMIZERS, GroupConfig
from dist_vse.models.layers import is_position, layer_numbers


@dataclass
class Group:
    """Parameters that share a rate and a weight decay."""

    lr_scale: float
    """Factor on the learning rate; timm's name of it."""
    weight_decay: float
    names: list[str] = field(default_factory=list)
    params: list[nn.Parameter] = field(default_factory=list)


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Build the optimizer of the trainable parameters, in their groups."""
    groups: list[dict[str, Any]] = [
        {
            "params": group.params,
            "weight_decay": group.weight_decay,
            "lr": config.lr * group.lr_scale,
            "lr_scale": group.lr_scale,
        }
        for group in parameter_groups(model, config)
    ]
    spec = OPTIMIZERS[config.name]
    settings = spec.settings(config)
    if spec.fuses and all(p.is_cuda for group in groups for p in group["params"]):
        settings["fused"] = True  # one kernel for all parameters, not one an operation
    module, name = spec.factory.split(":")
    factory = getattr(importlib.import_module(module), name)
    optimizer: torch.optim.Optimizer = factory(groups, lr=config.lr, **settings)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of the next step: each group's is this times its `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[Group]:
    """Return the trainable parameters in groups, those that decay first.

    Weight decay spares vectors (biases, norms) and scalars (temperature, bias of SigLIP); with
    `decay_positions` false, position and class embeddings too. Raises UserError for an item of
    `optim.groups` that matches nothing.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    scales = _layer_scales(model, config.layer_decay)
    exempt = set() if config.decay_positions else _without_decay(model)
    groups: dict[tuple[bool, float, float], Group] = {}
    _check_matches(config.groups, [name for name, _ in model.named_parameters()])
    for name, parameter in trainable.items():
        lr_scale, weight_decay = scales.get(name, 1.0), config.weight_decay
        for item in reversed(config.groups):
            if _matches(item.match, name):
                lr_scale *= item.lr_scale
                weight_decay = weight_decay if item.weight_decay is None else item.weight_decay
                break
        decays = parameter.ndim >= 2 and name not in exempt
        key = decays, lr_scale, weight_decay if decays else 0.0
        group = groups.setdefault(key, Group(*key[1:]))
        group.names.append(name)
        group.params.append(parameter)
    return [group for _, group in sorted(groups.items(), key=lambda item: not item[0][0])]


def _matches(pattern: str, name: str) -> bool:
    """Return whether a parameter is part of what `pattern` names."""
    return name == pattern or name.startswith(f"{pattern}.") or fnmatchcase(name, pattern)


def _check_matches(items: list[GroupConfig], names: list[str]) -> None:
    for item in items:
        if not any(_matches(item.match, name) for name in names):
            parts = sorted({".".join(name.split(".")[:2]) for name in names})
            raise UserError(
                f"optim.groups: {item.match!r} matches no parameter; the model has "
                f"{', '.join(parts)}"
            )


def _layer_scales(model: nn.Module, decay: float) -> dict[str, float]:
    """Return the factors of the trunks' layers: `decay` to the power of the distance to the head.

    As BEiT fine-tunes, https://arxiv.org/abs/2106.08254, and timm's `param_groups_layer_decay`.
    """
    scales: dict[str, float] = {}
    for tower in ("image", "text"):
        if decay < 1:
            layers = layer_numbers(model.get_submodule(f"{tower}.trunk"))
            after = max(layers.values()) + 1
            scales |= {f"{tower}.trunk.{k}": decay ** (after - i) for k, i in layers.items()}
    return scales


def _without_decay(model: nn.Module) -> set[str]:
    """Return the names of position and class embeddings, and of what its modules exempt."""
    named = {name for name, _ in model.named_parameters() if is_position(name)}
    for prefix, module in model.named_modules():
        own = getattr(module, "no_weight_decay", None)
        if callable(own):
            named |= {f"{prefix}.{name}" for name in own()}
    return named
