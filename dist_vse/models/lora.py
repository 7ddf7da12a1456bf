"""Low-rank adapters (LoRA) on the linear layers of pretrained trunks, by peft.

https://arxiv.org/abs/2106.09685. The trunks' own weights are the base: they stay as they are.
"""

import hashlib
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from dist_vse.common.errors import UserError
from dist_vse.config import LoraConfig, ModelConfig
from dist_vse.models.dual_encoder import DualEncoder

_MARK = "lora_"  # in the names of all that peft adds


def add_adapters(model: DualEncoder, config: ModelConfig, *, seed: int) -> None:
    """Give each pretrained trunk that learns its adapters, and freeze the rest of that trunk.

    The features stay as they are to the bit: an adapter begins as zero. Raises UserError where no
    layer takes one.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for name, tower in (("image", model.image), ("text", model.text)):
            section: Any = getattr(config, name)
            if section.all_frozen or not (config.is_whole or section.weights is not None):
                continue
            layers = _layers(tower.trunk, config.lora)
            if not layers:
                raise UserError(
                    f"model.lora.match ({', '.join(config.lora.match)}) finds no linear layer in "
                    f"the trunk of model.{name}: set model.{name}.frozen=true or model.lora.rank=0"
                )
            _inject(tower.trunk, layers, config.lora)
            tower.train(tower.training)  # what is frozen now stays in eval mode
            model.has_adapters = True
    if not model.has_adapters:
        raise UserError(
            "model.lora.rank is for pretrained trunks that learn, and there is none: give "
            "model.pretrained, model.from_run or weights, or set model.lora.rank=0"
        )


def base_names(model: nn.Module) -> set[str]:
    """Return the parameters that a checkpoint leaves out: those under adapters, and frozen ones.

    The temperature and the bias are always saved: who only reads the model does not know whether
    its loss learns them.
    """
    if not getattr(model, "has_adapters", False):
        return set()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return frozen - {"log_scale", "bias"}


def base_digest(model: nn.Module) -> str:
    """Return the SHA-256 of all weights that a checkpoint leaves out."""
    digest, tensors = hashlib.sha256(), dict(model.named_parameters())
    for name in sorted(base_names(model)):
        digest.update(name.encode())
        flat = tensors[name].detach().cpu().contiguous().view(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def remove_adapters(model: DualEncoder, *, merge: bool) -> dict[str, Tensor]:
    """Give the model its plain layers back, with their adapters merged in or left out.

    Returns the adapters by name.
    """
    adapters = {name: p.detach() for name, p in model.named_parameters() if _MARK in name}
    for name, module in list(model.named_modules()):
        if hasattr(module, "base_layer") and hasattr(module, "lora_A"):
            layer: Any = module
            if merge:
                layer.merge()
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, layer.base_layer.requires_grad_(True))
    model.has_adapters = False
    return adapters


def _layers(trunk: nn.Module, config: LoraConfig) -> list[str]:
    """Return the linear layers that learn and that `match` names.

    PyTorch's MultiheadAttention uses the weights of its last layer without calling it.
    """
    inside = tuple(
        f"{name}." for name, m in trunk.named_modules() if isinstance(m, nn.MultiheadAttention)
    )
    return [
        name
        for name, module in trunk.named_modules()
        if isinstance(module, nn.Linear)
        and module.weight.requires_grad
        and not name.startswith(inside)
        and any(fnmatchcase(name, pattern) for pattern in config.match)
    ]


def _inject(trunk: nn.Module, layers: list[str], config: LoraConfig) -> None:
    try:
        import peft  # slow to import, and an extra
    except ImportError:
        raise UserError("model.lora needs the package peft; pip install 'dist_vse[lora]'") from None
    names = "|".join(name.replace(".", r"\.") for name in layers)
    described = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=f"({names})",
    )
    peft.inject_adapter_in_model(described, trunk)
