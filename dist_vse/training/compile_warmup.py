"""Compile the trunks before the first step, and say whether that makes a chunk any faster."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from dist_vse.common.log import logger
from dist_vse.common.random_state import own_generators, random_state, replay
from dist_vse.config import TrainConfig
from dist_vse.models.dual_encoder import DualEncoder, frozen_statistics, made_up_pairs
from dist_vse.models.precision import autocast
from dist_vse.runs.metrics import synchronize

_HELPS = 0.95  # of the time without


def warm_up(model: DualEncoder, config: TrainConfig, rows: int) -> None:
    """Compile for chunks of so many pairs where the config asks for it, and log what it brings.

    A step encodes a chunk without a graph, and with one; so does this, with made-up pairs. It
    leaves no trace in the model. Call it before an engine stands around the model.
    """
    if not config.model.compile:
        return
    made_up = made_up_pairs(
        model,
        rows,
        image_size=config.model.image.size,
        num_tokens=config.model.text.max_tokens,
    )
    here = next(model.parameters()).device
    inputs = {name: value.to(here) for name, value in made_up.items()}
    parameters = [p for p in model.parameters() if p.requires_grad]

    def encode() -> Tensor:
        with autocast(here, config.engine.precision):
            outputs: tuple[Tensor, ...] = model(**model.prepare(**inputs))
        return torch.stack([output.sum() for output in outputs]).sum()

    def chunk() -> None:
        with torch.no_grad():
            encode()
        torch.autograd.grad(encode(), parameters, allow_unused=True)

    with replay(random_state(own_generators(model))), frozen_statistics(model):
        first, compiled = _seconds(chunk), _seconds(chunk)
        with torch.compiler.set_stance("force_eager"):
            _seconds(chunk)
            eager = _seconds(chunk)
    _tell(first, compiled, eager)


def _seconds(work: Callable[[], None]) -> float:
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def _tell(first: float, compiled: float, eager: float) -> None:
    """Log the seconds of the compilation, and of a chunk with and without it."""
    if compiled < _HELPS * eager:
        text = "the trunks were compiled in %.0f s: a chunk takes %.3g s, and %.3g s without"
        logger.info(text, first, compiled, eager)
    else:
        text = (
            "model.compile=true does not help here: a chunk takes %.3g s, and %.3g s without; "
            "set it to false"
        )
        logger.warning(text, compiled, eager)
