"""OpenCLIP's checkpoints: open_clip_config.json with weights beside it.

Shape letters: n captions, l the context length.
"""

import json
import logging
import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dist_vse.common.errors import UserError, first_line
from dist_vse.common.reading import read_json
from dist_vse.models.dual_encoder import DualEncoder
from dist_vse.models.image import ImageTrunk, make_sendable
from dist_vse.models.positions import check_grid, fit_positions
from dist_vse.models.pretrained.parts import Parts, PooledTrunk, Start
from dist_vse.models.tokenizer import Tokenizer, check_captions

KIND = "OpenCLIP"
CONFIG = "open_clip_config.json"
WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)
_WRONG = (
    OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError, AssertionError,
    SafetensorError, pickle.UnpicklingError,
)  # fmt: skip


class OpenClipTokenizer:
    """OpenCLIP's own tokenizer, which pads every caption to the context length."""

    vocabulary: list[str] | None = None

    def __init__(self, tokenizer: Any, *, vocab_size: int) -> None:
        """Wrap a tokenizer of OpenCLIP."""
        self._tokenizer = tokenizer
        self.pad_id: int = getattr(getattr(tokenizer, "tokenizer", None), "pad_token_id", None) or 0
        self.vocab_size = vocab_size

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Return int64 (n, l). Raises UserError for an empty caption."""
        check_captions(captions)
        if not captions:
            return torch.empty(0, 0, dtype=torch.int64)
        tokens: Tensor = self._tokenizer(list(captions))
        return tokens.long()


def read(folder: Path) -> Start:
    """Read the config and the temperature."""
    _import(folder)
    model, pixels = _config(folder)
    size = model["vision_cfg"].get("image_size", 224)
    mode, resampling = pixels["resize_mode"], pixels["interpolation"]
    if not isinstance(size, int) or mode == "longest" or resampling == "random":
        raise UserError(
            f"{folder / CONFIG}: only square images, resized by their shortest side or squashed, "
            f"bicubic or bilinear, are supported (image_size {size}, {mode}, {resampling})"
        )
    scalars = _scalars(folder)
    return Start(
        kind="OpenCLIP's model",
        image_size=size,
        squash=mode == "squash",
        resampling=resampling,
        max_tokens=model["text_cfg"].get("context_length", 77),
        embed_dim=model["embed_dim"],
        temperature=math.exp(-scalars["logit_scale"]),
        bias=scalars.get("logit_bias"),
    )


def build(
    folder: Path, *, image_size: int | None, max_tokens: int | None, grad_checkpointing: bool
) -> Parts:
    """Load the model, fit it to other sizes than its own, and take it apart."""
    open_clip = _import(folder)
    config, pixels = _config(folder)
    _weights(folder)
    try:  # weights are read with weights_only=True; the text encoder is always a module of its own
        model = open_clip.create_model(f"local-dir:{folder}", force_custom_text=True)
    except _WRONG as error:
        raise UserError(f"{folder}: does not load ({first_line(error)})") from error
    model = _fitted(model.float(), config, folder, image_size, max_tokens)
    if grad_checkpointing:
        model.set_grad_checkpointing()
    for part in (model.visual, model.text):
        make_sendable(part, str(folder))
    # Its encoders end in the shared space.
    image = ImageTrunk(
        model.visual, dim=config["embed_dim"], mean=pixels["mean"], std=pixels["std"]
    )
    return Parts(image, PooledTrunk(model.text), nn.Identity(), nn.Identity())


def _fitted(
    model: Any,
    config: dict[str, Any],
    folder: Path,
    image_size: int | None,
    max_tokens: int | None,
) -> Any:
    """Return the model with positions for these sizes; the very same where they are its own."""
    open_clip, vision = _import(folder), config["vision_cfg"]
    sizes = vision.get("image_size", 224), config["text_cfg"].get("context_length", 77)
    wanted = image_size or sizes[0], max_tokens or sizes[1]
    if wanted == sizes:
        return model
    if config["text_cfg"].get("hf_model_name") and wanted[1] > sizes[1]:
        raise UserError(
            f"{folder}: its text encoder has no positions for model.text.max_tokens={wanted[1]}; "
            f"leave it out, or give at most {sizes[1]}"
        )
    if not vision.get("timm_model_name"):
        check_grid(wanted[0], vision.get("patch_size", 16), folder)
    logging.disable(logging.WARNING)  # it warns that it loads no weights, which is on purpose
    try:
        other = open_clip.create_model(
            f"local-dir:{folder}",
            load_weights=False,
            pretrained_text=False,
            force_custom_text=True,
            force_image_size=wanted[0],
            force_context_length=wanted[1],
        )
        other.load_state_dict(fit_positions(model.state_dict(), other))
    except _WRONG as error:
        raise UserError(
            f"{folder}: can't take images of {wanted[0]} pixels and captions of {wanted[1]} "
            f"tokens ({first_line(error)}); leave out model.image.size and model.text.max_tokens"
        ) from error
    finally:
        logging.disable(logging.NOTSET)
    return other


def tokenizer(folder: Path, max_tokens: int | None) -> Tokenizer:
    """Load the tokenizer."""
    open_clip = _import(folder)
    config, _ = _config(folder)
    try:
        loaded = open_clip.get_tokenizer(f"local-dir:{folder}", context_length=max_tokens)
    except _WRONG as error:
        raise UserError(f"{folder}: its tokenizer does not load ({first_line(error)})") from error
    return OpenClipTokenizer(loaded, vocab_size=config["text_cfg"].get("vocab_size", 49408))


def save(model: DualEncoder, source: Path, folder: Path) -> None:
    """Write the config, the trained weights and the tokenizer's files."""
    config = read_json(source / CONFIG)
    config["model_cfg"]["custom_text"] = True  # the names of the text encoder's tensors
    trunk = model.image.trunk
    assert isinstance(trunk, ImageTrunk)
    vision: Any = trunk.backbone
    text: Any = model.text.trunk.encoder
    side = vision.image_size
    config["model_cfg"]["vision_cfg"]["image_size"] = side[0] if isinstance(side, tuple) else side
    if not config["model_cfg"]["text_cfg"].get("hf_model_name"):
        config["model_cfg"]["text_cfg"]["context_length"] = text.context_length
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    state = {f"visual.{name}": x for name, x in trunk.backbone.state_dict().items()}
    state |= {f"text.{name}": x for name, x in text.state_dict().items()}
    state["logit_scale"] = model.log_scale.data.reshape(())
    if config["model_cfg"].get("init_logit_bias") is not None:
        state["logit_bias"] = model.bias.data.reshape(())
    whole = {name: x.detach().cpu().contiguous().clone() for name, x in state.items()}
    save_file(whole, folder / WEIGHTS[0], metadata={"format": "pt"})
    if config["model_cfg"]["text_cfg"].get("hf_tokenizer_name"):
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(
            source, local_files_only=True, trust_remote_code=False
        ).save_pretrained(folder)


