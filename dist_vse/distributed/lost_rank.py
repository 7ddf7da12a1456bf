"""A rank that died: what the others' communication library makes of it, in words."""

import torch.distributed as dist

# Of gloo's messages; NCCL and the store raise types of their own.
_SIGNS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Application timeout caused pair closure",
    "Broken pipe",
    "Timed out waiting",
    "Read error",
    "Write error",
)


class LostRankError(RuntimeError):
    """Another rank is gone, or hangs: this process can only exit, without any collective."""


def is_lost_rank(error: BaseException) -> bool:
    """Return whether an error says that another rank is gone or does not answer."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and "gloo" in text and any(s in text for s in _SIGNS)
