"""PyTorch's DistributedDataParallel, with gradient caching: 4 pairs at a time."""

import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dist_vse import GlobalContrastiveLoss, cached_step
from examples.pairs import RATE, Towers, rank_batches, save_weights


def main() -> None:
    """Train for a few steps; run it alone or under torchrun."""
    model: torch.nn.Module = Towers()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        model = DistributedDataParallel(model)
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    criterion = GlobalContrastiveLoss("info_nce")
    optimizer = torch.optim.SGD([*model.parameters(), *criterion.parameters()], lr=RATE)

    for batch in rank_batches(rank, world_size):
        loss = cached_step(model, criterion, batch, chunk_size=4)
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            print(f"loss {loss.item():.6f}, temperature {criterion.stats['temperature']:.4f}")

    save_weights(model, criterion)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
