"""An export that OpenCLIP loads, where its classes can express the model."""

from pathlib import Path

import torch
from torch import Tensor, nn

from dist_vse.common.errors import UserError
from dist_vse.config import ModelConfig
from dist_vse.models.dual_encoder import DualEncoder
from dist_vse.models.save import save_tokenizer, usual_shapes
from dist_vse.tools.export.card import Card
from dist_vse.tools.export.parts import of_libraries, save_tensors, shown, write_json, write_whole

_POOLERS = {"mean": "mean_pooler", "cls": "cls_last_hidden_state_pooler"}
_OPENCLIP = """
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms("{name}")
    tokenizer = open_clip.get_tokenizer("{name}")
"""


def write_openclip(folder: Path, model: DualEncoder, shape: ModelConfig, name: str) -> Card:
    """Write what `open_clip.create_model_and_transforms("local-dir:FOLDER")` loads.

    `name` is the hub's, or where the folder will be: OpenCLIP asks there for the text encoder's
    settings, so a folder that moves needs another "hf_model_name".
    """
    place = f"local-dir:{shown(name)}" if Path(name).is_absolute() else f"hf-hub:{name}"
    card = Card("open_clip", _OPENCLIP.format(name=place), ("clip",))
    if shape.pretrained is not None:
        write_whole(folder, model, shape, "OpenCLIP")
        return card
    parts = of_libraries(model, shape, "openclip")
    if shape.head_hidden:
        raise UserError(
            f"OpenCLIP has no heads with a hidden layer (model.head_hidden={shape.head_hidden}); "
            "export with --format transformers or sentence-transformers"
        )
    _check_size(parts.image, shape)
    (image_head,), (text_head,) = parts.image_head, parts.text_head
    text = dict(parts.text.state_dict())
    last = _last_norm_bias(text)
    text[last] = text[last] + _shift(text_head.weight, text_head.bias)
    state = {f"visual.trunk.{key}": value for key, value in parts.image.state_dict().items()}
    state |= {
        "visual.head.proj.weight": image_head.weight,
        "visual.head.proj.bias": image_head.bias,
    }
    state |= {f"text.transformer.{k}": v for k, v in text.items() if not k.startswith("pooler.")}
    state |= {"text.proj.weight": text_head.weight}
    state |= {"logit_scale": model.log_scale[0], "logit_bias": model.bias[0]}
    folder.mkdir()
    model_cfg = {
        "embed_dim": shape.embed_dim,
        "init_logit_bias": 0.0,
        "vision_cfg": {
            "image_size": shape.image.size,
            "timm_model_name": shape.image.name,
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
            "timm_proj_bias": True,
        },
        "text_cfg": {
            "context_length": shape.text.max_tokens,
            "hf_model_name": name,
            "hf_model_pretrained": False,
            "hf_tokenizer_name": name,
            "hf_proj_type": "linear",
            "hf_pooler_type": _POOLERS[parts.pooling],
        },
    }
    preprocess = {
        **parts.normalisation,
        "interpolation": shape.image.resampling,
        "resize_mode": "squash" if shape.image.squash else "shortest",
    }
    write_json(
        folder / "open_clip_config.json", {"model_cfg": model_cfg, "preprocess_cfg": preprocess}
    )
    save_tensors(state, folder / "open_clip_model.safetensors")
    parts.text_config.save_pretrained(folder)
    assert shape.text.weights is not None
    save_tokenizer(shape.text.weights, folder)
    return card


def _check_size(backbone: nn.Module, shape: ModelConfig) -> None:
    """Raise UserError for an encoder that OpenCLIP would build for images of another size."""
    own = {key: tuple(tensor.shape) for key, tensor in backbone.state_dict().items()}
    if own != usual_shapes(shape.image.name):
        raise UserError(
            f"OpenCLIP builds {shape.image.name} for its usual image size, not for "
            f"{shape.image.size}; export with --format transformers or sentence-transformers"
        )


def _last_norm_bias(text: dict[str, Tensor]) -> str:
    """Return the bias of BERT's last normalisation, which is added to every hidden state."""
    keys = [
        key for key in text if key.endswith(".output.LayerNorm.bias") and ".attention." not in key
    ]
    if not keys:
        raise UserError(
            "OpenCLIP's text heads have no bias, and only an encoder like BERT can take it over; "
            "export with --format transformers or sentence-transformers"
        )
    return max(keys, key=lambda key: int(next(part for part in key.split(".") if part.isdigit())))


def _shift(weight: Tensor, bias: Tensor) -> Tensor:
    """Return d with `weight @ d = bias`: added to all hidden states, it stands for the bias."""
    found = torch.linalg.lstsq(weight.double(), bias.double()[:, None], driver="gelsd").solution
    if not torch.allclose(weight.double() @ found, bias.double()[:, None], atol=1e-6):
        raise UserError(
            "OpenCLIP's text heads have no bias, and the encoder is narrower than the shared "
            "space; export with --format transformers or sentence-transformers"
        )
    shift: Tensor = found[:, 0].to(weight.dtype)
    return shift
