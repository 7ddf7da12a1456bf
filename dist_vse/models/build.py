"""Build the whole model from its config."""

import os
import shutil

import torch
from torch import nn

from dist_vse.common.errors import UserError
from dist_vse.config import ImageConfig, LossConfig, ModelConfig, TextConfig
from dist_vse.losses.registry import find_loss
from dist_vse.models.dual_encoder import DualEncoder, Tower
from dist_vse.models.image import build_image_trunk
from dist_vse.models.layers import layer_numbers
from dist_vse.models.pretrained import Parts, build_pretrained
from dist_vse.models.text import build_text_trunk
from dist_vse.models.tokenizer import Vocabulary


def build_model(
    config: ModelConfig, loss: LossConfig, vocabulary: Vocabulary, *, seed: int = 0
) -> DualEncoder:
    """Build the model on the CPU, with the same weights on every rank and in every run.

    The loss decides the temperature and the bias, and whether they are learned. The random state
    of the process is left as it was. Raises UserError for an unknown model, weights that do not
    fit it, or where nothing can be compiled.
    """
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: it would seed the GPUs as well, which the fork does not restore.
        torch.default_generator.manual_seed(seed)
        if config.pretrained is not None:
            checkpointing = config.grad_checkpointing
            parts = build_pretrained(config.pretrained, grad_checkpointing=checkpointing)
        else:
            parts = _build_parts(config, vocabulary)
    if config.compile:
        _check_compiler()
        for trunk in (parts.image_trunk, parts.text_trunk):
            trunk.compile()  # in place, at the first call: names and weights stay
    model = DualEncoder(
        _build_tower(parts.image_trunk, parts.image_head, config.image, "model.image"),
        _build_tower(parts.text_trunk, parts.text_head, config.text, "model.text"),
        temperature=loss.temperature,
        learn_temperature=loss.learn_temperature,
        bias=loss.bias,
        learn_bias=find_loss(loss.name).learns_bias,
    )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            "nothing is left to learn: both encoders are frozen, and there are no heads besides "
            "them; set model.image.frozen=false or model.text.frozen=false"
        )
    return model


def _build_tower(
    trunk: nn.Module, head: nn.Module, config: ImageConfig | TextConfig, section: str
) -> Tower:
    """Join trunk and head, and freeze what the config says."""
    if config.unlocked == 0:
        return Tower(trunk, head, frozen=config.frozen)
    layers = layer_numbers(trunk)
    locked = max(layers.values()) + 1 - config.unlocked
    if locked <= 0:
        raise UserError(
            f"{section}.unlocked ({config.unlocked}) must be below the trunk's number of layers "
            f"({max(layers.values()) + 1}); set {section}.frozen=false to train them all"
        )
    for name, parameter in trunk.named_parameters():
        if layers[name] < locked:
            parameter.requires_grad_(False)
    return Tower(trunk, head, frozen=False)


def _build_parts(config: ModelConfig, vocabulary: Vocabulary) -> Parts:
    image_trunk = build_image_trunk(
        config.image, grad_checkpointing=config.grad_checkpointing and not config.image.all_frozen
    )
    text_trunk = build_text_trunk(
        config.text,
        vocabulary,
        grad_checkpointing=config.grad_checkpointing and not config.text.all_frozen,
    )
    image_head, text_head = (
        build_head(trunk.dim, config.embed_dim, config.head_hidden, config.head_dropout)
        for trunk in (image_trunk, text_trunk)
    )
    return Parts(image_trunk, text_trunk, image_head, text_head)


def _check_compiler() -> None:
    compiler = os.environ.get("CXX", "g++")
    if not torch.cuda.is_available() and shutil.which(compiler) is None:
        raise UserError(
            f"model.compile=true: there is no {compiler} here, which compiling for a CPU needs; "
            "install one, name it in the variable CXX, or set model.compile=false"
        )


def build_head(dim: int, embed_dim: int, hidden: int, dropout: float) -> nn.Sequential:
    """Build the head (b, dim) -> (b, embed_dim): linear, or with one hidden layer if hidden > 0.

    The hidden layer is that of ConVSE (https://arxiv.org/abs/2110.08872); Xavier's uniform
    weights and zero biases are those of VSE++ (https://arxiv.org/abs/1707.05612).
    """
    layers: list[nn.Module] = [nn.Linear(dim, hidden), nn.ReLU()] if hidden else []
    layers += [nn.Dropout(dropout), nn.Linear(hidden or dim, embed_dim)]
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)
