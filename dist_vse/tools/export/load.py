"""`dist_vse.load`: an exported folder as two functions, of images and of captions."""

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dist_vse.common.errors import UserError, first_line
from dist_vse.config import LoraConfig, LossConfig, ModelConfig
from dist_vse.data.decode import BadSampleError, Transform, decode_image
from dist_vse.data.image_file import narrowed, orientation, turned
from dist_vse.models.build import build_model
from dist_vse.models.dual_encoder import DualEncoder
from dist_vse.models.lora import add_adapters
from dist_vse.models.pretrained import pretrained_tokenizer
from dist_vse.models.save import TRUNK_WEIGHTS
from dist_vse.models.tokenizer import PretrainedTokenizer, Tokenizer, WordTokenizer
from dist_vse.runs.files import VOCABULARY_NAME
from dist_vse.tools.export.folder import ADAPTERS, HEADS, IMAGE, TEXT, read_description
from dist_vse.tools.export.hub import PREFIX, fetch

if TYPE_CHECKING:
    from PIL.Image import Image

Picture = "str | Path | bytes | Image"


class Embedder:
    """A trained model in eval mode, with its preprocessing and its tokenizer."""

    def __init__(
        self, model: DualEncoder, tokenizer: Tokenizer, *, shape: ModelConfig, device: torch.device
    ) -> None:
        """Join the parts of a model of that shape."""
        self.model = model.eval().to(device)
        self.tokenizer, self.shape, self.device = tokenizer, shape, device
        self.dim = shape.embed_dim  # the size of the shared space
        self.square = Transform(
            shape.image.size,
            squash=shape.image.squash,
            crop_share=shape.image.crop_share,
            resampling=shape.image.resampling,
        )

    @torch.inference_mode()
    def encode_images(
        self, images: "Sequence[str | Path | bytes | Image]", *, batch_size: int = 64
    ) -> Tensor:
        """Return unit features, float32 (n, d) on the CPU, of files, their bytes or PIL images.

        Raises UserError for an image that cannot be read, and for one that is not in a list.
        """
        _check_list(images, "images")
        found = [torch.empty(0, self.dim)]
        for start in range(0, len(images), batch_size):
            pixels = read_pixels(images[start : start + batch_size], self.square, first=start)
            found.append(self.model.encode_images(pixels.to(self.device)).cpu())
        return torch.cat(found)

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str], *, batch_size: int = 256) -> Tensor:
        """Return unit features, float32 (n, d) on the CPU.

        Raises UserError without a list, or for what is no text.
        """
        _check_list(texts, "texts")
        for position, text in enumerate(texts):
            if not isinstance(text, str):
                raise UserError(f"texts[{position}] is {_named(text)}; give a string")
        found = [torch.empty(0, self.dim)]
        for start in range(0, len(texts), batch_size):
            tokens = self.tokenizer(texts[start : start + batch_size])
            found.append(self.model.encode_texts(tokens.to(self.device)).cpu())
        return torch.cat(found)


def read_pixels(
    images: "Sequence[str | Path | bytes | Image]", square: Transform, *, first: int = 0
) -> Tensor:
    """Return uint8 pixels (n, 3, size, size) of files, their bytes or PIL images.

    Raises UserError for what cannot be read; `first` is the position of the first one in a list.
    """
    pixels = [_pixels(image, square, position) for position, image in enumerate(images, first)]
    return torch.stack(pixels)


def load(folder: str | Path, device: str | torch.device = "cpu") -> Embedder:
    """Load what `dist-vse export` wrote: a folder, or a model of a hub as `hf-hub:OWNER/MODEL`.

    Raises UserError if the folder is no export, or is damaged, and if a hub does not give it.
    """
    text = str(folder)
    folder = fetch(text.removeprefix(PREFIX)) if text.startswith(PREFIX) else Path(folder)
    description = read_description(folder)
    shape = description.model
    tokenizer: Tokenizer
    if shape.pretrained is not None:
        tokenizer = pretrained_tokenizer(shape.pretrained, shape.text.asked_tokens)
    elif shape.text.weights is not None:
        tokenizer = PretrainedTokenizer(shape.text.weights, shape.text.max_tokens)
    else:
        tokenizer = WordTokenizer.load(folder / VOCABULARY_NAME)
    return Embedder(build(folder), tokenizer, shape=shape, device=torch.device(device))


def build(folder: Path) -> DualEncoder:
    """Build the model of an exported folder, with its weights and adapters."""
    description = read_description(folder)
    config = description.model
    model = build_model(replace(config, lora=LoraConfig()), LossConfig(), description)
    try:
        if config.pretrained is None:
            for section, tower, part in (
                (config.image, model.image, IMAGE),
                (config.text, model.text, TEXT),
            ):
                if section.weights is None:  # no library has loaded them
                    tower.trunk.load_state_dict(load_file(folder / part / TRUNK_WEIGHTS))
        heads = load_file(folder / HEADS)
        for side, tower in (("image", model.image), ("text", model.text)):
            own = {k.removeprefix(f"{side}."): v for k, v in heads.items() if k.startswith(side)}
            tower.head.load_state_dict(own)
        model.log_scale.data.copy_(heads["log_scale"])
        model.bias.data.copy_(heads["bias"])
        if config.lora.rank:
            add_adapters(model, config, seed=0)
            adapters = load_file(folder / ADAPTERS)
            if unknown := model.load_state_dict(adapters, strict=False).unexpected_keys:
                raise KeyError(unknown[0])
    except (RuntimeError, OSError, KeyError, SafetensorError) as error:
        raise UserError(
            f"{folder}: is damaged ({first_line(error)}); export the model again"
        ) from error
    return model.eval()


def _check_list(given: object, name: str) -> None:
    """Raise UserError for what is no list; a string would be taken as a list of characters."""
    if isinstance(given, str | bytes) or not hasattr(given, "__len__"):
        raise UserError(
            f"encode_{name} takes a list, not {type(given).__name__}; give [...], also for one"
        )


def _named(value: object) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"


def _pixels(image: "str | Path | bytes | Image", square: Transform, position: int) -> Tensor:
    from PIL import Image

    if not isinstance(image, str | Path | bytes | Image.Image):
        raise UserError(
            f"images[{position}] is {_named(image)}; give a path, the bytes of a file, or a "
            "PIL image (Image.fromarray makes one of an array)"
        )
    name = str(image) if isinstance(image, str | Path) else f"images[{position}]"
    try:
        data = image if isinstance(image, bytes) else _read(image)
        return torch.from_numpy(np.ascontiguousarray(decode_image(data, square)))
    except (BadSampleError, OSError) as error:
        raise UserError(f"{name}: cannot be read ({error}); give an image file") from error


def _read(image: "str | Path | Image") -> bytes:
    if isinstance(image, str | Path):
        return Path(image).read_bytes()
    image = turned(image, orientation(image))  # PNG would lose the orientation
    image = narrowed(image) if image.mode in ("F", "I") else image
    buffer = io.BytesIO()  # without loss, so that it is treated as its file would be
    keep = image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
    (image if keep else image.convert("RGB")).save(buffer, "PNG")
    return buffer.getvalue()
