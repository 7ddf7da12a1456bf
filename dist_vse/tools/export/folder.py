"""The exported folder: its files and what its description says.

dist_vse.json          the model's shape, its temperature, and where it came from
model/                 of a run that began with model.pretrained: the checkpoint's own layout, with
                       tokenizer and preprocessing; takes the place of image/, text/, vocabulary
image/                 timm's layout: timm.create_model("local-dir:OUT/image", pretrained=True)
text/                  transformers' layout with the tokenizer, or plain tensors of our own trunks
heads.safetensors      the maps from both trunks into the shared space, log_scale and bias
adapters.safetensors   of a run with model.lora that was exported without --merge
vocabulary.json        of our own text trunks
README.md              how to use it, with this package and without
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_vse.common.errors import UserError
from dist_vse.common.reading import BadFileError, read_json
from dist_vse.common.version import __version__
from dist_vse.config import ImageConfig, LoraConfig, ModelConfig, TextConfig

DESCRIPTION = "dist_vse.json"
HEADS = "heads.safetensors"
ADAPTERS = "adapters.safetensors"
IMAGE, TEXT, MODEL = "image", "text", "model"
FORMAT = 1


@dataclass(frozen=True)
class Description:
    """What rebuilds the model."""

    model: ModelConfig  # its weights are names in the folder
    vocab_size: int
    pad_id: int
    source: dict[str, Any]
    """Run, checkpoint and data that the model came from, for people."""


def write_description(folder: Path, description: Description) -> None:
    """Write the description, the last file of an export."""
    content = {"format": FORMAT, "dist_vse": __version__, **dataclasses.asdict(description)}
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    (folder / DESCRIPTION).write_text(text, encoding="utf-8")


def read_description(folder: Path) -> Description:
    """Read a folder's description, its weights as paths.

    Raises UserError if the folder is no export, or one of another format.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        raise UserError(
            f"{folder}: no exported model ({DESCRIPTION} is missing); run dist-vse export"
        )
    try:
        content = read_json(path)
        if content["format"] != FORMAT:
            raise UserError(f"{path}: format {content['format']}, but this version reads {FORMAT}")
        model: dict[str, Any] = content["model"]
        for part in (model["image"], model["text"]):
            part["weights"] = str(folder / part["weights"]) if part["weights"] else None
        if model.get("pretrained"):
            model["pretrained"] = str(folder / model["pretrained"])
        shape = {k: v for k, v in model.items() if k not in ("image", "text", "lora")}
        config = ModelConfig(
            image=ImageConfig(**model["image"]),
            text=TextConfig(**model["text"]),
            lora=LoraConfig(**model.get("lora", {})),
            **shape,
        )
        return Description(config, content["vocab_size"], content["pad_id"], content["source"])
    except (BadFileError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is damaged ({error!r}); export the model again") from error
