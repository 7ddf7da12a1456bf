"""An export that transformers loads, by a page of code in the folder."""

import shutil
from pathlib import Path

from dist_vse.config import ModelConfig
from dist_vse.models.dual_encoder import DualEncoder
from dist_vse.models.save import save_tokenizer
from dist_vse.tools.export.card import Card
from dist_vse.tools.export.parts import of_libraries, save_tensors, shown, write_json, write_whole

_MODELING = Path(__file__).with_name("transformers_modeling.py")
_TRANSFORMERS = """
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained("{name}"{trust})
    tokenizer = AutoTokenizer.from_pretrained("{name}")
    processor = AutoImageProcessor.from_pretrained("{name}")
    images = model.get_image_features(**processor(picture, return_tensors="pt"))
    texts = model.get_text_features(**tokenizer(["a red apple"], return_tensors="pt", padding=True))
"""


def write_transformers(folder: Path, model: DualEncoder, shape: ModelConfig, name: str) -> Card:
    """Write what `transformers.AutoModel.from_pretrained(FOLDER, trust_remote_code=True)` loads.

    The code is a page of PyTorch in the folder that needs timm, and not this package.
    """
    if shape.pretrained is not None:
        write_whole(folder, model, shape, "transformers")
        return Card("transformers", _TRANSFORMERS.format(name=shown(name), trust=""))
    parts = of_libraries(model, shape, "transformers")
    folder.mkdir()
    heads = {"image": parts.image_head, "text": parts.text_head}
    mean, std = parts.normalisation["mean"], parts.normalisation["std"]
    config = {
        "model_type": "dist_vse",
        "architectures": ["DualEncoderModel"],
        "auto_map": {
            "AutoConfig": f"{_MODELING.stem}.DualEncoderConfig",
            "AutoModel": f"{_MODELING.stem}.DualEncoderModel",
        },
        "image_model": shape.image.name,
        "image_size": shape.image.size,
        "image_mean": mean,
        "image_std": std,
        "text_config": parts.text_config.to_dict(),
        "text_pooling": parts.pooling,
        "head_widths": [
            [layers[0].in_features, *(x.out_features for x in layers)] for layers in heads.values()
        ],
        "dtype": "float32",
    }
    state = {f"image.{k}": v for k, v in parts.image.state_dict().items()}
    state |= {f"text.{k}": v for k, v in parts.text.state_dict().items()}
    for side, layers in heads.items():
        for i, layer in enumerate(layers):
            state[f"{side}_head.{2 * i}.weight"] = layer.weight
            state[f"{side}_head.{2 * i}.bias"] = layer.bias
    state |= {"logit_scale": model.log_scale, "logit_bias": model.bias}
    write_json(folder / "config.json", config)
    save_tensors(state, folder / "model.safetensors")
    shutil.copyfile(_MODELING, folder / _MODELING.name)
    assert shape.text.weights is not None
    save_tokenizer(shape.text.weights, folder)
    preprocessing = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": shape.image.size},
        "crop_size": {"height": shape.image.size, "width": shape.image.size},
        "image_mean": mean,
        "image_std": std,
        "resample": {"bilinear": 2, "bicubic": 3}[shape.image.resampling],
    }
    if shape.image.squash:
        size = preprocessing["crop_size"]
        preprocessing |= {"size": size, "do_center_crop": False}
    write_json(folder / "preprocessor_config.json", preprocessing)
    return Card(
        "transformers", _TRANSFORMERS.format(name=shown(name), trust=", trust_remote_code=True")
    )
