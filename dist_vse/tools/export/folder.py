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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dist_vse.common.errors import UserError
from dist_vse.common.reading import BadFileError, is_count, is_file_name, read_json
from dist_vse.common.terminal import short
from dist_vse.common.version import __version__
from dist_vse.config import ModelConfig
from dist_vse.config.load import from_mapping

DESCRIPTION = "dist_vse.json"
HEADS = "heads.safetensors"
ADAPTERS = "adapters.safetensors"
IMAGE, TEXT, MODEL = "image", "text", "model"
FORMAT = 1
MAX_WORDS = 1 << 31


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
        config = from_mapping(content["model"], ModelConfig)
        vocab_size, pad_id, source = (content[name] for name in ("vocab_size", "pad_id", "source"))
        if not (is_count(vocab_size) and is_count(pad_id) and pad_id < vocab_size < MAX_WORDS):
            raise BadFileError("vocab_size and pad_id must be numbers")
        for part in (config.image.weights, config.text.weights, config.pretrained):
            if part is not None and not all(map(is_file_name, part.split("/"))):
                raise BadFileError(f"weights outside of the folder: {short(part)}")
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (BadFileError, KeyError) as error:
        raise UserError(f"{path}: is damaged ({error!r}); export the model again") from error

    def inside(part: str | None) -> str | None:
        return str(folder / part) if part is not None else None

    image = replace(config.image, weights=inside(config.image.weights))
    text = replace(config.text, weights=inside(config.text.weights))
    model = replace(config, image=image, text=text, pretrained=inside(config.pretrained))
    return Description(model, vocab_size, pad_id, source)
