"""Build the whole model from its config."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_vse.common.errors import UserError
from dist_vse.config import ImageConfig, LossConfig, ModelConfig, TextConfig
from dist_vse.config.sections import GRAPHS
from dist_vse.losses.registry import find_loss
from dist_vse.models.dual_encoder import DualEncoder, Tower
from dist_vse.models.image import build_image_trunk
from dist_vse.models.layers import layer_numbers
from dist_vse.models.lora import add_adapters
from dist_vse.models.pretrained import Parts, build_pretrained
from dist_vse.models.text import build_text_trunk
from dist_vse.models.tokenizer import Vocabulary


def build_model(
    config: ModelConfig,
    loss: LossConfig,
    vocabulary: Vocabulary,
    *,
    seed: int = 0,
    trains: bool = True,
) -> DualEncoder:
    """Build the model on the CPU, with the same weights on every rank and in every run.

    The loss decides the temperature and the bias, and whether they are learned. The random state
    of the process is left as it was. A model that only reads (`trains` is false) imports no loss
    from outside: a run's folder names it, which somebody else may have made. Raises UserError for
    an unknown model, weights that do not fit it, or where nothing can be compiled.
    """
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: it would seed the GPUs as well, which the fork does not restore.
        torch.default_generator.manual_seed(seed)
        if config.pretrained is not None:
            parts = build_pretrained(
                config.pretrained,
                image_size=config.image.asked_size,
                max_tokens=config.text.asked_tokens,
                grad_checkpointing=config.grad_checkpointing,
            )
        else:
            with _within_memory():
                parts = _build_parts(config, vocabulary)
    if config.compile:
        _check_compiler()
        mode = "reduce-overhead" if config.compile == GRAPHS else None
        for trunk in (parts.image_trunk, parts.text_trunk):
            trunk.compile(mode=mode)  # in place, at the first call: names and weights stay
    model = DualEncoder(
        _build_tower(parts.image_trunk, parts.image_head, config.image, "model.image"),
        _build_tower(parts.text_trunk, parts.text_head, config.text, "model.text"),
        temperature=loss.temperature,
        learn_temperature=loss.learn_temperature,
        bias=loss.bias,
        learn_bias=trains and find_loss(loss.name).learns_bias,
    )
    if config.compile == GRAPHS:
        model.use_cuda_graphs()
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            "nothing is left to learn: both encoders are frozen, and there are no heads besides "
            "them; set model.image.frozen=false or model.text.frozen=false"
        )
    if config.lora.rank:
        add_adapters(model, config, seed=seed)
    return model


def _build_tower(
    trunk: nn.Module, head: nn.Module, config: ImageConfig | TextConfig, section: str
) -> Tower:
    """Join trunk and head, and freeze what the config says."""
    if config.unlocked == 0:
        drifting = isinstance(config, ImageConfig) and config.drifting_statistics
        frozen = config.frozen or config.spec.is_stored
        return Tower(trunk, head, frozen=frozen, drifting_statistics=drifting)
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
        build_head(
            dim,
            config.embed_dim,
            config.head_hidden,
            config.head_dropout,
            hidden_bias=config.head_bias,
        )
        for dim in (config.image.projection or image_trunk.dim, text_trunk.dim)
    )
    before = build_projection(
        image_trunk.dim, config.image.projection, normalize=config.image.normalize
    )
    return Parts(image_trunk, text_trunk, nn.Sequential(*before, *image_head), text_head)


@contextmanager
def _within_memory() -> Iterator[None]:
    """Turn PyTorch's error of a model that this machine cannot hold into a UserError."""
    try:
        yield
    except RuntimeError as error:
        if "allocate memory" not in str(error) and "too large" not in str(error):
            raise
        raise UserError(
            "model: this machine has too little memory for these sizes; lower model.text.width, "
            "model.embed_dim or model.head_hidden, or take a smaller model.image.name"
        ) from error


def _check_compiler() -> None:
    compiler = os.environ.get("CXX", "g++")
    if not torch.cuda.is_available() and shutil.which(compiler) is None:
        raise UserError(
            f"model.compile: there is no {compiler} here, which compiling for a CPU needs; "
            "install one, name it in the variable CXX, or set model.compile=false"
        )


class Normalize(nn.Module):
    """Divides each row by its L2 norm."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (b, d) of unit length, of x (b, d)."""
        return functional.normalize(x, dim=-1)


def build_projection(dim: int, size: int, *, normalize: bool) -> list[nn.Module]:
    """Return what stands between a trunk of `dim` and its head: nothing where size is 0.

    VSE++ (https://arxiv.org/abs/1707.05612) normalises the trunk's output and maps it linearly;
    ConVSE puts its MLP behind that.
    """
    layers: list[nn.Module] = [Normalize()] if normalize else []
    return [*layers, _xavier(nn.Linear(dim, size))] if size else layers


def build_head(
    dim: int, embed_dim: int, hidden: int, dropout: float, *, hidden_bias: bool = True
) -> nn.Sequential:
    """Build the head (b, dim) -> (b, embed_dim): linear, or with one hidden layer if hidden > 0.

    The hidden layer is that of ConVSE (https://arxiv.org/abs/2110.08872); Xavier's uniform
    weights and zero biases are those of VSE++ (https://arxiv.org/abs/1707.05612).
    """
    layers: list[nn.Module] = []
    if hidden:
        layers = [nn.Linear(dim, hidden, bias=hidden_bias), nn.ReLU()]
    layers += [nn.Dropout(dropout), nn.Linear(hidden or dim, embed_dim)]
    for layer in layers:  # once all are built: each of them draws as well
        if isinstance(layer, nn.Linear):
            _xavier(layer)
    return nn.Sequential(*layers)


def _xavier(layer: nn.Linear) -> nn.Linear:
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
