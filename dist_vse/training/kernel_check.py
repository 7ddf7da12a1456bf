"""Whether fused kernels compute the loss right on this machine, before a run depends on them.

Made-up features pass through the kernels and through the tiles, on all ranks together. A compiler
or a GPU that nobody tried may refuse the kernels, or get them wrong without a word.
"""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dist_vse import distributed
from dist_vse.common.errors import UserError
from dist_vse.common.log import logger
from dist_vse.config import TrainConfig
from dist_vse.losses.global_loss import GlobalLoss
from dist_vse.losses.kernel_choice import choose_kernels
from dist_vse.losses.options import LossOptions
from dist_vse.losses.registry import find_loss
from dist_vse.training.step_loss import loss_options

ROWS, WIDTH = 300, 72  # a rank's pairs: more than a tile is tall, and ragged edges
COMPILED_ROWS = 8
_TOLERANCE = {False: 1e-3, True: 2**-5}  # of float32 products, and of bfloat16 ones


T = TypeVar("T")


class Settled(NamedTuple):
    """What computes the run's loss."""

    config: TrainConfig
    """With a `loss.kernels` that is right here."""
    kernels: str
    """`fused` or `tiled`."""
    reason: str


def settle_kernels(config: TrainConfig, *, rows: int = ROWS) -> Settled:
    """Settle what computes the loss: right here, and the same on every rank.

    Where the fused kernels fail or differ, `auto` becomes `tiled` with a line in the log. Raises
    UserError on every rank if they were asked for by name. Every rank calls this.
    """
    loss, device = config.loss, distributed.device()
    has_kernels = find_loss(loss.name).fused is not None
    only_tiled = loss_options(config, 0).only_tiled
    kernels, reason = choose_kernels(
        loss.kernels, has_kernels, torch.float32, device, only_tiled=only_tiled
    )
    if kernels == "tiled":
        return Settled(config, kernels, reason)
    fault = _find_fault(loss.name, loss_options(config, 0), device, rows)
    if not distributed.any_rank(fault is not None):
        return Settled(config, kernels, reason)
    first = next(x for x in distributed.all_gather_object(fault) if x is not None)
    if loss.kernels == "fused":
        raise UserError(f"loss.kernels=fused: {first}; set loss.kernels=tiled")
    if distributed.is_main_process():
        logger.warning("%s: the loss runs in tiles", first)
    return Settled(replace(config, loss=replace(loss, kernels="tiled")), "tiled", first)


def compile_meanwhile(batches: Iterator[T], config: TrainConfig) -> Iterator[T]:
    """Compile the run's fused kernels while a thread waits for its first batch; yield all batches.

    Every rank calls this. What goes wrong with the batch is raised where it is asked for.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="first batch") as pool:
        first = pool.submit(next, batches)
        seconds = compile_kernels(config)
        waited = time.perf_counter()
    waited = time.perf_counter() - waited
    if distributed.is_main_process():
        logger.info(
            "the fused kernels were compiled or found in Triton's cache in %.1f s, while the first "
            "batch was loaded, which took %.1f s more",
            *(seconds, waited),
        )
    return _with_first(first, batches)


def _with_first(first: "Future[T]", others: Iterator[T]) -> Iterator[T]:
    yield first.result()
    yield from others


def compile_kernels(config: TrainConfig) -> float:
    """Run every kernel that the run will need, on a few made-up pairs; return the seconds.

    A kernel is compiled for the width of the features, for batches with duplicates and without,
    and for the parts of a loss that comes in by a warm-up. Every rank calls this.
    """
    began, warmup = time.perf_counter(), config.loss.warmup_samples
    for moment in sorted({0, warmup // 2, warmup}):
        options = loss_options(config, moment)
        for duplicates in (False, True):
            _gradients(
                config.loss.name,
                options,
                distributed.device(),
                COMPILED_ROWS,
                width=config.model.embed_dim,
                duplicates=duplicates,
            )
    if distributed.device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _find_fault(name: str, options: LossOptions, device: torch.device, rows: int) -> str | None:
    """Say how the kernels fail, if they do."""
    try:
        fused, tiled = (
            _gradients(name, replace(options, kernels=kernels), device, rows)
            for kernels in ("fused", "tiled")
        )
    except Exception as error:  # whatever the compiler or the driver raises
        return f"the fused kernels fail here ({type(error).__name__}: {error})".splitlines()[0]
    found = max(_error(a, b) for a, b in zip(fused, tiled, strict=True))
    if found <= _TOLERANCE[options.bf16_products]:
        return None
    return f"the fused kernels of {name} are wrong here (relative error {found:.1e})"


def _gradients(
    name: str,
    options: LossOptions,
    device: torch.device,
    rows: int,
    *,
    width: int = WIDTH,
    duplicates: bool = True,
) -> list[Tensor]:
    """Return the loss and its gradients, of equal features in every call."""
    rank = distributed.rank()
    generator = torch.Generator().manual_seed(rank)
    made = normalize(torch.randn(2, rows, width, generator=generator), dim=2)
    images, texts = (x.to(device).requires_grad_() for x in made.unbind())
    ids = torch.arange(rows) + rank * rows
    if duplicates:
        ids[-1] = 0  # an image that the first rank has as well
    ten, zero = torch.full((1,), 10.0, device=device), torch.zeros(1, device=device)
    loss_fn = GlobalLoss(name, options, image_ids=ids, text_ids=ids)
    loss = loss_fn(images, texts, ten.log(), zero).loss
    return [loss.detach(), *torch.autograd.grad(loss, [images, texts])]


def _error(ours: Tensor, exact: Tensor) -> float:
    """Return the largest difference, relative to the largest number; NaN counts as wrong."""
    difference = ((ours - exact).abs().max() / exact.abs().max().clamp(min=1e-6)).item()
    return difference if difference == difference else float("inf")
