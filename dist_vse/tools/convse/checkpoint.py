"""The authors' checkpoints: a dictionary of two encoders' weights, and the command's options."""

import argparse
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_vse.common.errors import UserError, first_line, writing
from dist_vse.config import (
    DataConfig,
    LossConfig,
    OptimConfig,
    TrainConfig,
)
from dist_vse.models.build import build_model
from dist_vse.runs import checkpoint
from dist_vse.runs.checkpoint import WEIGHTS, Progress
from dist_vse.runs.files import CHECKPOINTS, VOCABULARY_NAME
from dist_vse.runs.folder import write_config
from dist_vse.tools.convse.names import is_precomputed, model_shape, renamed
from dist_vse.tools.convse.vocabulary import read_vocabulary, tokenizer_of

_NAMES = {
    "ConVSE": "convse",
    "CCL": "convse",
    "ConVSE++": "convse++",
    "CCLHN": "convse++",
}
_TRUNKS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


def import_checkpoint(path: Path, out: Path, *, vocabulary: Path, data: str) -> None:
    """Write a run's folder with the weights, vocabulary and settings of their checkpoint.

    Raises UserError if it can't be read, is of another model, or if there is a run already.
    """
    if (out / CHECKPOINTS).exists():
        raise UserError(f"{out}: holds a run already; give another folder")
    content = _read(path)
    options: dict[str, Any] = vars(content["opt"])
    for name in ("use_abs", "no_imgnorm"):
        if options.get(name):
            raise UserError(f"{path}: --{name} has no counterpart here; only cosines are imported")
    if options.get("measure", "cosine") not in ("cosine", False):
        raise UserError(f"{path}: --measure {options['measure']} has no counterpart here")
    image, text = content["model"]
    try:
        shape = model_shape(image, text, "" if is_precomputed(image) else _trunk(options))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    words = tokenizer_of(read_vocabulary(vocabulary), shape.text.max_tokens)
    if words.vocab_size != text["embed.weight"].shape[0]:
        raise UserError(
            f"{vocabulary}: has {words.vocab_size} words, but the checkpoint's text encoder "
            f"{text['embed.weight'].shape[0]}; give the vocabulary that it was trained with"
        )
    config = _config(options, out, data)
    config = replace(config, model=shape)
    model = build_model(config.model, config.loss, words)
    given = model.load_state_dict(renamed(image, text), strict=False)
    missing = {*given.missing_keys} - {"log_scale", "bias", "image.trunk.mean", "image.trunk.std"}
    if missing or given.unexpected_keys:
        raise UserError(
            f"{path}: its trunk is no {shape.image.name} "
            f"({(sorted(missing) + given.unexpected_keys)[0]} does not fit)"
        )
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        write_config(config)
        words.save(out / VOCABULARY_NAME)
        final = out / CHECKPOINTS / f"step-{int(content.get('Eiters', 0)):06d}"
        temporary = final.with_name(final.name + checkpoint.TEMPORARY)
        weights = {k: v.detach().contiguous().clone() for k, v in model.state_dict().items()}
        digests = checkpoint.write_files(temporary, {WEIGHTS: weights})
        progress = Progress(int(content.get("Eiters", 0)), 0, [])
        score = float(content["best_rsum"]) if "best_rsum" in content else None
        # No rank's files: nothing is known of the optimizer, so it can't be resumed.
        checkpoint.write_manifest(
            temporary, progress, digests, world_size=0, zero_stage=0, score=score
        )
        checkpoint.publish(temporary, final)


def _read(path: Path) -> dict[str, Any]:
    """Load a checkpoint's tensors and options: nothing else in it is built, and no code runs."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
        image, text = content["model"]
        for state in (image, text):
            if not all(isinstance(value, Tensor) for value in state.values()):
                raise TypeError("model holds something other than tensors")
        if not isinstance(content["opt"], argparse.Namespace):
            raise TypeError("opt is no namespace")
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError,
            TypeError, AttributeError) as error:  # fmt: skip
        raise UserError(
            f"{path}: not a checkpoint of VSE++ or ConVSE ({first_line(error)}); it is a "
            "dictionary with model, opt, epoch and best_rsum"
        ) from error
    found: dict[str, Any] = content
    return found


def _trunk(options: dict[str, Any]) -> str:
    """Return the timm model of their --cnn_type."""
    name = str(options.get("cnn_type", ""))
    if name not in _TRUNKS:
        raise UserError(f"its image encoder is {name or 'unknown'}; only ResNets are imported")
    return f"{name}.tv_in1k"


def _config(options: dict[str, Any], out: Path, data: str) -> TrainConfig:
    """Return their settings in ours, as far as evaluation and `model.from_run` need them."""
    name = _NAMES.get(str(options.get("loss_fn")))
    if name is None:
        name = "vse++" if options.get("max_violation") else "vse0"
    return TrainConfig(
        output_dir=str(out),
        data=DataConfig(index=data, captions_per_image=5, shuffle_window=0),
        loss=LossConfig(
            name=name,
            temperature=float(options.get("temp", 0.1)),
            margin=float(options.get("margin", 0.2)),
            duplicates="keep",
        ),
        optim=OptimConfig(
            name="adam",
            lr=float(options.get("learning_rate", 2e-4)),
            weight_decay=0.0,
            clip_norm=float(options.get("grad_clip", 2.0)),
            schedule="step",
        ),
    )
