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
from torch import Tensor

from dist_vse.common.errors import UserError, first_line, writing
from dist_vse.config import LoraConfig, ModelConfig
from dist_vse.models.dual_encoder import DualEncoder
from dist_vse.models.lora import add_adapters, remove_adapters
from dist_vse.models.pretrained import save_pretrained
from dist_vse.models.save import TRUNK_WEIGHTS, save_image_trunk, save_text_trunk, save_tokenizer
from dist_vse.models.tokenizer import Tokenizer, WordTokenizer
from dist_vse.runs.environment import read_environment
from dist_vse.runs.files import VOCABULARY_NAME
from dist_vse.runs.trained import open_trained
from dist_vse.tools.export.card import Card, own_usage, read_metrics, write_card
from dist_vse.tools.export.folder import (
    ADAPTERS,
    HEADS,
    IMAGE,
    MODEL,
    TEXT,
    Description,
    write_description,
)
from dist_vse.tools.export.formats import FORMATS
from dist_vse.tools.export.load import build, load
from dist_vse.tools.export.options import OWN, SENTENCES
from dist_vse.tools.export.to_sentence_transformers import add_sentence_transformers


def export_run(
    location: Path,
    out: Path,
    *,
    onnx: bool = False,
    form: str = OWN,
    name: str | None = None,
    merge: bool = False,
) -> Path:
    """Write the model of a run, or of one of its checkpoints, into the folder `out`.

    `form` is one of `options.FORMS`; `name` is what the model will be called on a hub; `merge` adds
    the adapters of `model.lora` to the layers that they belong to. The folder appears by one
    rename; one of our own layout was loaded again before, and found equal to the bit. Raises
    UserError if `out` exists or cannot be written, if the run has no checkpoint or has diverged,
    and for a model that a form cannot express.
    """
    if out.exists():
        raise UserError(f"{out}: already exists; give another folder, or remove it")
    if onnx and form in FORMATS:
        raise UserError(f"--onnx goes with --format {OWN} or {SENTENCES}, not {form}")
    trained = open_trained(location)
    if trained.config.model.image.spec.is_stored or trained.config.model.text.spec.is_stored:
        raise UserError(
            f"{trained.run_dir}: trained on stored vectors, so it has no encoder to export; train "
            "with model.image.kind=timm and model.text.kind=pretrained, and model.from_run"
        )
    model, shape = trained.model.eval(), trained.config.model
    _check_finite(model, f"{trained.run_dir} at {trained.checkpoint.name}")
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    source = {
        "run": trained.run_dir.resolve().name,
        "checkpoint": trained.checkpoint.name,
        "loss": trained.config.loss.name,
        "metrics": read_metrics(trained.run_dir),
        "global_batch_size": trained.config.global_batch_size,
        "data": (read_environment(trained.run_dir) or {}).get("data", {}),  # fingerprint by place
    }
    name = name or str(out.resolve())
    adapters = _take_adapters(model, shape, form, merge=merge)
    if merge:
        shape = dataclasses.replace(shape, lora=LoraConfig())
    with _writing(out):
        temporary.parent.mkdir(parents=True, exist_ok=True)
        if form in FORMATS:
            card = FORMATS[form](temporary, model, shape, name)
        else:
            card = write_folder(temporary, model, trained.tokenizer, shape, source)
        if form == SENTENCES:
            card = add_sentence_transformers(temporary, model, shape, name)
        write_card(temporary, card, source, shape.embed_dim)
        if adapters:
            save_file(adapters, temporary / ADAPTERS, metadata={"format": "pt"})
    if form not in FORMATS:
        _check_again(temporary, model, shape, adapters)
    if onnx:
        from dist_vse.tools.export.onnx import write_onnx

        with _writing(out):
            write_onnx(load(temporary), temporary)
    with _writing(out):
        os.rename(temporary, out)
    return out


def _take_adapters(
    model: DualEncoder, shape: ModelConfig, form: str, *, merge: bool
) -> dict[str, Tensor]:
    """Give the model its plain layers, adapters merged in or not; return those that were not.

    Raises UserError for a form that knows no adapters, and for a merge without any.
    """
    if not shape.lora.rank:
        if merge:
            raise UserError("--merge is for a run with adapters (model.lora); this one has none")
        return {}
    if form != OWN and not merge:
        raise UserError(f"--format {form} has no place for adapters (model.lora): add --merge")
    adapters = remove_adapters(model, merge=merge)
    return {} if merge else {name: x.contiguous().clone() for name, x in adapters.items()}


def _check_again(
    folder: Path, model: DualEncoder, shape: ModelConfig, adapters: dict[str, Tensor]
) -> None:
    """Hold the weights that were written to those of the model, to the bit."""
    again = build(folder)
    if adapters:
        add_adapters(model, shape, seed=0)
        model.load_state_dict(adapters, strict=False)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), f"{name} changed by saving"


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
    shape: ModelConfig,
    source: dict[str, Any],
) -> Card:
    """Write an export of our own layout; return what its card says."""
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
        whole = save_pretrained(model, shape.pretrained, folder / MODEL)
        moved = dataclasses.replace(shape, pretrained=MODEL)
    else:
        whole = ""
        moved = _write_trunks(folder, model, tokenizer, shape)
    description = Description(moved, tokenizer.vocab_size, tokenizer.pad_id, dict(source))
    write_description(folder, description)
    return Card("dist_vse", own_usage(shape, whole))


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
