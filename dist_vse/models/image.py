"""The image trunk: any timm model with weights from a file, or an encoder of another kind.

Shape letters: b images, h w pixels, d the trunk's features.
"""

import difflib
import pickle
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional

from dist_vse.common.errors import UserError, first_line
from dist_vse.config import ImageConfig
from dist_vse.models.entry import import_builder
from dist_vse.models.vectors import StoredVectors

# What reading a file of something else raises, by its kind.
_UNREADABLE = (
    RuntimeError, ValueError, SafetensorError, pickle.UnpicklingError, EOFError,
    KeyError, TypeError, AttributeError,
)  # fmt: skip


class ImageTrunk(nn.Module):
    """An image encoder without a classifier, and the normalisation it was made for."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, backbone: nn.Module, *, dim: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        """Wrap an encoder of normalised images whose features are (b, dim)."""
        super().__init__()
        self.backbone = backbone
        self.dim = dim
        self.train_size: int | None = None
        """Side to which training shrinks its images; None leaves them."""
        for name, values in (("mean", mean), ("std", std)):
            # In units of uint8, so that pixels need no division first.
            self.register_buffer(name, torch.tensor(values).mul(255).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return the features (b, d) of uint8 images (b, 3, h, w), or of normalised float ones."""
        raw = images.dtype == torch.uint8
        if self.training and self.train_size not in (None, images.shape[-1]):
            images = _resize(images.to(self.mean.dtype), self.train_size)
        if raw:
            images = images.to(self.mean.dtype).sub_(self.mean).div_(self.std)
        # Convolutions are faster with the channels last, and keep that order from layer to layer.
        features: Tensor = self.backbone(images.contiguous(memory_format=torch.channels_last))
        return features


def set_training_input(model: nn.Module, size: int, patch_drop: float) -> None:
    """Have the image trunk train on images of this side, without this share of its patches."""
    from timm.layers import PatchDropout  # slow to import, and needed for images only

    for module in model.modules():
        if isinstance(module, ImageTrunk):
            module.train_size = size
        elif isinstance(module, PatchDropout):
            module.prob = patch_drop


def _resize(images: Tensor, size: int | None) -> Tensor:
    return functional.interpolate(images, size=size, mode="bilinear", antialias=True)


Builder = Callable[[ImageConfig, bool], ImageTrunk | StoredVectors]


def build_image_trunk(
    config: ImageConfig, *, grad_checkpointing: bool
) -> ImageTrunk | StoredVectors:
    """Build the trunk of `config.kind`; its features are (b, trunk.dim).

    A builder is given the config and whether to recompute activations in backward; it loads the
    weights that the config names. Raises UserError as the builder does.
    """
    build: Builder = import_builder(config.spec.builder)
    trunk = build(config, grad_checkpointing)
    make_sendable(trunk, f"model.image.name={config.name!r}")
    return trunk


def build_timm(config: ImageConfig, grad_checkpointing: bool) -> ImageTrunk:
    """Build a timm model, load its weights, and try it on one image.

    Raises UserError for an unknown name, weights of another model, or an image size that the
    model cannot take.
    """
    backbone = _create(config)
    if config.weights is not None:
        _load_weights(backbone, Path(config.weights), config.name)
    if grad_checkpointing:
        try:
            backbone.set_grad_checkpointing(True)  # type: ignore[operator]
        except (AttributeError, AssertionError, NotImplementedError) as error:
            raise UserError(
                f"model.image.name={config.name!r} has no gradient checkpointing; "
                "set model.grad_checkpointing=false"
            ) from error
    normalisation: dict[str, tuple[float, ...]] = backbone.pretrained_cfg  # type: ignore[assignment]
    mean, std = normalisation["mean"], normalisation["std"]
    return ImageTrunk(backbone, dim=_output_dim(backbone, config), mean=mean, std=std)


