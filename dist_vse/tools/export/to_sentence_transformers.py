"""What sentence-transformers reads, added to an export of our own layout.

A model of an image encoder of timm and a text encoder of transformers needs only modules of
sentence-transformers, and so does a CLIP of transformers. Such a folder loads without any trust.
Any other model needs our class.
"""

import json
from pathlib import Path
from typing import Any

from torch import nn

from dist_vse.common.errors import UserError
from dist_vse.config import ModelConfig
from dist_vse.models.dual_encoder import DualEncoder, Tower
from dist_vse.models.image import ImageTrunk
from dist_vse.models.text import PretrainedTrunk
from dist_vse.tools.export.card import Card
from dist_vse.tools.export.folder import IMAGE, MODEL, TEXT
from dist_vse.tools.export.parts import shown, write_json

_NATIVE = """
    from sentence_transformers import SentenceTransformer   # and pip install timm

    model = SentenceTransformer("{name}")
    scores = model.similarity(model.encode([picture]), model.encode(["a red apple"]))

The modules are sentence-transformers' own (6.2 or newer). `dist_vse.load` reads the folder too.
"""
_TOWERS = """
    from sentence_transformers import SentenceTransformer   # and pip install 'dist_vse[train]'

    model = SentenceTransformer("{name}", trust_remote_code=True)
    scores = model.similarity(model.encode([picture]), model.encode(["a red apple"]))

The flag lets sentence-transformers import the class `dist_vse.tools.export.towers.Towers`; the
folder holds no code. `SentenceTransformer(modules=[Towers("{name}")])` needs no flag, and
`dist_vse.load` reads the folder too.
"""
_CLASS = "dist_vse.tools.export.towers.Towers"
_FEATURES = "sentence_embedding"
_SETTINGS: dict[str, Any] = {
    "similarity_fn_name": "cosine",
    "prompts": {},
    "default_prompt_name": None,
}


def add_sentence_transformers(
    folder: Path, model: DualEncoder, shape: ModelConfig, name: str
) -> Card:
    """Add the settings files; return what the card says. `name` is the hub's, or the folder's.

    Raises UserError where the package is needed for it and missing.
    """
    native = isinstance(model.image.trunk, ImageTrunk) and isinstance(
        model.text.trunk, PretrainedTrunk
    )
    if shape.pretrained is not None and _is_clip(folder / MODEL / "config.json"):
        modules, usage = _write_whole(folder, shape), _NATIVE
    elif native and shape.pretrained is None:
        modules, usage = _write_modules(folder, model, shape), _NATIVE
    else:
        modules, usage = [("", _CLASS)], _TOWERS
    described = [
        {"idx": idx, "name": str(idx), "path": path, "type": kind}
        for idx, (path, kind) in enumerate(modules)
    ]
    write_json(folder / "modules.json", described)
    write_json(folder / "config_sentence_transformers.json", _SETTINGS)
    tags = ("sentence-transformers",)
    return Card("sentence-transformers", usage.format(name=shown(name)), tags)


def _is_clip(path: Path) -> bool:
    """Return whether a whole checkpoint is a CLIP of transformers.

    SigLIP's texts are padded to their full length, which sentence-transformers does not do.
    """
    return path.is_file() and json.loads(path.read_text("utf-8")).get("model_type") == "clip"


def _library() -> Any:
    """Return the modules of sentence-transformers."""
    try:
        from sentence_transformers.base import modules
    except ImportError:
        raise UserError(
            "--format sentence-transformers writes this model with the package's own modules; "
            "pip install 'sentence-transformers>=6.2'"
        ) from None
    return modules


def _write_whole(folder: Path, shape: ModelConfig) -> list[tuple[str, str]]:
    """Write the settings of a CLIP of transformers; return the modules of the top."""
    library = _library()
    whole = library.Transformer(str(folder / MODEL), max_seq_length=shape.text.max_tokens)
    whole.processor.save_pretrained(folder / MODEL)
    whole.save_config(str(folder / MODEL))
    return [(MODEL, _kind(library.Transformer)), _write_normalize(folder)]


def _write_normalize(folder: Path) -> tuple[str, str]:
    normalize, place = _library().Normalize(), "1_Normalize"
    (folder / place).mkdir()
    normalize.save(str(folder / place))
    return place, _kind(type(normalize))


def _write_modules(folder: Path, model: DualEncoder, shape: ModelConfig) -> list[tuple[str, str]]:
    """Write a route of modules for texts and one for images; return the modules of the top."""
    library = _library()
    from sentence_transformers.sentence_transformer.modules import Pooling

    _drop_classes(folder / IMAGE / "config.json")
    texts = library.Transformer(str(folder / TEXT), max_seq_length=shape.text.max_tokens)
    texts.processor.save_pretrained(folder / TEXT)  # with the number of tokens
    pooled = {"method": "forward", "method_output_name": "pooler_output"}
    images = library.Transformer(
        str(folder / IMAGE), modality_config={"image": pooled}, module_output_name=_FEATURES
    )
    pooling = Pooling(
        texts.get_embedding_dimension(),
        pooling_mode=model.text.trunk.pooling,
    )
    routes = {
        "text": [texts, pooling, *_dense(model.text)],
        "image": [images, *_dense(model.image)],
    }
    types, structure = {}, {}
    for route, modules in routes.items():
        places = [route, *(f"{route}_{i}" for i in range(1, len(modules)))]
        structure[route] = places
        for place, module in zip(places, modules, strict=True):
            types[place] = _kind(type(module))
            (folder / place).mkdir(exist_ok=True)
            if place == route:
                module.save_config(str(folder / place))  # its weights are there
            else:
                module.save(str(folder / place))
    parameters = {"default_route": "text", "allow_empty_key": True, "route_mappings": {}}
    content = {"types": types, "structure": structure, "parameters": parameters}
    write_json(folder / library.Router.config_file_name, content)
    return [("", _kind(library.Router)), _write_normalize(folder)]


def _dense(tower: Tower) -> list[Any]:
    """Return a tower's head as layers of sentence-transformers."""
    layers = [layer for layer in tower.head.modules() if isinstance(layer, nn.Linear)]
    return [
        _library().Dense(
            layer.in_features,
            layer.out_features,
            activation_function=None if layer is layers[-1] else nn.ReLU(),
            init_weight=layer.weight.detach().clone(),
            init_bias=layer.bias.detach().clone(),
        )
        for layer in layers
    ]


def _drop_classes(path: Path) -> None:
    """Drop what timm's own file repeats: transformers would pass the number of classes twice."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["model_args"].pop("num_classes", None)
    write_json(path, config)


def _kind(module: type) -> str:
    return f"{module.__module__}.{module.__name__}"
