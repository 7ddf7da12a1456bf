"""The peer: OpenCLIP's loss, with the flags that give the gradient of the global batch."""

from collections.abc import Callable

from torch import Tensor

from dist_vse import distributed
from dist_vse.tools.verify.peer import peer_version


def peer_loss() -> Callable[..., Tensor] | None:
    """Return OpenCLIP's loss of (image features, text features, scale), or None if missing."""
    if peer_version() is None:
        return None
    from open_clip.loss import ClipLoss

    loss: Callable[..., Tensor] = ClipLoss(
        local_loss=True,
        gather_with_grad=True,
        cache_labels=True,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )
    return loss
