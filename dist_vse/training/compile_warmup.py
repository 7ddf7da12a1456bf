"""Compile the trunks before the first step: say whether that helps, refuse what it gets wrong."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from dist_vse.common.errors import UserError
from dist_vse.common.log import logger
from dist_vse.common.random_state import own_generators, random_state, replay, restore
from dist_vse.config import TrainConfig
from dist_vse.config.sections import GRAPHS
from dist_vse.models.dual_encoder import DualEncoder, frozen_statistics, made_up_pairs
from dist_vse.models.precision import autocast
from dist_vse.runs.metrics import synchronize

_HELPS = 0.95  # of the time without
_NUM_CHUNKS = 3
_ROUNDING = 2**-6  # the passes have kernels of their own, which round differently


def warm_up(model: DualEncoder, config: TrainConfig, rows: int) -> None:
    """Compile for chunks of so many pairs where the config asks for it, and log what it brings.

    A step encodes a chunk without a graph, and with one; so does this, with made-up pairs. It
    leaves no trace in the model. Call it before an engine stands around the model. Raises UserError
    if the second pass does not repeat the first, or for CUDA graphs of BatchNorm.
    """
    if not config.model.compile:
        return
    how = f"model.compile={str(config.model.compile).lower()}"
    if config.model.compile == GRAPHS:
        _refuse_moving_statistics(model)
    made_up = made_up_pairs(
        model,
        rows,
        image_size=config.model.image.size,
        num_tokens=config.model.text.max_tokens,
    )
    here = next(model.parameters()).device
    inputs = {name: value.to(here) for name, value in made_up.items()}
    parameters = [p for p in model.parameters() if p.requires_grad]

    def encode() -> tuple[Tensor, ...]:
        with autocast(here, config.engine.precision):
            outputs: tuple[Tensor, ...] = model(**model.prepare(**inputs))
        return outputs

    def chunk() -> None:
        with torch.no_grad():
            encode()
        _differentiate(encode(), parameters)

    with replay(random_state(own_generators(model))), frozen_statistics(model):
        first = _seconds(chunk)
        _seconds(chunk)  # CUDA graphs are recorded at the second run
        compiled = _seconds(chunk)
        gap = replay_gap(model, encode)
        with torch.compiler.set_stance("force_eager"):
            _seconds(chunk)
            eager = _seconds(chunk)
    if not gap < _ROUNDING:
        raise UserError(
            f"{how}: the second pass of gradient caching does not repeat the first here (features "
            f"differ by {gap:.1e}); set model.compile=false"
        )
    _tell(how, first, compiled, eager)


def replay_gap(model: DualEncoder, encode: Callable[[], tuple[Tensor, ...]]) -> float:
    """Return how chunks with a graph differ from equal ones without, relative to the largest.

    As in a step: the first pass of all chunks, then the second in reverse with its backward.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    generators = own_generators(model)
    states, first = [], []
    for _ in range(_NUM_CHUNKS):
        states.append(random_state(generators))
        restore(states[-1])  # as the first pass does
        with torch.no_grad():
            first.append(encode())
    gaps = []
    for state, before in zip(reversed(states), reversed(first), strict=True):
        with replay(state):
            after = encode()
        _differentiate(after, parameters)
        gaps += [
            (a - b).detach().abs().max() / a.abs().max().clamp(min=1e-6)
            for a, b in zip(before, after, strict=True)
        ]
    return float(torch.stack(gaps).max())


def _differentiate(outputs: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
    total = torch.stack([output.sum() for output in outputs]).sum()
    torch.autograd.grad(total, parameters, allow_unused=True)


def _refuse_moving_statistics(model: DualEncoder) -> None:
    """Raise UserError for BatchNorm in a trunk: a graph would write to the statistics it saw."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.training and ".trunk." in name:
            raise UserError(
                f"model.compile={GRAPHS}: {name} is a {type(module).__name__}, whose statistics "
                "gradient caching moves once a step, and a CUDA graph in every chunk; set "
                "model.compile=true"
            )


def _seconds(work: Callable[[], None]) -> float:
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def _tell(how: str, first: float, compiled: float, eager: float) -> None:
    """Log the seconds of the compilation, and of a chunk with and without it."""
    if compiled < _HELPS * eager:
        text = "%s: the trunks were compiled in %.0f s: a chunk takes %.3g s, and %.3g s without"
        logger.info(text, how, first, compiled, eager)
    else:
        text = "%s does not help here: a chunk takes %.3g s, and %.3g s without; set it to false"
        logger.warning(text, how, compiled, eager)
