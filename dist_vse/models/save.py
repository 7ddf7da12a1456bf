"""Trunks in the layouts of the libraries they come from, so that those load them alone."""

from pathlib import Path

import timm
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import Tensor, nn

from dist_vse.config import ImageConfig
from dist_vse.models.image import ImageTrunk
from dist_vse.models.text import PretrainedTrunk

TRUNK_WEIGHTS = "model.safetensors"  # timm's and transformers' own name


def save_image_trunk(trunk: nn.Module, folder: Path, image: ImageConfig) -> None:
    """Write the folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` reads.

    A trunk of another kind is written as plain tensors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not image.spec.from_library:
        save_file(_tensors(trunk), folder / TRUNK_WEIGHTS, metadata={"format": "pt"})
        return
    assert isinstance(trunk, ImageTrunk)
    backbone = trunk.backbone
    for tensor in [*backbone.parameters(), *backbone.buffers()]:
        tensor.data = tensor.data.contiguous()
    preprocessing = {
        "input_size": (3, image.size, image.size),
        "interpolation": image.resampling,
        "crop_pct": 1.0,  # the largest square in the middle
        "crop_mode": "squash" if image.squash else "center",
        **{name: backbone.pretrained_cfg[name] for name in ("mean", "std")},  # type: ignore[index]
    }
    save_for_hf(backbone, str(folder), safe_serialization=True, data_config=preprocessing)


def usual_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a timm model's tensors as it is built by its name alone."""
    model = timm.create_model(name, num_classes=0)
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def save_text_trunk(trunk: nn.Module, folder: Path) -> None:
    """Write a transformers model as `save_pretrained` does; any other as plain tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(trunk, PretrainedTrunk):
        trunk.encoder.save_pretrained(folder)  # type: ignore[operator]
    else:
        save_file(_tensors(trunk), folder / TRUNK_WEIGHTS, metadata={"format": "pt"})


def save_tokenizer(source: str, folder: Path) -> None:
    """Copy a transformers tokenizer from one folder to another, as its library saves it."""
    from transformers import AutoTokenizer  # slow to import

    AutoTokenizer.from_pretrained(
        source, local_files_only=True, trust_remote_code=False
    ).save_pretrained(folder)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.contiguous().clone() for name, tensor in module.state_dict().items()}
