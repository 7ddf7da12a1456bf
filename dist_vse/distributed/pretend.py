"""A process group of which only this rank exists: to measure one rank's share of the work."""

import contextlib
from collections.abc import Iterator

import torch.distributed as dist


@contextlib.contextmanager
def pretended_group(world_size: int) -> Iterator[None]:
    """Be rank 0 of so many ranks in the block. Nothing may be trained in it.

    A gather returns this rank's rows in every rank's place, and a reduction nothing of use: the
    shapes and the work are right, the numbers are not, and the network takes no time.
    """
    from torch.testing._internal.distributed import fake_pg  # noqa: F401  # registers "fake"

    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("fake", store=store, rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()
