"""OpenCLIP's loss with each combination of its flags."""

import itertools
import warnings
from collections.abc import Callable
from importlib import metadata

from torch import Tensor

from dist_vse import distributed

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(image features (b, d), text features (b, d), log_scale (1,)) -> what this rank minimises."""


def peer_version() -> str | None:
    """Return the version of open_clip_torch (extra `open_clip`), or None where it is missing."""
    try:
        return metadata.version("open_clip_torch")
    except metadata.PackageNotFoundError:
        return None


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
