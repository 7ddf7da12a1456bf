"""A model as the parts that other libraries know, and how to write them."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from dist_vse.common.errors import UserError
from dist_vse.config import ModelConfig
from dist_vse.models.dual_encoder import DualEncoder
from dist_vse.models.image import ImageTrunk
from dist_vse.models.pretrained import save_pretrained
from dist_vse.models.text import PretrainedTrunk


@dataclass(frozen=True)
class Parts:
    """A model whose encoders are of timm and of transformers."""

    image: nn.Module
    normalisation: dict[str, Any]
    """timm's `mean` and `std`."""
    text: nn.Module
    text_config: Any
    pooling: str
    image_head: list[nn.Linear]
    text_head: list[nn.Linear]


def of_libraries(model: DualEncoder, shape: ModelConfig, name: str) -> Parts:
    image, text = model.image.trunk, model.text.trunk
    if not (isinstance(image, ImageTrunk) and shape.image.spec.from_library):
        raise UserError(
            f"--format {name} needs an image encoder of timm, not model.image.kind="
            f"{shape.image.kind}; sentence-transformers takes any model"
        )
    if not isinstance(text, PretrainedTrunk):
        raise UserError(
            f"--format {name} needs a text encoder of transformers (model.text.kind=pretrained), "
            f"not {shape.text.kind}; sentence-transformers takes any model"
        )
    normalisation: Any = image.backbone.pretrained_cfg
    return Parts(
        image.backbone,
        {name: list(normalisation[name]) for name in ("mean", "std")},
        text.encoder,
        text.encoder.config,
        text.pooling,
        *(
            [x for x in tower.head.modules() if isinstance(x, nn.Linear)]
            for tower in (model.image, model.text)
        ),
    )


def write_whole(folder: Path, model: DualEncoder, shape: ModelConfig, kind: str) -> None:
    """Write a model that began with a checkpoint, which can only have its own layout."""
    assert shape.pretrained is not None
    found = save_pretrained(model, shape.pretrained, folder)
    if found != kind:
        shutil.rmtree(folder)
        raise UserError(
            f"the run began with a checkpoint of {found}, whose layout {kind} does not read; "
            f"export with --format {found.lower()} or sentence-transformers"
        )


def shown(name: str) -> str:
    """Return the name that a card shows: no path of the machine that wrote it."""
    return "path/to/this/folder" if Path(name).is_absolute() else name


def save_tensors(state: dict[str, Tensor], path: Path) -> None:
    """Write tensors, each with memory of its own."""
    own = {key: tensor.detach().contiguous().clone() for key, tensor in state.items()}
    save_file(own, path, metadata={"format": "pt"})


def write_json(path: Path, content: Any) -> None:
    """Write a settings file."""
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