def _import(folder: Path) -> Any:
    try:
        import open_clip
    except ImportError:
        hint = "pip install 'dist_vse[open_clip]'"
        raise UserError(f"{folder}: a checkpoint of OpenCLIP needs its package; {hint}") from None
    return open_clip


def _config(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the model's config and the whole preprocessing."""
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    path = folder / CONFIG
    try:
        content = read_json(path)
        model = content["model_cfg"]
        pixels = merge_preprocess_dict(PreprocessCfg(), content.get("preprocess_cfg", {}))
        lacking = {"embed_dim", "vision_cfg", "text_cfg"} - {*model}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is no config of OpenCLIP ({first_line(error)})") from error
    if lacking:
        raise UserError(f"{path}: lacks {', '.join(sorted(lacking))}")
    name = model["vision_cfg"].get("timm_model_name") or ""
    if ":" in name:  # hf-hub:… would be fetched
        raise UserError(
            f"{path}: timm_model_name {name!r} is not here but on a hub; name the architecture"
        )
    if "multimodal_cfg" in model:
        raise UserError(f"{path}: describes CoCa; only models of two encoders are supported")
    return model, pixels


def _weights(folder: Path) -> Path:
    found = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if not found:
        raise UserError(f"{folder}: the weights are missing; one of {', '.join(WEIGHTS)}")
    return found[0]


def _scalars(folder: Path) -> dict[str, float]:
    path, names = _weights(folder), ("logit_scale", "logit_bias")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                found = {name: file.get_tensor(name) for name in {*names} & {*file.keys()}}
        else:
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            state = state.get("state_dict", state)  # of a training, there are more
            state = {name.removeprefix("module."): x for name, x in state.items()}
            found = {n: state[n] for n in names if n in state}
    except _WRONG as error:
        raise UserError(
            f"{path}: does not read as weights ({first_line(error)}); it must hold tensors only"
        ) from error
    if "logit_scale" not in found:
        raise UserError(f"{path}: lacks logit_scale; these are not the weights of a whole model")
    return {name: float(value.item()) for name, value in found.items()}
