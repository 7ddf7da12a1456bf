"""A run's config, resolved: with what a checkpoint decides, and what an earlier start has found."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from dist_vse.common.errors import UserError
from dist_vse.common.log import logger
from dist_vse.config import TrainConfig
from dist_vse.config.sections import MIN_LEARNED_TEMPERATURE, LossConfig, ModelConfig
from dist_vse.models.pretrained import Start, read_start
from dist_vse.runs import checkpoint
from dist_vse.runs.files import CHECKPOINTS
from dist_vse.runs.folder import find_earlier_start, find_run, open_run

_MODEL_OF_RUN = ("pretrained", "embed_dim", "head_hidden", "head_bias")
_IMAGE_OF_RUN = ("kind", "name", "squash", "crop_share", "resampling", "normalize", "projection")
_TEXT_OF_RUN = ("kind", "weights", "width", "depth", "word_dim", "min_count", "words")
"""Settings that `model.from_run` brings with its weights."""


def resolve(config: TrainConfig) -> TrainConfig:
    """Fill in what the user left to `model.from_run`, `model.pretrained` and an earlier start.

    A chunk size that no start has found yet stays as it is. Raises UserError if one of them cannot
    be read, or if the config contradicts the run that it starts from.
    """
    config = with_start(_with_run(config))
    if not isinstance(config.chunk_size, int):
        earlier = find_earlier_start(Path(config.output_dir))
        if earlier is not None:
            config = replace(config, chunk_size=earlier.chunk_size)
    return config


def with_start(config: TrainConfig) -> TrainConfig:
    """Fill in what the checkpoint of `model.pretrained` decides, where there is one.

    Raises UserError if it cannot be read.
    """
    if config.model.pretrained is None:
        return config
    start = read_start(config.model.pretrained)
    _check_nothing_is_ignored(config, start)
    temperature = start.temperature
    if config.loss.learn_temperature:
        temperature = max(MIN_LEARNED_TEMPERATURE, temperature)
    bias = config.loss.bias if start.bias is None else start.bias
    size = config.model.image.asked_size or start.image_size
    max_tokens = config.model.text.asked_tokens or start.max_tokens
    logger.info(
        "%s: %s, %d pixels, %d tokens, %d dimensions, temperature %.4g",
        *(config.model.pretrained, start.kind, start.image_size),
        *(start.max_tokens, start.embed_dim, temperature),
    )
    if (size, max_tokens) != (start.image_size, start.max_tokens):
        logger.info("its positions are resampled to %d pixels, %d tokens", size, max_tokens)
    image = replace(
        config.model.image,
        size=size,
        squash=start.squash,
        resampling=start.resampling,
    )
    text = replace(config.model.text, max_tokens=max_tokens)
    model = replace(config.model, image=image, text=text, embed_dim=start.embed_dim)
    loss = replace(config.loss, temperature=temperature, bias=bias)
    if config.model.from_run is not None:  # which has trained on
        loss = config.loss
    return replace(config, model=model, loss=loss)


def _check_nothing_is_ignored(config: TrainConfig, start: Start) -> None:
    """Raise UserError for a setting that contradicts the checkpoint, which decides it."""
    model, loss = config.model, config.loss
    temperatures = (start.temperature, max(MIN_LEARNED_TEMPERATURE, start.temperature))
    settings: list[tuple[str, float, float, tuple[float, ...]]] = [
        ("model.embed_dim", model.embed_dim, ModelConfig.embed_dim, (start.embed_dim,)),
    ]
    if model.from_run is None:
        settings.append(
            ("loss.temperature", loss.temperature, LossConfig.temperature, temperatures)
        )
    if model.from_run is None and start.bias is not None:
        settings.append(("loss.bias", loss.bias, LossConfig.bias, (start.bias,)))
    for key, given, default, decided in settings:
        if given != default and not any(math.isclose(given, value) for value in decided):
            raise UserError(
                f"{key} ({given}) is {decided[0]:.4g} in the checkpoint of model.pretrained: leave "
                f"out {key}"
            )


def _with_run(config: TrainConfig) -> TrainConfig:
    """Fill in what the run of `model.from_run` decides, and which of its checkpoints it is.

    An earlier start has both already, so a run goes on where the one before it is gone.
    """
    if config.model.from_run is None:
        return config
    location = Path(config.model.from_run)
    earlier = find_earlier_start(Path(config.output_dir))
    if earlier is not None and _is_of(earlier.model.from_run, location):
        found, model = earlier.model.from_run, earlier.model
    else:
        run_dir, asked = find_run(location)
        model = open_run(run_dir).model
        path = asked or checkpoint.latest(run_dir / CHECKPOINTS)
        if path is None:
            raise UserError(f"model.from_run={location}: no whole checkpoint there yet")
        found = str(path)
        logger.info("starting from %s", found)
    own = config.model
    taken = {
        "image": replace(own.image, **_taken(own.image, model.image, _IMAGE_OF_RUN, "image.")),
        "text": replace(own.text, **_taken(own.text, model.text, _TEXT_OF_RUN, "text.")),
        **_taken(own, model, _MODEL_OF_RUN),
    }
    return replace(config, model=replace(own, from_run=found, **taken))


def _is_of(found: str | None, asked: Path) -> bool:
    """Return whether a checkpoint is the one asked for, or one of the run asked for."""
    return found is not None and asked in (Path(found), Path(found).parent.parent)


def _taken(own: object, of_run: object, names: tuple[str, ...], prefix: str = "") -> dict[str, Any]:
    """Return a run's settings by name. Raises UserError where the config gives other ones."""
    for name in names:
        ours, theirs = getattr(own, name), getattr(of_run, name)
        if ours not in (theirs, getattr(type(own)(), name)):
            raise UserError(
                f"model.{prefix}{name} ({ours}) is {theirs} in the run of model.from_run: leave it "
                "out, or start from another run"
            )
    return {name: getattr(of_run, name) for name in names}
