"""A text encoder of transformers, from a folder."""

from pathlib import Path
from typing import Any

import torch

from dist_vse.common.errors import UserError, first_line
from dist_vse.common.reading import BadFileError, read_json

_MODE = "pooling_mode_"


def load_encoder(folder: str, dropout: float) -> Any:
    """Load a transformers model from a folder, in float32, with `dropout` at all of its places.

    Raises UserError if the folder holds none, or not all of its weights.
    """
    # Slow to import, and needed for this kind only.
    from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # or every rank draws one

    if not Path(folder).is_dir():
        raise UserError(
            f"{folder}: no such folder; model.text.weights is a saved transformers model"
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        for name, value in vars(config).items():
            if ("dropout" in name or name.endswith("_pdrop")) and isinstance(value, float):
                setattr(config, name, dropout)
        # T5: half of it reads captions. A folder of that half alone says so in no field.
        halves = type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING
        encoder, loading = (AutoModelForTextEncoding if halves else AutoModel).from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise UserError(
            f"{folder}: does not load as a transformers model ({first_line(error)}); "
            "save one there with model.save_pretrained"
        ) from error
    missing = sorted(key for key in loading["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise UserError(
            f"{folder}: the weights lack {len(missing)} tensors of the model ({missing[0]}, ...); "
            "save it again with model.save_pretrained"
        )
    pooler = getattr(encoder, "pooler", None)
    if pooler is not None:
        pooler.requires_grad_(False)  # the mean does not pass it, so it would get no gradient
    return encoder.float().train()  # transformers loads in eval mode


def enable_checkpointing(encoder: Any, folder: str) -> None:
    """Let a transformers model keep no activations. Raises UserError if it cannot."""
    name = "activation_checkpointing_enable"  # since transformers 5
    enable = getattr(encoder, name, None) or encoder.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise UserError(
            f"{folder}: has no gradient checkpointing; set model.grad_checkpointing=false"
        ) from error


def max_positions(encoder: Any) -> int | None:
    """Return how many tokens a model has positions for; None if it has no table of them.

    RoBERTa and its kin count positions from behind the padding's id on.
    """
    for name, module in encoder.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - first
    limit = getattr(encoder.config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None  # XLNet says -1


def read_pooling(folder: str) -> str:
    """Return the pooling that a folder of sentence-transformers states: `mean` or `cls`.

    A folder that states none takes the mean. Raises UserError for another one.
    """
    path = Path(folder, "1_Pooling", "config.json")
    if not path.is_file():
        return "mean"
    try:
        content = read_json(path)
    except BadFileError as error:
        raise UserError(f"{path}: can't be read ({error})") from error
    stated = [name for name, value in content.items() if name.startswith(_MODE) and value is True]
    modes = {name.removeprefix(_MODE): name for name in stated}
    if isinstance(content.get("pooling_mode"), str):
        modes = {content["pooling_mode"]: "pooling_mode"}
    known = {"mean_tokens": "mean", "mean": "mean", "cls_token": "cls", "cls": "cls"}
    if len(modes) != 1 or next(iter(modes)) not in known:
        raise UserError(
            f"{path}: states the pooling {', '.join(modes) or 'of no kind'}; only the mean or the "
            "first token (cls) are supported"
        )
    return known[next(iter(modes))]


def encoder_dim(encoder: Any, folder: str) -> int:
    """Return the width of the last hidden states, by a forward of one token."""
    training = encoder.training
    try:
        with torch.no_grad():
            output = encoder.eval()(input_ids=torch.zeros(1, 1, dtype=torch.int64))
        return int(output.last_hidden_state.shape[-1])
    except (AttributeError, ValueError, TypeError) as error:
        raise UserError(
            f"{folder}: is no text encoder ({first_line(error)}); "
            "give a model like BERT, MPNet or MiniLM"
        ) from error
    finally:
        encoder.train(training)
