"""CLIPModel and SiglipModel of transformers, as `save_pretrained` writes them.

Shape letters: n captions, l tokens of the longest.
"""

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dist_vse.common.errors import UserError, first_line
from dist_vse.common.reading import BadFileError, is_file_name, read_json
from dist_vse.common.terminal import short
from dist_vse.models.dual_encoder import DualEncoder
from dist_vse.models.encoder import enable_checkpointing
from dist_vse.models.image import ImageTrunk, make_sendable
from dist_vse.models.positions import check_grid, fit_positions
from dist_vse.models.pretrained.parts import Parts, PooledTrunk, Start
from dist_vse.models.tokenizer import Tokenizer, check_captions

KIND = "transformers"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
MODELS = {"clip": "CLIPModel", "siglip": "SiglipModel"}
_RESAMPLINGS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
_WRONG = (OSError, ValueError, RuntimeError, ImportError, KeyError, SafetensorError)


class HfTokenizer:
    """A checkpoint's own tokenizer; SigLIP's pads every caption to its full length."""

    vocabulary: list[str] | None = None

    def __init__(self, tokenizer: Any, *, max_tokens: int, full: bool, vocab_size: int) -> None:
        """Wrap a tokenizer of transformers."""
        self._tokenizer = tokenizer
        self._how = {"padding": "max_length" if full else True, "max_length": max_tokens}
        self.pad_id: int = tokenizer.pad_token_id
        self.vocab_size = vocab_size

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Return int64 (n, l), padded on the right. Raises UserError for an empty caption."""
        check_captions(captions)
        if not captions:
            return torch.empty(0, 0, dtype=torch.int64)
        rows = self._tokenizer(list(captions), truncation=True, **self._how)["input_ids"]
        return torch.tensor(rows, dtype=torch.int64)


class _Pooled(nn.Module):
    """A model of transformers as a function of one tensor."""

    def __init__(self, model: nn.Module, argument: str) -> None:
        super().__init__()
        self.model = model
        self.argument = argument

    def forward(self, raw: Tensor) -> Tensor:
        features: Tensor = self.model(**{self.argument: raw}).pooler_output
        return features


def knows(folder: Path) -> bool:
    """Return whether the folder's config is that of a CLIP or SigLIP model."""
    path = folder / CONFIG
    return path.is_file() and _model_type(path) in MODELS


def read(folder: Path) -> Start:
    """Read the configs, the preprocessing and the temperature."""
    config, pixels = _config(folder), _preprocessing(folder)
    size = config.vision_config.image_size
    crop = pixels.crop_size if pixels.do_center_crop else pixels.size
    shortest = pixels.size.get("shortest_edge", size)
    if {crop["height"], crop["width"], shortest} != {size}:
        raise UserError(
            f"{folder}: images are resized to {dict(pixels.size)} and cropped to {dict(crop)}, but "
            f"the model takes {size} pixels; only the whole crop of its own size is supported"
        )
    if pixels.resample not in _RESAMPLINGS:
        raise UserError(f"{folder}: resamples by {pixels.resample}, not bicubic or bilinear")
    scalars = _scalars(folder)
    clip = config.model_type == "clip"
    return Start(
        kind=MODELS[config.model_type],
        image_size=size,
        squash=not pixels.do_center_crop,
        resampling=_RESAMPLINGS[pixels.resample],
        max_tokens=config.text_config.max_position_embeddings,
        embed_dim=config.projection_dim if clip else config.vision_config.hidden_size,
        temperature=math.exp(-scalars["logit_scale"]),
        bias=scalars.get("logit_bias"),
    )


def build(
    folder: Path, *, image_size: int | None, max_tokens: int | None, grad_checkpointing: bool
) -> Parts:
    """Load the model, fit it to other sizes than its own, and take it apart."""
    from transformers import AutoModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # or every rank draws one
    config, pixels = _config(folder), _preprocessing(folder)
    _weights(folder)
    try:
        model, loading = AutoModel.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except _WRONG as error:
        raise UserError(f"{folder}: does not load ({first_line(error)})") from error
    missing = sorted(loading["missing_keys"])
    if missing:
        raise UserError(f"{folder}: its weights lack {len(missing)} tensors ({missing[0]}, ...)")
    model = _fitted(model.float(), config, folder, image_size, max_tokens).train()
    if grad_checkpointing:
        enable_checkpointing(model, str(folder))
    vision, text = (
        _Pooled(model.vision_model, "pixel_values"),
        _Pooled(model.text_model, "input_ids"),
    )
    for part in (vision, text):
        make_sendable(part, str(folder))
    for part in (model.vision_model, model.text_model):
        part.embeddings.reads_inner = True  # its weight's shape; see engine/zero.py
    clip = config.model_type == "clip"  # SigLIP's encoders end in the shared space
    return Parts(
        ImageTrunk(
            vision,
            dim=config.vision_config.hidden_size,
            mean=pixels.image_mean,
            std=pixels.image_std,
        ),
        PooledTrunk(text),
        model.visual_projection if clip else nn.Identity(),
        model.text_projection if clip else nn.Identity(),
    )


