"""OpenCLIP's loss with each combination of its flags, under PyTorch's DDP, compared with ours.

The same small model and batch, and the gradients as DDP leaves them: averaged over the ranks.
"""

import itertools
import warnings
from collections.abc import Callable
from importlib import metadata

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dist_vse import distributed
from dist_vse.common.errors import UserError
from dist_vse.config import TrainConfig, load_config
from dist_vse.losses.global_loss import global_loss
from dist_vse.tools.verify.case import make_batch, shrink, small_model
from dist_vse.tools.verify.checks import Result
from dist_vse.tools.verify.reference import MIN_TOLERANCE, model_gradients
from dist_vse.tools.verify.table import Row, compare

OURS = "dist_vse"
SCALE = "log_scale"

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(image features (b, d), text features (b, d), log_scale (1,)) -> what this rank minimises."""


def peer_version() -> str | None:
    """Return the version of open_clip_torch (extra `open_clip`), or None where it is missing."""
    try:
        return metadata.version("open_clip_torch")
    except metadata.PackageNotFoundError:
        return None


def require_peer() -> str:
    """Return the version of open_clip_torch. Raises UserError where it is missing."""
    version = peer_version()
    if version is None:
        raise UserError("--peer open_clip: it is not installed; pip install 'dist_vse[open_clip]'")
    return version


def check_peer() -> Result:
    """Compare the gradients of every combination with one process; only ours can fail."""
    world_size = distributed.world_size()
    settings = ["loss.name=info_nce", "loss.learn_temperature=true"]
    config = shrink(load_config(None, settings), world_size)
    exact = _parts(_exact(config))
    rows: list[Row] = []
    tolerance = MIN_TOLERANCE["fp32"]
    for name, loss in _losses().items():
        found = _parts(_under_ddp(config, loss))
        rows += [compare(name, part, found[part], exact[part], tolerance) for part in exact]
    ours = all(row.exact for row in rows if row.section == OURS)
    title = (
        f"OpenCLIP {require_peer()} under DDP on {world_size} processes, "
        "against one process in float64"
    )
    return Result(title, distributed.broadcast_object(rows), world_size, 0 if ours else 1)


def peer_losses() -> dict[str, Loss]:
    """Return OpenCLIP's loss by the combination of its flags; nothing where it is missing."""
    if peer_version() is None:
        return {}
    from open_clip.loss import ClipLoss

    # It calls collectives that PyTorch has renamed: nothing that a user can mend.
    warnings.filterwarnings("ignore", r"torch\.distributed\.nn\.functional\.\w+ is deprecated")

    def peer(local_loss: bool, gather_with_grad: bool) -> Loss:
        loss = ClipLoss(
            local_loss=local_loss,
            gather_with_grad=gather_with_grad,
            cache_labels=True,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )
        return lambda images, texts, log_scale: loss(images, texts, log_scale.exp())

    combinations = itertools.product((False, True), repeat=2)
    return {
        f"local_loss={local}, gather_with_grad={with_grad}": peer(local, with_grad)
        for local, with_grad in combinations
    }


def _losses() -> dict[str, Loss]:
    def ours(images: Tensor, texts: Tensor, log_scale: Tensor) -> Tensor:
        return global_loss("info_nce", images, texts, log_scale, torch.zeros_like(log_scale)).loss

    return peer_losses() | {OURS: ours}


def _exact(config: TrainConfig) -> dict[str, Tensor]:
    batch = make_batch(config.global_batch_size, duplicates=False)  # OpenCLIP knows of none
    model = small_model(config, frozen=(False, False)).double()
    return model_gradients(config, model, batch)[1]


def _under_ddp(config: TrainConfig, loss: Loss) -> dict[str, Tensor]:
    batch = make_batch(config.global_batch_size, duplicates=False)
    here = distributed.device()
    count = config.global_batch_size // distributed.world_size()
    rows = slice(distributed.rank() * count, (distributed.rank() + 1) * count)
    model = small_model(config, frozen=(False, False))
    replicas = DistributedDataParallel(model)
    images, texts, log_scale, _ = replicas(
        images=batch.images[rows].to(here), tokens=batch.tokens[rows].to(here)
    )
    loss(images, texts, log_scale).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def _parts(gradient: dict[str, Tensor]) -> dict[str, Tensor]:
    towers = [grad.reshape(-1) for name, grad in gradient.items() if name != SCALE]
    return {"gradient of towers": torch.cat(towers), "gradient of logit scale": gradient[SCALE]}
