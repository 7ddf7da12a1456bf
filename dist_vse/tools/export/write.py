"""`dist-vse export`: a run's model as a folder that other programs can read."""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from dist_vse.common.errors import UserError, first_line, writing
from dist_vse.config import ModelConfig, TrainConfig
from dist_vse.models.dual_encoder import DualEncoder
from dist_vse.models.pretrained import save_pretrained
from dist_vse.models.save import TRUNK_WEIGHTS, save_image_trunk, save_text_trunk, save_tokenizer
from dist_vse.models.tokenizer import Tokenizer, WordTokenizer
from dist_vse.runs.environment import read_environment
from dist_vse.runs.files import VOCABULARY_NAME
from dist_vse.runs.trained import open_trained
from dist_vse.tools.export.folder import HEADS, IMAGE, MODEL, TEXT, Description, write_description
from dist_vse.tools.export.load import build, load

README = """# {name}

An image encoder and a caption encoder into one space of {dim} dimensions, trained with dist_vse
({loss}, global batch {batch:,}); from {checkpoint} of {name}.

    import dist_vse

    model = dist_vse.load("path/to/this/folder")
    scores = model.encode_images(["photo.jpg"]) @ model.encode_texts(["a red apple"]).T

Without dist_vse: {parts}. Divide the features by their length. The score of a pair is the inner
product.
"""
OWN_PARTS = """`image/` is a model of timm (`timm.create_model("local-dir:image",
pretrained=True)`; images are {square} {size} pixels with {resampling}, and normalised as
`image/config.json` says){text}. The heads in `heads.safetensors` (`image.*`,
`text.*`: linear layers{relu}) map the trunks' outputs into the shared space"""
WHOLE_PARTS = {
    "transformers": "`model/` is a model of transformers (`AutoModel.from_pretrained`; "
    "`get_image_features`,\n`get_text_features`), with tokenizer and image processor",
    "OpenCLIP": "`model/` is a model of OpenCLIP\n"
    "(`open_clip.create_model_and_transforms('local-dir:model')`)",
}
PRETRAINED_TEXT = (
    "; `text/` one of transformers with its tokenizer (the mean of the last hidden states over a "
    "caption's tokens)"
)


def export_run(location: Path, out: Path, *, onnx: bool) -> Path:
    """Write the model of a run, or of one of its checkpoints, into the folder `out`.

    The folder appears by one rename, after what it holds was loaded again and found equal to the
    bit. Raises UserError if `out` exists or cannot be written, and if the run has no checkpoint or
    has diverged.
    """
    if out.exists():
        raise UserError(f"{out}: already exists; give another folder, or remove it")
    trained = open_trained(location)
    model = trained.model.eval()
    _check_finite(model, f"{trained.run_dir} at {trained.checkpoint.name}")
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    source = {
        "run": trained.run_dir.resolve().name,
        "checkpoint": trained.checkpoint.name,
        "loss": trained.config.loss.name,
        "global_batch_size": trained.config.global_batch_size,
        "data": (read_environment(trained.run_dir) or {}).get("data", {}),  # fingerprint by place
    }
    with _writing(out):
        write_folder(temporary, model, trained.tokenizer, trained.config, source)
    again = build(temporary)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), f"{name} changed by saving"
    if onnx:
        from dist_vse.tools.export.onnx import write_onnx

        with _writing(out):
            write_onnx(load(temporary), temporary)
    with _writing(out):
        os.rename(temporary, out)
    return out


def _check_finite(model: DualEncoder, name: str) -> None:
    """Raise UserError for weights that are not finite."""
    bad = [key for key, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    if bad:
        raise UserError(
            f"{name}: {len(bad)} weights are not finite, such as {bad[0]}; the run diverged: "
            "export an earlier checkpoint"
        )


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn a refusal to write into a UserError, that of safetensors as well."""
    try:
        with writing(path):
            yield
    except SafetensorError as error:
        raise UserError(f"{path}: can't be written ({first_line(error)}); make room") from error


def write_folder(
    folder: Path,
    model: DualEncoder,
    tokenizer: Tokenizer,
    config: TrainConfig,
    source: dict[str, Any],
) -> None:
    """Write all files of an export."""
    shape = config.model
    folder.mkdir(parents=True)
    heads = {
        f"{side}.{name}": tensor
        for side, tower in (("image", model.image), ("text", model.text))
        for name, tensor in tower.head.state_dict().items()
    }
    heads |= {"log_scale": model.log_scale.detach(), "bias": model.bias.detach()}
    heads = {name: tensor.contiguous().clone() for name, tensor in heads.items()}
    save_file(heads, folder / HEADS, metadata={"format": "pt"})
    if shape.pretrained is not None:
        parts = WHOLE_PARTS[save_pretrained(model, shape.pretrained, folder / MODEL)]
        moved = dataclasses.replace(shape, pretrained=MODEL)
    else:
        parts = _own_parts(shape)
        moved = _write_trunks(folder, model, tokenizer, shape)
    text = README.format(
        name=source["run"],
        checkpoint=source["checkpoint"],
        loss=source["loss"],
        batch=config.global_batch_size,
        dim=shape.embed_dim,
        parts=parts,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    description = Description(moved, tokenizer.vocab_size, tokenizer.pad_id, dict(source))
    write_description(folder, description)


def _write_trunks(
    folder: Path, model: DualEncoder, tokenizer: Tokenizer, shape: ModelConfig
) -> ModelConfig:
    """Write both trunks and the tokenizer; return the shape with its weights in the folder."""
    save_image_trunk(model.image.trunk, folder / IMAGE, shape.image)
    save_text_trunk(model.text.trunk, folder / TEXT)
    if isinstance(tokenizer, WordTokenizer):
        tokenizer.save(folder / VOCABULARY_NAME)
    else:
        assert shape.text.weights is not None
        save_tokenizer(shape.text.weights, folder / TEXT)
    image = f"{IMAGE}/{TRUNK_WEIGHTS}" if shape.image.spec.from_library else None
    text = TEXT if shape.text.spec.from_library else None
    return dataclasses.replace(
        shape,
        image=dataclasses.replace(shape.image, weights=image),
        text=dataclasses.replace(shape.text, weights=text),
    )


def _own_parts(shape: ModelConfig) -> str:
    squash = shape.image.squash
    return OWN_PARTS.format(
        square="squashed to"
        if squash
        else "cropped to the largest square in the middle, resized to",
        size=shape.image.size,
        resampling=shape.image.resampling,
        text=PRETRAINED_TEXT if shape.text.spec.from_library else "",
        relu=", with a ReLU between them" if shape.head_hidden else "",
    )