def make_sendable(encoder: nn.Module, what: str) -> None:
    """Lay the parameters out in flat memory, as DeepSpeed sends them.

    Raises UserError for one without a dimension, which it cannot send.
    """
    for name, parameter in encoder.named_parameters():
        if parameter.ndim == 0:
            raise UserError(
                f"{what} has a scalar parameter ({name}), which DeepSpeed cannot send to the other "
                "ranks; choose another model"
            )
        parameter.data = parameter.data.contiguous()


def _create(config: ImageConfig) -> nn.Module:
    """Create the timm model with random weights."""
    import timm  # slow to import, and needed for images only

    name, size = config.name, config.size
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() has the names"
        raise UserError(f"model.image.name={name!r} is no timm model; {hint}")
    options: dict[str, Any] = {"patch_drop_rate": config.patch_drop} if config.patch_drop else {}
    if config.size_schedule:
        options["dynamic_img_size"] = True
    try:
        try:
            model: nn.Module = timm.create_model(name, num_classes=0, img_size=size, **options)
        except TypeError:  # a convolutional net takes any size, and knows no img_size
            if config.patch_drop:
                raise UserError(
                    f"model.image.name={name!r} has no patches to leave out: set "
                    "model.image.patch_drop=0"
                ) from None
            model = timm.create_model(name, num_classes=0)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(
            f"model.image.name={name!r} cannot be built for model.image.size={size}: "
            f"{first_line(error)}"
        ) from error
    return model


def _output_dim(backbone: nn.Module, config: ImageConfig) -> int:
    """Return the size of the features, by a forward of one black image."""
    training = backbone.training
    sizes = [*(int(side) for _, side in config.size_schedule), config.size]
    try:
        with torch.no_grad():
            for size in sizes:
                features: Tensor = backbone.eval()(torch.zeros(1, 3, size, size))
    except (RuntimeError, ValueError, AssertionError) as error:
        key = "size" if size == config.size else "size_schedule"
        raise UserError(
            f"model.image.name={config.name!r} does not take images of "
            f"model.image.{key}={size}: {first_line(error)}"
        ) from error
    finally:
        backbone.train(training)
    if features.ndim != 2:
        raise UserError(
            f"model.image.name={config.name!r} gives features of shape {tuple(features.shape)} "
            "an image batch, not (batch, features); choose another model"
        )
    return features.shape[1]


def _load_weights(backbone: nn.Module, path: Path, name: str) -> None:
    """Load a file of the model's weights; a classifier in the file is left out."""
    from timm.models import load_state_dict

    if not path.is_file():
        raise UserError(f"{path}: no such file; model.image.weights is a .safetensors or .pth file")
    try:
        state: dict[str, Tensor] = load_state_dict(str(path), weights_only=True)
        # Older and resized checkpoints (such as another number of patches) are converted by the
        # function that timm keeps beside the model for its own downloads.
        convert = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
        if convert is not None:
            state = convert(state, backbone)
    except _UNREADABLE as error:
        raise UserError(
            f"{path}: does not read as weights of {name} ({first_line(error)}); "
            "give a .safetensors file, or a .pth file that holds tensors only"
        ) from error
    own = backbone.state_dict()
    state = {
        key: value
        for key, value in state.items()
        if key in own or not _is_classifier(key, backbone)
    }
    reshaped = [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    result = backbone.load_state_dict(
        {k: v for k, v in state.items() if k not in reshaped}, strict=False
    )
    problems = {
        "missing": sorted(set(result.missing_keys) - set(reshaped)),
        "unexpected": result.unexpected_keys,
        "of another shape": sorted(reshaped),
    }
    if any(problems.values()):
        listed = "; ".join(f"{kind}: {_some(keys)}" for kind, keys in problems.items() if keys)
        raise UserError(
            f"{path}: not the weights of {name} ({listed}); "
            "set model.image.name to the model they were made with"
        )


def _is_classifier(key: str, backbone: nn.Module) -> bool:
    names: str | tuple[str, ...] = backbone.pretrained_cfg.get("classifier") or ()  # type: ignore
    prefixes = (names,) if isinstance(names, str) else names
    return key.startswith(tuple(f"{prefix}." for prefix in prefixes))


def _some(keys: list[str], limit: int = 3) -> str:
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more
