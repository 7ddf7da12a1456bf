"""The peers of gradient caching, driven as their users drive them, on our model and batches.

OpenCLIP: its own `train_one_epoch` with `accum_freq` = K, one step an epoch, under DDP. GradCache
(https://github.com/luyug/GradCache): its `GradCache` with its own contrastive loss, from a folder
that the user names; it is no part of this project.
"""

import importlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.support.open_clip_loss import peer_loss
from dist_vse import distributed
from dist_vse.common.errors import UserError
from dist_vse.models.dual_encoder import DualEncoder
from dist_vse.tools.verify.conformance.peers import AsOpenClip

Step = Callable[[], Any]


class _OneStep:
    """A data loader of the K parts of one step."""

    def __init__(self, parts: list[tuple[Tensor, Tensor]]) -> None:
        self.parts = parts
        self.num_batches = len(parts)
        self.num_samples = sum(len(images) for images, _ in parts) * distributed.world_size()

    def __iter__(self) -> Any:
        return iter(self.parts)


def open_clip_step(
    model: DualEncoder,
    optimizer: torch.optim.Optimizer,
    pairs: tuple[Tensor, Tensor],
    num_chunks: int,
) -> Step | None:
    """Return a step of OpenCLIP's accumulation; None where open_clip_torch is missing."""
    loss = peer_loss()
    if loss is None:
        return None
    from open_clip_train.train import train_one_epoch

    wrapped = _distributed(AsOpenClip(model))
    images, tokens = (x.chunk(num_chunks) for x in pairs)
    loader = _OneStep(list(zip(images, tokens, strict=True)))
    data = {"train": SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)}
    args = SimpleNamespace(
        accum_freq=num_chunks,
        batch_size=len(images[0]),
        device="cpu",
        distill=False,
        grad_clip_norm=None,
        horovod=False,
        local_rank=distributed.rank(),
        log_every_n_steps=1,
        log_local=False,
        precision="fp32",
        rank=distributed.rank(),
        skip_scheduler=True,
        wandb=False,
        world_size=distributed.world_size(),
    )
    return lambda: train_one_epoch(wrapped, data, loss, 0, optimizer, None, None, None, args)


def check_checkout(folder: Path) -> None:
    """Raise UserError if the GradCache library isn't in a folder."""
    if not (folder / "src" / "grad_cache").is_dir():
        raise UserError(f"{folder}: no src/grad_cache in it; give a checkout of luyug/GradCache")


def grad_cache_step(
    folder: Path,
    model: DualEncoder,
    optimizer: torch.optim.Optimizer,
    pairs: tuple[Tensor, Tensor],
    num_chunks: int,
) -> Step:
    """Return a step of the GradCache library in `folder`, a checkout of its repository.

    Raises UserError if it is not there.
    """
    check_checkout(folder)
    sys.path.insert(0, str(folder / "src"))
    library = importlib.import_module("grad_cache.grad_cache")
    losses = importlib.import_module("grad_cache.loss")
    several = distributed.world_size() > 1
    loss = losses.DistributedContrastiveLoss() if several else losses.SimpleContrastiveLoss()
    towers = [_distributed(model.image), _distributed(model.text)]
    cache = library.GradCache(
        models=towers,
        chunk_sizes=math.ceil(len(pairs[0]) / num_chunks),
        loss_fn=lambda x, y: loss(x * 10.0, y),
    )

    def step() -> None:
        optimizer.zero_grad()
        cache(*pairs, no_sync_except_last=several)
        optimizer.step()

    return step


def _distributed(module: nn.Module) -> nn.Module:
    if distributed.world_size() == 1:
        return module
    return cast(nn.Module, DistributedDataParallel(module))
