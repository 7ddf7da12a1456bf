"""The optimizer and its parameter groups."""

import importlib
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from dist_vse.common.errors import UserError, first_line
from dist_vse.config import OptimConfig
from dist_vse.config.optimizers import OPTIMIZERS, GroupConfig
from dist_vse.models.layers import is_position, layer_numbers


@dataclass
class Group:
    """Parameters that share a rate and a weight decay."""

    lr_scale: float
    """Factor on the learning rate; timm's name of it."""
    weight_decay: float
    embeds: bool = False
    """Whether these are embeddings, which an optimizer with a second rule steps by that."""
    names: list[str] = field(default_factory=list)
    params: list[nn.Parameter] = field(default_factory=list)


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Build the optimizer of the trainable parameters, in their groups.

    Raises UserError for options that it does not take, and for one that this timm lacks.
    """
    spec = OPTIMIZERS[config.name]
    if spec.from_timm:
        _check_timm(config.name)
    groups: list[dict[str, Any]] = [
        {
            "params": group.params,
            "weight_decay": group.weight_decay,
            "lr": config.lr * group.lr_scale,
            "lr_scale": group.lr_scale,
            **({"use_fallback": True} if spec.second_group and group.embeds else {}),
        }
        for group in parameter_groups(model, config)
    ]
    settings = spec.settings(config)
    if spec.fuses and all(p.is_cuda for group in groups for p in group["params"]):
        settings["fused"] = True  # one kernel for all parameters, not one an operation
    module, name = spec.factory.split(":")
    factory = getattr(importlib.import_module(module), name)
    try:
        optimizer: torch.optim.Optimizer = factory(groups, lr=config.lr, **settings)
    except (TypeError, ValueError) as error:
        raise UserError(f"optim.options of {config.name}: {first_line(error)}") from error
    return optimizer


def _check_timm(name: str) -> None:
    if name not in importlib.import_module("timm.optim").list_optimizers():
        raise UserError(
            f"optim.name={name}: the installed timm {version('timm')} does not have it; "
            "install a newer timm"
        )


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
    embeddings = _embeddings(model) if OPTIMIZERS[config.name].second_group else set()
    exempt = set() if config.decay_positions else _without_decay(model)
    groups: dict[tuple[bool, float, float, bool], Group] = {}
    _check_matches(config.groups, [name for name, _ in model.named_parameters()])
    for name, parameter in trainable.items():
        lr_scale, weight_decay = scales.get(name, 1.0), config.weight_decay
        for item in reversed(config.groups):
            if _matches(item.match, name):
                lr_scale *= item.lr_scale
                weight_decay = weight_decay if item.weight_decay is None else item.weight_decay
                break
        decays = parameter.ndim >= 2 and name not in exempt
        key = decays, lr_scale, weight_decay if decays else 0.0, name in embeddings
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


def _embeddings(model: nn.Module) -> set[str]:
    """Return the names of word, position and class embeddings, which look up and don't multiply."""
    words = {
        f"{prefix}.weight" for prefix, m in model.named_modules() if isinstance(m, nn.Embedding)
    }
    return words | {name for name, _ in model.named_parameters() if is_position(name)}