def _fitted(
    model: Any, config: Any, folder: Path, image_size: int | None, max_tokens: int | None
) -> Any:
    """Return the model with positions for these sizes; the very same where they are its own."""
    from transformers import AutoModel

    sizes = config.vision_config.image_size, config.text_config.max_position_embeddings
    wanted = image_size or sizes[0], max_tokens or sizes[1]
    if wanted == sizes:
        return model
    check_grid(wanted[0], config.vision_config.patch_size, folder)
    changed = copy.deepcopy(config)
    changed.vision_config.image_size, changed.text_config.max_position_embeddings = wanted
    other = AutoModel.from_config(changed).float()
    other.load_state_dict(fit_positions(model.state_dict(), other))
    return other


def tokenizer(folder: Path, max_tokens: int | None) -> Tokenizer:
    """Load the tokenizer."""
    config = _config(folder)
    full = config.model_type == "siglip"  # its last position is what it looks at
    return HfTokenizer(
        _load_tokenizer(folder),
        max_tokens=max_tokens or config.text_config.max_position_embeddings,
        full=full,
        vocab_size=config.text_config.vocab_size,
    )


def save(model: DualEncoder, source: Path, folder: Path) -> None:
    """Put the trained parts together again, and save them with tokenizer and preprocessing."""
    from transformers import AutoModel

    config, trunk = _config(source), model.image.trunk
    assert isinstance(trunk, ImageTrunk)
    vision: Any = trunk.backbone.model
    text: Any = model.text.trunk.encoder.model  # type: ignore[union-attr]
    own = config.vision_config.image_size
    side = config.vision_config.image_size = vision.config.image_size
    length = config.text_config.max_position_embeddings = text.config.max_position_embeddings
    whole = AutoModel.from_config(config).float()
    parts = {
        "vision_model": vision,
        "text_model": text,
        "visual_projection": model.image.head,
        "text_projection": model.text.head,
    }
    for name, part in parts.items():
        if hasattr(whole, name):
            getattr(whole, name).load_state_dict(part.state_dict())
    for name, value in (("logit_scale", model.log_scale), ("logit_bias", model.bias)):
        if hasattr(whole, name):
            scalar = getattr(whole, name)
            scalar.data = value.data.cpu().reshape(scalar.shape).clone()
    whole.save_pretrained(folder)
    words, pixels = _load_tokenizer(source), _preprocessing(source)
    words.model_max_length = length
    words.save_pretrained(folder)
    if side != own:
        pixels.size = dict.fromkeys(_keys(pixels.size), side)
        if pixels.do_center_crop:
            pixels.crop_size = dict.fromkeys(_keys(pixels.crop_size), side)
    pixels.save_pretrained(folder)


def _keys(size: Any) -> list[str]:
    return [key for key, value in dict(size).items() if value is not None]


def _model_type(path: Path) -> str:
    try:
        return str(read_json(path).get("model_type"))
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: is no JSON of a model ({first_line(error)})") from error


def _config(folder: Path) -> Any:
    from transformers import AutoConfig  # slow to import

    kind = _model_type(folder / CONFIG)
    if kind not in MODELS:
        raise UserError(
            f"{folder}: model_type {kind!r} is no CLIP and no SigLIP of transformers; a text "
            "encoder alone is for model.text.weights"
        )
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except _WRONG as error:
        raise UserError(f"{folder / CONFIG}: does not load ({first_line(error)})") from error


def _preprocessing(folder: Path) -> Any:
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except _WRONG as error:
        raise UserError(
            f"{folder}: its image preprocessing does not load ({first_line(error)}); "
            "preprocessor_config.json belongs there"
        ) from error


def _load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, padding_side="right"
        )
    except (*_WRONG, TypeError) as error:
        raise UserError(
            f"{folder}: its tokenizer does not load ({first_line(error)}); save one there with "
            "tokenizer.save_pretrained"
        ) from error
    if loaded.pad_token_id is None:
        raise UserError(f"{folder}: its tokenizer has no padding token; set pad_token and save it")
    return loaded


def _weights(folder: Path) -> list[Path]:
    """Return the files of the weights, one or several."""
    path, parts = folder / WEIGHTS, folder / f"{WEIGHTS}.index.json"
    if path.is_file():
        return [path]
    if parts.is_file():
        return _parts(folder, parts)
    pickled = sorted(folder.glob("pytorch_model*.bin"))
    if pickled:
        raise UserError(
            f"{pickled[0]}: is a pickle, which may hold code; load the model with transformers and "
            "save it with save_pretrained"
        )
    raise UserError(f"{path}: the weights are missing; save the model with save_pretrained")


def _parts(folder: Path, index: Path) -> list[Path]:
    try:
        names = {*read_json(index)["weight_map"].values()}
    except (BadFileError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index}: can't be read ({first_line(error)})") from error
    for name in names:
        if not is_file_name(name) or not (folder / name).is_file():
            raise UserError(f"{index}: names {short(name)}, which is not in the folder")
    return [folder / name for name in sorted(names)]


def _scalars(folder: Path) -> dict[str, float]:
    paths, found = _weights(folder), dict[str, float]()
    for path in paths:
        try:
            with safe_open(path, "pt") as file:
                names = {"logit_scale", "logit_bias"} & {*file.keys()}
                found |= {name: float(file.get_tensor(name).item()) for name in names}
        except _WRONG as error:
            raise UserError(f"{path}: is damaged ({first_line(error)})") from error
    if "logit_scale" not in found:
        raise UserError(
            f"{paths[0]}: lacks logit_scale; these are not the weights of a whole model"
        )
    return found
