"""The model card of an export: README.md with the metadata that hubs read, and how to use it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_vse.common.reading import BadFileError, read_json
from dist_vse.config import ModelConfig

CARD = "README.md"
_TASK = "zero-shot-image-classification"  # hubs' name for encoders of images and texts
_METRICS = ("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10")


@dataclass(frozen=True)
class Card:
    """What a card says."""

    library: str
    """Hubs' name of the library that loads the folder."""
    usage: str
    """A program that loads it, and what else there is to say."""
    tags: tuple[str, ...] = ()


def write_card(folder: Path, card: Card, source: dict[str, Any], dim: int) -> None:
    """Write the card; `source` says which run the model came from."""
    front = {
        "library_name": card.library,
        "pipeline_tag": _TASK,
        "tags": ["dist_vse", "image-text-retrieval", *card.tags],
        **_results(source),
    }
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items()]
    text = "\n".join(
        [
            "---",  # JSON is YAML
            *lines,
            "---",
            f"# {source['run']}",
            "",
            f"An image encoder and a caption encoder into one space of {dim} dimensions, trained",
            f"with dist_vse ({source['loss']}, global batch {source['global_batch_size']:,}); from "
            f"{source['checkpoint']} of {source['run']}.",
            "",
            card.usage.strip(),
            "",
        ]
    )
    (folder / CARD).write_text(text, encoding="utf-8")


def read_metrics(run_dir: Path) -> dict[str, dict[str, float]]:
    """Return the retrieval metrics of each split that `dist-vse eval` measured."""
    found = {}
    for path in sorted(run_dir.glob("eval-*.json")):
        try:
            trained = read_json(path).get("trained", {})
        except BadFileError:
            continue  # it is no part of the model
        values = {name: trained[name] for name in _METRICS if name in trained}
        if values:
            found[path.stem.removeprefix("eval-")] = values
    return found


def _results(source: dict[str, Any]) -> dict[str, Any]:
    results = [
        {
            "task": {"type": _TASK},
            "dataset": {"name": split, "type": "webdataset"},
            "metrics": [
                {"name": name, "type": name, "value": value} for name, value in values.items()
            ],
        }
        for split, values in source["metrics"].items()
    ]
    return {"model-index": [{"name": source["run"], "results": results}]} if results else {}


def own_usage(shape: ModelConfig, whole: str) -> str:
    """Return how to use an export of our own layout; `whole` names the library of `model/`."""
    parts = _WHOLE[whole] if whole else _own_parts(shape)
    return _OWN.format(parts=parts)


def _own_parts(shape: ModelConfig) -> str:
    squash = shape.image.squash
    return _PARTS.format(
        square="squashed to"
        if squash
        else "cropped to the largest square in the middle, resized to",
        size=shape.image.size,
        resampling=shape.image.resampling,
        text=_PRETRAINED_TEXT if shape.text.spec.from_library else "",
        relu=", with a ReLU between them" if shape.head_hidden else "",
    )


_OWN = """
    import dist_vse

    model = dist_vse.load("path/to/this/folder")
    scores = model.encode_images(["photo.jpg"]) @ model.encode_texts(["a red apple"]).T

Without dist_vse: {parts}. Divide the features by their length. The score of a pair is the inner
product.
"""
_PARTS = """`image/` is a model of timm (`timm.create_model("local-dir:image",
pretrained=True)`; images are {square} {size} pixels with {resampling}, and normalised as
`image/config.json` says){text}. The heads in `heads.safetensors` (`image.*`,
`text.*`: linear layers{relu}) map the trunks' outputs into the shared space"""
_WHOLE = {
    "transformers": "`model/` is a model of transformers (`AutoModel.from_pretrained`; "
    "`get_image_features`,\n`get_text_features`), with tokenizer and image processor",
    "OpenCLIP": "`model/` is a model of OpenCLIP\n"
    "(`open_clip.create_model_and_transforms('local-dir:model')`)",
}
_PRETRAINED_TEXT = (
    "; `text/` one of transformers with its tokenizer (the mean of the last hidden states over a "
    "caption's tokens)"
)
