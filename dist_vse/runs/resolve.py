"""A run's config, resolved: with what a checkpoint decides, and what an earlier start has found."""

from dataclasses import replace
from pathlib import Path

from dist_vse.common.log import logger
from dist_vse.config import TrainConfig
from dist_vse.config.checks import AUTO
from dist_vse.config.sections import MIN_LEARNED_TEMPERATURE
from dist_vse.models.pretrained import read_start
from dist_vse.runs.folder import find_earlier_start


def resolve(config: TrainConfig) -> TrainConfig:
    """Fill in what the user left to `model.pretrained`, and to an earlier start of the run.

    A chunk size that no start has tried yet stays `auto`. Raises UserError if one of the two
    cannot be read.
    """
    config = with_start(config)
    if config.chunk_size == AUTO:
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
    temperature = start.temperature
    if config.loss.learn_temperature:
        temperature = max(MIN_LEARNED_TEMPERATURE, temperature)
    bias = config.loss.bias if start.bias is None else start.bias
    logger.info(
        "%s: %s, %d pixels, %d tokens, %d dimensions, temperature %.4g",
        *(config.model.pretrained, start.kind, start.image_size),
        *(start.max_tokens, start.embed_dim, temperature),
    )
    image = replace(
        config.model.image,
        size=start.image_size,
        squash=start.squash,
        resampling=start.resampling,
    )
    text = replace(config.model.text, max_tokens=start.max_tokens)
    model = replace(config.model, image=image, text=text, embed_dim=start.embed_dim)
    loss = replace(config.loss, temperature=temperature, bias=bias)
    return replace(config, model=model, loss=loss)
